"""Downloads where there is no network: an answer within seconds, with the file to fetch and where to put it."""

import socket
from pathlib import Path

import pytest
import torch

from deitkit.data.dataset import load_dataset
from deitkit.errors import DataError, TeacherError
from deitkit.models.zoo import create_classifier
from deitkit.recipe.schema import DataRecipe
from deitkit.system.network import STALLED_SECONDS, no_endless_wait, unreachable


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No host can be reached."""

    def refuse(address: tuple[str, int], timeout: float) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setattr("urllib.request.getproxies", dict)


def test_a_host_that_answers_is_reachable_and_one_that_does_not_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert unreachable(f"http://127.0.0.1:{port}/file") is None
    assert (unreachable(f"http://127.0.0.1:{port}/file") or "").startswith("127.0.0.1 cannot be reached: ")


def test_behind_a_proxy_the_library_tries_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://proxy:3128"})
    assert unreachable("https://nowhere.invalid") is None


@pytest.mark.usefixtures("offline")
def test_hosts_that_need_no_proxy_are_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"no": "localhost"})
    assert unreachable("https://nowhere.invalid") == "nowhere.invalid cannot be reached: name or service not known"


def test_the_limit_on_waiting_is_taken_back() -> None:
    before = socket.getdefaulttimeout()
    with no_endless_wait():
        assert socket.getdefaulttimeout() == STALLED_SECONDS
    assert socket.getdefaulttimeout() == before


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("name", "file", "place"),
    [
        ("cifar10", "cifar-10-python.tar.gz", "{root}"),
        ("cifar100", "cifar-100-python.tar.gz", "{root}"),
        ("fashion_mnist", "t10k-labels-idx1-ubyte.gz", "{root}/FashionMNIST/raw"),
        ("flowers102", "102flowers.tgz", "{root}/flowers-102"),
    ],
)
def test_an_absent_data_set_names_its_file_and_place(name: str, file: str, place: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be reached") as caught:
        load_dataset(DataRecipe(name=name, root=tmp_path, image_px=8))
    told = str(caught.value)
    assert file in told
    assert f"into {place.format(root=tmp_path)} and run again" in told


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("timm/resnet18", "resnet18.a1_in1k/resolve/main/model.safetensors"),
        ("torchvision/resnet18", "resnet18-f37072fd.pth"),
    ],
)
def test_absent_pretrained_weights_name_their_file(
    name: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    with pytest.raises(TeacherError, match="are not on this machine") as caught:
        create_classifier(name, classes=10, channels=3, pretrained=True)
    assert file in str(caught.value)
    assert "set teacher.checkpoint to the file and teacher.image_px=224" in str(caught.value)
