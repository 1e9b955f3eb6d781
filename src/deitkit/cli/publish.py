"""The command ``publish``."""

from pathlib import Path
from typing import Annotated

import typer

from deitkit.cli.console import errors, print_json, say
from deitkit.cli.options import Json, ModelArgument, Readout, Root
from deitkit.errors import RecipeError


def publish(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", help="A new folder.")],
    licence: Annotated[str | None, typer.Option("--licence", help="As the Hub names it, such as apache-2.0.")] = None,
    readout: Readout = None,
    onnx: Annotated[bool, typer.Option("--onnx/--no-onnx", help="Add ONNX files, which needs deitkit[export].")] = True,
    int8: Annotated[
        bool | None,
        typer.Option(
            "--int8/--no-int8",
            help="Add one in 8-bit integers, unless it loses more than a point of accuracy; by default with --onnx.",
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="Data set to check them on; by default that of the training.")
    ] = None,
    root: Root = None,
    push: Annotated[
        str | None, typer.Option("--push", metavar="USER/NAME", help="Upload the folder to the Hugging Face Hub.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Upload where only you can see it.")] = False,
    as_json: Json = False,
) -> None:
    """Write a student's folder for the Hugging Face Hub: weights, ONNX files, and a model card with the run's table.

    For example `deitkit publish runs/mine --out flowers-vit --licence apache-2.0`. timm, transformers, deitkit and ONNX
    Runtime open it by its path. Folders of this machine are left out of the card.
    """
    from deitkit.export.export import ExportOptions
    from deitkit.export.hub import check_licence, full_name
    from deitkit.export.hub import push as upload
    from deitkit.export.publish import PublishOptions
    from deitkit.export.publish import publish as write

    if private and push is None:
        raise RecipeError("--private is for an upload: add --push USER/NAME, or leave it out")
    for option, given in (("--data", data), ("--root", root), ("--int8", int8)):
        if given and not onnx:
            raise RecipeError(f"{option} is for the ONNX files, and --no-onnx writes none: leave out one of them")
    check_licence(licence)
    name = None if push is None else full_name(push)
    exported = ExportOptions(int8=int8 is not False, data=data, root=root, public=True) if onnx else None
    card = write(model, out, PublishOptions(name, licence, exported, readout), lambda text: say(text, errors))
    address = None if name is None else upload(out, name, private=private)
    files = sorted(path.name for path in out.iterdir())
    if as_json:
        print_json({"folder": str(out), "card": str(card), "files": files, "address": address})
        return
    say(f"wrote {out}: {', '.join(files)}")
    say(f"uploaded to {address}" if address is not None else f"read {card} before you publish it")
