"""Which code produced a figure, and when: what every file of results begins with."""

import hashlib
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

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


def envelope(file_format: int) -> dict[str, Any]:
    """Return the first fields of a file of results: its format, version and code of the writer, and the time."""
    return {
        "format": file_format,
        "deitkit": deitkit.__version__,
        "code": code_sha256(),
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
