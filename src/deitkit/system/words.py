"""Numbers and names in sentences."""

import re
import unicodedata
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any


def counted(count: int, noun: str) -> str:
    """Return a number and its noun: "1 image", "4,500 images"; the plural takes an s, or es after s (classes)."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{count:,} {noun if count == 1 else plural}"


def duration_text(seconds: float) -> str:
    """Format a duration: "40 s", "12 min", "3 h 5 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def as_sentence(remark: str) -> str:
    """Return a remark with a capital letter and a full stop."""
    return f"{remark[0].upper()}{remark[1:]}."


def display_name(name: str) -> str:
    """Return a name as it is shown and compared.

    Unicode is normalised, since macOS writes 'é' as two characters. Bytes that are not valid UTF-8, as in old archives,
    are escaped.
    """
    return unicodedata.normalize("NFC", name.encode("utf-8", "backslashreplace").decode("utf-8"))


def without_folders(value: Any) -> Any:
    """Return JSON values in which every absolute path is its last part alone, also behind ``folder:`` and in sentences.

    For what is published: folders tell names of people and projects.
    """
    if isinstance(value, dict):
        return {key: without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(inner) for inner in value]
    if isinstance(value, PurePath):
        value = str(value)
    if not isinstance(value, str):
        return value
    whole = re.fullmatch(r"((?:folder|parquet|csv):)?(?:~|[A-Za-z]:)?[/\\](?!/).*", value, re.S)
    if whole is not None:
        return (whole[1] or "") + re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    name = r"[^\s'\"/\\,;]+(?: [^\s'\"/\\,;]+)*"  # of a folder, which may contain spaces
    return re.sub(rf"(?<![\w./\\])(?:~|[A-Za-z]:(?=\\))?[/\\](?![/\s])(?:{name}[/\\])+", "", value)


def shortened(name: str, most: int) -> str:
    """Return a name of at most ``most`` characters: of a longer one its beginning and its end."""
    end = (most - 1) // 2
    return name if len(name) <= most else f"{name[: most - 1 - end]}…{name[len(name) - end :]}"


def first_of(names: Sequence[str]) -> str:
    """Return a few names, with the number of the others."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
