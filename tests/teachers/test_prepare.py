"""The teacher: what the gate lets through, what it refuses and how it names the cause."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from conftest import CPU_FP32, poisoned_gradient, striped_dataset
from deitkit.comparison.compare import compare
from deitkit.data.dataset import Dataset, Split, load_dataset
from deitkit.errors import CheckpointError, TeacherError
from deitkit.models.classifier import Classifier
from deitkit.models.saved import load_classifier, save_classifier, save_tensors
from deitkit.models.vit import DeiT
from deitkit.models.weights.read import file_sha256
from deitkit.models.zoo import create_classifier
from deitkit.recipe.load import load_recipe, parse_recipe
from deitkit.recipe.schema import Recipe
from deitkit.run.observer import Watcher
from deitkit.run.results import TeacherCard
from deitkit.teachers.frozen import FrozenTeacher
from deitkit.teachers.gate import gate
from deitkit.teachers.images import load_teacher_images
from deitkit.teachers.prepare import _model_card, dry_run_teachers, prepare_teacher
from deitkit.training.student import Student

CARD = TeacherCard(
    name="test", source="test", fit="none", top1=0.0, n=0, chance=0.0, verdict="", weak=False, parameters=1,
    image_px=None, mean=(0.0,) * 3, std=(1.0,) * 3,
)  # fmt: skip


class Brightness(nn.Module):
    """Knows the stripes: their classes are brightnesses 0.06, 0.32 and 0.58."""

    def __init__(self, order: tuple[int, ...] = (0, 1, 2), answers: int = 3) -> None:
        super().__init__()
        levels = torch.full((answers,), 9.0)
        levels[list(order)] = torch.tensor([0.06, 0.32, 0.58])
        self.levels = nn.Parameter(levels)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return -(images.mean(dim=(1, 2, 3))[:, None] - self.levels).abs()


def classifier(model: nn.Module, mean: float = 0.0, std: float = 1.0) -> Classifier:
    return Classifier(model, mean=(mean,) * 3, std=(std,) * 3)


def judge(model: Classifier, dataset: Dataset, card: TeacherCard = CARD, **recipe: Any) -> TeacherCard:
    return gate(model, card, dataset, parse_recipe({"teacher": recipe}).teacher, CPU_FP32)


def test_a_good_teacher_passes_with_its_accuracy(stripes: Dataset) -> None:
    card = judge(classifier(Brightness()), stripes)
    assert (card.top1, card.n, card.weak, card.verdict) == (1.0, 60, False, "fit to teach")
    assert card.chance == pytest.approx(1 / 3)


def test_an_untrained_head_is_refused_and_named(stripes: Dataset) -> None:
    torch.manual_seed(0)
    random_head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3, bias=False))
    untrained = CARD.model_copy(update={"verdict": "its classifier is new and was not trained"})
    with pytest.raises(
        TeacherError, match=r"is not significantly above chance.*its classifier is new.*teacher\.fit=head"
    ):
        judge(classifier(random_head, 0.3), stripes, untrained)
    weak = judge(classifier(random_head, 0.3), stripes, untrained, allow_weak=True)
    assert weak.weak
    assert "chance" in weak.verdict


def test_another_order_of_classes_is_refused_and_named(stripes: Dataset) -> None:
    with pytest.raises(TeacherError, match="classes are in another order"):
        judge(classifier(Brightness(order=(1, 2, 0))), stripes)


def test_a_wrong_normalisation_is_refused_and_named(stripes: Dataset) -> None:
    # It was trained on values in [0, 1] and is given values around zero.
    with pytest.raises(TeacherError, match=r"normalisation is wrong: with values in \[0, 1\]"):
        judge(classifier(Brightness(), 0.3, 0.25), stripes)


def test_a_teacher_below_the_recipes_bound_is_refused(stripes: Dataset) -> None:
    flaky = Brightness()
    flaky.levels.data[1] = 9.0  # never answers 1
    with pytest.raises(TeacherError, match=r"below teacher\.min_top1=0\.9"):
        judge(classifier(flaky), stripes, min_top1=0.9)


def test_another_number_of_classes_is_refused(stripes: Dataset) -> None:
    with pytest.raises(TeacherError, match="has 5 classes, but the data has 3"):
        judge(classifier(Brightness(answers=5)), stripes)


def test_guessing_the_commonest_class_is_not_better_than_chance() -> None:
    data = striped_dataset()
    labels = torch.tensor([0] * 54 + [1] * 3 + [2] * 3)
    skewed = replace(data, validation=Split(data.validation.images, labels))
    always_zero = Brightness()
    always_zero.levels.data[1:] = 99.0
    with pytest.raises(TeacherError, match="is not significantly above chance"):
        judge(classifier(always_zero), skewed)


def recipe(**teacher: Any) -> Recipe:
    train = {"epochs": 8, "batch_size": 12, "warmup_epochs": 0, "learning_rate": 0.03}
    base = {"name": "cifar/resnet20", "train": train}
    base["augment"] = {"flip": 0.0, "crop": "none"}
    return parse_recipe({"teacher": base | teacher})


def prepare(loaded: Recipe, dataset: Dataset, folder: Path) -> tuple[FrozenTeacher, TeacherCard]:
    return prepare_teacher(loaded, dataset, folder=folder / "teacher", precision=CPU_FP32, watcher=Watcher())


def test_a_teacher_trained_here_teaches_again_from_its_folder(stripes: Dataset, tmp_path: Path) -> None:
    teacher, card = prepare(recipe(), stripes, tmp_path / "first")
    assert card.fit == "full"
    assert card.top1 > 0.6
    assert all(parameter.grad is None for parameter in teacher.parameters()), "no memory of its training"
    folder = tmp_path / "first" / "teacher"
    again, second = prepare(recipe(name=str(folder)), stripes, tmp_path / "second")
    assert (second.fit, second.name) == ("none", "cifar/resnet20")
    view = torch.rand(4, 3, 8, 8)
    assert torch.equal(teacher(view), again(view))
    with pytest.raises(TeacherError, match=rf"is a folder without a model.json: name one with it, such as {folder}$"):
        prepare(recipe(name=str(tmp_path / "first")), stripes, tmp_path / "third")
    with pytest.raises(TeacherError, match=r"teacher\.checkpoint=x\.pth has no effect beside teacher\.name="):
        prepare(recipe(name=str(folder), checkpoint="x.pth"), stripes, tmp_path / "third")
    with pytest.raises(CheckpointError, match=r"checkpoint .* is a folder: name a file"):
        prepare(recipe(checkpoint=str(folder)), stripes, tmp_path / "third")
    resumed, same = prepare(recipe(), stripes, tmp_path / "first")
    assert torch.equal(teacher(view), resumed(view))
    assert same == card


def test_a_teacher_of_all_images_takes_a_batch_of_them_and_no_more(tiny_recipe: Callable[..., Recipe]) -> None:
    fits = tiny_recipe("teacher.all_images=true", "teacher.train.batch_size=970")
    data = load_dataset(fits.data)
    assert len(load_teacher_images(fits, data).train) == 970
    with pytest.raises(TeacherError, match=r"teacher\.train\.batch_size=971 exceeds the 970 training images"):
        load_teacher_images(tiny_recipe("teacher.all_images=true", "teacher.train.batch_size=971"), data)
    assert load_teacher_images(tiny_recipe("teacher.all_images=false"), data) is data


def saved_backbone(folder: Path, dataset: Dataset, classes: int, prefix: str = "") -> Path:
    """Train a teacher on the stripes, then save it with a head of another class count."""
    prepare(recipe(), dataset, folder)
    trained, _ = load_classifier(folder / "teacher", torch.device("cpu"))
    state = dict(trained.model.state_dict())
    state["linear.weight"], state["linear.bias"] = torch.randn(classes, 64), torch.zeros(classes)
    save_tensors(folder / "backbone.safetensors", {f"{prefix}{name}": value for name, value in state.items()})
    return folder / "backbone.safetensors"


@pytest.mark.parametrize("prefix", ["", "module.student."])
def test_a_backbone_with_another_class_count_gets_its_new_head_trained(
    prefix: str, stripes: Dataset, tmp_path: Path
) -> None:
    checkpoint = saved_backbone(tmp_path, stripes, 7, prefix)
    teacher, card = prepare(recipe(checkpoint=str(checkpoint)), stripes, tmp_path / "run")
    assert card.fit == "head"
    assert card.top1 > 0.6
    before = load_classifier(tmp_path / "teacher", torch.device("cpu"))[0].state_dict()
    after = teacher.classifier.state_dict()
    moved = [name for name in after if name in before and not torch.equal(before[name], after[name])]
    assert moved == ["model.linear.weight", "model.linear.bias"]
    named = f"backbone.safetensors (sha256 {file_sha256(checkpoint)[:8]})"
    assert f"{named}, whose classifier does not fit (7 classes)" in card.source
    checkpoint.unlink()  # the run has its own copy
    resumed, same = prepare(recipe(checkpoint=str(checkpoint)), stripes, tmp_path / "run")
    assert same == card
    assert all(torch.equal(value, after[name]) for name, value in resumed.classifier.state_dict().items())


def test_a_reset_head_without_training_is_the_seeds_mistake_and_is_refused(stripes: Dataset, tmp_path: Path) -> None:
    checkpoint = saved_backbone(tmp_path, stripes, classes=3)
    seeds_mistake = recipe(checkpoint=str(checkpoint), reset_head=True, fit="none")
    with pytest.raises(TeacherError, match="its classifier is new and was not trained"):
        prepare(seeds_mistake, stripes, tmp_path / "run")


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        ({"name": "cifar/resnet21"}, "cifar/resnet20"),
        ({"name": "timm/resnet1"}, "timm/resnet1"),
        ({"mean": [0.5], "std": [0.5]}, r"teacher\.mean=\[0\.5\] has 1 value, but the images have 3 channels"),
        ({"mean": [0.5] * 3, "std": [0.5]}, r"teacher\.std=\[0\.5\] has 1 value, but the images have 3 channels"),
        ({"checkpoint": "nowhere.pth"}, "nowhere.pth does not exist"),
    ],
)
def test_teachers_that_cannot_be_built(teacher: dict, words: str, stripes: Dataset, tmp_path: Path) -> None:
    with pytest.raises((TeacherError, CheckpointError), match=words):
        prepare(recipe(**teacher), stripes, tmp_path)


def test_an_optimizer_that_cannot_train_a_cnn_is_told_before_a_teacher_trains(stripes: Dataset, tmp_path: Path) -> None:
    loaded = recipe(train={"optimizer": "muon", "batch_size": 16})
    with pytest.raises(TeacherError, match=r"teacher\.train\.optimizer=muon trains the students only"):
        dry_run_teachers(loaded, stripes, tmp_path, CPU_FP32)


def test_a_checkpoint_of_another_architecture_is_refused(stripes: Dataset, tmp_path: Path) -> None:
    other = create_classifier("cifar/resnet32", classes=3, channels=3)
    save_tensors(tmp_path / "other.safetensors", dict(other.model.state_dict()))
    with pytest.raises(CheckpointError, match="do not fit"):
        prepare(recipe(checkpoint=str(tmp_path / "other.safetensors")), stripes, tmp_path)


def test_a_bare_file_as_a_name_says_what_to_write(stripes: Dataset, tmp_path: Path) -> None:
    save_tensors(tmp_path / "weights.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(TeacherError, match=r"teacher\.checkpoint="):
        prepare(recipe(name=str(tmp_path / "weights.safetensors")), stripes, tmp_path)


def test_the_teacher_resizes_views_to_its_own_resolution() -> None:
    seen = []

    class Spy(Brightness):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(tuple(images.shape))
            return super().forward(images)

    teacher = FrozenTeacher(Classifier(Spy(), mean=(0.0,) * 3, std=(1.0,) * 3, image_px=20))
    teacher(torch.rand(2, 3, 8, 8))
    assert seen == [(2, 3, 20, 20)]


CLASSES = ["class 0", "class 1", "class 2"]


def saved_student(folder: Path, tokens: tuple[str, ...], **card: Any) -> DeiT:
    student = DeiT(image_px=8, patch_px=4, channels=3, classes=3, width=16, depth=1, heads=1, tokens=tokens)
    for head in (student.head, student.head_dist):
        if head is not None:
            head.weight.data *= 50  # answers far apart, so that readouts differ
    save_classifier(folder, classifier(student), {"class_names": CLASSES, "channels": 3, **card})
    return student


def naive_answers(student: DeiT, view: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the probabilities of each readout, by the paper's words."""
    output = student.eval()(view)
    heads = {"class": output.class_logits, "distillation": output.distillation_logits}
    heads = {name: logits.double() for name, logits in heads.items() if logits is not None}
    answers = {name: logits.softmax(dim=-1) for name, logits in heads.items()}
    if len(heads) == 2:
        answers["joint"] = (answers["class"] + answers["distillation"]) / 2
        answers["joint-logits"] = ((heads["class"] + heads["distillation"]) / 2).softmax(dim=-1)
    return answers


