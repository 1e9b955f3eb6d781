"""A process that helps to train has the images and the run folder of the first one, or says that it has not."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from deitkit.comparison import worker
from deitkit.comparison.worker import load_same_images, require_prepared
from deitkit.data.dataset import Dataset, load_dataset
from deitkit.errors import CheckpointError, DataError
from deitkit.recipe.schema import Recipe
from deitkit.system.ranks import ALONE
from deitkit.training.shared import SharedTraining, announce, images_hash


class Radio:
    """The first of two processes, which keeps what it sends."""

    count = 2

    def __init__(self, refusal: str = "") -> None:
        self.refusal = refusal

    def broadcast(self, message: object) -> None:
        self.sent = message

    def agreed_refusal(self, refusal: str = "") -> str:
        return self.refusal


def announced(recipe: Recipe, dataset: Dataset, folder: Path, seed: int | None = 0) -> SharedTraining:
    """Return what a worker receives of a training."""
    radio = Radio()
    announce.__wrapped__(radio, recipe, dataset, folder, seed=seed, names=["none"])
    return SharedTraining.model_validate(radio.sent)


@pytest.mark.parametrize("seed", [0, None], ids=["students", "a teacher"])
def test_other_images_or_labels_are_refused(
    seed: int | None, tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe("methods=[none]")
    dataset = load_dataset(recipe.data)
    training = announced(recipe, dataset, tmp_path, seed)
    assert images_hash(load_same_images(training)[1]) == images_hash(dataset)
    labels = dataset.train.labels.roll(1)
    stale = replace(dataset, train=replace(dataset.train, labels=labels))
    monkeypatch.setattr(worker, "_load", lambda *_: stale)
    with pytest.raises(DataError, match=r"^data\.name=digits has other images or labels than for the first process"):
        load_same_images(training)


def test_a_teacher_that_trains_on_all_images_is_checked_on_these(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe("methods=[soft]", "teacher.all_images=true")
    dataset = load_dataset(recipe.data)
    everything = worker.load_teacher_images(recipe, dataset)
    assert len(everything.train) > len(dataset.train)
    training = announced(recipe, everything, tmp_path, None)
    of_run, images = load_same_images(training)
    assert (len(of_run.train), len(images.train)) == (len(dataset.train), len(everything.train))
    monkeypatch.setattr(worker, "load_teacher_images", lambda *_: dataset)
    with pytest.raises(DataError, match="other images or labels"):
        load_same_images(training)


def test_a_run_folder_that_a_machine_does_not_see_is_refused(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = tiny_recipe("methods=[soft]")
    dataset = load_dataset(recipe.data)
    training = announced(recipe, dataset, tmp_path / "run")
    for _ in range(2):  # without the folder, then without a teacher in it
        with pytest.raises(CheckpointError, match=r"the folder .*run of the first process is not here, or without its"):
            require_prepared(training)
        (tmp_path / "run" / "teacher").mkdir(parents=True, exist_ok=True)
    (tmp_path / "run" / "teacher" / "card.json").touch()
    require_prepared(training)
    require_prepared(announced(recipe, dataset, tmp_path / "run" / "teacher", None))


def test_the_first_process_ends_with_the_sentence_of_another(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, stripes: Dataset
) -> None:
    recipe = tiny_recipe("methods=[none]")
    with pytest.raises(DataError, match=r"^on node7: no such images$"):
        announce.__wrapped__(Radio("on node7: no such images"), recipe, stripes, tmp_path, seed=0, names=["none"])
    announce(ALONE, recipe, stripes, tmp_path, seed=0, names=["none"])
