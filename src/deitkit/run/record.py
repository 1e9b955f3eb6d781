"""The base of the records in a run folder's files, and the fields that every file of results begins with."""

import json
from typing import Any

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """A part of a file of results; unknown fields are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Document(Record):
    """A file of results; ``provenance.envelope`` makes these fields.

    Attributes:
        format: Of the file.
        deitkit: The version that wrote it.
        code: Hash of the code that wrote it.
        created: UTC.
    """

    format: int
    deitkit: str
    code: str | None = None
    created: str


def parse_json(text: str) -> Any:
    """Return the value of a JSON text, with None for numbers that are not finite; raise ValueError on a mistake."""
    return json.loads(text, parse_constant=lambda name: None)
