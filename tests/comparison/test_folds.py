"""k-fold cross-validation: its division, its statistics by hand, how it stops and goes on, and what it refuses."""

import csv
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from sklearn.model_selection import StratifiedKFold
from typer.testing import CliRunner

from conftest import TINY, StopAfter, draw_reports, poisoned_gradient
from deitkit.analyze.analysis import analyze_run
from deitkit.cli.main import app
from deitkit.comparison.compare import compare
from deitkit.comparison.finetune import start_from
from deitkit.comparison.folds import combine, prepare_folds
from deitkit.comparison.run import run_recipe
from deitkit.comparison.units import PREPARE, run_unit
from deitkit.comparison.verify import verify_run
from deitkit.data.dataset import Dataset, load_dataset
from deitkit.data.split import plan_splits
from deitkit.errors import CheckpointError, DataError, Interrupted, RecipeError, TeacherError
from deitkit.evaluation.apply import evaluate_model
from deitkit.evaluation.statistics import holm, resampled_difference, resampled_interval
from deitkit.models.saved import load_classifier
from deitkit.recipe.load import load_recipe
from deitkit.recipe.schema import DataRecipe, Recipe
from deitkit.report.write import write_report
from deitkit.run.metrics import read_metrics
from deitkit.run.observer import Watcher
from deitkit.run.results import FIT_TO_TEACH, Cost, FoldResults, Results, read_results
from deitkit.training.student import Student
from source_helpers import write_classes

TinyRecipe = Callable[..., Recipe]
LEARNS = (
    "data.folds=3", "methods=[none, hard]", "data.train_images=160", "train.optimizer=adamw",
    "train.learning_rate=0.004", "train.epochs=4", "augment.cutmix=0", "augment.crop=none",
)  # fmt: skip


