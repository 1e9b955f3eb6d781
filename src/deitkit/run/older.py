"""Files of version 0.1: what they did not store is added while they are read, nowhere else."""

from typing import Any


def completed(stored: dict[str, Any]) -> dict[str, Any]:
    """Add to the content of an older file what version 0.1 did not store; it knew rows by the name of their method."""
    rows = stored.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return stored
    kinds = {"cnn-baseline": "baseline", "before": "checkpoint"}
    last = [row.get("method") for row in rows if row.get("weights") == "last"]
    reference = next((name for name in ("none", "mean-pool-none", "class-only") if name in last), None)
    rows = [
        {
            "kind": kinds.get(str(row.get("method")), "student"),
            "reference": row.get("weights") == "last" and row.get("method") == reference,
        }
        | _with_differences(row)
        for row in rows
    ]
    published = [
        entry | {"table": "reproduction"} if isinstance(entry, dict) and entry.get("table") == "seed" else entry
        for entry in stored.get("published") or []
    ]
    stored = stored | {"rows": rows, "notes": stored.get("notes") or [], "published": published}
    if not stored.get("teachers") and stored.get("teacher"):
        stored["teachers"] = [stored["teacher"]]
    return stored


def _with_differences(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with its differences in one field, which were five fields for each reference."""
    differences = {}
    for reference, name in (("labels", "none"), *((name, name) for name in ("before", "base", "teacher", "baseline"))):
        regular = (f"difference_vs_{name}_ci95", f"p_vs_{name}", f"p_vs_{name}_test", f"p_vs_{name}_holm")
        fields = ("difference_ci95", "p_vs_none", "p_test", "p_vs_none_holm") if name == "none" else regular
        if row.get(f"difference_vs_{name}") is not None:
            ci95, p, test, p_holm = (row.get(field) for field in fields)
            mean = row[f"difference_vs_{name}"]
            differences[reference] = {"mean": mean, "ci95": ci95, "p": p, "test": test, "p_holm": p_holm}
    return {"differences": differences} | row
