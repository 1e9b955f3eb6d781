"""`deitkit verify` on a real run, a small one: whole, with a figure changed, with a student lost, and on other data."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from conftest import TINY
from deitkit.analyze.analysis import analyze_run
from deitkit.cli.main import app
from deitkit.comparison.compare import compare
from deitkit.comparison.verify import TOLERANCE_ELSEWHERE, verify_run
from deitkit.errors import CheckpointError
from deitkit.recipe.load import load_recipe
from deitkit.run.observer import Watcher
from deitkit.run.results import read_results


def test_a_table_holds_until_a_student_or_the_data_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    overrides = [*TINY, "methods=[none, token-hard]", "train.epochs=1", "train.precision=fp32", "device=cpu"]
    results = compare(load_recipe("digits", overrides), run, watcher=Watcher())
    # It measures on the run's device, whatever else there is.
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device("cuda"))

    def verified() -> tuple[int, dict]:
        outcome = CliRunner().invoke(app, ["verify", str(run), "--json"])
        return outcome.exit_code, json.loads(outcome.stdout)

    code, found = verified()
    assert code == 0
    assert found["holds"]
    assert found["tolerance"] == 0
    assert [(row["row"], row["measured"]) for row in found["rows"]] == [
        (row.row, pytest.approx(row.top1[0])) for row in results.rows
    ]
    told = json.loads((run / "results.json").read_text())
    recorded = told["rows"][0]["top1"][0]
    told["rows"][0]["top1"][0] += 0.01  # one image of a hundred
    (run / "results.json").write_text(json.dumps(told))
    code, found = verified()
    assert code == 1
    assert [row["row"] for row in found["rows"] if row["holds"] is False] == ["none/class"]
    here = told["machine"]
    for change, holds in ((0.02, False), (0.01, True)):  # on another machine, which rounds differently: one image
        told["rows"][0]["top1"][0] = recorded + change
        (run / "results.json").write_text(json.dumps(told))
        with monkeypatch.context() as patch:
            patch.setattr("deitkit.comparison.verify.describe_machine", lambda _: here | {"processor": "another"})
            code, found = verified()
        assert (code == 0, found["holds"], found["tolerance"]) == (holds, holds, 0.01)
    told["rows"][0]["top1"][0] = recorded
    (run / "results.json").write_text(json.dumps(told))
    (run / "seed-0" / "none" / "model.json").rename(tmp_path / "model.json")
    code, found = verified()
    assert code == 1, "a student that is gone"
    gone = run / "seed-0" / "none" / "model.json"
    assert found["problems"] == [f"{gone} is missing: copy the student's folder back into its run"]
    assert str(gone) in CliRunner().invoke(app, ["verify", str(run)]).stdout
    (tmp_path / "model.json").rename(run / "seed-0" / "none" / "model.json")
    assert found["same_teachers"]
    teacher = run / "teacher" / "model.safetensors"
    weights = teacher.read_bytes()
    assert told["teacher"]["sha256"] == hashlib.sha256(weights).hexdigest()
    teacher.write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    code, found = verified()
    assert (code, found["same_teachers"]) == (1, False)
    assert found["problems"] == [f"{teacher} has other weights than the run's teacher: restore them"]
    teacher.unlink()
    code, found = verified()
    assert (code, found["same_teachers"]) == (1, False)
    assert found["problems"] == [f"{teacher} is missing: copy the teacher's folder back into its run"]
    teacher.write_bytes(weights)
    told["dataset"]["fingerprint"] = "0" * 64
    (run / "results.json").write_text(json.dumps(told))
    code, found = verified()
    assert (code, found["same_data"]) == (0, True), "the same pixels, as of files that were copied elsewhere"
    environment = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps(environment | {"splits": "0" * 64}))
    code, found = verified()
    assert (code, found["same_data"]) == (1, False)


def test_images_are_read_as_when_the_run_began_however_much_memory_is_free(
    tmp_path: Path, write_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = write_images(tmp_path / "photos")
    own = ["data.train_images=null", "data.test_images=null", "data.image_px=8", f"data.name=folder:{photos}"]
    crops = "augment.crop=random-resized"  # of the files where they are streamed, else of copies

    def run(*methods: str, resume: bool) -> None:
        fields = [*TINY, *own, f"methods=[{', '.join(methods)}]", "train.epochs=1", crops]
        compare(load_recipe("digits", fields), tmp_path / "run", watcher=Watcher(), resume=resume)

    run("none", resume=False)
    (tmp_path / "run" / "analysis").mkdir()
    monkeypatch.setattr("deitkit.data.survey._MOST_MEMORY", 0.0)  # everything that may be streamed now is
    assert verify_run(tmp_path / "run", Watcher()).holds
    analyze_run(tmp_path / "run", images=0, watcher=Watcher())
    run("none", "distillation-only", resume=True)
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["streamed"] is False
    assert verify_run(tmp_path / "run", Watcher()).holds


def test_each_student_is_held_to_the_machine_on_which_it_was_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    fields = [*TINY, "train.epochs=1", "train.precision=fp32", "device=cpu"]
    elsewhere = {"processor": "another", "device": "cpu"}
    with monkeypatch.context() as patch:
        patch.setattr("deitkit.comparison.seed_run.machine_of", lambda _: elsewhere)
        compare(load_recipe("digits", [*fields, "methods=[none]"]), run, watcher=Watcher())
    compare(load_recipe("digits", [*fields, "methods=[none, class-only]"]), run, watcher=Watcher(), resume=True)
    told = json.loads((run / "results.json").read_text())
    for row in told["rows"]:
        row["top1"][0] += TOLERANCE_ELSEWHERE
    (run / "results.json").write_text(json.dumps(told))
    found = verify_run(run, Watcher())
    assert {row.row: row.holds for row in found.rows} == {"none/class": True, "class-only/class": False}
    assert found.tolerance == 0.01, "one of a hundred images"


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("rows", 0, "top1_mean"), 0.5, "none/class: top1_mean is recorded as 0.5, and measured as"),
        (("rows", 1, "balanced_accuracy"), 0.5, "mean-pool-none/class: balanced_accuracy"),
        (("rows", 1, "top5", 0), 0.123, "mean-pool-none/class: top5"),
        (("rows", 1, "validation_top1", 0), 0.999, "mean-pool-none/class: validation_top1"),
        (("rows", 1, "differences", "labels", "mean"), 0.9, "differences.labels.mean is recorded as 0.9"),
        (("rows", 1, "differences", "labels", "p"), 1e-9, "differences.labels.p"),
        (("rows", 1, "differences", "labels", "ci95", 0), -0.99, "differences.labels.ci95"),
        (("winner",), "nobody", "the recorded winner is nobody, but the predictions make it"),
        (("verdict",), "All is well.", "the recorded verdict is not that of the predictions"),
    ],
)  # fmt: skip
def test_every_figure_that_follows_from_the_predictions_is_verified(
    place: tuple[str | int, ...], value: object, words: str, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    told = inner = json.loads((run / "results.json").read_text())
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (run / "results.json").write_text(json.dumps(told))
    found = verify_run(run, Watcher())
    assert not found.holds
    assert any(words in problem for problem in found.problems), found.problems


def test_a_winners_folder_with_another_students_weights_is_told(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    assert verify_run(run, Watcher()).holds
    row = read_results(run).winner
    assert row is not None
    other = next(name for name in ("none", "mean-pool-none") if name != row.partition("/")[0])
    shutil.copy(run / "seed-0" / other / "model.safetensors", run / "winner" / "model.safetensors")
    found = verify_run(run, Watcher())
    assert not found.holds
    assert f"has not the weights of {row} under any seed" in found.problems[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two students without a teacher, for one epoch."""
    run = tmp_path_factory.mktemp("verify") / "run"
    fields = [*TINY, "methods=[none, mean-pool-none]", "train.epochs=1", "train.precision=fp32", "device=cpu"]
    compare(load_recipe("digits", fields), run, watcher=Watcher())
    return run


