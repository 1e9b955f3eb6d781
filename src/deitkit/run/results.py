"""The results of a comparison: ``results.json`` as typed records, with one reader and one writer."""

from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError

from deitkit.errors import CheckpointError, os_reason
from deitkit.run.difference import Difference, Interval, Reference
from deitkit.run.record import Document, Record, parse_json
from deitkit.system.files import write_json

FORMAT = 1


class Cost(Record):
    """What it costs to use a model, measured on the machine of the run when its table was made.

    Attributes:
        file_bytes: Of its weights.
        milliseconds: For a single image.
        batch_size: The fastest of a few.
        milliseconds_in_batch: For an image in a batch of that size.
    """

    file_bytes: int
    milliseconds: float
    batch_size: int
    milliseconds_in_batch: float


class Row(Record):
    """A row of the table: one student (or the baseline, or a checkpoint) and one readout, over all seeds.

    Attributes:
        row: Its name, ``METHOD/READOUT``, with ``+ema`` for averaged weights.
        label: Its title for readers.
        method: The student's name: its method, ``cnn-baseline`` or ``before``.
        readout: ``class``, ``distillation``, ``joint`` or ``joint-logits``.
        weights: ``last`` or ``ema``.
        kind: ``student``, ``baseline``, or ``checkpoint`` for the model before fine-tuning.
        reference: Whether differences to ``labels`` are relative to this row.
        labels: Whether true labels were part of its loss; None if unknown.
        teacher: The part of the teacher's output that was used: ``soft``, ``hard`` or None.
        tokens: The student's tokens, ``-`` for a CNN.
        top1: Accuracy on the test images by seed, as a fraction; None for a seed that stopped.
        top5: The same for the five highest scores; None for at most five classes.
        n: Test images.
        top1_mean: Over the finished seeds.
        balanced_accuracy: Mean over the classes of the share of their test images that is right, over the seeds.
        macro_f1: Mean over the classes of F1, the harmonic mean of precision and recall, over the seeds.
        top1_std: Over the finished seeds; None for one seed.
        top1_ci95: Of several seeds Student's t interval, of one seed Wilson's.
        validation_top1: Accuracy on the validation images by seed.
        validation_balanced: Balanced accuracy on them.
        balanced_differences: Differences of the balanced accuracies, where the winner is chosen by these.
        differences: Of ``top1_mean`` to that of ``labels`` (the reference row), ``teacher``, ``baseline``, ``before``
            (the checkpoint that was fine-tuned) and ``base`` (of an ablation), as far as there are such.
        teacher_agreement: Share of test images with the teacher's decision.
        parameters: Of the model.
        status: ``ok``, or which seed stopped and why.
        images_per_second: Of training, without the work that all students share.
        train_seconds: Of training, by the same count: the mean over the seeds.
        cost: Of using the model; None for a checkpoint, and for a student that finished under no seed.
    """

    row: str
    label: str
    method: str
    readout: str
    weights: str
    kind: Literal["student", "baseline", "checkpoint"]
    reference: bool
    labels: bool | None
    teacher: str | None
    tokens: str = "-"
    top1: tuple[float | None, ...]
    top5: tuple[float | None, ...] | None = None
    n: int
    top1_mean: float | None
    top1_std: float | None = None
    top1_ci95: Interval | None = None
    validation_top1: tuple[float | None, ...] = ()
    differences: dict[Reference, Difference] = Field(default_factory=dict)
    teacher_agreement: float | None = None
    parameters: int | None = None
    status: str
    images_per_second: float | None = None
    train_seconds: float | None = None
    balanced_accuracy: float | None = None
    macro_f1: float | None = None
    validation_balanced: tuple[float | None, ...] = ()
    cost: Cost | None = None
    balanced_differences: dict[Reference, Difference] = Field(default_factory=dict)

    @property
    def folder_name(self) -> str:
        """The name of the student's folder in the run folder."""
        return f"{self.method}+ema" if self.weights == "ema" else self.method

    def differences_by(self, by: str) -> dict[Reference, Difference]:
        """Return the differences in what the winner is chosen by: ``accuracy`` or ``balanced``."""
        return self.balanced_differences if by == "balanced" else self.differences


SomeRow = TypeVar("SomeRow", bound=Row)


def with_difference(row: SomeRow, reference: Reference, difference: Difference | None, by: str = "accuracy") -> SomeRow:
    """Return a row with its difference to a reference, in accuracy or ``balanced``; itself if there is none."""
    if difference is None:
        return row
    field = "balanced_differences" if by == "balanced" else "differences"
    return row.model_copy(update={field: getattr(row, field) | {reference: difference}})


