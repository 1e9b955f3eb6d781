"""Writing a matplotlib figure to a file."""

import io
import logging
import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deitkit.system.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIRST_CJK = "\u1100"  # Hangul; what follows is not in matplotlib's font
# What systems bring for Chinese, Japanese and Korean.
CJK_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei",
    "PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo", "Arial Unicode MS", "Microsoft YaHei", "Yu Gothic",
    "Malgun Gothic", "SimHei",
)  # fmt: skip


def save_figure(path: Path, figure: "Figure", **options: Any) -> None:
    """Write a figure in the format of its suffix; a character that no font has becomes a box, without a warning.

    Raises:
        CheckpointError: As ``write_bytes``.
    """
    from matplotlib.text import Text

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # a font without a bold face is no matter
    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore",
            "Glyph .* missing from|Matplotlib currently does not support .* natively|constrained_layout not applied",
        )
        if len(_fonts()) > 1:
            figure.draw_without_rendering()  # which makes the labels of ticks
            for text in figure.findobj(Text):
                if max(text.get_text(), default="") >= FIRST_CJK:
                    text.set_fontfamily(_fonts())
        figure.savefig(picture, format=path.suffix.removeprefix("."), **options)
    write_bytes(path, picture.getvalue())


@cache
def _fonts() -> list[str]:
    """Return matplotlib's font, then those on this machine that have what it lacks: Chinese, Japanese and Korean."""
    from matplotlib import font_manager

    present = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in CJK_FONTS if name in present)]
