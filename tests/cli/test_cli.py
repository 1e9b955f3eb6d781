"""Each kind of bad input, tried and answered by one sentence; and the commands that read a run."""

import io
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import deitkit
from conftest import TINY
from deitkit.cli.console import print_json

FAST = [*TINY, "methods=[none]", "train.epochs=1"]


Run = Callable[..., tuple[int, str, str]]


def refused(result: tuple[int, str, str], *words: str) -> None:
    """Check for exit code 2, one line that holds the words, and no traceback."""
    code, _, errors = result
    assert code == 2, result
    assert errors.startswith("error: "), errors
    assert len(errors.strip().splitlines()) == 1, errors
    assert "Traceback" not in errors
    for word in words:
        assert word in errors, errors


def test_importing_the_command_line_loads_no_heavy_library() -> None:
    script = "import sys, deitkit.cli.main\n"
    script += "print(sorted({'torch', 'torchvision', 'timm', 'matplotlib', 'plotly', 'jinja2'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_comparison_loads_no_drawing_library_before_it_draws() -> None:
    script = "import sys, deitkit.comparison.ablation, deitkit.report.table\n"
    script += "print(sorted({'matplotlib', 'plotly', 'jinja2'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_consoles_are_made_in_one_place() -> None:
    source = Path(deitkit.__file__).parent
    makers = [path for path in source.rglob("*.py") if "Console(" in path.read_text(encoding="utf-8")]
    assert makers == [source / "cli" / "console.py"]


def test_recipes_that_cannot_run(run: Run, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "run")
    refused(run("compare", "digits", "trian.epochs=3", *out), "trian", "did you mean train")
    refused(run("compare", "digits", "train.epochs=many", *out), "train.epochs='many'", "integer")
    refused(run("compare", "digist", *out), "did you mean digits")
    refused(run("verify", tmp_path, "--data", "folder:x"), "is not a run folder")
    refused(run("compare", "digits", "methods=[nome]", *out), "'nome' is not a method", "none")
    refused(run("compare", "digits", *FAST, "model.patch_px=3", *out), "patch_px=3", "8")
    assert not (tmp_path / "run" / "results.json").exists()


def test_a_field_that_an_option_gives_too_is_refused(run: Run, tmp_path: Path) -> None:
    compare = ("compare", "digits", "--out", tmp_path / "run")
    for option, field in (("--seeds 3", "seeds=[5]"), ("--folds 3", "data.folds=5")):
        words = f"{option} and {field} exclude each other: give one"
        refused(run(*compare, "train.epochs=no", *option.split(), field), words)


def test_images_smaller_than_a_patch(run: Run, tmp_path: Path) -> None:
    refused(run("compare", "digits", *FAST, "model.patch_px=16", "--out", tmp_path / "run"), "patch_px=16", "8")


def test_a_batch_larger_than_the_data(run: Run, tmp_path: Path) -> None:
    refused(
        run("compare", "digits", *FAST, "train.batch_size=65", "--out", tmp_path / "a"), "train.batch_size=65", "64"
    )


def test_missing_and_broken_data(run: Run, tmp_path: Path, write_images: Callable[..., Path]) -> None:
    plain = ["model.patch_px=4", "methods=[none]", "train.epochs=1", "data.train_images=null", "data.test_images=null",
             "train.batch_size=4"]  # fmt: skip

    def compare(folder: Path, *more: str) -> tuple[int, str, str]:
        out = tmp_path / f"run-{folder.name}"
        return run("compare", "digits", *TINY, *plain, f"data.name=folder:{folder}", *more, "--out", out)

    refused(compare(tmp_path / "nowhere"), "nowhere")
    empty = write_images(tmp_path / "empty")
    (empty / "train" / "eel").mkdir()
    refused(compare(empty), "eel")
    differing = write_images(tmp_path / "differing")
    (differing / "test" / "cat").rename(differing / "test" / "cow")
    refused(compare(differing), "cat", "cow")
    corrupt = write_images(tmp_path / "corrupt", count=40)
    (corrupt / "train" / "cat" / "3.png").write_bytes(b"\x89PNG truncated")
    refused(compare(corrupt, "data.corrupt=error"), "3.png")
    code, _, errors = compare(corrupt)
    assert code == 0, errors
    results = json.loads((tmp_path / "run-corrupt" / "results.json").read_text())
    assert results["dataset"]["skipped"] == 1
    assert "3.png" in results["notes"][0]


