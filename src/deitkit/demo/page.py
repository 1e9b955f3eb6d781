"""The page: Gradio's components around ``shown``. It sends nothing anywhere, and is reached from this machine only."""

import base64
import html
import io
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deitkit.demo.shown import Demo, ShownModel
from deitkit.errors import DataError, RecipeError, reason_of

INSTALL = "pip install 'deitkit[demo]'"
FIRST_PORT, PORTS = 7860, 100
LARGEST_FILE = "50mb"
TOP = 5  # classes of a column
AT_FIRST = 3  # models that are shown before any is chosen
CSS = """
footer { display: none !important }
summary { cursor: pointer }
.about { opacity: .75; font-size: .9rem }
#problem { color: #A83A00; font-weight: 600 }
.dark #problem { color: #FFB088 }
#image img { width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated }
#examples .grid-wrap { height: auto; min-height: 0; max-height: none; padding-top: 2rem }
#examples .grid-container { grid-template-columns: repeat(auto-fill, minmax(72px, 1fr)) !important }
#maps .maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(120px, 1fr)); gap: .75rem }
#maps figure { margin: 0 }
#maps img { width: 100%; border-radius: 4px; image-rendering: pixelated }
#maps figcaption { font-size: .85rem }
@media (max-width: 700px) { #left { display: contents } #examples { order: 9 } }
"""


