"""The commands ``recipes`` and ``methods``: what a comparison can name."""

import re
import sys
from typing import Annotated

import typer
from rich.table import Table

from deitkit.cli.console import console, plain, say
from deitkit.errors import RecipeError
from deitkit.recipe.load import describe_fields, load_recipe, shipped_recipes


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[RECIPE]", help="Print this recipe; with --fields, the fields with this word."),
    ] = None,
    fields: Annotated[bool, typer.Option("--fields", help="List every field with its default and meaning.")] = False,
) -> None:
    """List the shipped recipes, print one, or explain every field.

    For example `deitkit recipes --fields augment`, or `--fields mixup`.
    """
    shipped = shipped_recipes()
    if fields:
        described = list(describe_fields()) if name is None else _fields_about(name)
        table = Table(box=None)
        table.add_column("field", no_wrap=True)
        table.add_column("default")
        table.add_column("meaning")
        for field in described:
            table.add_row(*map(plain, field))
        console.print(table)
    elif name is not None:
        if name not in shipped:
            load_recipe(name)
            raise RecipeError(f"'{name}' is not a shipped recipe; shipped are {', '.join(shipped)}")
        sys.stdout.write(shipped[name])
    else:
        table = Table("recipe", "what it does", "cost", box=None)
        for shipped_name, text in shipped.items():
            first, *head = text.splitlines()
            cost = next(line.removeprefix("# Cost: ") for line in head if line.startswith("# Cost: "))
            table.add_row(shipped_name, plain(first.removeprefix("# ")), plain(_short(cost)))
        console.print(table)
        say("deitkit recipes NAME prints a recipe, whose head has its command, cost and result")


def _fields_about(word: str) -> list[tuple[str, str, str]]:
    """Return the fields of a section, else those with a word in their names, else in what they mean."""
    fields = list(describe_fields())
    for found in (
        [field for field in fields if field[0] == word or field[0].startswith(f"{word}.")],
        [field for field in fields if word.lower() in field[0]],
        [field for field in fields if word.lower() in field[2].lower()],
    ):
        if found:
            return found
    sections = dict.fromkeys(key.partition(".")[0] for key, _, _ in fields if "." in key)
    raise RecipeError(f"no field of a recipe is about '{word}': name a section ({', '.join(sections)}) or a field")


def _short(cost: str) -> str:
    """Return the first clause of what a recipe costs."""
    return re.split(r"[,;.:]( |$)| \(", cost.replace("not measured yet: it needs", "needs"))[0]


def methods() -> None:
    """List the methods that a comparison can name."""
    from deitkit.distillation.methods import METHODS

    table = Table("method", "tokens", "labels", "teacher", "what it is", box=None)
    for method in METHODS.values():
        labels = "yes" if method.uses_labels else "no"
        table.add_row(method.name, method.token_layout, labels, method.teacher_signal or "-", method.summary)
    console.print(table)
    say("images without labels (data.unlabelled) join the teacher's term; a method without a teacher does not see them")
