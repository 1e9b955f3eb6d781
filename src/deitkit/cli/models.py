"""The command ``models``: the catalogue, with counted parameters and operations and published accuracies."""

from rich.table import Table

from deitkit.cli.console import console, print_json, say
from deitkit.cli.options import Json


def models(as_json: Json = False) -> None:
    """List the models of the paper's tables: size, operations, published accuracy, and their names in a recipe."""
    from deitkit.bench.inference_speed import catalogue_rows
    from deitkit.models.catalogue import SOURCES

    rows = catalogue_rows()
    if as_json:
        print_json(rows)
        return
    numbers = {name: str(number) for number, name in enumerate(SOURCES, start=1)}
    table = Table(box=None, padding=(0, 1, 0, 0))  # fits 80 columns
    table.add_column("model", no_wrap=True)
    for heading in ("px", "million", "GMAC", "top-1 %", "from"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("in a recipe", no_wrap=True)
    for row in rows:
        table.add_row(
            row["model"],
            str(row["image_px"]),
            f"{row['parameters'] / 1e6:.1f}",
            f"{row['multiply_adds'] / 1e9:.2f}",
            "-" if row["published_top1"] is None else f"{row['published_top1']:.1f}",
            ",".join(numbers[name] for name in row["sources"]),
            row["recipe"].get("model.name") or row["recipe"]["teacher.name"],
        )
    console.print(table)
    for line in (
        "Millions of parameters and billions of multiply-adds are counted; accuracies (ImageNet) are published:",
        *(f"  {numbers[name]} {work}" for name, work in SOURCES.items()),
        "In a recipe: model.name, with model.patch_px and data.image_px; or teacher.name.",
    ):
        say(line)
