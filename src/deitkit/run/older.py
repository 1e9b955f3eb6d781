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
        | row
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
