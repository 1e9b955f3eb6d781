"""Which code produced a figure: a hash of the package, which distinguishes two states of one version."""

import hashlib
from functools import cache
from pathlib import Path

import deitkit


@cache
def code_sha256() -> str:
    """Return the SHA-256 over the package's own source files and recipes and their names, 64 hexadecimal digits."""
    home = Path(deitkit.__file__).parent  # the whole package, not the folder of this file
    digest = hashlib.sha256()
    for path in sorted(path for pattern in ("*.py", "*.yaml", "*.j2") for path in home.rglob(pattern)):
        digest.update(path.relative_to(home).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
