"""The results of a comparison whose students have all finished: rows, verdict, cards of the teachers and notes."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from deitkit.comparison.environment import machine_of
from deitkit.comparison.finetune import add_checkpoint_row
from deitkit.comparison.finished_run import predict_test_of_teachers
from deitkit.comparison.prepare import PreparedComparison
from deitkit.comparison.rows import note_on_stops, summarise
from deitkit.comparison.seed_run import (
    gather_metrics,
    load_predictions,
)
from deitkit.data.dataset import Dataset
from deitkit.data.duplicates import Duplicates
from deitkit.evaluation.readouts import balanced_accuracy, macro_f1, top_k_accuracy
from deitkit.report.published import published_figures
from deitkit.run.metrics import read_metrics
from deitkit.run.provenance import envelope
from deitkit.run.results import (
    FORMAT,
    DatasetSummary,
    DuplicateImages,
    Results,
    TeacherCard,
)
from deitkit.system.words import as_sentence
from deitkit.teachers.prepare import common_card
from deitkit.teachers.resolution import TeacherLogits
from deitkit.training.build import (
    describe_initial_weights,
    student_names,
)


def collect_results(prepared: PreparedComparison, folder: Path) -> Results:
    """Gather the predictions of all seeds into rows."""
    recipe, dataset, teachers, checkpoint = prepared.recipe, prepared.dataset, prepared.teachers, prepared.checkpoint
    cards, precision = prepared.cards, prepared.precision
    logits, together = None, None
    if teachers is not None:
        each = predict_test_of_teachers(teachers, recipe, dataset, folder, precision)
        logits = TeacherLogits.mean(each)
        cards = [_tested(card, own, dataset) for card, own in zip(cards, each, strict=True)]
        together = _tested(common_card(teachers, cards, dataset, precision), logits, dataset)
    names = student_names(recipe)
    predictions = load_predictions(folder, recipe.seeds, names)
    gather_metrics(folder, recipe.seeds, names)
    summary = summarise(recipe, dataset, predictions, logits, read_metrics(folder))
    if checkpoint is not None:
        on_views = None if logits is None else logits.on_views
        summary = add_checkpoint_row(summary, checkpoint, dataset, predictions, on_views)
    return Results(
        **envelope(FORMAT),
        recipe=recipe.model_dump(mode="json"),
        dataset=_summary(dataset),
        teacher=together,
        teachers=tuple(cards),
        initial=describe_initial_weights(recipe),
        seeds=recipe.seeds,
        rows=summary.rows,
        winner=None if summary.winner is None else summary.winner.row,
        verdict=summary.verdict,
        published=published_figures(recipe.published),
        notes=(
            *summary.notes,
            *_on_views(cards, dataset),
            *note_on_stops(summary.rows, recipe),
            *map(as_sentence, prepared.remarks),
        ),
        machine=machine_of(precision),
    )


def _tested(card: TeacherCard, logits: TeacherLogits, dataset: Dataset) -> TeacherCard:
    """Return a card with what a teacher scores on the test images: as it is used, and where that differs, on views."""
    used, labels = logits.as_used, dataset.test.labels
    figures = {"test_balanced": balanced_accuracy(used, labels), "test_macro_f1": macro_f1(used, labels)}
    if not used.equal(logits.on_views):
        figures["view_test_top1"] = top_k_accuracy(logits.on_views, labels)
    return card.model_copy(update={"test_top1": top_k_accuracy(used, labels), **figures})


def _on_views(cards: Sequence[TeacherCard], dataset: Dataset) -> Iterator[str]:
    """Yield a remark for each teacher that is tested on larger images than it taught with."""
    for card in cards:
        if card.view_test_top1 is not None:
            yield (
                f"The teacher {card.name} is tested as it is used, on images of {card.image_px} px; on the students' "
                f"{min(dataset.image_px)} px, with which it taught, it scores {100 * card.view_test_top1:.2f} %."
            )


def _summary(dataset: Dataset) -> DatasetSummary:
    return DatasetSummary(
        name=dataset.name,
        train=len(dataset.train),
        validation=len(dataset.validation),
        test=len(dataset.test),
        classes=dataset.classes,
        class_names=tuple(dataset.class_names),
        image_px=tuple(dataset.image_px),
        channels=dataset.channels,
        unlabelled=0 if dataset.unlabelled is None else len(dataset.unlabelled),
        skipped=len(dataset.skipped),
        skipped_files=tuple(dataset.skipped),
        fingerprint=dataset.fingerprint,
        duplicates=_recorded(dataset.duplicates),
        near_duplicates=_recorded(dataset.near_duplicates),
        test_by_class=tuple(dataset.test.labels.bincount(minlength=dataset.classes).tolist()),
        divided=dataset.divided,
    )


def _recorded(duplicates: Duplicates) -> DuplicateImages:
    return DuplicateImages(count=duplicates.count, examples=duplicates.examples)
