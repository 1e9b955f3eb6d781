"""How many images are predicted at once."""

import pytest
import torch

from deitkit.data.split import Split
from deitkit.evaluation.predict import CPU_PIXELS, GPU_PIXELS, _batch_size
from deitkit.models.classifier import Classifier
from deitkit.models.cnn import CifarResNet


@pytest.mark.parametrize(("device", "pixels"), [("cpu", CPU_PIXELS), ("cuda", GPU_PIXELS)])
def test_a_batch_is_as_large_as_the_resolution_that_a_model_enlarges_it_to_allows(device: str, pixels: int) -> None:
    split = Split(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    small, large = (
        Classifier(CifarResNet(20, classes=3), mean=(0.5,) * 3, std=(0.5,) * 3, image_px=px) for px in (None, 224)
    )
    sizes = [_batch_size(split, models, torch.device(device)) for models in ([small], [small, large], [])]
    assert sizes == [pixels // 32**2, pixels // 224**2, pixels // 32**2]
