"""An ablation: a comparison as its recipe says, and once more for each variant of the recipe, in one table.

Each is an ordinary comparison in a folder of its own. Here stand what they share, their order, and how far each lies
from the base on the same test images; nothing here knows how a student is trained.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from deitkit import __version__
from deitkit.comparison.compare import compare, has_finished, rehearse
from deitkit.comparison.finetune import BEFORE
from deitkit.comparison.rows import paired_over_seeds, reported_rows, row_hits
from deitkit.comparison.seed_run import load_predictions
from deitkit.data.dataset import Dataset, load_dataset
from deitkit.errors import DataError, DeitkitError
from deitkit.recipe.load import changed_fields, expand_variants
from deitkit.recipe.schema import BASE, DataRecipe, Recipe
from deitkit.report.write import write_report
from deitkit.run.folder import begin_run, check_run
from deitkit.run.observer import Watcher
from deitkit.run.provenance import code_sha256
from deitkit.run.results import read_results
from deitkit.system.device import Precision, choose_device
from deitkit.system.files import write_text
from deitkit.teachers.prepare import prepare_teachers
from deitkit.training.build import needs_teacher

Hits = dict[tuple[str, str, str], dict[int, Bool[Tensor, " n"]]]  # method, weights, readout -> seed -> images got right


def compare_variants(recipe: Recipe, folder: Path, *, watcher: Watcher, resume: bool = False) -> dict[str, Any]:
    """Run a recipe and its variants, the base first, and return the ``results.json`` of the whole.

    Everything that can go wrong for any of them before a student trains does so first: what cannot be built, other
    test images, and teachers.

    Args:
        recipe: With variants.
        folder: New or empty; with ``resume`` one that this recipe has begun. Its variants may be others by then: those
            that ended are not trained again, new ones are.
        watcher: Is told how it goes, and asked whether to stop.
        resume: Go on with the variant at which a run was stopped.

    Raises:
        Interrupted: The watcher asked to stop; the run can be resumed.
    """
    recipes = expand_variants(recipe)
    homes = {name: folder / "variants" / name for name in recipes}
    check_run(folder, recipe, resume)
    for name, variant in recipes.items():
        check_run(homes[name], variant, resume=True)
    # One data set at a time: variants that share it follow each other in most recipes, and two may not fit in memory.
    load = lru_cache(maxsize=1)(lambda data: load_dataset(data, watcher.reading))
    labels = _rehearse_all(recipes, load)
    begin_run(folder, recipe)
    unfinished = [name for name in recipes if not has_finished(homes[name], recipes[name])]
    for name in unfinished:
        begin_run(homes[name], recipes[name])
        if needs_teacher(recipes[name]):
            with _told_of(name):
                _provide_teacher(name, recipes, homes, load(recipes[name].data), watcher)
    for name in unfinished:
        watcher.say(f"variant {name} ({list(recipes).index(name) + 1} of {len(recipes)}) {_in_words(name, recipes)}")
        with _told_of(name):
            data = load(recipes[name].data)
            compare(recipes[name], homes[name], watcher=watcher, resume=True, dataset=data)
    results = _results(recipe, recipes, homes, labels)
    write_text(folder / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    write_report(folder)
    return results


def _rehearse_all(recipes: dict[str, Recipe], load: Callable[[DataRecipe], Dataset]) -> Int64[Tensor, " n"]:
    """Build every variant once and throw it away; return the labels of the test images, the same for all."""
    labels = load(recipes[BASE].data).test.labels
    for name, variant in recipes.items():
        with _told_of(name):
            dataset = load(variant.data)
            if not torch.equal(dataset.test.labels, labels):
                raise DataError(
                    f"its {len(dataset.test)} test images are not the base's {len(labels)}: change no field of data "
                    "that divides them"
                )
            rehearse(variant, dataset, _precision(variant))
    return labels


def _precision(recipe: Recipe) -> Precision:
    return Precision.choose(recipe.train.precision, choose_device(recipe.device))


@contextmanager
def _told_of(name: str) -> Iterator[None]:
    """Say of which variant a mistake is."""
    try:
        yield
    except DeitkitError as error:
        error.args = (f"variant {name}: {error}",)
        raise


def _provide_teacher(
    name: str, recipes: dict[str, Recipe], homes: dict[str, Path], dataset: Dataset, watcher: Watcher
) -> None:
    """Give a variant its teacher: a copy of one that learned the same lesson, else a new one."""
    recipe, home = recipes[name], homes[name]
    same = [homes[other] for other in recipes if _lesson(recipes[other]) == _lesson(recipe)]
    ready = next((other for other in same if (other / "teacher" / "card.json").exists()), None)
    if ready is not None and not (home / "teacher" / "card.json").exists():
        for teacher in sorted(ready.glob("teacher*"), reverse=True):  # the first one last
            _copy_teacher(teacher, home / teacher.name)
    prepare_teachers(recipe, dataset, folder=home / "teacher", precision=_precision(recipe), watcher=watcher)


def _copy_teacher(source: Path, home: Path) -> None:
    """Copy a teacher, its card last: where that lies, the rest is whole."""
    home.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir(), key=lambda path: path.name == "card.json"):
        shutil.copy2(path, home / path.name)


def _lesson(recipe: Recipe) -> tuple[Any, ...]:
    """Return all that makes a teacher what it is."""
    return recipe.teacher, recipe.data, recipe.train.precision, recipe.seeds[0]


def _results(
    recipe: Recipe, recipes: dict[str, Recipe], homes: dict[str, Path], labels: Int64[Tensor, " n"]
) -> dict[str, Any]:
    """Gather the rows of all variants into one table, in the format of docs/design.md."""
    each = {name: read_results(home) for name, home in homes.items()}
    base_hits = _hits(each[BASE], homes[BASE], labels)
    rows = []
    for name, results in each.items():
        hits = base_hits if name == BASE else _hits(results, homes[name], labels)
        rows += [
            _row(row, name, recipes, results["teacher"], hits, base_hits) for row in reported_rows(results["rows"])
        ]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    rows.sort(key=lambda row: methods.index(row["method"]))
    return {
        "format": 1,
        "deitkit": __version__,
        "code": code_sha256(),
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "recipe": recipe.model_dump(mode="json"),
        "dataset": each[BASE]["dataset"],
        "teacher": None,
        "seeds": list(recipe.seeds),
        "variants": {name: _changes(name, recipes, "json") for name in recipes},
        "rows": rows,
        "winner": None,
        "verdict": _verdict(rows),
        "published": [],
        "notes": [],
        "machine": each[BASE]["machine"],
    }


def _hits(results: dict[str, Any], home: Path, labels: Int64[Tensor, " n"]) -> Hits:
    methods = list(dict.fromkeys(row["method"] for row in results["rows"] if row["method"] != BEFORE))
    predictions = load_predictions(home, results["seeds"], methods)
    keys = [(row["method"], row["weights"], row["readout"]) for row in reported_rows(results["rows"])]
    return {key: row_hits(predictions, *key, labels) for key in keys}


def _row(
    row: dict[str, Any],
    name: str,
    recipes: dict[str, Recipe],
    teacher: dict[str, Any] | None,
    hits: Hits,
    base_hits: Hits,
) -> dict[str, Any]:
    """Extend a row of a variant's own table by what changed, its teacher, and its difference to the base's row.

    Averaged weights are compared with the base's averaged weights; the base's own, and those of a variant where the
    base kept none, with the base's last weights.
    """
    key, last = ((row["method"], weights, row["readout"]) for weights in (row["weights"], "last"))
    other = base_hits.get(last) if name == BASE else base_hits.get(key, base_hits.get(last))
    comparable = other is not None and (name, key) != (BASE, last)
    difference = paired_over_seeds(hits[key], other) if other is not None and comparable else None
    return {
        **row,
        "row": f"{name}: {row['row']}",
        "variant": name,
        "changed": _in_words(name, recipes),
        "teacher_name": None if teacher is None or row["teacher"] is None else teacher["name"],
        "teacher_sha256": None if teacher is None or row["teacher"] is None else teacher.get("sha256"),
        "teacher_test_top1": None if teacher is None or row["teacher"] is None else teacher["test_top1"],
        "difference_vs_base": None if difference is None else difference.mean,
        "difference_vs_base_ci95": None if difference is None else difference.ci95,
        "p_vs_base": None if difference is None else difference.p,
        "p_vs_base_test": None if difference is None else difference.test,
    }


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


def _verdict(rows: list[dict[str, Any]]) -> str:
    """Say what costs most and what gains most, of what chance does not explain."""
    sure = [row for row in rows if row["p_vs_base"] is not None and row["p_vs_base"] < 0.05]
    compared = [row for row in rows if row["variant"] != BASE]
    text = f"{len(sure)} of {len(compared)} rows differ from the base by more than chance explains (p < 0.05)"
    for words, sign in (("lowest", -1), ("highest", 1)):
        row = max(sure, key=lambda row: sign * row["difference_vs_base"], default=None)
        if row is not None and sign * row["difference_vs_base"] > 0:
            text += f"; {words} is {row['row']} ({100 * row['difference_vs_base']:+.2f} points)"
    return text + "."