def folds_of(tmp_path_factory: pytest.TempPathFactory, *overrides: str) -> Path:
    folder = tmp_path_factory.mktemp("folds") / "run"
    run_recipe(load_recipe("digits", [*TINY, *overrides]), folder, watcher=Watcher())
    return folder


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three folds whose students learn something."""
    with pytest.MonkeyPatch.context() as patch:
        draw_reports(patch)
        return folds_of(tmp_path_factory, *LEARNS)


@pytest.fixture(scope="module")
def two_folds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folds_of(tmp_path_factory, "data.folds=2", "methods=[none, hard]")


@pytest.fixture(scope="module")
def one_method(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        draw_reports(patch)
        return folds_of(tmp_path_factory, "data.folds=2", "methods=[none]")


def planned(labels: torch.Tensor, folds: int, groups: torch.Tensor | None = None, **fields: Any) -> list[Any]:
    names = [str(number) for number in range(int(labels.max()) + 1)]
    recipes = [DataRecipe(folds=folds, fold=fold, **fields) for fold in range(1, folds + 1)]
    return [plan_splits(labels, None, names, recipe, groups) for recipe in recipes]


def test_every_image_is_a_test_image_once_and_every_fold_has_the_classes_in_proportion() -> None:
    labels = torch.cat([torch.zeros(40), torch.ones(23), torch.full((7,), 2)]).long()
    plans = planned(labels, 5)
    assert torch.equal(torch.cat([plan.test for plan in plans]).sort().values, torch.arange(70))
    for plan in plans:
        together = torch.cat([plan.train, plan.validation, plan.test])
        assert torch.equal(together.sort().values, torch.arange(70))
        counts = torch.bincount(labels[plan.test])
        assert [abs(float(count) - size / 5) < 1 for count, size in zip(counts, (40, 23, 7), strict=True)] == [True] * 3
    division = StratifiedKFold(5, shuffle=True, random_state=0).split(labels, labels)
    assert [plan.test.tolist() for plan in plans] == [test.tolist() for _, test in division]


def test_a_group_is_in_one_fold_only() -> None:
    labels, groups = torch.arange(60) % 2, torch.arange(60) // 4
    for plan in planned(labels, 4, groups):
        parts = [set(groups[part].tolist()) for part in (plan.train, plan.validation, plan.test)]
        assert not (parts[0] & parts[1])
        assert not (parts[0] & parts[2])
        assert not (parts[1] & parts[2])
        assert parts[2]


@pytest.mark.parametrize(
    ("labels", "groups", "folds", "message"),
    [
        ([0] * 9 + [1] * 4, None, 5, r"class '1' .* has 4 images for 5 folds, but needs at least 5"),
        ([0] * 9 + [1] * 9, [0] * 6 + [1] * 6 + [2] * 6, 5, r"has 3 groups to divide, but data\.folds=5 needs 5"),
        (
            [0] * 12 + [1] * 6,
            [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5] + [9] * 6,
            3,
            r"class '1' .* has 0 images in the folds beside fold 1 of 3",
        ),
    ],
)
def test_a_fold_that_lacks_a_class_is_refused_by_name(
    labels: list[int], groups: list[int] | None, folds: int, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        planned(torch.tensor(labels), folds, None if groups is None else torch.tensor(groups))


def test_a_fold_that_damaged_files_leave_without_a_class_is_found_before_the_first_trains(tmp_path: Path) -> None:
    photos = write_classes(tmp_path / "photos", {"cat": 12, "dog": 12})
    for number in range(6):
        (photos / "dog" / f"{number:03}.png").write_bytes(b"damaged")
    recipe = load_recipe(
        "digits",
        [
            *TINY, f"data.name=folder:{photos}", "data.folds=3", "data.train_images=null", "data.test_images=null",
            "train.batch_size=8", "teacher.train.batch_size=8",
        ],
    )  # fmt: skip
    for fold in (1, 2):  # the third alone lacks dogs
        load_dataset(recipe.data.model_copy(update={"fold": fold}))
    with pytest.raises(DataError, match="class 'dog'"):
        prepare_folds(recipe, tmp_path / "run", watcher=Watcher())
    assert not (tmp_path / "run").exists()


def test_a_fold_trains_only_on_the_images_of_the_others(tmp_path: Path) -> None:
    photos = write_classes(tmp_path / "photos", {"cat": 12, "dog": 12})
    for number in range(6):  # equal images of both classes
        shutil.copy2(photos / "cat" / f"{number:03}.png", photos / "dog" / f"{20 + number}.png")
    fields = [
        *TINY, f"data.name=folder:{photos}", "data.folds=3", "data.train_images=null", "data.test_images=null",
        "data.image_px=8", "train.batch_size=8", "train.epochs=1", "methods=[none]",
    ]  # fmt: skip
    recipe = load_recipe("digits", fields)
    run_unit(recipe, tmp_path / "run", PREPARE, watcher=Watcher())
    run_unit(recipe, tmp_path / "run", "fold-1", watcher=Watcher())
    run_unit(recipe, tmp_path / "run", "fold-2", watcher=Watcher())
    Image.new("RGB", (6, 6), (1, 2, 3)).save(photos / "cat" / "new.png")
    with pytest.raises(CheckpointError, match=r"folds/1 was begun with other images or labels than"):
        run_unit(recipe, tmp_path / "run", "fold-3", watcher=Watcher())
    (photos / "cat" / "new.png").unlink()
    run_unit(recipe, tmp_path / "run", "fold-3", watcher=Watcher())


def test_a_data_set_with_a_test_split_is_refused() -> None:
    labels, official = torch.arange(40) % 2, torch.arange(40) < 10
    with pytest.raises(DataError, match=r"has a test split of 10 images: drop data\.folds"):
        plan_splits(labels, official, ["a", "b"], DataRecipe(name="folder:x", folds=3, fold=1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["data.fold=2"], r"data\.fold=2 is none of data\.folds=None: set data\.folds too"),
        (["data.folds=3", "data.fold=4"], r"data\.fold=4 is none of data\.folds=3: choose 1 to 3"),
        (["data.folds=1"], r"data\.folds"),
        (["data.folds=3", "seeds=[0, 1]"], r"trains once for each fold, but seeds=\[0, 1\]: give one seed"),
        (["data.folds=3", "variants.a.train.epochs=1"], r"data\.folds and variants exclude each other"),
    ],
)
def test_fields_that_contradict_folds_are_refused(fields: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("digits", fields)


def test_the_test_is_the_corrected_resampled_t_by_hand() -> None:
    differences = [0.02, 0.05, -0.01, 0.04, 0.03]
    found = resampled_difference(differences, 5)
    usual = stats.ttest_1samp(differences, 0.0)
    shrunk = usual.statistic * np.sqrt((1 / 5) / (1 / 5 + (1 / 5) / (4 / 5)))
    assert found.test == "corrected resampled t"
    assert found.mean == pytest.approx(0.026)
    assert found.p == pytest.approx(2 * stats.t.sf(shrunk, 4))
    assert found.p > usual.pvalue
    low, high = resampled_interval(differences, 5)
    assert found.ci95 == (low, high)
    assert (high - low) / 2 == pytest.approx(2.7764451 * np.std(differences, ddof=1) * np.sqrt(0.45), rel=1e-6)


def test_of_three_finished_folds_of_five_the_test_images_are_a_quarter_of_the_training_images() -> None:
    differences = [0.02, 0.05, 0.03]
    usual = stats.ttest_1samp(differences, 0.0)
    shrunk = usual.statistic * np.sqrt((1 / 3) / (1 / 3 + 1 / 4))
    assert resampled_difference(differences, 5).p == pytest.approx(2 * stats.t.sf(shrunk, 2))


def test_an_interval_excludes_no_difference_where_p_is_below_5_percent_and_only_there() -> None:
    generator = np.random.default_rng(0)
    for shift in (0.0, 0.01, 0.03, 0.06):
        for _ in range(40):
            found = resampled_difference(generator.normal(shift, 0.02, 5).tolist(), 5)
            assert found.ci95 is not None
            assert (found.p < 0.05) == (not found.ci95[0] <= 0 <= found.ci95[1])


def test_the_usual_test_finds_differences_of_equal_learners_that_the_corrected_one_does_not() -> None:
    """Differences of folds that share what their training sets share, which is 3/4 of the noise at five folds."""
    generator = np.random.default_rng(1)
    usual, corrected, draws = 0, 0, 1500
    for _ in range(draws):
        shared, own = generator.normal(), generator.normal(size=5)
        differences = (
            np.sqrt(0.2) * shared + np.sqrt(0.8) * own
        ).tolist()  # the correlation that the correction assumes
        usual += stats.ttest_1samp(differences, 0.0).pvalue < 0.05
        corrected += resampled_difference(differences, 5).p < 0.05
    assert usual / draws > 0.1
    assert 0.03 < corrected / draws < 0.07


def test_folds_that_differ_by_the_same_number_are_tested_by_their_sign() -> None:
    assert resampled_difference([0.0] * 4, 4).p == 1.0
    found = resampled_difference([0.125] * 4, 4)
    assert (found.p, found.test, found.ci95) == (2 * 0.5**4, "sign test", None)


def test_a_table_of_folds_is_that_of_comparisons_of_each(tiny_recipe: TinyRecipe, learnt: Path, tmp_path: Path) -> None:
    results = read_results(learnt)
    assert isinstance(results, FoldResults)
    each = [
        compare(tiny_recipe(*LEARNS, f"data.fold={fold}"), tmp_path / f"alone-{fold}", watcher=Watcher())
        for fold in (1, 2, 3)
    ]
    for row in results.rows:
        alone = [one.row(row.row) for one in each]
        assert row.top1 == tuple(one.top1[0] for one in alone if one is not None)
        assert row.top1_mean == pytest.approx(float(np.mean([value for value in row.top1 if value is not None])))
        assert row.n == sum(one.dataset.test for one in each) == 300
    none, hard = results.row("none/class"), results.row("hard/class")
    assert none is not None
    assert hard is not None
    gains = [a - b for a, b in zip(hard.top1, none.top1, strict=True) if a is not None and b is not None]
    teachers = [one.teacher.test_top1 for one in each if one.teacher is not None]
    found, lag = hard.differences.get("labels"), hard.differences.get("teacher")
    assert found is not None
    assert lag is not None
    assert found.p == pytest.approx(resampled_difference(gains, 3).p)
    assert lag.mean == pytest.approx(np.mean([a - b for a, b in zip(hard.top1, teachers, strict=True)]))  # type: ignore[operator]
    lags = [row.differences["teacher"] for row in results.rows if "teacher" in row.differences]
    assert [each.p_holm for each in lags] == holm([each.p for each in lags])
    assert results.dataset.test == 300
    assert results.notes[0].startswith("The test images are drawn from each of 3 folds, which share"), "100 of each"
    alone = "On the validation images of 3 folds alone it is statistically indistinguishable"
    assert alone in results.verdict or " wins on " in results.verdict
    assert results.teacher is not None
    assert results.teacher.test_top1 == pytest.approx(np.mean(teachers))
    assert results.teacher.sha256 is None
    assert "mean of 3 folds, n = 300" in results.verdict
    assert "The teacher scores" in results.verdict


def test_what_a_run_folder_of_folds_holds(learnt: Path, tmp_path: Path) -> None:
    run = shutil.copytree(learnt, tmp_path / "run")
    results = read_results(run)
    table = (run / "table.md").read_text()
    assert "3 folds" in table
    assert "seed" not in table.split("recipe")[0]
    assert "Nadeau and Bengio 2003" in table
    with (run / "table.csv").open() as file:
        first = next(csv.DictReader(file))
    assert {"top1_fold_1", "top1_fold_2", "top1_fold_3", "validation_top1_fold_3"} <= set(first)
    float(first["validation_top1_fold_3"])
    page = (run / "report.html").read_text()
    assert all(f'href="folds/{fold}/report.html"' in page for fold in (1, 2, 3))
    assert (run / "folds" / "3" / "report.html").exists()
    winner = results.row(results.winner)
    assert winner is not None
    best = winner.validation_top1.index(max(value for value in winner.validation_top1 if value is not None))
    card = json.loads((run / "winner" / "model.json").read_text())
    assert card["test_top1"] == winner.top1[best]
    home = run / "folds" / str(best + 1) / "seed-0" / winner.folder_name
    ours, theirs = (load_classifier(path, torch.device("cpu"))[0].state_dict() for path in (run / "winner", home))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    measured = evaluate_model(run / "winner", "digits")
    of_teacher = evaluate_model(home.parents[1] / "teacher", "digits")
    for found in (measured, of_teacher):
        assert (found["n"], found["trained_on"]) == (599, 0), "the images of its fold"
    before = table, (run / "results.json").read_text()
    write_report(run)
    assert ((run / "table.md").read_text(), (run / "results.json").read_text()) == before
    verified = verify_run(run, Watcher())
    assert verified.holds
    assert {row.row for row in verified.rows} >= {f"fold {fold}: none/class" for fold in (1, 2, 3)}
    with pytest.raises(CheckpointError, match=r"is a cross-validation: analyze one of its folds, such as .*folds/1"):
        analyze_run(run, watcher=Watcher())


def test_a_stopped_run_goes_on_and_ends_as_one_that_never_stopped(
    tiny_recipe: TinyRecipe, two_folds: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe("data.folds=2", "methods=[none, hard]")
    whole = read_results(two_folds)
    with pytest.raises(Interrupted):
        run_recipe(recipe, tmp_path / "parts", watcher=StopAfter(25))
    for _ in range(20):
        try:
            parts = run_recipe(recipe, tmp_path / "parts", watcher=StopAfter(25), resume=True)
            break
        except Interrupted:
            continue
    assert [(row.row, row.top1) for row in parts.rows] == [(row.row, row.top1) for row in whole.rows]


def test_a_finished_run_grows_by_a_method(tiny_recipe: TinyRecipe, one_method: Path, tmp_path: Path) -> None:
    run = shutil.copytree(one_method, tmp_path / "run")
    grown = run_recipe(tiny_recipe("data.folds=2", "methods=[none, hard]"), run, watcher=Watcher(), resume=True)
    assert [row.row for row in grown.rows] == ["none/class", "hard/class"]
    with pytest.raises(CheckpointError, match=r"data\.folds was 2, now 3"):
        run_recipe(tiny_recipe("data.folds=3", "methods=[none]"), run, watcher=Watcher(), resume=True)


@pytest.mark.reports
def test_a_student_that_stops_in_a_fold_leaves_its_statistics(
    tiny_recipe: TinyRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Student, "backward", poisoned_gradient("hard", at=2))
    recipe = tiny_recipe("data.folds=3", "methods=[none, hard]")
    hard = run_recipe(recipe, tmp_path, watcher=Watcher()).row("hard/class")
    assert hard is not None
    assert hard.top1[0] is None
    assert None not in hard.top1[1:]
    assert hard.status.startswith("fold 1: ")
    assert hard.differences.get("labels") is not None
    assert "† hard/class: fold 1: seed 0 stopped" in (tmp_path / "table.md").read_text()


def test_the_curves_are_over_folds(one_method: Path) -> None:
    page = (one_method / "report.html").read_text()
    assert "none, fold 2" in page
    assert not read_metrics(one_method)


def test_the_command_takes_folds_and_names_them(tmp_path: Path) -> None:
    fields = [
        "train.epochs=1",
        "train.warmup_epochs=0",
        "teacher.train.warmup_epochs=0",
        "teacher.train.epochs=1",
        "methods=[none]",
        "data.train_images=40",
    ]
    outcome = CliRunner().invoke(app, ["compare", "digits", "--folds", "2", *fields, "--out", str(tmp_path / "run")])
    assert outcome.exit_code == 0, outcome.output
    assert "fold 2 of 2" in outcome.output
    assert str(tmp_path / "run" / "folds" / "2") in outcome.output.replace("\n", "")
    outcome = CliRunner().invoke(app, ["compare", "digits", "--folds", "1"])
    assert outcome.exit_code == 2


def test_folds_differ_in_their_data_alone() -> None:
    recipes = [DataRecipe(folds=2, fold=fold) for fold in (1, 2)]
    first, second = (load_dataset(recipe) for recipe in recipes)
    assert first.class_names == second.class_names
    assert first.fingerprint != second.fingerprint
    assert len(first.test) + len(second.test) == 1797


def test_folds_are_compared_by_balanced_accuracy_where_it_chooses(tiny_recipe: TinyRecipe, learnt: Path) -> None:
    folds: dict[int, Results] = {fold: read_results(learnt / "folds" / str(fold)) for fold in (1, 2, 3)}
    combined = combine(tiny_recipe(*LEARNS, "compare.by=balanced"), folds)
    own = [one.row("hard/class") for one in folds.values()]
    others = [one.teacher for one in folds.values()]
    lags = [
        row.balanced_accuracy - card.test_balanced  # type: ignore[operator, union-attr]
        for row, card in zip(own, others, strict=True)
    ]
    hard = combined.row("hard/class")
    assert hard is not None
    assert hard.balanced_differences["teacher"].p == pytest.approx(resampled_difference(lags, 3).p)
    assert hard.balanced_differences["teacher"].mean == pytest.approx(np.mean(lags))
    assert "It was chosen by balanced accuracy" in combined.verdict
    assert "balanced_differences" not in read_results(learnt).to_json()["rows"][0]


def test_what_the_gate_says_of_some_folds_is_not_said_of_all_and_one_busy_fold_does_not_make_the_cost(
    tiny_recipe: TinyRecipe, learnt: Path
) -> None:
    folds: dict[int, Results] = {fold: read_results(learnt / "folds" / str(fold)) for fold in (1, 2, 3)}

    def cost_of(milliseconds: float) -> Cost:
        return Cost(file_bytes=10, milliseconds=milliseconds, batch_size=8, milliseconds_in_batch=milliseconds / 2)

    def combined(*verdicts: str) -> FoldResults:
        for (fold, one), verdict, time in zip(folds.items(), verdicts, (9.0, 1.0, 2.0), strict=True):
            assert one.teacher is not None
            card = one.teacher.model_copy(update={"verdict": verdict, "cost": cost_of(time)})
            rows = tuple(row.model_copy(update={"cost": cost_of(time)}) for row in one.rows)
            folds[fold] = one.model_copy(update={"teacher": card, "teachers": (card,), "rows": rows})
        return combine(tiny_recipe(*LEARNS), folds)

    some = combined("weak: a", FIT_TO_TEACH, "weak: a")
    assert [card.verdict for card in some.teachers] == ["folds 1 and 3: weak: a"]
    assert [one.cost for one in (*some.rows, *some.teachers)] == [cost_of(2.0)] * (len(some.rows) + 1)
    (card,) = combined("weak: a", FIT_TO_TEACH, "weak: b").teachers
    assert card.verdict == "fold 1: weak: a; fold 3: weak: b"
    assert combined(*["weak: a"] * 3).teachers[0].verdict == "weak: a"
    assert combined(*[FIT_TO_TEACH] * 3).teachers[0].verdict == FIT_TO_TEACH


def test_a_row_without_a_fold_to_compare_has_no_difference(tiny_recipe: TinyRecipe, two_folds: Path) -> None:
    results = read_results(two_folds)
    folds: dict[int, Results] = {fold: read_results(two_folds / "folds" / str(fold)) for fold in (1, 2)}
    stopped = [row.model_copy(update={"top1": (None,), "status": "seed 0 stopped"}) for row in folds[1].rows]
    folds[1] = folds[1].model_copy(update={"rows": tuple(stopped)})
    combined = combine(tiny_recipe("data.folds=2", "methods=[none, hard]"), folds)
    assert combined.winner is None
    assert all(row.differences.get("labels") is None for row in combined.rows)
    assert len(results.rows) == len(combined.rows)


def test_a_checkpoint_that_has_seen_a_fold_is_refused_before_anything_trains(
    tiny_recipe: TinyRecipe, tmp_path: Path
) -> None:
    recipe = tiny_recipe("data.folds=2", "methods=[none]", "data.test_images=null")
    run_recipe(recipe, tmp_path / "run", watcher=Watcher())
    again = start_from(recipe, tmp_path / "run" / "folds" / "1")
    with pytest.raises(RecipeError, match=r"are training images of .*data\.folds=2 data\.fold=1\)"):
        run_recipe(again, tmp_path / "again", watcher=Watcher())
    assert not (tmp_path / "again").exists()
    alone = again.model_copy(update={"data": again.data.model_copy(update={"fold": 1})})
    assert run_recipe(alone, tmp_path / "alone", watcher=Watcher()).rows
    teacher = f"teacher.name={tmp_path / 'run' / 'folds' / '1' / 'winner'}"
    taught = tiny_recipe("data.folds=2", "methods=[hard]", "data.test_images=null", "teacher.allow_weak=true", teacher)
    with pytest.raises(TeacherError, match=r"are training images of the teacher .*data\.folds=2 data\.fold=1\)"):
        run_recipe(taught, tmp_path / "again", watcher=Watcher())
    assert not (tmp_path / "again").exists()


def test_a_model_of_a_fold_is_evaluated_on_the_test_split_of_other_data(
    tiny_recipe: TinyRecipe, tmp_path: Path
) -> None:
    photos = write_classes(tmp_path / "photos", {"a": 12, "b": 12})
    recipe = tiny_recipe(
        f"data.name=folder:{photos}", "data.folds=2", "data.fold=2", "methods=[none]", "data.image_px=8",
        "data.train_images=null", "data.test_images=null", "train.batch_size=4",
    )  # fmt: skip
    run_recipe(recipe, tmp_path / "run", watcher=Watcher())
    write_classes(tmp_path / "others" / "train", {"a": 3, "b": 3}, start=100)
    write_classes(tmp_path / "others" / "test", {"a": 4, "b": 3}, start=200)
    assert evaluate_model(tmp_path / "run" / "winner", f"folder:{tmp_path / 'others'}")["n"] == 7


def test_one_fold_at_a_time_is_in_memory(
    tiny_recipe: TinyRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[Dataset]] = []

    def load(*arguments: Any, **settings: Any) -> Dataset:
        assert not any(dataset() is not None for dataset in loaded)
        dataset = load_dataset(*arguments, **settings)
        loaded.append(weakref.ref(dataset))
        return dataset

    monkeypatch.setattr("deitkit.comparison.folds.load_dataset", load)
    monkeypatch.setattr("deitkit.comparison.images.load_dataset", load)
    run_recipe(tiny_recipe("data.folds=3", "methods=[none]"), tmp_path / "run", watcher=Watcher())
    assert len(loaded) == 3


def test_finished_folds_are_judged_by_the_bounds_of_now(
    two_folds: Path, tmp_path: Path, tiny_recipe: TinyRecipe
) -> None:
    folder = shutil.copytree(two_folds, tmp_path / "run")
    for fold, top1 in ((1, 1.0), (2, 0.5)):
        card = folder / "folds" / str(fold) / "teacher" / "card.json"
        card.write_text(json.dumps(json.loads(card.read_text()) | {"top1": top1, "weak": False}))
    fields = ("data.folds=2", "methods=[none, hard]", "teacher.allow_weak=false", "teacher.min_top1=0.9")
    with pytest.raises(TeacherError, match=r"scores 50.00 % .* and is weak: is below teacher\.min_top1=0\.9"):
        run_recipe(tiny_recipe(*fields), folder, watcher=Watcher(), resume=True)
