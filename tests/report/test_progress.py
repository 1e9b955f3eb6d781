"""``deitkit progress``: how far the trainings of a run are, and how they stand beside another run."""

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from deitkit.cli.main import app
from deitkit.errors import CheckpointError
from deitkit.report.progress import progress_of, read_trainings, running_trainings
from deitkit.run.folder import locked
from deitkit.run.metrics import EpochMetrics, write_metrics


def make_lines(student: str, accuracies: list[float], seed: int = 0, epochs: int = 4) -> list[EpochMetrics]:
    """Epochs of 100 images at 50 images/s with this student alone, at 20 images/s with all: 5 s each."""
    return [
        EpochMetrics(
            seed=seed,
            student=student,
            epoch=epoch,
            epochs=epochs,
            train_loss=1 / epoch,
            validation={"class": 0.0, "joint": accuracy},
            images_per_second=50.0,
            seconds=2.0,
            cohort_images_per_second=20.0,
        )
        for epoch, accuracy in enumerate(accuracies, start=1)
    ]


def write_run(folder: Path, *lines: EpochMetrics) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_metrics(lines, folder)
    return folder


def test_a_training_stands_beside_the_same_epoch_of_the_same_student() -> None:
    reference = [*make_lines("soft", [0.3, 0.5, 0.6, 0.7]), *make_lines("soft", [0.3, 0.6, 0.6, 0.7], seed=1)]
    lines = [*make_lines("soft", [0.2, 0.4]), *make_lines("none", [0.1, 0.2, 0.3, 0.4])]
    running, alone = progress_of(lines, reference, {(0, "soft"), (0, "none")})
    assert (running.epoch, running.epochs, running.is_done) == (2, 4, False)
    assert running.validation == 0.4
    assert running.reference == pytest.approx(0.55)
    assert running.difference == pytest.approx(-0.15)
    assert running.seconds_left == pytest.approx(2 * 5.0)
    assert alone.is_done
    assert (alone.reference, alone.difference) == (None, None)


def test_a_training_that_did_not_reach_its_end_has_stopped() -> None:
    lines = [*make_lines("soft", [0.2, 0.4]), *make_lines("none", [0.1, 0.2, 0.3, 0.4])]
    stopped, done = progress_of(lines)
    assert (stopped.has_stopped, stopped.seconds_left) == (True, None)
    assert (done.has_stopped, done.is_done) == (False, True)
    (running, _) = progress_of(lines, running={(0, "soft")})
    assert (running.has_stopped, running.seconds_left) == (False, 10.0)
    (unknown,) = progress_of([line.model_copy(update={"epochs": None}) for line in make_lines("soft", [0.2])])
    assert not unknown.has_stopped, "how many epochs it has is not recorded"


@pytest.mark.parametrize("used", [".", "units", "seed-0/soft"])
def test_a_training_runs_as_long_as_a_process_holds_the_lock_of_its_run_or_its_own(tmp_path: Path, used: str) -> None:
    run = write_run(tmp_path / "run", *make_lines("soft", [0.2]))
    write_run(run / "seed-0" / "none", *make_lines("none", [0.1]))
    (run / "results.json").write_text("{}", encoding="utf-8")  # of methods that were trained before
    assert running_trainings(run) == set()
    with locked(run / used):
        assert running_trainings(run) == ({(0, "soft")} if "soft" in used else {(0, "soft"), (0, "none")})
        shown = CliRunner().invoke(app, ["progress", str(run)], env={"COLUMNS": "100"}).output
        assert next(line for line in shown.splitlines() if "soft" in line).split()[-2:] == ["15", "s"]
        assert ("stopped" in shown) == ("soft" in used)  # the other one then
    shown = CliRunner().invoke(app, ["progress", str(run)], env={"COLUMNS": "100"}).output
    assert next(line for line in shown.splitlines() if "soft" in line).split()[-1] == "stopped"
    assert "--resume continues it" in shown
    with locked(run / used):  # which looking did not take for good
        pass


def test_the_trainings_of_a_fold_and_of_a_variant_run_with_their_run_or_their_unit(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for home in ("folds/1", "folds/2", "variants/wide", "teacher"):
        write_run(run / home, *make_lines("hard", [0.3]))
    with locked(run / "folds" / "2"), locked(run / "variants" / "wide"):
        assert running_trainings(run) == {(2, "hard"), (0, "wide: hard")}
    with locked(run):
        assert running_trainings(run) == {(0, "hard"), (1, "hard"), (2, "hard"), (0, "wide: hard")}


def test_an_epoch_beyond_the_reference_has_no_reference() -> None:
    (training,) = progress_of(make_lines("soft", [0.2, 0.4, 0.5]), make_lines("soft", [0.3, 0.5]))
    assert training.reference is None


def test_a_run_that_still_trains_is_read_from_wherever_its_metrics_lie(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", *make_lines("soft", [0.2]))  # of the cohort that trains
    write_run(run / "teacher", *make_lines("teacher", [0.8]))
    write_run(run / "seed-0" / "none", *make_lines("none", [0.1, 0.2]))  # of a finished student
    write_run(run / "seed-0" / "soft", *make_lines("soft", [0.2]))  # the same line twice
    write_run(run / "folds" / "10", *make_lines("hard", [0.3]))
    write_run(run / "folds" / "2" / "seed-0" / "hard", *make_lines("hard", [0.3]))
    write_run(run / "variants" / "wide", *make_lines("hard", [0.4]))
    found = [(training.student, training.seed, training.epoch) for training in progress_of(read_trainings(run))]
    assert found == [
        ("teacher", 0, 1),
        ("soft", 0, 1),
        ("none", 0, 2),
        ("hard", 2, 1),
        ("hard", 10, 1),
        ("wide: hard", 0, 1),
    ]


def test_a_folder_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a run folder: name the one that `deitkit compare` printed"):
        read_trainings(tmp_path / "nowhere")


def test_the_command_prints_a_table_and_draws_the_curves(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", *make_lines("token-hard", [0.2, 0.4]), *make_lines("none", [0.1, 0.25]))
    reference = write_run(tmp_path / "reference", *make_lines("token-hard", [0.2, 0.45, 0.6, 0.7]))
    command = ["progress", str(run), "--reference", str(reference)]
    with locked(run):
        shown = CliRunner().invoke(app, command, env={"COLUMNS": "100"})
    assert shown.exit_code == 0, shown.output
    cells = next(line.split() for line in shown.output.splitlines() if "token-hard" in line)
    assert cells == ["token-hard", "0", "2/4", "0.500", "40.00", "45.00", "-5.00", "10", "s"]
    cells = next(line.split() for line in shown.output.splitlines() if "none" in line)
    assert cells == ["none", "0", "2/4", "0.500", "25.00", "–", "–", "10", "s"]
    with Image.open(run / "progress.png") as picture:
        with_reference = picture.convert("RGB").tobytes()
    values = json.loads(CliRunner().invoke(app, [*command, "--json"]).output)
    assert [value["validation"] for value in values] == [0.4, 0.25]
    assert CliRunner().invoke(app, command[:2]).exit_code == 0
    with Image.open(run / "progress.png") as picture:
        assert picture.convert("RGB").tobytes() != with_reference


def test_a_run_without_an_epoch_says_so(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").touch()
    shown = CliRunner().invoke(app, ["progress", str(tmp_path)])
    assert shown.exit_code == 0
    assert "has finished an epoch yet" in shown.output
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
