"""Reading ``results.json``, and the fields that it must have."""

from pathlib import Path
from typing import Any

from deitkit.errors import CheckpointError
from deitkit.run.metrics import _parse

_FORMAT = 1
_REQUIRED = ("created", "recipe", "dataset", "seeds", "rows")
_REQUIRED_OF_ROW = (
    "row",
    "label",
    "method",
    "readout",
    "weights",
    "labels",
    "teacher",
    "top1",
    "n",
    "top1_mean",
    "status",
)
_REQUIRED_OF_VARIANT = (
    "variant",
    "changed",
    "teacher_name",
    "teacher_test_top1",
    "difference_vs_base",
    "difference_vs_base_ci95",
    "p_vs_base",
    "p_vs_base_test",
)


def read_results(folder: Path) -> dict[str, Any]:
    """Return ``results.json`` of a run folder; numbers that are not finite become None.

    Raises:
        CheckpointError: The file is missing, is not JSON, has another format than 1, or lacks a required field.
    """
    path = folder / "results.json"
    try:
        results = _parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"no results in '{folder}': {path.name} cannot be read; finish the comparison first"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"'{path}' is not valid JSON: run the comparison again with --resume") from error
    if not isinstance(results, dict) or results.get("format") != _FORMAT:
        found = results.get("format") if isinstance(results, dict) else None
        raise CheckpointError(
            f"'{path}' has format {found!r}, this version reads format {_FORMAT}: use the deitkit that wrote it"
        )
    lacking = [name for name in _REQUIRED if name not in results]
    required = _REQUIRED_OF_ROW + (_REQUIRED_OF_VARIANT if "variants" in results else ())
    for row in results.get("rows") or []:
        lacking += [f"rows.{name}" for name in required if name not in row]
    if lacking or not results["rows"]:
        what = ", ".join(dict.fromkeys(lacking)) or "rows"
        raise CheckpointError(f"'{path}' lacks {what}: run the comparison again with --resume")
    return results