class VariantRow(Row):
    """A row of an ablation: a row of one of its variants, with the difference to the base's row.

    Attributes:
        variant: The variant's name; ``base`` is the recipe unchanged.
        changed: The fields in which it differs from the base, as text.
        teacher_name: Of the variant's teacher.
        teacher_sha256: Of that teacher's weights.
        teacher_test_top1: That teacher's accuracy on the test images.
    """

    variant: str
    changed: str
    teacher_name: str | None
    teacher_sha256: str | None = None
    teacher_test_top1: float | None


# Fields of a teacher's card after its comparison.
TESTED = {"test_top1", "test_balanced", "test_macro_f1", "view_test_top1", "cost"}
FIT_TO_TEACH = "fit to teach"  # the verdict of the gate on a teacher that passed every test


class TeacherCard(Record):
    """Facts about a teacher.

    Attributes:
        name: Its architecture or folder; of several teachers all names.
        source: Where its weights are from.
        fit: What was trained here: ``none``, ``head`` or ``full``.
        top1: Accuracy on the validation images, through the preprocessing of distillation.
        n: Validation images.
        chance: The share of the most frequent class among them.
        verdict: Of the gate.
        weak: Whether the gate would have refused it without ``teacher.allow_weak``.
        verdict_without_bound: Of one that is weak for ``teacher.min_top1`` alone, which a resumed run may change: the
            verdict without it.
        parameters: Of the model.
        image_px: Its resolution; None for that of the data.
        mean: Of its normalisation, by channel.
        std: Of its normalisation, by channel.
        readout: Of a student as teacher; None for a CNN, which has one head.
        sha256: Of its weights in the run folder.
        test_top1: Accuracy on the test images, as the model takes them in use; None before they were predicted, as the
            next two.
        test_balanced: Balanced accuracy on them.
        test_macro_f1: Macro F1 on them.
        own_px_top1: Accuracy on some validation images decoded at ``image_px``; None unless views are smaller.
        view_px_top1: Accuracy on the views of the same images.
        cost: Of using it; of several teachers the sum.
        view_test_top1: Accuracy on the students' views of the test images, if it is used on larger ones.
    """

    name: str
    source: str
    fit: str
    top1: float
    n: int
    chance: float
    verdict: str
    weak: bool
    verdict_without_bound: str | None = None
    parameters: int
    image_px: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    readout: str | None = None
    sha256: str | None = None
    test_top1: float | None = None
    test_balanced: float | None = None
    test_macro_f1: float | None = None
    own_px_top1: float | None = None
    view_px_top1: float | None = None
    cost: Cost | None = None
    view_test_top1: float | None = None


class DuplicateImages(Record):
    """Test images that are also training images: their number, and pairs of names as examples."""

    count: int = 0
    examples: tuple[tuple[str, str], ...] = ()


class DatasetSummary(Record):
    """The data set of a comparison: numbers of images by split, classes, and the hash of its pixels and labels.

    Attributes:
        test_by_class: Test images of each class; None in files that do not tell.
        divided: Whether the test images were drawn from all, since the data set has no test split of its own; None in
            files that do not tell.
    """

    name: str
    train: int
    validation: int
    test: int
    classes: int
    class_names: tuple[str, ...]
    image_px: tuple[int, ...]
    channels: int
    unlabelled: int = 0
    skipped: int
    skipped_files: tuple[str, ...] = ()
    fingerprint: str
    duplicates: DuplicateImages | None = None
    near_duplicates: DuplicateImages | None = None
    test_by_class: tuple[int, ...] | None = None
    divided: bool | None = None


class PublishedFigure(Record):
    """A figure that others published: ``top1`` as a fraction, of a ``row`` as printed and of the method it stands for.

    Attributes:
        table: ``reproduction`` (of the paper's table on CIFAR-10) or ``paper``.
    """

    table: str
    model: str
    data: str
    row: str
    method: str
    readout: str
    teacher: str | None
    top1: float


