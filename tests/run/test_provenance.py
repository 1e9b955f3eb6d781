"""The hash of the code covers the whole package."""

import hashlib
import shutil
from pathlib import Path

import pytest

import deitkit
from deitkit.run import provenance
from deitkit.run.provenance import code_sha256


@pytest.mark.parametrize(
    "name", ["errors.py", "training/cohort.py", "recipe/shipped/digits.yaml", "report/page.html.j2"]
)
def test_a_change_anywhere_in_the_package_changes_the_hash(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_package = code_sha256.__wrapped__()
    copy = tmp_path / "deitkit"
    shutil.copytree(Path(deitkit.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance.deitkit, "__file__", str(copy / "__init__.py"))
    hash_of = code_sha256.__wrapped__
    before = hash_of()
    assert before == of_package, "the copy is the package"
    (copy / name).write_bytes((copy / name).read_bytes() + b"\n")
    assert hash_of() != before
    assert len(bytes.fromhex(before)) == hashlib.sha256().digest_size
