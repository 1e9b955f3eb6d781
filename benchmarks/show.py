"""Print the figures that `benchmarks/gpu.sh speed` wrote into a folder: `python benchmarks/show.py FOLDER`."""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def line(name: str, result: dict[str, Any]) -> tuple[str, str]:
    """Return what one file says, in one line."""
    if "ratio" in result:
        peaks = ", ".join(f"{peak:.2f}" for peak in result["peak_memory_gib"])
        return name, (
            f"cohort/alone {result['ratio']:.3f}, with cached logits {result['ratio_cached']:.3f}; a teacher of "
            f"{result['teacher_per_student_step']:.2f} student steps; peak memory {peaks} GiB"
        )
    text = f"{result['images_per_second']:,.0f} images/s"
    if "share_of_limit" in result:
        text += f", {100 * result['share_of_limit']:.1f} % of {result['limit_gflop_per_second'] / 1000:,.1f} TFLOP/s"
    if "shares" in result:
        text += "; " + ", ".join(f"{part} {100 * share:.0f} %" for part, share in result["shares"].items())
    if "peak_memory_gib" in result:
        text += f"; {result['peak_memory_gib']:.2f} GiB"
    return name, text


def main(folder: Path) -> None:
    """Print every file of a folder."""
    table = Table("measurement", "figure", box=None)
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(result, list):
            for row in result:
                speed = row.get("problem") or f"{row['images_per_second']:,.0f} images/s"
                table.add_row(row["row"], f"{speed} (published on a V100: {row['published_images_per_second']:,.1f})")
        elif "rows" not in result:
            table.add_row(*line(path.stem, result))
    Console(width=150).print(table)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