@pytest.mark.parametrize(
    ("tokens", "card", "readout"),
    [
        (("class",), {}, "class"),
        (("distillation",), {}, "distillation"),
        ((), {}, "class"),
        (("class", "distillation"), {}, "joint"),
        (("class", "distillation"), {"readout": "joint-logits"}, "joint-logits"),
        (("class", "distillation"), {"readout": "distillation"}, "distillation"),
    ],
)
def test_a_student_teaches_by_one_readout(
    tokens: tuple[str, ...], card: dict[str, str], readout: str, stripes: Dataset, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    student = saved_student(tmp_path / "student", tokens, **card)
    teacher, told = prepare(recipe(name=str(tmp_path / "student"), allow_weak=True), stripes, tmp_path / "run")
    assert (told.fit, told.readout, told.image_px) == ("none", readout, 8)
    view = torch.rand(5, 3, 8, 8)
    expected = naive_answers(student, view)[readout].float()
    torch.testing.assert_close(teacher(view).softmax(dim=-1), expected)
    for again in (recipe(allow_weak=True), recipe(name=str(tmp_path / "run" / "teacher"), allow_weak=True)):
        # On resume, and from its folder in another run.
        home = tmp_path / "run" if again.teacher.name == "cifar/resnet20" else tmp_path / "other"
        same, card_again = prepare(again, stripes, home)
        assert torch.equal(same(view), teacher(view))
        assert card_again.readout == readout
    assert teacher(torch.rand(2, 3, 20, 20)).shape == (2, 3)


def test_a_student_with_one_trained_head_teaches_by_that_one(stripes: Dataset, tmp_path: Path) -> None:
    student = saved_student(tmp_path / "student", ("class", "distillation"), only_readout="class")
    teacher, told = prepare(recipe(name=str(tmp_path / "student"), allow_weak=True), stripes, tmp_path / "run")
    assert told.readout == "class"
    view = torch.rand(5, 3, 8, 8)
    torch.testing.assert_close(teacher(view).softmax(dim=-1), naive_answers(student, view)["class"].float())


def test_a_teacher_whose_loss_is_not_finite_does_not_teach(
    stripes: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Student, "backward", poisoned_gradient("teacher", 8))
    with pytest.raises(TeacherError, match=r"teacher cifar/resnet20 .*finite.*: lower teacher\.train\.learning_rate"):
        prepare(recipe(allow_weak=True), stripes, tmp_path)
    assert not (tmp_path / "teacher" / "card.json").exists()


def test_looking_for_a_better_normalisation_leaves_the_teacher_as_it_was(stripes: Dataset) -> None:
    teacher = classifier(nn.Sequential(Brightness(), nn.BatchNorm1d(3))).eval()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    judge(teacher, stripes, allow_weak=True)
    assert not any(module.training for module in teacher.modules())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_weights_of_blue_green_red_are_turned_round(stripes: Dataset, tmp_path: Path) -> None:
    built = create_classifier("cifar/resnet20", classes=3, channels=3)
    save_tensors(tmp_path / "bgr.safetensors", dict(built.model.state_dict()))
    given = {"checkpoint": str(tmp_path / "bgr.safetensors"), "mean": [0.5] * 3, "std": [0.5] * 3, "allow_weak": True}
    plain, _ = prepare(recipe(**given), stripes, tmp_path / "plain")
    turned, card = prepare(recipe(channel_order="bgr", **given), stripes, tmp_path / "turned")
    view = torch.rand(4, 3, 8, 8)
    torch.testing.assert_close(turned(view), plain(view.flip(1)))
    assert card.source.endswith("channels reversed")


def test_a_student_asks_the_gate_as_any_teacher_does(stripes: Dataset, tmp_path: Path) -> None:
    saved_student(tmp_path / "student", ("class", "distillation"))
    with pytest.raises(TeacherError, match="on 60 validation images, which"):
        prepare(recipe(name=str(tmp_path / "student"), min_top1=1.0), stripes, tmp_path)


def test_the_winner_of_a_run_teaches_the_next(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    first = compare(tiny_recipe("methods=[none]"), tmp_path / "first", watcher=Watcher())
    assert first.winner == "none/class"
    taught = tiny_recipe("methods=[none, token-hard]", f"teacher.name={tmp_path / 'first'}", "teacher.cache=true")
    second = compare(taught, tmp_path / "second", watcher=Watcher())
    assert second.teacher.name == str(tmp_path / "first")
    assert second.teacher.readout == "class"
    assert second.teacher.test_top1 == first.rows[0].top1[0]


def test_a_teacher_of_unknown_images_is_noted_where_the_test_images_are_drawn_here(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    def notes(name: str, *teacher: str) -> str:
        recipe = tiny_recipe("methods=[hard]", "train.epochs=1", *teacher)
        return " ".join(compare(recipe, tmp_path / name, watcher=Watcher()).notes)

    words = "Nothing records from which images the teacher"
    assert words not in notes("own")
    shutil.copy(tmp_path / "own" / "teacher" / "model.safetensors", tmp_path / "strange.safetensors")
    assert words in notes("strange", f"teacher.checkpoint={tmp_path / 'strange.safetensors'}")
    assert words in notes("again", f"teacher.name={tmp_path / 'strange' / 'teacher'}")
    assert words not in notes("known", f"teacher.name={tmp_path / 'own' / 'teacher'}")


@pytest.mark.parametrize(("own", "view", "side"), [(0.9, 0.8, 224), (0.8, 0.8, 224), (0.7, 0.8, 8), (None, None, 8)])
def test_a_strangers_teacher_is_used_at_the_resolution_that_is_better(
    own: float | None, view: float | None, side: int, stripes: Dataset
) -> None:
    card = CARD.model_copy(update={"image_px": 224, "own_px_top1": own, "view_px_top1": view})
    assert _model_card(card, stripes, recipe(), stripes)["input_px"] == [side, side]
    trained = card.model_copy(update={"fit": "head"})  # on the views
    assert _model_card(trained, stripes, recipe(), stripes)["input_px"] == [8, 8]


def test_a_timm_transformer_sees_views_at_its_own_resolution(stripes: Dataset, tmp_path: Path) -> None:
    for image_px, expected in ((None, 160), (32, 32)):
        vit = recipe(name="timm/test_vit", fit="none", allow_weak=True, image_px=image_px)
        teacher, card = prepare(vit, stripes, tmp_path / str(image_px))
        assert card.image_px == expected
        assert teacher(torch.rand(2, 3, 8, 8)).shape == (2, 3)


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        ({"image_px": 16}, "teacher.image_px=16 does not suit the student .* of 8 px: leave it out"),
        ({"fit": "head"}, "two classifier layers.*set teacher.fit=none or full"),
        ({"reset_head": True}, "two classifier layers.*set teacher.fit=none or full"),
    ],
)
def test_what_a_student_cannot_do_as_a_teacher(
    teacher: dict[str, Any], words: str, stripes: Dataset, tmp_path: Path
) -> None:
    saved_student(tmp_path / "student", ("class", "distillation"))
    with pytest.raises(TeacherError, match=words):
        prepare(recipe(name=str(tmp_path / "student"), **teacher), stripes, tmp_path)


def test_a_student_of_other_classes_does_not_teach(stripes: Dataset, tmp_path: Path) -> None:
    saved_student(tmp_path / "student", ("class",), class_names=["a", "b", "c"])
    with pytest.raises(TeacherError, match=r"has the classes a, b, c, but the data has class 0, class 1, class 2: "):
        prepare(recipe(name=str(tmp_path / "student")), stripes, tmp_path)


def test_a_student_can_be_trained_further_before_it_teaches(stripes: Dataset, tmp_path: Path) -> None:
    saved_student(tmp_path / "student", ("class", "distillation"))
    train = {"optimizer": "adamw", "learning_rate": 0.01, "epochs": 20, "batch_size": 12}
    own = {"mean": list(stripes.mean), "std": list(stripes.std), "train": train}
    teacher, card = prepare(recipe(name=str(tmp_path / "student"), fit="full", **own), stripes, tmp_path)
    assert (card.fit, card.readout, card.top1 > 0.6) == ("full", "joint", True)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_a_teachers_images_are_read_as_when_its_training_began(
    tmp_path: Path, write_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = write_images(tmp_path / "photos", px=16)
    fields = ("data.train_images=8", "data.image_px=8", "teacher.all_images=true", "teacher.train.batch_size=4")
    recipe = load_recipe(
        "digits", [f"data.name=folder:{photos}", "data.test_images=null", *fields, "train.batch_size=4"]
    )
    dataset, home = load_dataset(recipe.data), tmp_path / "teacher"
    home.mkdir()
    assert not load_teacher_images(recipe, dataset, home).streamed
    with monkeypatch.context() as patch:
        patch.setattr("deitkit.data.survey._MOST_MEMORY", 0.0)  # everything that may be streamed now is
        assert not load_teacher_images(recipe, dataset, home).streamed
        assert load_teacher_images(recipe, dataset).streamed
        assert load_teacher_images(recipe, dataset, tmp_path).streamed
    assert load_teacher_images(recipe, dataset, tmp_path).streamed


def test_a_teacher_of_all_images_sees_them_in_the_channels_of_the_run(tmp_path: Path) -> None:
    """Only images that the students do not train on are coloured."""
    for label, name in enumerate(("ant", "bee")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(30):
            picture = Image.new("L", (8, 8), 100 * label + index)
            picture.save(tmp_path / "photos" / name / f"{index:02}.png")
    fields = [f"data.name=folder:{tmp_path / 'photos'}", "data.train_images=8", "data.test_images=null",
              "teacher.all_images=true", "teacher.train.batch_size=4", "train.batch_size=4"]  # fmt: skip
    recipe = load_recipe("digits", fields)
    used = load_dataset(recipe.data)
    seen = torch.cat([split.images[:, 0, 0, 0] for split in (used.train, used.validation, used.test)]).tolist()
    for value in {100 * label + index for label in (0, 1) for index in range(30)} - set(seen):
        path = tmp_path / "photos" / ("ant", "bee")[value // 100] / f"{value % 100:02}.png"
        coloured = Image.open(path).convert("RGB")
        coloured.putpixel((0, 0), (255, 0, 0))
        coloured.save(path)
    again = load_dataset(recipe.data)
    assert again.channels == 1
    assert load_teacher_images(recipe, again).channels == 1