def test_a_seed_without_any_model_is_told(tmp_path: Path) -> None:
    run = tmp_path / "run"
    compare(load_recipe("digits", [*TINY, "methods=[none]", "train.epochs=1"]), run, watcher=Watcher())
    (run / "seed-0" / "none" / "model.json").unlink()
    found = verify_run(run, Watcher())
    assert not found.holds
    (problem,) = found.problems
    assert "model.json is missing: copy the student's folder back into its run" in problem


def test_a_run_whose_images_moved_goes_on_and_is_verified(tmp_path: Path, write_images: Callable[..., Path]) -> None:
    photos, run = write_images(tmp_path / "photos"), tmp_path / "run"
    own = ["data.train_images=null", "data.test_images=null", "data.image_px=8", "train.epochs=1"]

    def start(methods: str, place: Path, **fields: bool) -> None:
        overrides = [*TINY, *own, f"data.name=folder:{place}", f"methods={methods}", "data.streaming=true"]
        compare(load_recipe("digits", overrides), run, watcher=Watcher(), **fields)

    start("[none]", photos)
    photos.rename(tmp_path / "moved")
    command = ["verify", str(run), "--data", f"folder:{tmp_path / 'moved'}"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    start("[none, hard]", tmp_path / "moved", resume=True)
    assert verify_run(run, Watcher()).holds
    other = write_images(tmp_path / "other", count=13)
    with pytest.raises(CheckpointError, match="was begun with other images or labels"):
        start("[none, hard]", other, resume=True)
    found = verify_run(run, Watcher(), data=f"folder:{other}")
    assert (found.holds, found.same_data) == (False, False)
