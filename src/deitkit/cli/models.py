"""The command ``models``: the catalogue, with counted parameters and operations and published accuracies."""

from typing import Any

from rich.table import Table

from deitkit.cli.console import console, print_json, say
from deitkit.cli.options import Json


def models(as_json: Json = False) -> None:
    """List the models of the paper's tables: size, operations, published accuracy, and their names in a recipe."""
    rows = catalogue_rows()
    if as_json:
        print_json(rows)
        return
    numbers = {name: str(number) for number, name in enumerate(sources(), start=1)}
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
        *(f"  {numbers[name]} {work}" for name, work in sources().items()),
        "In a recipe: model.name, with model.patch_px and data.image_px; or teacher.name.",
    ):
        say(line)


def catalogue_rows() -> list[dict[str, Any]]:
    """Return every model of the catalogue as plain values, with counted parameters and operations.

    A multiply-add counts as one, of matrix products, convolutions and attention, for one image. Students' last block
    leaves the patches out (see ``DeiT``), so they have fewer than is usually stated.
    """
    import torch

    from deitkit.bench.measure import count_flops
    from deitkit.models.catalogue import CATALOGUE, SOURCES

    rows = []
    for model in CATALOGUE:
        with torch.device("meta"):
            built = model.build().eval()
        flops = count_flops(built, (3, model.image_px, model.image_px), backward=False)
        rows.append(
            {
                "model": model.row,
                "image_px": model.image_px,
                "parameters": sum(parameter.numel() for parameter in built.parameters()),
                "published_parameters": model.millions and f"{model.millions} M",
                "multiply_adds": flops // 2,
                "published_top1": model.top1,
                "published_images_per_second": model.images_per_second,
                "sources": {name: SOURCES[name] for name in model.sources},
                "recipe": model.recipe_fields(),
                "teacher": model.teacher,
            }
        )
    return rows


def sources() -> dict[str, str]:
    """Return the full reference for the short name of each source."""
    from deitkit.models.catalogue import SOURCES

    return SOURCES
