"""README and docs as a reader follows them: commands parse, what a laptop can run is run, figures have a source."""

import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer.main
from PIL import Image

from conftest import TINY
from deitkit.cli.main import app
from deitkit.distillation.methods import METHODS, SIGNALS
from deitkit.models import registered
from deitkit.run.results import read_results

ROOT = Path(__file__).parents[1]
PAGES = ("README", "getting-started", "own-data", "recipes", "methods", "teachers", "models", "finetune", "scale",
         "weights", "export", "demo", "analyze", "reliability", "benchmarks", "python", "paper", "when",
         "faq")  # fmt: skip
Run = Callable[..., tuple[int, str, str]]

# What only some readers have: downloads, weights of others, runs that take hours; and a page that is served.
ABSENT = re.compile(
    r"\.pth|cifar10|imagenet|finetune-|transfer-|timm|runs/first|student-|\bbench\b|\bdemo\b|[A-Z]{4,}|parquet:|csv:|more-photos"
)
COLOURS = ("data.image_px=16", "model.width=16", "model.depth=1", "model.heads=1", "model.patch_px=8",
           "train.epochs=1", "train.warmup_epochs=0", "train.batch_size=8", "teacher.allow_weak=true",
           "teacher.train.epochs=1", "teacher.train.warmup_epochs=0", "teacher.train.batch_size=8")  # fmt: skip


def page_text(page: str) -> str:
    """Return the source of README or of a page of docs/."""
    return (ROOT / "README.md" if page == "README" else ROOT / "docs" / f"{page}.md").read_text()


def fences(page: str) -> Iterator[list[str]]:
    """Yield the lines of every block that shows commands."""
    for block in re.findall(r"^```(?:console|bash)\n(.*?)^```", page_text(page), re.M | re.S):
        yield block.splitlines()


def commands(page: str) -> Iterator[list[str]]:
    """Yield the words of every `deitkit` command in a page's blocks, without comment."""
    for lines in fences(page):
        for line in lines:
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words and words[0].removeprefix(".venv/bin/") == "deitkit" and "KEY=VALUE" not in line:
                yield words[1:]


def shown_output(page: str, command: str) -> str:
    """Return the lines that a page shows below a command."""
    lines = next(lines for lines in fences(page) if f"$ {command}" in lines)
    return "\n".join(lines[lines.index(f"$ {command}") + 1 :])


def without_numbers(text: str) -> str:
    """Return the text with every number replaced, as numbers differ between machines and lengths of training."""
    return re.sub(r"\d+(\.\d+)?", "#", text.strip())


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_one_that_the_program_has(page: str) -> None:
    program = typer.main.get_command(app)
    root = program.make_context("deitkit", ["--version"], resilient_parsing=True)
    for words in commands(page):
        words = words[: words.index(">")] if ">" in words else words
        name, command, rest = program.resolve_command(root, words)  # type: ignore[attr-defined]
        while hasattr(command, "resolve_command"):
            name, command, rest = command.resolve_command(command.make_context(name, [], resilient_parsing=True), rest)
        command.make_context(name, rest, parent=root)  # an unknown option or a missing argument raises


def test_pages_are_all_read() -> None:
    unlisted = {path.stem for path in (ROOT / "docs").glob("*.md")} - {*PAGES}
    assert not [page for page in unlisted if list(commands(page))]
    assert sum(len(list(commands(page))) for page in PAGES) > 60


