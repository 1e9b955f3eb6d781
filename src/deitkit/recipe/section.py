"""The base of a recipe's sections, and the types of their fields."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator


def from_home(path: Path) -> Path:
    """Return a path with the home folder for ``~``, which a shell leaves as it is after ``=``."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path.expanduser raises for an unknown user


Fraction = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
UserPath = Annotated[Path, AfterValidator(from_home)]
NameOrPath = Annotated[str, AfterValidator(os.path.expanduser)]
Colour = tuple[float, ...]
OptimizerName = Literal["adamw", "sgd", "muon", "lamb"]


class Section(BaseModel):
    """A part of a recipe: immutable, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: Any) -> Any:
        """Refuse ``true`` where a number is meant, which pydantic would take for 1."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        takes_truth = annotation is bool or bool in get_args(annotation)
        for entry in value if isinstance(value, list | tuple) else [value]:
            if isinstance(entry, bool) and not takes_truth:
                raise ValueError(f"{str(entry).lower()} is not a value of this field")
        return value
