"""Numbers in sentences."""

import pytest

from deitkit.system.words import counted


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [(0, "image", "0 images"), (1, "image", "1 image"), (4500, "training image", "4,500 training images"),
     (1, "class", "1 class"), (2, "class", "2 classes")],
)  # fmt: skip
def test_a_number_and_its_noun(count: int, noun: str, text: str) -> None:
    assert counted(count, noun) == text