def test_teachers_that_must_not_teach(run: Run, tmp_path: Path) -> None:
    fast = [*TINY, "methods=[hard]", "teacher.allow_weak=false"]
    refused(
        run("compare", "digits", *fast, "teacher.fit=none", "--out", tmp_path / "chance"),
        "is not significantly above chance", "teacher.allow_weak=true",
    )  # fmt: skip
    refused(run("compare", "digits", *fast, "teacher.name=cifar/resnet57", "--out", tmp_path / "a"), "cifar/resnet56")
    refused(
        run("compare", "digits", *fast, f"teacher.checkpoint={tmp_path / 'x.pth'}", "--out", tmp_path / "b"), "x.pth"
    )


def test_folders_that_cannot_be_written(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(run("compare", "digits", *FAST, "--out", tmp_path / "file" / "run"), "cannot write", "--out")
    refused(run("compare", "digits", *FAST, "--out", tmp_path / "file"), "--out")
    too_long = tmp_path / ("a" * 300)
    refused(run("compare", "digits", *FAST, "--out", too_long), "cannot write into", "file name too long")
    refused(run("predict", too_long, "x.png"), "file name too long")
    refused(run("evaluate", too_long, "--data", "digits"), "file name too long")
    refused(run("convert", too_long, "--to", "ours", "--out", tmp_path / "out"), "file name too long")
    if os.geteuid() != 0:  # root may write anywhere
        locked = tmp_path / "locked"
        locked.mkdir()
        locked.chmod(stat.S_IRUSR | stat.S_IXUSR)
        refused(run("compare", "digits", *FAST, "--out", locked / "run"), "cannot write")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_one_sentence(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_open = Path.open

    def full(path: Path, mode: str = "r", *rest: object, **named: object):  # type: ignore[no-untyped-def]
        return (
            whole_open(Path("/dev/full"), mode)
            if path.name.endswith(".tmp")
            else whole_open(path, mode, *rest, **named)
        )

    monkeypatch.setattr(Path, "open", full)
    full_disk = run("compare", "digits", *FAST, "--out", tmp_path / "run")
    refused(full_disk, "no space left", "correct this, then start it again, a run with --resume")


def test_a_run_is_compared_evaluated_reported_and_used(run: Run, tmp_path: Path, write_images: Callable) -> None:
    photos = write_images(tmp_path / "photos", classes=("cat", "<b>dog&"), count=16)
    out = tmp_path / "run"
    code, text, errors = run(
        "compare", "digits", *TINY, "methods=[none, token-hard]", "model.patch_px=4", "train.epochs=2",
        "train.batch_size=8", "teacher.train.batch_size=8", "data.train_images=null", "data.test_images=null",
        f"data.name=folder:{photos}", "augment.crop=none", "teacher.augment.crop=none", "--out", out,
    )  # fmt: skip
    assert code == 0, errors
    assert "token-hard" in text
    assert "winner" in text
    code, text, _ = run("predict", out, photos / "test" / "cat", "--json")
    assert code == 0
    answers = json.loads(text)
    assert len(answers) == 16
    names, shares = zip(*answers[0]["classes"], strict=True)
    assert set(names) == {"cat", "<b>dog&"}
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    code, text, errors = run("evaluate", out / "seed-0" / "token-hard", "--data", f"folder:{photos}", "--json")
    assert code == 0, errors
    top1 = {row["readout"]: row["top1"] for row in json.loads(text)["readouts"]}
    results = json.loads((out / "results.json").read_text())
    assert top1 == {row["readout"]: row["top1"][0] for row in results["rows"] if row["method"] == "token-hard"}
    untold = shutil.copytree(out / "seed-0" / "token-hard", tmp_path / "untold")
    card = json.loads((untold / "model.json").read_text())
    (untold / "model.json").write_text(json.dumps({key: card[key] for key in card if key != "trained_on"}))
    for model, note in ((out, False), (untold, True)):
        assert ("nothing records which images" in run("evaluate", model, "--data", f"folder:{photos}")[1]) == note
    (out / "table.md").unlink()
    code, text, _ = run("report", out)
    assert code == 0
    assert (out / "table.md").exists()
    assert "<b>dog&" not in (out / "report.html").read_text()
    code, text, errors = run("analyze", out, "--images", "2", "--json")
    assert code == 0, errors
    assert {row["row"]: row["top1"] for row in json.loads(text)["rows"]}.items() >= {
        (f"token-hard/{readout}", value) for readout, value in top1.items()
    }
    code, text, _ = run("analyze", out, "--images", "1")
    assert code == 0
    assert "attention-token-hard.png" in text
    assert "<b>dog&" not in (out / "report.html").read_text()
    refused(run("analyze", out, "--seed", "7"), "--seed 7", "choose from 0")
    everything, broken = tmp_path / "everything", tmp_path / "everything" / "cat" / "broken.jpg"
    shutil.copytree(photos / "test", everything)
    broken.write_bytes(b"no image")
    (everything / "notes.txt").write_text("no image either")
    code, text, _ = run("predict", out, everything, "--json")
    answers = {Path(answer["image"]): answer for answer in json.loads(text)}
    assert set(answers) == {path for path in everything.rglob("*") if path.is_file() and path.suffix != ".txt"}
    assert answers[broken]["classes"] == []
    assert "identify" in answers[broken]["error"]
    assert all(len(answer["classes"]) > 1 for path, answer in answers.items() if path != broken)
    code, text, _ = run("predict", out, everything)
    assert code == 0
    assert f"{len(answers) - 1} of {len(answers)} images classified" in text
    refused(run("predict", out, broken), "broken.jpg cannot be decoded")
    for path in list(answers):
        path.write_bytes(b"no image")
    refused(run("predict", out, everything), f"none of {len(answers)} images can be decoded")
    refused(run("predict", out, tmp_path / "nowhere.png"), "nowhere.png")
    refused(run("predict", out, out / "results.json"), "cannot be decoded")
    refused(run("predict", out / "seed-0" / "none", photos / "test" / "cat", "--readout", "joint"), "readout joint")
    refused(run("evaluate", out, "--data", "digits"), "classes")


def test_an_ablation_prints_one_table_and_where_its_variants_are(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, text, errors = run("compare", "digits", *FAST, "variants.sgd.train.optimizer=sgd", "--out", out)
    assert code == 0, errors
    assert "vs base" in text
    assert f"variant  {out / 'variants' / 'sgd'}" in text
    (out / "table.md").unlink()
    code, text, _ = run("report", out)
    assert code == 0
    assert "vs base" in text
    assert (out / "table.md").exists()
    refused(run("compare", "digits", "variants.sgd.train.optimiser=sgd"), "variants.sgd", "train.optimizer")


def test_folders_that_hold_no_run(run: Run, tmp_path: Path) -> None:
    refused(run("report", tmp_path / "nowhere"), "is not a run folder")
    refused(run("analyze", tmp_path), "is not a run folder")
    refused(run("progress", tmp_path), "is not a run folder")
    refused(run("predict", tmp_path, tmp_path), "model.json")
    refused(run("evaluate", tmp_path / "nowhere", "--data", "digits"), "model.json")


def test_the_shell_completes_commands_and_recipes() -> None:
    program = Path(sys.executable).with_name("deitkit")  # the name decides the variable
    for words, expected in (("deitkit exp", "export"), ("deitkit compare own-", "own-images")):
        asked = {"_DEITKIT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        found = subprocess.run([program], env=os.environ | asked, capture_output=True, text=True, check=False)
        assert expected in found.stdout.split()


def test_lists_teach(run: Run) -> None:
    code, text, _ = run("recipes")
    assert code == 0
    assert "digits" in text
    assert run("recipes", "digits")[1].startswith("# ")
    assert "temperature" in run("recipes", "--fields")[1]
    code, out, _ = run("recipes", "--fields", "augment")
    assert code == 0
    assert "augment.erase_mode" in out
    assert "temperature" not in out
    code, _, errors = run("recipes", "--fields", "augmnt")
    assert code == 2
    assert "no field of a recipe is about 'augmnt': name a section (data, augment, model" in errors
    assert "teacher.fit" in run("recipes", "--fields", "teacher.fit")[1]
    assert "augment.mixup" in run("recipes", "--fields", "Mixup")[1]
    code, out, _ = run("recipes", "--fields", "stochastic")
    assert (code, "model.drop_path" in out, "augment" in out) == (0, True, False)
    assert "token-hard" in run("methods")[1]
    refused(run("recipes", "digist"), "did you mean digits")
    assert "deitkit compare digits" in run("compare", "--help")[1]


def test_teacher_alone_prints_its_card(run: Run, tmp_path: Path) -> None:
    code, text, errors = run("teacher", "digits", *TINY, "--out", tmp_path / "t", "--json")
    assert code == 0, errors
    card = json.loads(text)
    assert card["name"] == "cifar/resnet20"
    assert 0 <= card["top1"] <= 1
    assert run("teacher", "digits", *TINY, "--out", tmp_path / "t", "--resume", "--json")[0] == 0


def test_train_is_a_comparison_of_one_row(run: Run, tmp_path: Path) -> None:
    code, text, errors = run(
        "train", "digits", *TINY, "train.epochs=1", "--method", "none", "--out", tmp_path / "run", "--json"
    )
    assert code == 0, errors
    assert [row["row"] for row in json.loads(text)["rows"]] == ["none/class"]
    recipe = (tmp_path / "run" / "recipe.yaml").read_text()
    again = run("teacher", "digits", *FAST, "--out", tmp_path / "run", "--resume")
    refused(again, "is a finished run, whose teacher is")
    assert (tmp_path / "run" / "recipe.yaml").read_text() == recipe
    for override in ("methods=[none, soft]", "baseline.name=small/resnet18"):
        refused(run("train", "digits", override, "--out", tmp_path / "b"), f"{override}: train has one student")
    refused(run("train", "digits", "--method", "tokenhard", "--out", tmp_path / "b"), "'tokenhard' is not a method")


def test_show_batch_draws_and_trains_nothing(run: Run, tmp_path: Path) -> None:
    code, _, errors = run("compare", "digits", "--show-batch", "--out", tmp_path)
    assert code == 0, errors
    assert (tmp_path / "digits-views.png").stat().st_size > 10_000
    assert not (tmp_path / "metrics.jsonl").exists()


def test_json_can_be_printed_where_stdout_is_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    print_json({"class": "貓 é"})
    sys.stdout.flush()
    assert json.loads(raw.getvalue()) == {"class": "貓 é"}


def test_a_teacher_alone_goes_on_with_its_own_images_only(
    run: Run, tmp_path: Path, write_images: Callable[..., Path]
) -> None:
    photos = write_images(tmp_path / "photos")
    fields = ("own-images", f"data.name=folder:{photos}", "data.image_px=16", "teacher.train.epochs=1",
              "teacher.train.batch_size=8", "teacher.train.warmup_epochs=0", "teacher.min_top1=0.999",
              "teacher.allow_weak=false", "--out", tmp_path / "out")  # fmt: skip
    code, _, refused = run("teacher", *fields)
    assert code == 2, refused
    write_images(photos, classes=("dog", "cat"))  # other pictures of the same names
    code, _, errors = run("teacher", *fields, "--resume")
    assert code == 2
    assert "was begun with other images or labels" in errors


def test_a_comparison_without_a_student_that_finished_exits_with_1(run: Run, tmp_path: Path) -> None:
    fields = (*TINY, "methods=[none]", "train.optimizer=sgd", "train.learning_rate=1e18", "train.precision=fp32")
    code, shown, _ = run("compare", "digits", *fields, "--out", tmp_path / "run")
    assert code == 1
    assert "No student reached the end of its training" in shown
