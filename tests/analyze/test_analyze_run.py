"""`deitkit analyze` on real runs, small ones: its figures against loops over what the run itself has saved."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from conftest import TINY
from deitkit.analyze.analysis import analyze_run
from deitkit.analyze.pictures import tinted
from deitkit.comparison.compare import compare
from deitkit.data.dataset import load_dataset
from deitkit.errors import CheckpointError, DataError, Interrupted, RecipeError
from deitkit.models.saved import load_classifier
from deitkit.recipe.load import load_recipe
from deitkit.run.analysis import Analysis, read_analysis, write_analysis
from deitkit.run.observer import Watcher
from deitkit.run.results import Results, write_results
from deitkit.run.state import load_tree

CPU = torch.device("cpu")
SHORT = "{name: cifar/resnet20, allow_weak: true, train: {batch_size: 16, epochs: 2}}"
FP32 = ("train.precision=fp32",)
Analyzed = tuple[Path, Results, Analysis]


def compared(folder: Path, *overrides: str) -> Results:
    return compare(load_recipe("digits", [*TINY, *FP32, *overrides]), folder, watcher=Watcher())


@pytest.fixture(scope="module")
def analyzed(tmp_path_factory: pytest.TempPathFactory) -> Analyzed:
    """A run with everything: two seeds, averages, a student without tokens, a CNN."""
    folder = tmp_path_factory.mktemp("everything") / "run"
    results = compared(
        folder, "methods=[none, token-hard, mean-pool-none]", "seeds=[3, 5]", "train.ema_decay=0.5", "train.epochs=1",
        "baseline={name: cifar/resnet20}",
    )  # fmt: skip
    return folder, results, analyze_run(folder, images=3, watcher=Watcher())


@pytest.fixture(scope="module")
def decided(analyzed: Analyzed) -> dict[str, list[list[int]]]:
    """What the truth, the teacher and every row decide under each seed, from what the run saved."""
    folder, _, _ = analyzed
    test = load_dataset(load_recipe(str(folder / "recipe.yaml")).data).test
    with torch.no_grad():
        answer = load_classifier(folder / "teacher", CPU)[0](test.images.float() / 255).class_logits
    found = {"truth": [test.labels.tolist()] * 2, "teacher": [answer.argmax(dim=-1).tolist()] * 2}
    for seed in (3, 5):
        for name in ("none", "token-hard", "mean-pool-none", "cnn-baseline"):
            student = load_tree(folder / f"seed-{seed}" / name / "predictions.safetensors")
            for weights, splits in student["scores"].items():
                for readout, scores in splits["test"].items():
                    row = f"{name}/{readout}" + ("+ema" if weights == "ema" else "")
                    found.setdefault(row, []).append(scores.argmax(dim=-1).tolist())
    return found


def test_its_rows_are_those_of_the_table_with_its_figures(analyzed: Analyzed) -> None:
    folder, results, analysis = analyzed
    teacher, *summaries = analysis.rows
    assert teacher.row == "teacher"
    assert teacher.top1 == results.teacher.test_top1
    assert teacher.agreement_overall is None
    assert [summary.row for summary in summaries] == [row.row for row in results.rows]
    for summary, row in zip(summaries, results.rows, strict=True):
        assert summary.top1 == pytest.approx(row.top1_mean, abs=1e-12), row.row
        assert summary.agreement_overall == pytest.approx(row.teacher_agreement, abs=1e-12), row.row
        assert sum(place.count for place in summary.reliability) == 2 * 100, "the images of both seeds"
    assert read_analysis(folder) == analysis
    assert analysis.notes == ()


def test_disagreement_is_that_of_a_loop_over_saved_predictions(
    analyzed: Analyzed, decided: dict[str, list[list[int]]]
) -> None:
    table = analyzed[2].disagreement
    assert table.rows == ("truth", "teacher", *(row for row in decided if "/" in row and "logits" not in row))
    for first, shares in zip(table.rows, table.shares, strict=True):
        for second, share in zip(table.rows, shares, strict=True):
            pairs = [zip(decided[first][seed], decided[second][seed], strict=True) for seed in (0, 1)]
            differing = sum(one != other for pair in pairs for one, other in pair)
            assert share == pytest.approx(differing / 200), (first, second)
    assert max(max(shares) for shares in table.shares) > 0.1


def test_classes_are_counted_for_the_teacher_and_one_row_of_each_student(
    analyzed: Analyzed, decided: dict[str, list[list[int]]]
) -> None:
    entries = {entry.row: entry for entry in analyzed[2].classes}
    assert list(entries) == ["teacher", "none/class", "token-hard/joint", "mean-pool-none/class", "cnn-baseline/class"]
    truth = decided["truth"]
    for name, entry in entries.items():
        pairs = [pair for seed in (0, 1) for pair in zip(truth[seed], decided[name][seed], strict=True)]
        assert {(true, said): count for true, said, count in entry.confusion} == {
            pair: pairs.count(pair) for pair in set(pairs)
        }
        for label, accuracy in enumerate(entry.accuracy):
            said = [other for true, other in pairs if true == label]
            assert accuracy == pytest.approx(said.count(label) / len(said))


def test_cosine_of_the_tokens_is_that_of_a_walk_through_the_blocks(analyzed: Analyzed) -> None:
    folder, _, analysis = analyzed
    assert [entry.student for entry in analysis.tokens] == ["token-hard", "token-hard+ema"]
    images = load_dataset(load_recipe(str(folder / "recipe.yaml")).data).test.images.float() / 255
    layers: list[list[torch.Tensor]] = [[], [], []]
    learned = []
    for seed in (3, 5):
        classifier, _ = load_classifier(folder / f"seed-{seed}" / "token-hard", CPU)
        student = classifier.model
        with torch.no_grad():
            patches = student.patch_embed((images - classifier.mean) / classifier.std)
            tokens = torch.cat([student.cls_token, student.dist_token], dim=1)
            x = torch.cat([tokens.expand(len(images), -1, -1), patches], dim=1) + student.pos_embed
            for layer, block in zip(layers, [torch.nn.Identity(), *student.blocks], strict=True):
                x = block(x)
                layer.append(F.normalize(x[:, 0], dim=-1).mul(F.normalize(x[:, 1], dim=-1)).sum(dim=-1))
            learned.append(float(F.normalize(tokens[0, 0], dim=0) @ F.normalize(tokens[0, 1], dim=0)))
    entry = analysis.tokens[0]
    assert entry.learned == pytest.approx(sum(learned) / 2, abs=1e-5)
    assert list(entry.cosine) == pytest.approx([float(torch.cat(layer).mean()) for layer in layers], abs=1e-4)
    assert list(entry.deviation) == pytest.approx([float(torch.cat(layer).std()) for layer in layers], abs=1e-4)


def test_pictures_show_students_that_have_tokens(analyzed: Analyzed) -> None:
    folder, _, analysis = analyzed
    assert [entry.student for entry in analysis.attention] == ["none", "token-hard"]
    widths = []
    for entry in analysis.attention:
        assert entry.seed == 3
        assert len(entry.images) == 3
        with Image.open(folder / "analysis" / entry.file) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 50
            widths.append(picture.width)
    assert widths[0] < widths[1], "a student with two tokens has two more maps"


def test_a_tint_is_dark_where_the_image_is_and_follows_the_map() -> None:
    image = torch.zeros(3, 4, 4)
    image[:, :, :2] = 1
    pixels = tinted(image, torch.tensor([[0.2, 0.1], [0.0, 0.0]]))
    assert pixels.shape == (4, 4, 3)
    assert (pixels[0, 0] == pixels[1, 1]).all(), "one patch, one colour"
    assert (pixels[0, 0] != pixels[2, 0]).any(), "patches of other attention differ"
    assert pixels[0, 0].sum() > pixels[0, 2].sum() > 0, "a black patch still shows its attention"


def test_one_seed_alone(analyzed: Analyzed) -> None:
    folder, results, whole = analyzed
    try:
        analysis = analyze_run(folder, images=0, seed=5, watcher=Watcher())
        assert analysis.seeds == (5,)
        assert analysis.attention == ()
        assert [row.top1 for row in analysis.rows[1:]] == [row.top1[1] for row in results.rows]
    finally:
        write_analysis(whole, folder)
    with pytest.raises(RecipeError, match=r"--seed 4 is not a seed of .*: choose from 3, 5"):
        analyze_run(folder, seed=4, watcher=Watcher())


def test_a_student_without_its_model_under_one_seed_is_named(
    analyzed: Analyzed, run: Callable[..., tuple[int, str, str]]
) -> None:
    folder, _, whole = analyzed
    card = folder / "seed-3" / "mean-pool-none" / "model.json"
    card.rename(folder / "kept.json")
    try:
        code, text, _ = run("analyze", folder, "--images", 0)
        assert code == 0
        reason = "it stopped, or the run folder does not contain its model."
        assert f"mean-pool-none/class of seed 3 is left out: {reason}\n" in text
        assert text.count("left out") == 1
    finally:
        (folder / "kept.json").rename(card)
        write_analysis(whole, folder)


def test_one_student_and_no_teacher(tmp_path: Path) -> None:
    compared(tmp_path / "run", "methods=[none]", "train.epochs=1")
    analysis = analyze_run(tmp_path / "run", images=1, watcher=Watcher())
    assert analysis.disagreement.rows == ("truth", "none/class")
    (row,) = analysis.rows
    assert row.divergence is None
    assert analysis.tokens == ()
    assert [entry.student for entry in analysis.attention] == ["none"]


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_folders_of_grey_images_of_another_size_in_memory_and_streamed(
    tmp_path: Path, write_images: Callable[..., Path], streaming: str
) -> None:
    photos = write_images(tmp_path / "photos", px=48)
    results = compared(
        tmp_path / "run", f"data.name=folder:{photos}", "data.image_px=48", "data.channels=1", "model.patch_px=16",
        f"data.streaming={streaming}", "data.workers=0", "data.train_images=null", "data.test_images=null",
        "methods=[token-soft]", "train.batch_size=4", "teacher.train.batch_size=4", "train.epochs=1",
    )  # fmt: skip
    analysis = analyze_run(tmp_path / "run", watcher=Watcher())
    assert analysis.n == 24
    assert analyze_run(tmp_path / "run", images=0, watcher=Watcher()).rows == analysis.rows
    assert [row.top1 for row in analysis.rows[1:]] == [row.top1_mean for row in results.rows]


def test_a_student_that_stopped_is_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    compared(folder, "methods=[none, class-only]", "train.epochs=1")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    stopped = results["rows"][0] | {"top1": [None], "top1_mean": None, "status": "seed 0 stopped at step 1"}
    results["rows"][0] = stopped | {"top1_std": None, "top1_ci95": None}
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    analysis = analyze_run(folder, images=1, watcher=Watcher())
    assert analysis.disagreement.rows == ("truth", "class-only/class")
    assert [entry.student for entry in analysis.attention] == ["class-only"]
    assert analysis.notes == ("none/class is left out: it stopped, or the run folder does not contain its model.",)


def test_two_teachers_answer_by_their_mean_and_a_row_without_a_model_is_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    results = compared(
        folder, "methods=[soft]", "train.epochs=1",
        f"teachers=[{SHORT}, {SHORT}]",
    )  # fmt: skip
    changed = {"row": "before/class", "method": "before", "kind": "checkpoint", "top1": (0.5,)}
    before = results.rows[0].model_copy(update=changed)
    write_results(results.model_copy(update={"rows": (before, *results.rows)}), folder)
    analysis = analyze_run(folder, images=0, watcher=Watcher())
    teacher, student = analysis.rows
    assert teacher.top1 == results.teacher.test_top1
    images = load_dataset(load_recipe(str(folder / "recipe.yaml")).data).test.images.float() / 255
    shares = []
    for name in ("teacher", "teacher-2"):
        with torch.no_grad():
            shares.append(load_classifier(folder / name, CPU)[0](images).class_logits.softmax(dim=-1))
    decisions = (shares[0] + shares[1]).argmax(dim=-1)
    (scores,) = load_tree(folder / "seed-0" / "soft" / "predictions.safetensors")["scores"]["last"]["test"].values()
    agrees = (scores.argmax(dim=-1) == decisions).double().mean().item()
    assert student.agreement_overall == pytest.approx(agrees)
    assert analysis.notes == ("before/class is left out: it stopped, or the run folder does not contain its model.",)
    (folder / "teacher-2" / "card.json").unlink()
    with pytest.raises(CheckpointError, match=r"teacher-2 holds no card.json"):
        analyze_run(folder, watcher=Watcher())


class Impatient(Watcher):
    def should_stop(self) -> bool:
        return True


def test_what_cannot_be_analyzed_is_told_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a run folder"):
        analyze_run(tmp_path, watcher=Watcher())
    folder = tmp_path / "run"
    results = compared(folder, "methods=[none]", "train.epochs=1")
    with pytest.raises(Interrupted, match="nothing was written"):
        analyze_run(folder, watcher=Impatient())
    assert not (folder / "analysis.json").exists()
    text = (folder / "results.json").read_text(encoding="utf-8")
    (folder / "results.json").write_text(text.replace(results.dataset.fingerprint, "0" * 64), encoding="utf-8")
    assert "fingerprint" in analyze_run(folder, images=0, watcher=Watcher()).notes[0]
    fewer = results.dataset.model_copy(update={"test": 90})
    write_results(results.model_copy(update={"dataset": fewer}), folder)
    with pytest.raises(DataError, match="has 100 test images of 10 classes, but the run was tested on 90 of 10"):
        analyze_run(folder, watcher=Watcher())
    (folder / "results.json").write_text(text, encoding="utf-8")
    (folder / "seed-0" / "none" / "model.json").unlink()
    with pytest.raises(CheckpointError, match=r"run contains no student that finished its training, as seed-0/METHOD"):
        analyze_run(folder, watcher=Watcher())
    stored = json.loads(text)
    row = stored["rows"][0] | dict.fromkeys(("variant", "changed", "teacher_name", "teacher_test_top1"))
    ablation = stored | {"variants": {"base": {}}, "rows": [row | {"variant": "base", "changed": ""}]}
    (folder / "results.json").write_text(json.dumps(ablation), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"analyze one of its variants, such as .*run/variants/base"):
        analyze_run(folder, watcher=Watcher())


def test_a_student_with_two_tokens_teaches_and_is_no_student_of_the_run(analyzed: Analyzed, tmp_path: Path) -> None:
    folder, _, _ = analyzed
    taught = f"teacher={{name: {folder / 'seed-3' / 'token-hard'}, allow_weak: true}}"
    compared(tmp_path / "run", "methods=[token-hard]", "train.epochs=1", taught)
    analysis = analyze_run(tmp_path / "run", images=0, watcher=Watcher())
    assert [tokens.student for tokens in analysis.tokens] == ["token-hard"]
    assert [row.row for row in analysis.rows][:2] == ["teacher", "token-hard/class"]


def test_the_classes_of_an_averaged_winner_are_its_own(analyzed: Analyzed) -> None:
    folder, results, whole = analyzed
    winner = "none/class+ema"
    write_results(results.model_copy(update={"winner": winner}), folder)
    try:
        analysis = analyze_run(folder, images=0, watcher=Watcher())
        assert winner in [found.row for found in analysis.classes]
        page = (folder / "report.html").read_text(encoding="utf-8")
        assert "Precision and recall of none/\u200bclass+ema" in page
    finally:
        write_results(results, folder)
        write_analysis(whole, folder)


def test_each_student_is_drawn_from_the_first_seed_that_has_it_and_what_is_left_out_is_known(
    analyzed: Analyzed, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, whole = analyzed
    cards = [
        folder / place / "model.json" for place in ("seed-3/none", "seed-3/mean-pool-none", "seed-5/mean-pool-none")
    ]
    for card in cards:
        card.rename(card.with_suffix(".kept"))
    try:
        analysis = analyze_run(folder, images=1, watcher=Watcher())
        assert {entry.student: entry.seed for entry in analysis.attention} == {"none": 5, "token-hard": 3}
        assert analysis.left_out == ("mean-pool-none/class",)
        assert "analysis of an earlier table" not in (folder / "report.html").read_text(encoding="utf-8")
    finally:
        for card in cards:
            card.with_suffix(".kept").rename(card)
        write_analysis(whole, folder)


def test_pictures_are_drawn_when_all_is_predicted(analyzed: Analyzed) -> None:
    class StopsAfterTheFirstSeed(Watcher):
        def __init__(self) -> None:
            self.done = 0.0

        def reading(self, what: str, done: int, total: int) -> None:
            self.done += what.startswith("seed 3") and done == total

        def should_stop(self) -> bool:
            return self.done > 0

    folder, _, _ = analyzed
    drawn = {path: path.stat().st_mtime_ns for path in (folder / "analysis").iterdir()}
    with pytest.raises(Interrupted):
        analyze_run(folder, images=2, watcher=StopsAfterTheFirstSeed())
    assert {path: path.stat().st_mtime_ns for path in (folder / "analysis").iterdir()} == drawn
