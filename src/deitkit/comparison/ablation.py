"""An ablation: a comparison of the recipe unchanged and of each of its variants, in one table.

Each is an ordinary comparison in its own folder. This module orders them, shares data and teachers between them, and
compares each with the base on the same test images.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from deitkit.comparison.compare import compare, complete, has_finished
from deitkit.comparison.environment import require_same_code, require_same_ingredients
from deitkit.comparison.images import as_begun, cache_last, require_same_images
from deitkit.comparison.prepare import dry_run
from deitkit.comparison.rows import Hits, RowKey, corrected, note_on_stops, paired_over_seeds
from deitkit.comparison.seed_run import LOCK_SECONDS, load_predictions
from deitkit.data.dataset import Dataset, load_dataset
from deitkit.errors import DataError, DeitkitError
from deitkit.models.weights.pretrained import resolved
from deitkit.recipe.contradictions import BASE
from deitkit.recipe.load import changed_fields, expand_variants
from deitkit.recipe.schema import DataRecipe, Recipe
from deitkit.report.write import write_report
from deitkit.run.folder import begin_run, check_run, locked
from deitkit.run.layout import teacher_folders, variant_folder
from deitkit.run.observer import Watcher
from deitkit.run.provenance import envelope
from deitkit.run.reported import reported_rows
from deitkit.run.results import (
    FIT_TO_TEACH,
    FORMAT,
    AblationResults,
    Results,
    Row,
    TeacherCard,
    VariantRow,
    read_results,
    with_difference,
    write_results,
)
from deitkit.system.device import Precision
from deitkit.system.files import copy_file
from deitkit.teachers.prepare import CARD, dry_run_teachers, is_prepared, prepare_teachers
from deitkit.training.build import needs_teacher


def compare_variants(recipe: Recipe, folder: Path, *, watcher: Watcher, resume: bool = False) -> AblationResults:
    """Run a recipe and its variants, the base first, and return the results of all in one table.

    Mistakes in any variant fail before a student trains: what cannot be built, other test images, refused teachers.

    Args:
        recipe: With variants.
        folder: New or empty; with ``resume`` one that this recipe has prepared. Its variants may have changed since:
            finished ones are not trained again, new ones are.
        watcher: Receives progress, and may request a stop.
        resume: Continue at the variant at which a run was stopped.

    Raises:
        Interrupted: The watcher requested a stop; the run can be resumed.
    """
    prepared = prepare_variants(recipe, folder, watcher=watcher, resume=resume)
    recipes, homes = prepared.recipes, prepared.homes
    for name in prepared.unfinished:
        watcher.say(f"variant {name} ({list(recipes).index(name) + 1} of {len(recipes)}) {_in_words(name, recipes)}")
        with named_in_errors(name), locked(homes[name], LOCK_SECONDS, watcher.say):  # a unit may still train it
            if not has_finished(homes[name], recipes[name]):
                compare(recipes[name], homes[name], watcher=watcher, resume=True, dataset=prepared.images(name))
    for name, own in recipes.items():
        with locked(homes[name], LOCK_SECONDS, watcher.say):
            complete(own, homes[name], watcher)
    results = _results(recipe, recipes, homes, prepared.labels)
    write_results(results, folder)
    write_report(folder)
    return results


@dataclass(frozen=True)
class PreparedVariants:
    """An ablation whose folders have begun and whose teachers are ready."""

    recipes: dict[str, Recipe]
    homes: dict[str, Path]
    labels: Int64[Tensor, " n"]
    load: Callable[[DataRecipe], Dataset]

    @property
    def unfinished(self) -> list[str]:
        """The variants that are not finished, the base first."""
        return [name for name in self.recipes if not has_finished(self.homes[name], self.recipes[name])]

    def images(self, name: str) -> Dataset:
        """Return the data set of a variant."""
        return self.load(as_begun(self.recipes[name].data, self.homes[name]))


def variant_recipes(recipe: Recipe) -> dict[str, Recipe]:
    """Return the recipe of the base and of each variant, by name."""
    return {name: resolved(variant) for name, variant in expand_variants(recipe).items()}


def prepare_variants(recipe: Recipe, folder: Path, *, watcher: Watcher, resume: bool = False) -> PreparedVariants:
    """Check everything that can be checked before training, begin the run folders, and prepare all teachers.

    The arguments are those of ``compare_variants``.
    """
    recipes = variant_recipes(recipe)
    homes = {name: variant_folder(folder, name) for name in recipes}
    check_run(folder, recipe, resume)
    for name, variant in recipes.items():
        check_run(homes[name], variant, resume=True)
    # Variants that share a data set follow each other in most recipes.
    random_crops = any(variant.has_random_crops for variant in recipes.values())
    load = cache_last(lambda data: load_dataset(data, watcher.reading, random_crops=random_crops))
    prepared = PreparedVariants(recipes, homes, _dry_run_all(recipes, homes, load), load)
    begin_run(folder, recipe)
    for name in prepared.unfinished:
        begin_run(homes[name], recipes[name])
        if needs_teacher(recipes[name]):
            ready = all(map(is_prepared, teacher_folders(homes[name], len(recipes[name].all_teachers))))
            lock = nullcontext() if ready else locked(homes[name], LOCK_SECONDS, watcher.say)
            with named_in_errors(name), lock:
                _provide_teacher(name, recipes, homes, prepared.images(name), watcher)
    return prepared


def _dry_run_all(
    recipes: dict[str, Recipe], homes: dict[str, Path], load: Callable[[DataRecipe], Dataset]
) -> Int64[Tensor, " n"]:
    """Build every variant once and throw it away; return the labels of the test images, the same for all."""
    base = load(as_begun(recipes[BASE].data, homes[BASE]))
    labels, places = base.test.labels, base.test_places
    del base  # before another is loaded
    tried: list[tuple[Any, ...]] = []
    for name, variant in recipes.items():
        with named_in_errors(name):
            dataset = load(as_begun(variant.data, homes[name]))
            require_same_images(dataset, homes[name])
            if not (torch.equal(dataset.test_places, places) and torch.equal(dataset.test.labels, labels)):
                raise DataError(
                    f"its {len(dataset.test)} test images are not the base's {len(labels)}: change no field of data "
                    "that divides them"
                )
            dry_run(variant, dataset, Precision.of(variant))
            require_same_ingredients(variant, dataset, homes[name])
            require_same_code(variant, dataset, homes[BASE])  # initial weights may be what a variant changes
            if needs_teacher(variant) and _teacher_key(variant) not in tried:
                dry_run_teachers(variant, dataset, homes[name], Precision.of(variant))
                tried.append(_teacher_key(variant))
            del dataset  # before the next is loaded
    return labels


@contextmanager
def named_in_errors(name: str) -> Iterator[None]:
    """Name the variant in the message of an error."""
    try:
        yield
    except DeitkitError as error:
        error.args = (f"variant {name}: {error}",)
        raise


def _provide_teacher(
    name: str, recipes: dict[str, Recipe], homes: dict[str, Path], dataset: Dataset, watcher: Watcher
) -> None:
    """Provide a variant's teacher: a copy of one that was trained in the same way, or a new one."""
    recipe, home = recipes[name], homes[name]
    same = [homes[other] for other in recipes if _teacher_key(recipes[other]) == _teacher_key(recipe)]
    ready = next((other for other in same if is_prepared(other / "teacher")), None)
    if ready is not None and not is_prepared(home / "teacher"):
        for teacher in sorted(ready.glob("teacher*"), reverse=True):  # the first one last
            _copy_teacher(teacher, home / teacher.name)
    prepare_teachers(recipe, dataset, folder=home, precision=Precision.of(recipe), watcher=watcher)


