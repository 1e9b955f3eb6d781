"""Recorded answers: they teach the same as the teacher, make it unnecessary, and are refused when they are stale."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import CPU_FP32, striped_dataset
from deitkit.comparison.compare import compare
from deitkit.comparison.prepare import dry_run
from deitkit.data.dataset import Dataset, load_dataset
from deitkit.data.split import CropSource
from deitkit.errors import RecipeError, TeacherError
from deitkit.models.classifier import Classifier
from deitkit.models.cnn import CifarResNet
from deitkit.recipe.load import load_recipe
from deitkit.recipe.schema import Recipe
from deitkit.run.observer import Watcher
from deitkit.system.device import Precision
from deitkit.teachers.frozen import FrozenTeacher, Teachers
from deitkit.teachers.logit_cache import LogitCache, _fingerprint, kept_logits, open_logit_cache


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DEITKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def teacher(seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    data = striped_dataset()
    return Classifier(CifarResNet(20, classes=3), mean=data.mean, std=data.std).eval()


def answers(classifier: Classifier, **changes: Any) -> LogitCache:
    settings: dict[str, Any] = {"steps": 2, "batch": 4, "classes": 3, "device": CPU_FP32.device}
    return LogitCache({"teacher": _fingerprint(classifier)}, **(settings | changes))


def results(recipe: Recipe, folder: Path) -> list[Any]:
    rows = compare(recipe, folder, watcher=Watcher()).rows
    return [(row.row, row.top1) for row in rows]


def count_questions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    asked: list[int] = []
    forward = FrozenTeacher.forward

    def counted(self: FrozenTeacher, view: torch.Tensor) -> torch.Tensor:
        asked.append(len(view))
        return forward(self, view)

    monkeypatch.setattr(FrozenTeacher, "forward", counted)
    return asked


def test_a_second_comparison_on_the_same_views_asks_only_to_check(
    tiny_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = count_questions(monkeypatch)
    recipe = tiny_recipe("teacher.cache=true", "methods=[none, soft, hard]")
    first = results(recipe, tmp_path / "first")
    steps = 64 // 16 * 2
    assert len(asked) == steps
    assert results(recipe, tmp_path / "second") == first
    assert len(asked) == steps + 2  # the first view of each epoch
    weights = [load_file(tmp_path / run / "seed-0" / "soft" / "model.safetensors") for run in ("first", "second")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_other_methods_of_the_same_views_use_them_and_other_views_do_not(
    tiny_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = count_questions(monkeypatch)
    compare(tiny_recipe("teacher.cache=true", "methods=[hard]"), tmp_path / "first", watcher=Watcher())
    before = len(asked)
    compare(tiny_recipe("teacher.cache=true", "methods=[token-soft]"), tmp_path / "second", watcher=Watcher())
    assert len(asked) == before + 2
    changed = tiny_recipe("teacher.cache=true", "methods=[hard]", "augment.flip=0.1")
    compare(changed, tmp_path / "third", watcher=Watcher())
    assert len(asked) == before + 2 + 8


def test_what_is_kept_is_rounded_and_comes_back_bit_for_bit() -> None:
    first, second = answers(teacher()), answers(teacher())
    given = [torch.randn(4, 3) for _ in range(2)]
    assert first.find(0, 0) is None
    kept = [first.keep(0, step, answer) for step, answer in enumerate(given)]
    for step in range(2):
        found = second.find(0, step)
        assert found is not None
        assert torch.equal(found, kept[step])
        assert torch.allclose(found, given[step], rtol=1e-3)
    assert second.find(1, 0) is None


@pytest.mark.parametrize(("classes", "top"), [(10, 3), (10, 9), (40_000, 5)])
def test_the_largest_logits_are_kept_with_the_share_of_the_rest(classes: int, top: int) -> None:
    first, second = (answers(teacher(), classes=classes, top=top) for _ in range(2))
    given = [torch.randn(4, classes) * 3 for _ in range(2)]
    first.find(0, 0)
    kept = [first.keep(0, step, answer) for step, answer in enumerate(given)]
    for step, logits in enumerate(given):
        found = second.find(0, step)
        assert found is not None
        assert torch.equal(found, kept[step])
        largest = logits.topk(top)
        assert torch.equal(found.gather(1, largest.indices[:, :1])[:, 0], found.amax(1)), "the decision, up to ties"
        torch.testing.assert_close(found.gather(1, largest.indices), largest.values, rtol=1e-3, atol=2e-3)
        torch.testing.assert_close(found.logsumexp(1), logits.logsumexp(1), rtol=2e-3, atol=4e-3)
        rest = found.scatter(1, largest.indices, float("nan"))
        assert torch.equal(rest.nan_to_num(-99).amax(1), rest.nan_to_num(99).amin(1)), "the others are equal"
    with pytest.raises(RecipeError, match=r"teacher\.cache_top=10 is not below the 10 classes"):
        kept_logits(load_recipe("digits", ["teacher.cache=true", "teacher.cache_top=10"]), 10)


def test_a_comparison_with_the_largest_logits_repeats_itself_from_the_disk(
    tiny_recipe: Any, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe("methods=[soft, token-hard]", "teacher.cache=true", "teacher.cache_top=2")
    first = results(recipe, tmp_path / "one")
    (whole,) = (cache / "answers").glob("*")
    assert all(path.stat().st_size < 64 * (2 * 4 + 2) + 400 for path in whole.iterdir())
    asked = count_questions(monkeypatch)
    assert results(recipe, tmp_path / "two") == first
    assert sum(asked) < 64 * 2


def test_an_epoch_that_was_not_recorded_to_its_end_is_not_written() -> None:
    first = answers(teacher())
    first.find(0, 1)
    first.keep(0, 1, torch.randn(4, 3))  # resumed in the middle
    assert answers(teacher()).find(0, 0) is None


def test_other_views_have_a_folder_of_their_own(tiny_recipe: Any) -> None:
    data, classifier = load_dataset(tiny_recipe().data), teacher()

    def folder(*overrides: str, dataset: Dataset = data, seed: int = 0, precision: Precision = CPU_FP32) -> Path:
        recipe = tiny_recipe(*overrides)
        return open_logit_cache(recipe, dataset, Teachers([FrozenTeacher(classifier)]), seed, precision).folder

    unlabelled = replace(data, unlabelled=data.test)
    rest = "data.unlabelled=rest"
    others = [
        folder("augment.flip=0.1"),
        folder("train.batch_size=8"),
        folder("train.repeats=2"),
        folder("train.epoch_repeats=2"),
        folder("data.sampling=balanced"),
        folder("teacher.cache=true", "teacher.cache_top=2"),
        folder(seed=1),
        folder(precision=Precision(CPU_FP32.device, torch.bfloat16)),
        folder(dataset=replace(data, fingerprint="other")),
        folder(rest, dataset=unlabelled),
        folder(rest, "train.unlabelled_batch_size=3", dataset=unlabelled),
        folder(rest, dataset=replace(data, unlabelled=data.train[: len(data.test)])),
    ]
    assert len({folder(), *others}) == 13
    assert folder() == folder("methods=[hard]", "train.epochs=9", "model.depth=1"), "students do not matter"


def test_another_teacher_has_a_folder_of_its_own() -> None:
    other = teacher()
    with torch.no_grad():
        other.model.bn1.running_mean[0] += 1e-3
    larger, joint = teacher(), teacher()
    larger.image_px, joint.readout = 16, "joint"
    assert len({answers(each).folder for each in (teacher(), other, larger, joint)}) == 4
    assert answers(teacher()).folder == answers(teacher()).folder


def test_a_damaged_recording_is_as_good_as_none() -> None:
    first = answers(teacher())
    first.find(0, 0)
    for step in range(2):
        first.keep(0, step, torch.randn(4, 3))
    (path,) = first.folder.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-5])
    assert answers(teacher()).find(0, 0) is None


def test_a_stale_recording_is_refused_with_its_folder(
    tiny_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    recipe = tiny_recipe("teacher.cache=true", "methods=[hard]")
    compare(recipe, tmp_path / "first", watcher=Watcher())
    for path in (cache / "answers").rglob("*.safetensors"):
        recorded = load_file(path)["answers"]
        save_file({"answers": recorded.flip(1).contiguous()}, path)
    with pytest.raises(TeacherError, match=r"stale.*delete that folder, or set teacher.cache=false"):
        compare(recipe, tmp_path / "second", watcher=Watcher())


def test_a_full_disk_is_told_before_anything_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deitkit.teachers.logit_cache.shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
    first = answers(teacher())
    first.find(0, 0)
    with pytest.raises(TeacherError, match=r"teacher\.cache needs"):
        first.keep(0, 0, torch.randn(4, 3))


def test_other_crops_of_images_without_labels_are_other_views(tiny_recipe: Any) -> None:
    recipe = tiny_recipe("methods=[hard]", "augment.crop=random-resized", "data.unlabelled=rest",
                         "train.unlabelled_batch_size=4")  # fmt: skip
    data = striped_dataset()
    without = replace(data.train, labels=torch.full_like(data.train.labels, -1))
    sizes = torch.tensor([[16, 16]]).repeat(len(without), 1)
    folders = set()
    for source in (None, CropSource(None, sizes), CropSource(torch.zeros(len(without), 3, 32, 32).byte(), sizes)):
        own = replace(data, unlabelled=replace(without, crop_source=source))
        folders.add(open_logit_cache(recipe, own, Teachers([FrozenTeacher(teacher())]), 0, CPU_FP32).folder)
    assert len(folders) == 3


def test_the_largest_logits_are_refused_where_a_loss_needs_all(tiny_recipe: Any) -> None:
    """A z-score changes with the logits that become equal; a softmax hardly does."""
    data, more = load_dataset(tiny_recipe().data), ("teacher.cache=true", "teacher.cache_top=3")
    with pytest.raises(RecipeError, match="loss of standardised and token-standardised depends on all logits: drop it"):
        dry_run(tiny_recipe("methods=[none, soft, standardised, token-standardised]", *more), data, CPU_FP32)
    dry_run(tiny_recipe("methods=[none, soft, hard, dkd, dist, consistent]", *more), data, CPU_FP32)
    dry_run(tiny_recipe("methods=[standardised]", more[0]), data, CPU_FP32)


def test_teachers_that_share_a_cache_keep_as_many_logits(tiny_recipe: Any) -> None:
    def kept(*each: str) -> int | None:
        return kept_logits(
            tiny_recipe(f"teachers=[{', '.join(f'{{name: cifar/resnet20, {one}}}' for one in each)}]"), 10
        )

    said = r"teachers\.0\.cache_top=null, teachers\.1\.cache_top=5 differ, but the mean of the teachers is cached"
    with pytest.raises(RecipeError, match=said):
        kept("cache: true", "cache: true, cache_top: 5")
    assert kept("cache: true, cache_top: 5", "cache: true, cache_top: 5") == 5
    assert kept("cache: false", "cache: true, cache_top: 5") == 5