def import_gradio(folder: Path) -> Any:
    """Return the module, told to report nothing and to keep uploaded images in a folder.

    Raises:
        RecipeError: It is not installed, or cannot be loaded.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(folder)  # by default images would stay in the machine's temporary folder
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio  # an extra
    except ImportError as error:  # or of a library that it needs, as for a SOCKS proxy
        if find_spec("gradio") is None:
            raise RecipeError(f"the page needs Gradio: {INSTALL}") from None
        raise RecipeError(f"Gradio cannot be loaded: {reason_of(error)}") from None
    return gradio


def build_page(demo: Demo, examples: Sequence[tuple[np.ndarray, str]], folder: Path) -> Any:
    """Return the page as Gradio's ``Blocks``.

    Args:
        demo: What it shows.
        examples: Images with their classes.
        folder: Temporary; example images are written here, for the browser to load.
    """
    gr = import_gradio(folder)
    paths = _write_examples(examples, folder)
    # One at a time, whoever asks: attention is recorded by hooks, which would see another forward pass too.
    in_turn = {"api_visibility": "private", "concurrency_id": "models", "concurrency_limit": 1}
    with gr.Blocks(title=demo.title, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.HTML(_heading(demo))
        with gr.Row():
            with gr.Column(scale=1, min_width=280, elem_id="left"):
                image = gr.Image(
                    label="Drop, paste, choose or photograph an image",
                    sources=["upload", "clipboard", "webcam"],
                    type="filepath",
                    height=300,
                    buttons=[],
                    elem_id="image",
                )
                image.preprocess = _path_of
                problem = gr.HTML(elem_id="problem", visible=False)
                if paths:
                    _add_examples(gr, paths, image)
            with gr.Column(scale=2, min_width=280):
                _add_answers(gr, demo, image, problem, in_turn)
                _add_attention(gr, demo, image, in_turn)
    return page


def _add_examples(gr: Any, paths: Sequence[tuple[Path, str]], image: Any) -> None:
    """Add test images, of which a click chooses one."""
    gallery = gr.Gallery(
        [(str(path), name) for path, name in paths],
        label="Test images: choose one",
        height="auto",
        object_fit="contain",
        allow_preview=False,
        interactive=False,
        buttons=[],
        elem_id="examples",
    )

    def choose(event: gr.SelectData) -> str:
        return str(paths[event.index][0])

    gallery.select(choose, None, image, api_visibility="private")


def _add_answers(gr: Any, demo: Demo, image: Any, problem: Any, in_turn: Mapping[str, Any]) -> None:
    """Add the choice of models and a column for each of them, with its answer to the image."""
    models = {model.name: model for model in demo.models}
    chosen = gr.CheckboxGroup(list(models), value=list(models)[:AT_FIRST], label="Models", visible=len(models) > 1)
    columns, labels = [], []
    with gr.Row():
        for place, model in enumerate(demo.models):
            with gr.Column(min_width=190, visible=place < AT_FIRST) as column:
                labels.append(gr.Label(label=model.name, num_top_classes=TOP, buttons=[]))
                gr.HTML(f'<p class="about">{html.escape(model.about)}</p>')
            columns.append(column)

    def answer(path: str | None, names: list[str]) -> list[Any]:
        answers, text = _answers(demo, [models[name] for name in names], path)
        shown = [gr.update(visible=name in names) for name in models]
        return [gr.HTML(html.escape(text), visible=bool(text)), *shown, *(answers.get(name) for name in models)]

    gr.on([image.change, chosen.change], answer, [image, chosen], [problem, *columns, *labels], **in_turn)


def _add_attention(gr: Any, demo: Demo, image: Any, in_turn: Mapping[str, Any]) -> None:
    """Add the attention of a chosen student to the image, if any has one."""
    models = {model.name: model for model in demo.models if model.has_attention}
    if not models:
        return
    names = list(models)
    student = gr.Dropdown(names, value=names[0], label="Attention of", filterable=False, visible=len(names) > 1)
    maps = gr.HTML(elem_id="maps")

    def draw(path: str | None, name: str) -> str:
        return _maps(models[name], path)

    gr.on([image.change, student.change], draw, [image, student], maps, **in_turn)


def serve(
    demo: Demo,
    examples: Sequence[tuple[np.ndarray, str]],
    folder: Path,
    *,
    port: int | None = None,
    share: bool = False,
    ready: Callable[[str, str | None], None],
    wait: Callable[[], None],
) -> None:
    """Serve the page until ``wait`` returns or is interrupted.

    Args:
        demo: What it shows.
        examples: Images with their classes.
        folder: Temporary; for the examples and what is uploaded.
        port: Of 127.0.0.1; by default the first free one from 7860.
        share: Ask Gradio for a public address, through its servers.
        ready: Called with the address, and with the public one if there is one.
        wait: Blocks as long as the page is to be served.

    Raises:
        RecipeError: Gradio is not installed, or the port is taken.
    """
    gr = import_gradio(folder)
    page = build_page(demo, examples, folder)
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    for name in ("NO_PROXY", "no_proxy"):  # the page asks itself at its start whether it answers
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), "127.0.0.1", "localhost")))
    try:
        _, address, public = page.launch(
            server_name="127.0.0.1",
            server_port=port,
            share=share,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            max_file_size=LARGEST_FILE,
            ssr_mode=False,
            theme=theme,
            css=CSS,
        )
    except OSError:
        wanted = f"--port {port} is taken" if port else f"no port from {FIRST_PORT} to {FIRST_PORT + PORTS} is free"
        raise RecipeError(f"{wanted}: end what uses it, or name another port") from None
    try:
        ready(address, public)
        wait()
    finally:
        page.close(verbose=False)


def _answers(demo: Demo, models: Sequence[ShownModel], path: str | None) -> tuple[dict[str, dict[str, float]], str]:
    """Return the answer of each model, and what is wrong with the image, if anything."""
    if path is None:
        return {}, ""
    try:
        return {model.name: model.answer(Path(path), demo.precision) for model in models}, ""
    except DataError as error:
        return {}, str(error)


def _heading(demo: Demo) -> str:
    heading = f"<h1>{html.escape(demo.title)}</h1>"
    if not demo.summary:
        return heading
    return f"{heading}<details><summary>What the comparison says</summary><p>{html.escape(demo.summary)}</p></details>"


def _maps(model: ShownModel, path: str | None) -> str:
    """Return pictures of a student's attention, as HTML; nothing without an image that can be decoded."""
    try:
        pictures = [] if path is None else list(model.attention(Path(path)))
    except DataError:  # which the answer shows
        return ""
    figures = [
        f'<figure><img alt="{title}" src="data:image/png;base64,{_base64(picture)}">'
        f"<figcaption>{title}</figcaption></figure>"
        for picture, title in pictures
    ]
    return f'<div class="maps">{"".join(figures)}</div>'


def _base64(picture: Image.Image) -> str:
    content = io.BytesIO()
    picture.save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()


def _path_of(payload: Any) -> str | None:
    """Return the uploaded file, in place of Gradio's own decoding, which opens every format that Pillow knows."""
    return None if payload is None or payload.path is None else str(payload.path)


def _write_examples(examples: Sequence[tuple[np.ndarray, str]], folder: Path) -> list[tuple[Path, str]]:
    paths = []
    for place, (pixels, name) in enumerate(examples):
        path = folder / f"{place}.png"
        Image.fromarray(pixels).save(path)
        paths.append((path, name))
    return paths
