"""Numbers and names in sentences."""

import pytest

from deitkit.system.words import without_folders


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("folder:/home/me/my photos", "folder:my photos"),
        ("/home/me/x.safetensors", "x.safetensors"),
        ("~/photos", "photos"),
        (r"C:\\Users\\me\\photos", "photos"),
        ("csv:/a:b/c.csv", "csv:c.csv"),
        ("from /home/jane doe/my secret/teacher.pth", "from teacher.pth"),
        ("before: /home/me/ckpt as it was", "before: ckpt as it was"),
        ("none/class is better than hard/class", "none/class is better than hard/class"),
        ("see https://arxiv.org/abs/2012.12877", "see https://arxiv.org/abs/2012.12877"),
        ("timm/resnet18", "timm/resnet18"),
        ("1 / 2", "1 / 2"),
    ],
)
def test_folders_are_left_out(given: str, expected: str) -> None:
    assert without_folders({"a": [given, 3, None]}) == {"a": [expected, 3, None]}
