"""The command ``publish``."""

from pathlib import Path
from typing import Annotated

import typer

from deitkit.cli.console import errors, print_json, say
from deitkit.cli.options import Json, ModelArgument, Root


def publish(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", help="A new folder.")],
    licence: Annotated[str | None, typer.Option("--licence", help="As the Hub names it, such as apache-2.0.")] = None,
    onnx: Annotated[bool, typer.Option("--onnx/--no-onnx", help="Add ONNX files, which needs deitkit[export].")] = True,
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
    from deitkit.export.publish import PublishOptions
    from deitkit.export.publish import publish as write
    from deitkit.export.publish import push as upload

    exported = ExportOptions(int8=True, data=data, root=root, public=True) if onnx else None
    card = write(model, out, PublishOptions(push, licence, exported), lambda text: say(text, errors))
    address = upload(out, push, private=private) if push is not None else None
    files = sorted(path.name for path in out.iterdir())
    if as_json:
        print_json({"folder": str(out), "card": str(card), "files": files, "address": address})
        return
    say(f"wrote {out}: {', '.join(files)}")
    say(f"uploaded to {address}" if address is not None else f"read {card} before you publish it")
