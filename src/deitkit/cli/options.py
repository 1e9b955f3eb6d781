"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from deitkit.recipe.load import SHIPPED

RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A shipped recipe (see `deitkit recipes`) or a YAML file.",
        autocompletion=lambda: list(SHIPPED),
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Fields to change, such as `train.epochs=40`.")
]
Out = Annotated[Path | None, typer.Option("--out", help="The run folder; by default a new one under runs/.")]
Seeds = Annotated[int | None, typer.Option("--seeds", min=1, help="Train this many seeds, from 0.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --out (or the newest of this recipe).")]
On = Annotated[
    str | None, typer.Option("--on", help="Run units side by side: local, local:4, ray or ray:ADDRESS (a cluster).")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for another program to read.")]
ModelArgument = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A model folder, a run folder (its winner), or an .onnx file.")
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder with results.json.")]
Root = Annotated[Path | None, typer.Option("--root", help="The folder of the named data sets.")]
Readout = Annotated[str | None, typer.Option("--readout", help="class, distillation, joint or joint-logits.")]
