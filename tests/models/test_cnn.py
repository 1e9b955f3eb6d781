"""The CIFAR ResNets against the paper and public weights, and the stems for small images."""

import io
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from deitkit.models.cnn import BasicBlock, CifarResNet
from deitkit.models.torchvision_models import build_small, small_names
from deitkit.models.weights.read import load_into, read_state

SHARED = Path(__file__).parents[2] / ".." / "shared"
CIFAR = SHARED / "data" / "cifar10" / "test-00000-of-00001.parquet"
WEIGHTS = SHARED / "weights" / "resnet20-12fca82f.th"


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# He et al. 2016, table 6, in millions.
@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85)])
def test_parameter_counts_are_the_papers(depth: int, millions: float) -> None:
    model = CifarResNet(depth, classes=10)
    assert parameters(model) / 1e6 == pytest.approx(millions, abs=0.0051)
    weighted = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(weighted) == depth


@pytest.mark.parametrize("image_px", [4, 8, 28, 32])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_resolution_and_channels(image_px: int, channels: int) -> None:
    logits = CifarResNet(20, classes=7, channels=channels)(torch.randn(2, channels, image_px, image_px))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()


def test_shortcut_subsamples_and_pads_channels_evenly() -> None:
    block = BasicBlock(4, 8, stride=2).eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 4, 6, 6)
    out = block(x)
    assert torch.equal(out[:, 2:6], F.interpolate(x, scale_factor=0.5, mode="nearest"))
    assert out[:, [0, 1, 6, 7]].abs().sum() == 0


def cifar_test_images(count: int) -> tuple[Tensor, Tensor]:
    import pyarrow.parquet as pq
    from PIL import Image

    table = pq.read_table(CIFAR).slice(0, count).to_pydict()
    to_tensor = torchvision.transforms.functional.pil_to_tensor
    images = torch.stack([to_tensor(Image.open(io.BytesIO(image["bytes"]))) for image in table["img"]]) / 255
    mean, std = torch.tensor([(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)]).view(2, 3, 1, 1)
    return (images - mean) / std, torch.tensor(table["label"])


@torch.no_grad()
def correct(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    model.eval()
    answers = torch.cat([model(part).argmax(dim=1) for part in images.split(250)])
    return int((answers == labels).sum())


@pytest.mark.skipif(
    not (CIFAR.exists() and WEIGHTS.exists()), reason="needs CIFAR-10 and the public weights in ../shared"
)
def test_public_resnet20_weights_load_and_score_as_published() -> None:
    model = CifarResNet(20, classes=10)
    assert load_into(model, read_state(WEIGHTS), head="linear", source=WEIGHTS.name) is False
    images, labels = cifar_test_images(1000)
    assert correct(model, images, labels) == 923  # and 9,173 of all 10,000, as published


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d", "regnet_x_400mf", "regnet_y_400mf"])
def test_small_cnns_differ_from_torchvisions_in_the_stem_alone(name: str) -> None:
    ours = build_small(name, classes=10, channels=3).model.state_dict()
    theirs = torchvision.models.get_model(name, weights=None, num_classes=10).state_dict()
    differing = {key for key in ours.keys() | theirs.keys() if ours[key].shape != theirs[key].shape}
    assert differing == (set() if "regnet" in name else {"conv1.weight"})  # 7x7 to 3x3


def test_small_stems_keep_the_resolution() -> None:
    shapes: dict[str, torch.Size] = {}
    for name, layer in (("resnet18", "layer1"), ("regnet_x_400mf", "stem")):
        model = build_small(name, classes=10, channels=1).model.eval()
        model.get_submodule(layer).register_forward_hook(lambda _, __, out, name=name: shapes.update({name: out.shape}))
        assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    assert {name: tuple(shape[2:]) for name, shape in shapes.items()} == {"resnet18": (8, 8), "regnet_x_400mf": (8, 8)}


def test_small_names_are_the_residual_families() -> None:
    assert {"resnet18", "resnet152", "regnet_x_400mf", "regnet_y_128gf", "wide_resnet50_2"} <= set(small_names())
    with torch.device("meta"):  # where RegNets cannot be built
        for name in set(small_names()) - {name for name in small_names() if "regnet" in name}:
            build_small(name, classes=2, channels=1)