def test_what_the_docs_show_runs_in_their_order(
    run: Run, write_images: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader with photographs and nothing else types the commands page by page."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    write_images(tmp_path / "photos")
    for name in ("photo.png", "my-digit.png", "folder-of-images/one.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 20), (200, 90, 40)).save(tmp_path / name)
    assert run("compare", "digits", *TINY)[0] == 0  # `make demo`
    done = []
    for page in PAGES:
        for words in commands(page):
            if ABSENT.search(" ".join(words)) or "foo" in " ".join(words) or "teacher.fit=none" in words:
                continue
            out = words[words.index("--out") + 1] if "--out" in words else ""
            goes_on = "--resume" in words or ("--unit" in words and "prepare" not in words)
            if out and not goes_on:
                shutil.rmtree(out, ignore_errors=True)  # `runs/mine` is a reader's own name, and several pages use it
            if words[0] == "evaluate":  # of images, so of a run on images
                assert run("compare", "own-images", "data.name=folder:photos", *COLOURS, "--out", "runs/mine")[0] == 0
            if ">" in words:
                words, target = words[: words.index(">")], words[-1]
                (tmp_path / target).write_text(run(*words)[1])
                continue
            trains = words[0] in ("compare", "train", "finetune", "teacher")
            shorter = (COLOURS if "own-images" in words else TINY) if trains else ()
            given = {word.partition("=")[0] for word in words}
            given = given - {"train.epochs", "seeds"} | ({"seeds"} if "--seeds" in words else set())
            shorter = tuple(item for item in shorter if item.partition("=")[0] not in given)
            code, _, errors = run(*words, *shorter)
            assert code == 0, (page, words, errors)
            done.append(words)
            if words[0] == "evaluate":
                shutil.rmtree("runs/mine")
                assert run("compare", "digits", *TINY, "--out", "runs/mine")[0] == 0
    assert len(done) > 25
    assert {words[0] for words in done} >= {"compare", "predict", "evaluate", "analyze", "verify", "finetune"}


def test_mistakes_that_the_docs_show_are_the_programs(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for page, command in (
        ("recipes", "deitkit compare digits train.epoch=3 augment.crop=foo"),
        ("teachers", "deitkit compare digits teacher.fit=none"),
    ):
        code, _, errors = run(*shlex.split(command)[1:])
        assert code == 2
        assert without_numbers(errors.splitlines()[-1]) == without_numbers(shown_output(page, command))


def test_the_first_table_has_the_rows_and_words_of_the_program(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = re.search(r"^```\n( digits: .*?)^```", page_text("getting-started"), re.M | re.S)
    assert shown is not None
    _, printed, _ = run("compare", "digits", *TINY, "--out", tmp_path / "run")
    rows = re.compile(r"^\s+[★ ]?\s*(\S+/\S+|teacher: \S+)\s{2,}", re.M)
    assert rows.findall(printed) == rows.findall(shown[1])
    assert len(rows.findall(printed)) == 12
    titles = [re.findall(r"^ row (.*)", text, re.M)[0].split() for text in (printed, shown[1])]
    assert titles[0] == titles[1]
    heading = shown[1].strip().splitlines()[0]
    assert without_numbers(heading) in without_numbers(printed)


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "results").glob("*/README.md"))], ids=str)
def test_accuracies_with_an_interval_or_a_deviation_stand_in_a_table_of_a_run(page: Path) -> None:
    text = page.read_text()
    # A page quotes its own runs, and those whose pages it links.
    linked = {(page.parent / link).parent.resolve() for link in re.findall(r"\]\(([\w./-]+/README\.md)", text)}
    runs = {page.parent, *linked} - {ROOT}
    tables = "".join(path.read_text() for folder in runs for path in folder.rglob("table.md"))
    for path in (path for folder in runs for path in folder.rglob("evaluation.json")):  # of `deitkit evaluate`
        for readout in json.loads(path.read_text())["readouts"]:
            low, high = readout["top1_ci95"]
            tables += f" {100 * readout['top1']:.2f} [{100 * low:.2f}, {100 * high:.2f}]"
    figures = re.findall(r"\d+\.\d{1,2} (?:\[\d+\.\d{1,2}, \d+\.\d{1,2}\]|± \d+\.\d{1,2})", text)
    assert figures
    assert [figure for figure in figures if figure not in tables] == []


def test_speeds_in_the_readme_are_those_of_the_benchmarks() -> None:
    factors = re.findall(r"(\d+\.\d+) times", page_text("README"))
    assert len(factors) >= 2
    measured = page_text("benchmarks")
    assert [factor for factor in factors if not re.search(rf"(?<![\d.]){re.escape(factor)}(?!\d)", measured)] == []


class MyNet(torch.nn.Module):
    """What a reader's project contains."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.classifier = torch.nn.Linear(64, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.classifier(images.flatten(1))
        return logits


def test_architectures_and_methods_that_the_docs_add_are_trained(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for table in (METHODS, SIGNALS):  # which are as before afterwards
        monkeypatch.setitem(table, "regression", None)
    monkeypatch.setattr(registered, "_REGISTERED", {})
    monkeypatch.setitem(sys.modules, "my_project", SimpleNamespace(MyNet=MyNet))
    for page, first in (("teachers", "my_net"), ("methods", "SIGNALS")):
        (block,) = [
            code for code in re.findall(r"^```python\n(.*?)^```", page_text(page), re.M | re.S) if first in code
        ]
        exec(block, {})
    own = ("teacher.name=own/my-net", "methods=[none, regression]", "--out", tmp_path / "run")
    code, _, errors = run("compare", "digits", *TINY, *own)
    assert code == 0, errors
    results = read_results(tmp_path / "run")
    assert [(row.label, row.status) for row in results.rows][-1] == ("logit regression", "ok")
    assert results.teacher.name == "own/my-net"
