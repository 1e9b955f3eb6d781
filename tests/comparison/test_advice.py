"""The answer for someone who has to decide, and what it rests on: measured costs."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deitkit.comparison.advice import _equal_images, _guesses, advice
from deitkit.comparison.compare import compare
from deitkit.recipe.schema import Recipe
from deitkit.report.cost_chart import cost_chart, cost_points
from deitkit.run.difference import Difference
from deitkit.run.observer import Watcher
from deitkit.run.results import Cost, Results, parse_results

SMALL = Cost(file_bytes=1_000_000, milliseconds=2.0, batch_size=32, milliseconds_in_batch=0.5)
LARGE = Cost(file_bytes=44_000_000, milliseconds=9.0, batch_size=32, milliseconds_in_batch=3.0)


def results_with(
    difference: Difference, own: Cost = SMALL, other: Cost = LARGE, seeds: int = 1, **fields: Any
) -> Results:
    """Return results of one student and a teacher of known costs and difference."""
    row = {
        "row": "hard/class", "label": "hard", "method": "hard", "readout": "class", "weights": "last",
        "kind": "student", "reference": False, "labels": True, "teacher": "hard", "top1": [0.8], "n": 1000,
        "top1_mean": 0.8, "balanced_accuracy": 0.8, "status": "ok", "cost": own.model_dump(), "validation_top1": [0.8],
        "differences": {"teacher": asdict(difference)},
    } | fields  # fmt: skip
    card = {
        "name": "timm/resnet18", "source": "here", "fit": "full", "top1": 0.85, "n": 100, "chance": 0.1,
        "verdict": "fit to teach", "weak": False, "parameters": 1, "image_px": None, "mean": [0.5], "std": [0.5],
        "test_top1": 0.85, "cost": other.model_dump(),
    }  # fmt: skip
    data = {
        "name": "photos", "train": 10, "validation": 10, "test": 1000, "classes": 10, "class_names": list("abcdefghij"),
        "image_px": [8, 8], "channels": 3, "skipped": 0, "fingerprint": "0",
    }  # fmt: skip
    return parse_results({
        "format": 1, "deitkit": "0", "created": "2026-11-26", "recipe": {"name": "photos"}, "dataset": data,
        "teacher": card, "teachers": [card], "seeds": list(range(seeds)), "rows": [row], "winner": "hard/class",
    })  # fmt: skip


def difference(mean: float, half: float, p: float) -> Difference:
    return Difference(mean, (mean - half, mean + half), p, "McNemar")


@pytest.mark.parametrize(
    ("found", "own", "other", "words"),
    [
        (difference(-0.05, 0.01, 1e-6), SMALL, LARGE,
         "Keep the teacher timm/resnet18 unless speed and size count more than 5.0 points of accuracy."),
        (difference(-0.05, 0.01, 1e-6), LARGE, SMALL,
         "Keep the teacher timm/resnet18: hard/class is 5.0 points less accurate, slower and larger."),
        (difference(0.03, 0.01, 1e-6), LARGE, SMALL,
         "Use hard/class instead of the teacher timm/resnet18 unless speed and size count more than that: it is 3.0 "
         "points more accurate."),
        (difference(0.03, 0.01, 1e-6), SMALL, LARGE,
         "Use hard/class instead of the teacher timm/resnet18: it is 3.0 points more accurate."),
        (difference(-0.002, 0.01, 0.7), SMALL.model_copy(update={"milliseconds": 12.0}), LARGE,
         "hard/class may replace the teacher timm/resnet18 where size counts more than speed: it is as accurate within "
         "chance."),
        (difference(-0.002, 0.01, 0.7), SMALL, LARGE,
         "Use hard/class instead of the teacher timm/resnet18 for its speed and size: it is as accurate within "
         "chance."),
        (difference(-0.002, 0.01, 0.7), LARGE, SMALL,
         "Keep the teacher timm/resnet18: hard/class is as accurate within chance, and neither faster nor smaller."),
        (difference(-0.002, 0.06, 0.9), SMALL, LARGE,
         "The 1,000 test images do not decide between hard/class and the teacher timm/resnet18: its accuracy may be "
         "6.2 points lower or 5.8 higher; more test images would tell more."),
        (difference(-0.05, 1.2, 0.7), SMALL, LARGE,
         "The 1,000 test images do not decide between hard/class and the teacher timm/resnet18: its accuracy may be "
         "85.0 points lower or 15.0 higher; more test images would tell more."),
        (difference(-0.0275, 0.0225, 0.09), SMALL, LARGE,
         "The 1,000 test images do not decide between hard/class and the teacher timm/resnet18: its accuracy may be "
         "0.5 to 5.0 points lower; more test images would tell more."),
    ],
)  # fmt: skip
def test_the_advice_weighs_accuracy_against_speed_and_size(
    found: Difference, own: Cost, other: Cost, words: str
) -> None:
    assert advice(results_with(found, own, other)).startswith(words)


def test_of_several_seeds_more_of_them_would_tell_more() -> None:
    text = advice(results_with(difference(-0.002, 0.06, 0.9), seeds=2, top1=[0.79, 0.81], validation_top1=[0.8, 0.8]))
    assert text.startswith("2 seeds on 1,000 test images do not decide between hard/class and the teacher")
    assert "5.8 higher; more seeds or test images would tell more." in text


def test_seeds_do_not_replace_test_images() -> None:
    over_seeds = Difference(-0.02, (-0.025, -0.015), 1e-4, "paired t", ci95_new_images=(-0.05, 0.01))
    several = {"seeds": 3, "top1": [0.8] * 3, "validation_top1": [0.8] * 3}
    assert advice(results_with(over_seeds, LARGE, SMALL, **several)).startswith(
        "3 seeds on 1,000 test images do not decide between hard/class and the teacher timm/resnet18: its accuracy may "
        "be 5.0 points lower or 1.0 higher; more test images would tell more."
    )
    sure = replace(over_seeds, ci95_new_images=(-0.035, -0.005))
    assert "2.0 points less accurate" in advice(results_with(sure, LARGE, SMALL, **several))
    near = Difference(-0.009, (-0.012, -0.006), 1e-5, "paired t", ci95_new_images=(-0.019, 0.001))
    assert advice(results_with(near, **several)).startswith(
        "Use hard/class instead of the teacher timm/resnet18 for its speed and size: it is 0.9 points less accurate on "
        "these test images, which chance in their choice may explain."
    )
    above = Difference(0.015, (0.01, 0.02), 1e-5, "paired t", ci95_new_images=(-0.002, 0.032))
    assert "hard/class is 1.5 points more accurate on these" in advice(results_with(above, LARGE, SMALL, **several))


def test_a_teacher_that_is_better_on_larger_images_is_told() -> None:
    found = results_with(difference(-0.05, 0.01, 1e-6))
    assert found.teacher is not None
    for own, told in ((0.94, True), (0.89, False)):
        card = {"own_px_top1": own, "view_px_top1": 0.88, "image_px": 224}
        text = advice(found.model_copy(update={"teacher": found.teacher.model_copy(update=card)}))
        words = "The teacher was judged on the students' 8 px; on images of its own 224 px it scores 94.0 % instead of"
        assert (words in text) is told


def test_of_a_set_without_a_test_split_folds_would_tell_more() -> None:
    found = results_with(difference(-0.002, 0.06, 0.9))
    divided = found.model_copy(update={"dataset": found.dataset.model_copy(update={"divided": True})})
    assert "5.8 higher; more test images would tell more; --folds 5 tests on every image once. " in advice(divided)
    assert "--folds" not in advice(found)
    others = ({"data": {"folds": 2}}, {"model": {"checkpoint": "photos.pth"}}, {"data": {"test_images": 100}})
    for recipe in others:  # is one, cannot be, or would not test on every image
        assert "more test images would tell more. " in advice(divided.model_copy(update={"recipe": recipe}))
    trained = divided.teachers[0].model_copy(update={"fit": "none"})  # elsewhere, and maybe on any of these images
    assert "--folds" not in advice(divided.model_copy(update={"teachers": (trained,)}))
    empty = {"data": {"folds": None}, "model": {"checkpoint": None}}
    assert "--folds" in advice(divided.model_copy(update={"recipe": empty}))


def test_the_advice_names_times_and_sizes() -> None:
    text = advice(results_with(difference(-0.05, 0.01, 1e-6)))
    assert (
        "hard/class takes 2 ms for an image instead of 9 on this machine (4.5 times as fast), and its file is 1 MB"
        in text
    )
    slower = advice(results_with(difference(-0.05, 0.01, 1e-6), LARGE, SMALL))
    assert "takes 9 ms for an image instead of 2 on this machine (4.5 times as long)" in slower
    for milliseconds in (8.7, 9.3):
        near = LARGE.model_copy(update={"milliseconds": milliseconds})
        assert "on this machine (about as long)" in advice(results_with(difference(-0.05, 0.01, 1e-6), near, LARGE))


def test_a_corrected_p_value_decides() -> None:
    sure, unsure = Difference(-0.03, (-0.05, -0.01), 0.03, "McNemar"), Difference(-0.03, (-0.05, -0.01), 0.03, "x", 0.2)
    assert "unless" in advice(results_with(sure))
    assert "do not decide" in advice(results_with(unsure))


def test_the_advice_is_by_balanced_accuracy_where_the_winner_was_chosen_by_it() -> None:
    """Less accurate than the teacher, and far better on the rare classes."""
    plain, balanced = difference(-0.055, 0.01, 1e-6), difference(0.3, 0.05, 1e-6)
    results = results_with(plain, balanced_differences={"teacher": asdict(balanced)})
    assert "unless speed and size count more than 5.5 points of accuracy" in advice(results)
    by_balance = results.model_copy(update={"recipe": {"compare": {"by": "balanced"}}})
    assert advice(by_balance).startswith(
        "Use hard/class instead of the teacher timm/resnet18: it is 30.0 points higher in balanced accuracy."
    )


def test_a_model_that_guesses_replaces_nothing_and_without_a_cnn_there_is_no_advice() -> None:
    found = difference(-0.002, 0.01, 0.7)
    assert advice(results_with(found, balanced_accuracy=0.1)).endswith(
        "1,000 test images do not show hard/class to be better than chance."
    )
    guesses = results_with(found).teachers[0].model_copy(update={"test_balanced": 0.1})
    both = results_with(found, balanced_accuracy=0.1).model_copy(update={"teacher": guesses})
    words = (
        "Use neither hard/class nor the teacher timm/resnet18: 1,000 test images do not show either to be better than"
    )
    assert advice(both) == f"{words} chance."
    nearly = both.model_copy(update={"rows": (both.rows[0].model_copy(update={"balanced_accuracy": 0.105}),)})
    assert advice(nearly) == f"{words} chance.", "more than a constant answer, but not significantly"
    text = advice(results_with(found).model_copy(update={"teacher": guesses}))
    assert (
        text
        == "Use hard/class instead of the teacher timm/resnet18: it alone is better than chance on 1,000 test images."
    )
    few = results_with(difference(0.09, 0.3, 1.0)).model_copy(update={"teacher": guesses})
    assert advice(few).startswith("The 1,000 test images do not decide between hard/class and the teacher")
    assert advice(results_with(found, cost=None)) == ""
    assert advice(results_with(found).model_copy(update={"teacher": None})) == ""
    assert advice(results_with(found).model_copy(update={"winner": None})) == ""


@pytest.mark.reports
def test_every_model_of_a_run_is_measured(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny_recipe("methods=[none, token-hard]", "baseline.name=cifar/resnet20", "train.ema_decay=0.9")
    results = compare(recipe, tmp_path / "run", watcher=Watcher())
    for row in results.rows:
        assert row.cost is not None, row.row
        assert row.cost.file_bytes == (tmp_path / "run/seed-0" / row.folder_name / "model.safetensors").stat().st_size
        assert 0 < row.cost.milliseconds_in_batch < 10_000
        assert 0 < row.cost.milliseconds < 10_000
    costs = {row.row: row.cost for row in results.rows}
    assert costs["token-hard/class"] == costs["token-hard/joint"]
    assert results.teachers[0].cost is not None
    assert results.teacher is not None
    assert results.teacher.cost == results.teachers[0].cost
    assert results.advice == advice(results)
    assert results.dataset.divided is True  # the digits have no test split
    names = [point.name for point in cost_points(results, ())]
    assert names == ["none", "token-hard", "cnn-baseline", "teacher cifar/resnet20"]
    assert (tmp_path / "run/cost.svg").exists()
    page = (tmp_path / "run/report.html").read_text()
    assert 'id="cost"' in page


def test_names_in_the_cost_chart_are_escaped() -> None:
    results = results_with(difference(-0.05, 0.01, 1e-6))
    hostile = results.teachers[0].model_copy(update={"name": "<img src=x>"})
    chart = cost_chart(results.model_copy(update={"teacher": hostile}), ())
    assert chart is not None
    assert "<img" not in str(chart)


@pytest.mark.parametrize("by_class", [(500, 500), (900, 100), (990, 10), (40, 30, 20, 10)])
def test_classes_of_unequal_size_do_not_make_a_guess_look_better_than_chance(by_class: tuple[int, ...]) -> None:
    generator, classes, images = np.random.default_rng(0), len(by_class), sum(by_class)
    hits = [generator.binomial(count, 1 / classes, 4000) / count for count in by_class]
    balanced = np.mean(hits, axis=0)
    found = np.mean([not _guesses(value, _equal_images(images, by_class), classes) for value in balanced])
    assert found < 0.075, "of 5 %, and what rounding to whole images adds"
    assert not _guesses(0.9, _equal_images(images, by_class), classes)


def test_of_equal_classes_all_test_images_count() -> None:
    assert _equal_images(1000, (100,) * 10) == _equal_images(1000, None) == 1000


def test_the_diamond_is_the_teacher_and_no_student_of_equal_folds() -> None:
    results = results_with(difference(-0.05, 0.01, 1e-6), top1_ci95=None)
    chart = cost_chart(results, ())
    assert chart is not None
    assert [trace["marker"]["symbol"] for trace in chart["data"]] == ["circle", "diamond"]


def test_a_long_name_of_a_teacher_leaves_room_for_the_chart() -> None:
    results = results_with(difference(-0.05, 0.01, 1e-6))
    long = results.teachers[0].model_copy(update={"name": "a/very/long/way/to/the/folder/of/a/teacher/runs/first"})
    named = results.model_copy(update={"teacher": long, "teachers": (long,)})
    assert cost_points(named, ())[-1].name == "teacher a/very/long/way/to/t…/teacher/runs/first"
    several = results.model_copy(update={"teacher": long, "teachers": (long, long, long)})
    assert cost_points(several, ())[-1].name == "mean of 3 teachers"
