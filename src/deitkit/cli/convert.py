"""The command ``convert``."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deitkit.cli.console import print_json, say
from deitkit.cli.options import Json
from deitkit.errors import RecipeError, is_out_of_memory

if TYPE_CHECKING:
    from deitkit.models.weights.export_layouts import Layout


def convert(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="A model or run folder (its winner), or a .safetensors or .pth file."),
    ],
    to: Annotated[str, typer.Option("--to", help="ours, timm, transformers or released.")],
    out: Annotated[Path, typer.Option("--out", help="A new folder; for --to released a new .pth file.")],
    image_px: Annotated[int | None, typer.Option("--image-px", min=1, help="Change the resolution.")] = None,
    patch_px: Annotated[int | None, typer.Option("--patch-px", min=1, help="Change the patch size.")] = None,
    channels: Annotated[int | None, typer.Option("--channels", min=1, help="1 for grey, 3 for colour.")] = None,
    classes: Annotated[
        int | None, typer.Option("--classes", min=1, help="A new classifier of this many classes.")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option("--tokens", help="class, distillation, class+distillation or none (mean pooling).")
    ] = None,
    heads: Annotated[int | None, typer.Option("--heads", min=1, help="Attention heads, if not in the source.")] = None,
    mean: Annotated[str | None, typer.Option("--mean", help="Mean, as 0.5,0.5,0.5, if not in the source.")] = None,
    std: Annotated[str | None, typer.Option("--std", help="Standard deviation, like --mean.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Open the result with its library and compare logits.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Convert a student to or from timm, transformers or the released files; optionally change its shape.

    For example `deitkit convert runs/digits --to timm --out digits-timm --check`, or
    `deitkit convert deit_tiny_distilled_patch16_224-b40b3cf7.pth --to ours --out deit-tiny --image-px 384`.
    """
    from deitkit.models.weights.export import Changes, prepare_export
    from deitkit.models.weights.export_layouts import largest_difference, removed_on_failure, require_same_logits

    layout = _layout(to, out)
    if check:
        layout.require_package()
    wanted = Changes(image_px, patch_px, channels, classes, tokens)
    with _own_advice_on_memory():
        exported = prepare_export(
            source, wanted, heads=heads, mean=_numbers("--mean", mean), std=_numbers("--std", std)
        )
        with removed_on_failure(out):
            opening = layout.write(exported, out)
            difference = largest_difference(exported, layout, out) if check else None
            require_same_logits(difference, source, out)
    if as_json:
        result = {
            "source": str(source), "to": to, "out": str(out), "architecture": asdict(exported.architecture),
            "changes": list(exported.lines), "open": opening, "largest_difference": difference,
        }  # fmt: skip
        print_json(result)
        return
    checked = [_checked(difference, exported.assumes_heads)] if check else []
    how = ("open it with", *(f"  {line}" for line in opening))
    for line in (*exported.lines, f"wrote {out}: {layout.holds}", *checked, *how):
        say(line)


@contextmanager
def _own_advice_on_memory() -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise RecipeError(
            "out of memory: choose a smaller --image-px, a larger --patch-px or fewer --classes"
        ) from None


def _checked(difference: float | None, assumes_heads: bool) -> str:
    if difference is None:
        return "not checked: the classifier is new and its logits are all zero, so there is nothing to compare"
    line = f"checked: on 8 random images the logits differ by {difference:.1e} at most"
    return f"{line}; the assumed number of heads is on both sides, and so not checked" if assumes_heads else line


def _layout(to: str, out: Path) -> "Layout":
    from deitkit.models.weights.export_layouts import LAYOUTS

    if to not in LAYOUTS:
        raise RecipeError(f"--to {to}: choose {', '.join(LAYOUTS)}")
    layout = LAYOUTS[to]
    if layout.suffix and out.suffix != layout.suffix:
        raise RecipeError(f"--out {out}: --to {to} writes a file, so give a name that ends in {layout.suffix}")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise RecipeError(f"--out {out} already exists: name a new {'file' if layout.suffix else 'folder'}")
    return layout


def _numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise RecipeError(f"{option} {text}: give numbers with commas between them, as 0.5,0.5,0.5") from None