class Results(Document):
    """All that ``results.json`` holds.

    Attributes:
        recipe: The whole recipe, as JSON values.
        dataset: Its splits and classes.
        teacher: All teachers together; None without a teacher.
        teachers: Each of them.
        initial: Name and hash of the checkpoint from which the students started.
        seeds: In the order of every list by seed.
        rows: In the order of the table.
        winner: Name of the winning row; None if no student finished, and for an ablation.
        verdict: The outcome in a sentence or two.
        advice: Whether the winner should replace the CNN; empty where there is none.
        published: Figures that others published.
        notes: Remarks for the readers of the table.
        machine: Processor, cores, memory, device, precision, versions.
    """

    recipe: dict[str, Any]
    dataset: DatasetSummary
    teacher: TeacherCard | None = None
    teachers: tuple[TeacherCard, ...] = ()
    initial: str | None = None
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    winner: str | None = None
    verdict: str = ""
    advice: str = ""
    published: tuple[PublishedFigure, ...] = ()
    notes: tuple[str, ...] = ()
    machine: dict[str, Any] = Field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return all as JSON values, without the fields that no row has."""
        used = set().union(*(row.model_fields_set for row in self.rows))
        rows = [row.model_dump(mode="json", include=used) for row in self.rows]
        return self.model_dump(mode="json", exclude={"rows"}, exclude_unset=True) | {"rows": rows}

    def row(self, name: str | None) -> Row | None:
        """Return a row by name, or None."""
        return next((row for row in self.rows if row.row == name), None)

    @property
    def repetitions(self) -> tuple[int, ...]:
        """The seeds, or the folds: every list of a row has a value for each."""
        return self.seeds

    @property
    def repetition(self) -> str:
        """What a repetition is, in a word."""
        return "seed"

    @property
    def reference(self) -> Row | None:
        """The row that differences to ``labels`` are relative to; None without a student that has no teacher."""
        return next((row for row in self.rows if row.reference), None)


class AblationResults(Results):
    """The results of an ablation: all variants in one table.

    Attributes:
        variants: By variant the changed fields, each with the base's value and its own.
    """

    rows: tuple[VariantRow, ...]
    variants: dict[str, dict[str, tuple[Any, Any]]]


class FoldResults(Results):
    """The results of a cross-validation: one comparison for each fold, in one table.

    Attributes:
        folds: Their numbers, in the order of every list of a row; ``seeds`` has the one seed of all.
    """

    folds: tuple[int, ...]

    @property
    def repetitions(self) -> tuple[int, ...]:
        """The folds."""
        return self.folds

    @property
    def repetition(self) -> str:
        """What a repetition is, in a word."""
        return "fold"


def require_single(results: Results, folder: Path, verb: str) -> None:
    """Raise CheckpointError for an ablation or a cross-validation, and name a part that ``verb`` takes instead."""
    if isinstance(results, AblationResults):
        raise CheckpointError(f"{folder} is an ablation: {verb} one of its variants, such as {folder}/variants/base")
    if isinstance(results, FoldResults):
        raise CheckpointError(f"{folder} is a cross-validation: {verb} one of its folds, such as {folder}/folds/1")


def write_results(results: Results, folder: Path) -> None:
    """Write ``results.json``; raise CheckpointError if it cannot be written."""
    write_json(folder / "results.json", results.to_json())


def read_results(folder: Path) -> Results:
    """Return the results in a run folder; numbers that are not finite become None.

    Raises:
        CheckpointError: The file is missing, is not JSON, has another format than 1, or lacks a required field.
    """
    path = folder / "results.json"
    try:
        stored = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if not (folder / "recipe.yaml").exists():
            raise CheckpointError(
                f"'{folder}' is not a run folder: name the one that `deitkit compare` printed"
            ) from error
        raise CheckpointError(f"no results in '{folder}' yet: finish the comparison first, with --resume") from error
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read ({os_reason(error)}): check its rights") from error
    except ValueError as error:
        raise CheckpointError(f"'{path}' is not valid JSON: run the comparison again with --resume") from error
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        found = stored.get("format") if isinstance(stored, dict) else None
        raise CheckpointError(
            f"'{path}' has format {found!r}, this version reads format {FORMAT}: use the deitkit that wrote it"
        )
    return parse_results(stored, str(path))


def parse_results(stored: dict[str, Any], source: str = "results.json") -> Results:
    """Return the content of a ``results.json`` as records; ``source`` names it in an error.

    Raises:
        CheckpointError: A required field is missing, or a field has another type.
    """
    kind = AblationResults if "variants" in stored else FoldResults if "folds" in stored else Results
    try:
        results = kind.model_validate(stored)
    except ValidationError as error:
        places = {
            ".".join(str(part) for part in one["loc"] if isinstance(part, str)): one["type"] for one in error.errors()
        }
        lacking = [place for place, problem in places.items() if problem == "missing"]
        what = f"lacks {', '.join(lacking)}" if lacking else f"has an invalid {', '.join(places)}"
        raise CheckpointError(f"'{source}' {what}: run the comparison again with --resume") from error
    if not results.rows:
        raise CheckpointError(f"'{source}' lacks rows: run the comparison again with --resume")
    return results
