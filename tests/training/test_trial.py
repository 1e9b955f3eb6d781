"""Models of other libraries are tried before anything trains: what they cannot process is one sentence."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from conftest import CPU_FP32, striped_dataset
from deitkit.data.dataset import Dataset, Split
from deitkit.models.accelerate import accelerate
from deitkit.models.classifier import Classifier
from deitkit.models.zoo import create_classifier
from deitkit.recipe.speed import SpeedRecipe
from deitkit.training.trial import failure_of

CLASSES = 3


class Returns(nn.Module):
    """A model with BatchNorm and dropout that returns whatever it is given to make."""

    def __init__(self, make: object) -> None:
        super().__init__()
        self.norm, self.dropout, self.head = nn.BatchNorm2d(3), nn.Dropout(), nn.LazyLinear(CLASSES)
        self.head(torch.zeros(1, 192))
        self.make = make

    def forward(self, images: torch.Tensor) -> object:
        logits = self.head(self.dropout(self.norm(images)).flatten(1))
        return self.make(logits) if self.make is not None else logits


def classifier(make: object = None) -> Classifier:
    return Classifier(Returns(make), mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return striped_dataset()


def test_a_model_that_works_is_left_as_it_was(data: Dataset) -> None:
    model = classifier().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert failure_of(model, data, 8, CPU_FP32, trained=True) is None
    assert torch.equal(torch.rand(3), expected), "random numbers were drawn"
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda logits: (logits, logits), "cannot process 8 images of 8 x 8 px: "),
        (lambda logits: logits[:4], "it returns an output of shape (4, 3) instead of one row per image"),
        (lambda logits: logits[:, :2], "it returns 2 logits for 3 classes"),
        (lambda logits: logits.detach(), "element 0 of tensors does not require grad"),
    ],
)
def test_what_a_model_returns_is_checked(data: Dataset, make: object, said: str) -> None:
    assert said in str(failure_of(classifier(make), data, 8, CPU_FP32, trained=True))


def test_running_out_of_memory_keeps_its_own_message(data: Dataset) -> None:
    def fail(logits: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory: you tried to allocate too much")

    with pytest.raises(RuntimeError, match="out of memory"):
        failure_of(classifier(fail), data, 8, CPU_FP32, trained=True)


@pytest.mark.parametrize(
    ("name", "px", "batch_size", "works"),
    [
        ("cifar/resnet20", 8, 4, True),
        ("small/resnet18", 8, 4, True),
        ("timm/resnet10t", 32, 4, True),
        ("timm/mobilenetv3_small_050", 32, 4, True),
        ("timm/regnetx_002", 8, 1, False),
        ("timm/vgg11", 16, 4, False),
        ("torchvision/shufflenet_v2_x0_5", 32, 4, True),
        ("torchvision/squeezenet1_1", 32, 4, True),
        ("torchvision/alexnet", 32, 4, False),
        ("torchvision/mnasnet0_5", 32, 1, False),
        ("torchvision/inception_v3", 32, 4, False),
    ],
)
def test_a_sample_of_the_zoos_works_or_is_refused(name: str, px: int, batch_size: int, works: bool) -> None:
    data = striped_dataset()
    images = torch.nn.functional.interpolate(data.train.images[:8].float(), size=(px, px)).to(torch.uint8)
    data = replace(data, train=Split(images, data.train.labels[:8]))
    built = create_classifier(name, classes=CLASSES, channels=3)
    failure = failure_of(
        Classifier(built.model, mean=(0.5,) * 3, std=(0.5,) * 3), data, batch_size, CPU_FP32, trained=True
    )
    assert (failure is None) == works, failure
    if failure is not None:
        assert failure.startswith(f"cannot process {batch_size} image")
        assert "\n" not in failure


class Views(nn.Module):
    """Flattens feature maps by ``view``, which torch's channels_last layout does not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 64, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.body(images)
        logits: torch.Tensor = self.head(features.view(features.size(0), -1))
        return logits


def test_a_net_that_cannot_take_our_layout_is_told_what_to_set(data: Dataset) -> None:
    net = Classifier(Views(), mean=(0.0,) * 3, std=(1.0,) * 3)
    speed = SpeedRecipe()
    said = failure_of(accelerate(net, speed, torch.device("cpu")), data, 4, CPU_FP32, trained=True)
    assert said is not None
    assert "reshape (or speed.channels_last=false)" in said
    plain = Classifier(Views(), mean=(0.0,) * 3, std=(1.0,) * 3)
    accelerate(plain, speed.model_copy(update={"channels_last": False}), torch.device("cpu"))
    assert failure_of(plain, data, 4, CPU_FP32, trained=True) is None


def test_a_net_that_cannot_be_copied_is_one_sentence(data: Dataset) -> None:
    net = classifier()
    net.kept = torch.ones(1, requires_grad=True) * 2  # torch copies only leaves
    said = failure_of(net, data, 4, CPU_FP32, trained=True)
    assert "deepcopy" in str(said)
