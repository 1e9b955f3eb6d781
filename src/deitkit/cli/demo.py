"""The command ``demo``."""

import signal
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Annotated

import typer

from deitkit.cli.console import errors, say
from deitkit.cli.options import Root


def demo(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL_OR_RUN", help="A run folder, a folder with model.safetensors, or an ONNX file."),
    ],
    port: Annotated[
        int | None, typer.Option("--port", min=1, max=65535, help="By default the first free one from 7860.")
    ] = None,
    examples: Annotated[int, typer.Option("--examples", min=0, max=60, help="How many test images to offer.")] = 12,
    data: Annotated[
        str | None, typer.Option("--data", help="Data set of the examples; by default that of the training.")
    ] = None,
    root: Root = None,
    share: Annotated[
        bool, typer.Option("--share", help="Also ask Gradio for a public address: whoever has it can use the page.")
    ] = False,
) -> None:
    """Try models on images of your own, on a page in your browser.

    For example `deitkit demo runs/mine`. Drop, paste or photograph an image, and see the predictions of the winner, the
    teacher and the other students, and the attention of a student's tokens. The page is served on 127.0.0.1, to
    this machine only, and sends nothing anywhere. Needs `pip install 'deitkit[demo]'`.
    """
    from deitkit.data.decode import strict_pillow
    from deitkit.demo.page import import_gradio, serve
    from deitkit.demo.shown import load_demo

    def ready(address: str, public: str | None) -> None:
        say(f"open {address} in your browser; Ctrl-C ends it")
        if share:
            say(f"public, for a week at most: {public}" if public else "no public address: Gradio's servers gave none")

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it, too, removes what was uploaded
    with TemporaryDirectory(prefix="deitkit-demo-") as folder, strict_pillow():
        import_gradio(Path(folder))
        loaded = load_demo(model, data, root)
        offered = loaded.examples(examples, lambda text: say(text, errors))
        try:
            serve(loaded, offered, Path(folder), port=port, share=share, ready=ready, wait=_forever)
        except KeyboardInterrupt:
            say("stopped", errors)


def _forever() -> None:
    Event().wait()
