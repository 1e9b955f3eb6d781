"""The card of a saved model: what `model.json`, or the metadata of an ONNX file, records of it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from deitkit.data.duplicates import hashes_of, merge_sketches
from deitkit.errors import CheckpointError, reason_of
from deitkit.system.words import display_name, without_folders

FORMAT = 1
MOST_PX = 2**13  # side of an image of an untrusted card
REQUIRED = ("kind", "config", "mean", "std", "image_px", "class_names")  # of a model.json
_NO_PATHS = ("class_names", "trained_on", "trained_before_on")

Side = Annotated[int, Field(gt=0, le=MOST_PX)]
Names = Annotated[
    tuple[str, ...],
    BeforeValidator(lambda given: [display_name(str(name)) for name in given] if isinstance(given, list) else given),
]


def _readable(text: str | None) -> str | None:
    """Return a sketch; None for one that was damaged, as a folder's name in it was taken out of published cards."""
    try:
        return text if text is None or len(hashes_of(text)) else None
    except ValueError:
        return None


Sketch = Annotated[str | None, AfterValidator(_readable)]


class ModelCard(BaseModel):
    """What a saved model is, how it takes images, and what it has learned from; further fields are kept.

    Attributes:
        kind: ``deit`` for a student, ``cnn``, or ``onnx`` for a file.
        deitkit: The version that wrote it.
        config: Of a student: the arguments of ``DeiT``.
        architecture: Of a CNN: its name.
        parameters: Their number.
        mean: Normalisation of the images, per channel, of values in [0, 1].
        std: As ``mean``.
        image_px: Side to which the model resizes its images; None if it takes them as they are.
        input_px: Height and width of the images that it was trained on.
        channels: 1 or 3; by default as many as ``mean`` has.
        eval_crop: As ``data.eval_crop``.
        fit: As ``data.fit``.
        class_names: One for each output.
        dataset: Name of the data that it was trained on.
        split: Fields of ``data`` that divided these.
        trained_on: Sketch of the images that it was trained on; see ``duplicates.sketch``.
        labelled_share: Which share of those had labels.
        trained_before_on: Sketch of those of the models that it started from.
        trained_before_view: How those were taken, as ``view``; None if as the model takes its images.
        method: Of a student.
        seed: Of its training.
        readout: By which it won its comparison.
        only_readout: ``class`` if only that head was trained, though there are both.
        test_top1: Of a winner.
        precision: As ``train.precision`` of its training, in which it is used too.
        onnx_format: Of an ONNX file.
        exported_readout: By which an ONNX file answers.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    kind: str = "onnx"
    deitkit: str | None = None
    config: dict[str, Any] | None = None
    architecture: str | None = None
    parameters: int = 0
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_px: Side | None = None
    input_px: tuple[Side, Side] | None = None
    channels: Literal[1, 3]
    eval_crop: Annotated[float, Field(gt=0, le=1)] = 1.0
    fit: Literal["crop", "pad", "squash"] = "crop"
    class_names: Names
    dataset: str | None = None
    split: dict[Literal["split_seed", "test_fraction", "folds", "fold"], int | float | None] = {}
    trained_on: Sketch = None
    labelled_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    trained_before_on: Sketch = None
    trained_before_view: dict[Literal["image_px", "channels", "fit"], Side | str] | None = None
    method: str | None = None
    seed: int | None = None
    readout: str | None = None
    only_readout: str | None = None
    test_top1: float | None = None
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    onnx_format: int | None = None
    exported_readout: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _with_channels(cls, given: dict[str, Any]) -> dict[str, Any]:
        mean = given.get("mean")
        return {"channels": len(mean)} | given if isinstance(mean, list | tuple) else given

    @field_validator("eval_crop")
    @classmethod
    def _bounded(cls, share: float, info: Any) -> float:
        if min(info.data.get("input_px") or (1,)) > share * MOST_PX:
            raise ValueError(f"images are resized to more than {MOST_PX} px")
        return share

    def require_side(self) -> None:
        """Raise CheckpointError for a card that does not say of which size its images are."""
        if self.input_px is None:
            raise CheckpointError("model.json does not say of which size its images are: add input_px, [HEIGHT, WIDTH]")

    @property
    def side(self) -> int:
        """Side of the square images that it takes, in pixels."""
        self.require_side()
        assert self.input_px is not None
        return min(self.input_px)

    @property
    def view(self) -> dict[str, Any]:
        """How it takes images, as fields of ``data``: equal views of one file have equal pixels."""
        return {"image_px": self.side, "channels": self.channels, "fit": self.fit}

    @property
    def seen(self) -> str | None:
        """Sketch of all images that it has learned from, as it takes images; None if none are known."""
        before = None if self._saw_otherwise else self.trained_before_on
        known = [text for text in (self.trained_on, before) if text is not None]
        return merge_sketches(known) if known else None

    @property
    def seen_otherwise(self) -> tuple[str, dict[str, Any]] | None:
        """Sketch of images that it learned from when it took them in another way, and that way; None without any."""
        if self.trained_before_on is None or self.trained_before_view is None or not self._saw_otherwise:
            return None
        return self.trained_before_on, {str(field): value for field, value in self.trained_before_view.items()}

    @property
    def all_seen(self) -> list[tuple[str, dict[str, Any]]]:
        """Each sketch of images that it has learned from, with how it took these."""
        now = [] if self.seen is None else [(self.seen, self.view)]
        before = self.seen_otherwise
        return now if before is None else [*now, before]

    @property
    def _saw_otherwise(self) -> bool:
        return self.trained_before_view is not None and self.trained_before_view != self.view

    def written(self) -> dict[str, Any]:
        """Return it as it was read, for a file."""
        return self.model_dump(mode="json", exclude_unset=True)

    def published(self) -> "ModelCard":
        """Return it without the names of folders; names of classes and sketches, which may look like paths, stay."""
        written = self.written()
        kept = {name: written[name] for name in _NO_PATHS if name in written}
        return ModelCard.model_validate(without_folders(written) | kept)


def card_from(content: Any, path: Path) -> ModelCard:
    """Return the card that a ``model.json`` contains.

    Raises:
        CheckpointError: It is not of deitkit, or incomplete or wrong.
    """
    found = content.get("format") if isinstance(content, dict) else "unknown"
    if found != FORMAT:
        raise CheckpointError(f"{path} has format {found}; this deitkit reads format {FORMAT}")
    return checked_card(content, REQUIRED, lambda wrong: wrong_card(path, f"see {', '.join(wrong)}"))


def checked_card(
    content: dict[str, Any], required: Sequence[str], refuse: Callable[[list[str]], CheckpointError]
) -> ModelCard:
    """Return the card with these fields; raise what ``refuse`` returns for those that are missing or wrong."""
    wrong = [name for name in required if name not in content]
    try:
        if not wrong:
            return ModelCard.model_validate(content)
    except ValidationError as error:
        wrong = sorted({str(one["loc"][0]) for one in error.errors()})
    raise refuse(wrong)


def wrong_card(path: Path, reason: object) -> CheckpointError:
    """Return the error on a card whose values do not describe a model."""
    return CheckpointError(f"{path} is incomplete or wrong ({reason_of(reason)}): copy the folder again from its run")
