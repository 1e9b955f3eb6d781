"""What is said before anything trains."""

import pytest

from conftest import striped_dataset
from deitkit.comparison.describe import describe_students
from deitkit.recipe.load import load_recipe


@pytest.mark.parametrize(
    ("image_px", "patch_px", "words"),
    [
        (224, 8, "784 patches of 8 px for each image make training slow: model.patch_px=14 makes 256"),
        (224, 16, ""),
        (384, 16, ""),  # as in the paper
    ],
)
def test_many_patches_are_told(image_px: int, patch_px: int, words: str) -> None:
    dataset = striped_dataset(per_class=4, image_px=image_px)
    lines = list(describe_students(load_recipe("own-images", [f"model.patch_px={patch_px}"]), dataset, {}))
    assert (words in lines) if words else not any("for each image make training slow" in line for line in lines)