def _copy_teacher(source: Path, home: Path) -> None:
    """Copy a teacher, its card last: a folder with a card is complete."""
    for path in sorted(source.iterdir(), key=lambda path: path.name == CARD):
        copy_file(path, home / path.name)


def _teacher_key(recipe: Recipe) -> tuple[Any, ...]:
    """Return everything on which a teacher depends."""
    return recipe.all_teachers, recipe.data, recipe.train.precision, recipe.seeds[0]


def _results(
    recipe: Recipe, recipes: dict[str, Recipe], homes: dict[str, Path], labels: Int64[Tensor, " n"]
) -> AblationResults:
    """Gather the rows of all variants into one table."""
    each = {name: read_results(home) for name, home in homes.items()}
    base_hits = _hits(each[BASE], homes[BASE], labels)
    rows: list[VariantRow] = []
    for name, results in each.items():
        hits = base_hits if name == BASE else _hits(results, homes[name], labels)
        rows += [
            _row(row, name, recipes, results.teacher, hits, base_hits)
            for row in reported_rows(results.rows)
            if row.kind != "checkpoint"
        ]
    rows = corrected(rows, "base")
    methods = list(dict.fromkeys(row.method for row in rows))
    rows.sort(key=lambda row: methods.index(row.method))
    return AblationResults(
        **envelope(FORMAT),
        recipe=recipe.model_dump(mode="json"),
        dataset=each[BASE].dataset,
        teacher=None,
        seeds=recipe.seeds,
        variants={name: _changes(name, recipes, "json") for name in recipes},
        rows=tuple(rows),
        winner=None,
        verdict=_verdict(rows),
        published=(),
        notes=_notes(each, recipes) + note_on_stops(rows, recipe),
        machine=each[BASE].machine,
    )


