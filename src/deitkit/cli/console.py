"""The consoles, and the helpers through which every command prints."""

import json
import sys
from typing import Any

from rich.console import Console, RenderableType
from rich.markup import escape

from deitkit.errors import one_line

console = Console()
errors = Console(stderr=True)


def say(text: str, to: Console = console, *, style: str | None = None) -> None:
    """Print one line that may contain paths: unwrapped, without markup, control characters escaped."""
    to.print(one_line(text), style=style, highlight=False, markup=False, soft_wrap=True)


def as_text(renderable: RenderableType) -> str:
    """Return what would be printed, as plain text 120 columns wide."""
    page = Console(width=120, color_system=None)
    with page.capture() as capture:
        page.print(renderable)
    return capture.get()


def plain(value: Any) -> str:
    """Return the text of a value for a table cell: one line, markup and control characters escaped."""
    return escape(one_line(str(value)))


def print_json(value: Any) -> None:
    """Print a value as one line of JSON to standard output, in ASCII, which every terminal and pipe can carry."""
    sys.stdout.write(json.dumps(value) + "\n")