def _notes(each: dict[str, Results], recipes: dict[str, Recipe]) -> tuple[str, ...]:
    """Return the notes of all variants, and why a teacher of one is weak, each once."""
    found: dict[str, None] = {}
    for name, results in each.items():
        own = note_on_stops(results.rows, recipes[name])  # the table of all has one of its own
        found |= dict.fromkeys(note for note in results.notes if note not in own)
        weak = (teacher for teacher in results.teachers if teacher.verdict != FIT_TO_TEACH)
        found |= dict.fromkeys(f"teacher {teacher.name}: {teacher.verdict}." for teacher in weak)
    return tuple(found)


def _hits(results: Results, home: Path, labels: Int64[Tensor, " n"]) -> dict[RowKey, Hits]:
    rows = [row for row in reported_rows(results.rows) if row.kind != "checkpoint"]
    predictions = load_predictions(home, results.seeds, list(dict.fromkeys(row.method for row in rows)))
    return {RowKey.of(row): RowKey.of(row).hits(predictions, labels) for row in rows}


def _row(
    row: Row,
    name: str,
    recipes: dict[str, Recipe],
    teacher: TeacherCard | None,
    hits: dict[RowKey, Hits],
    base_hits: dict[RowKey, Hits],
) -> VariantRow:
    """Extend a row of a variant's own table by what changed, its teacher, and its difference to the base's row.

    Averaged weights are compared with the base's averaged weights; the base's own, and those of a variant where the
    base kept none, with the base's last weights.
    """
    key, last = RowKey.of(row), RowKey(row.method, "last", row.readout)
    other = base_hits.get(last) if name == BASE else base_hits.get(key, base_hits.get(last))
    comparable = other is not None and (name, key) != (BASE, last)
    difference = paired_over_seeds(hits[key], other) if other is not None and comparable else None
    if row.teacher is None:
        teacher = None
    fields = {
        "row": f"{name}: {row.row}",
        "variant": name,
        "changed": _in_words(name, recipes),
        "teacher_name": None if teacher is None else teacher.name,
        "teacher_sha256": None if teacher is None else teacher.sha256,
        "teacher_test_top1": None if teacher is None else teacher.test_top1,
    }
    return with_difference(VariantRow(**row.model_dump(exclude_unset=True) | fields), "base", difference)


def _changes(name: str, recipes: dict[str, Recipe], mode: str) -> dict[str, tuple[Any, Any]]:
    """Return the fields in which a variant differs from the base, with the base's value and its own."""
    base, variant = (recipes[which].model_dump(mode=mode) for which in (BASE, name))
    return {key: (old, new) for key, old, new in changed_fields(base, variant) if key != "name"}


def _in_words(name: str, recipes: dict[str, Recipe]) -> str:
    """Say what a variant changes; of a path only the file's name."""

    def shown(value: Any) -> str:
        return value.name if isinstance(value, Path) else json.dumps(value, default=str).strip('"')

    return "; ".join(
        f"{key}: {shown(old)} → {shown(new)}" for key, (old, new) in _changes(name, recipes, "python").items()
    )


def _verdict(rows: Sequence[VariantRow]) -> str:
    """Return the largest loss and the largest gain, of those that chance does not explain."""
    others = [row for row in rows if row.variant != BASE]
    compared = {row.row: row.differences["base"] for row in others if "base" in row.differences}
    sure = {name: found.mean for name, found in compared.items() if found.holds_for_new_images}
    text = f"{len(sure)} of {len(compared)} rows differ from the base by more than chance explains (p < 0.05)"
    if len(compared) < len(others):
        text += f", {len(others) - len(compared)} could not be compared"
    for words, sign in (("lowest", -1), ("highest", 1)):
        name = max(sure, key=lambda name: sign * sure[name], default=None)
        if name is not None and sign * sure[name] > 0:
            text += f"; {words} is {name} ({100 * sure[name]:+.2f} points)"
    return text + "."
