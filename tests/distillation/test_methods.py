"""Properties of every method, over the whole table."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import CPU_FP32, striped_dataset
from deitkit.distillation.methods import METHODS, SIGNALS, Method, Signal, Term, find_method, is_shipped
from deitkit.errors import RecipeError
from deitkit.evaluation.readouts import readout_scores
from deitkit.models.classifier import Classifier
from deitkit.models.vit import DeiT, Output
from deitkit.recipe.schema import AugmentRecipe, DistillationRecipe, TrainRecipe
from deitkit.recipe.speed import SpeedRecipe
from deitkit.run.layout import BASELINE
from deitkit.teachers.frozen import FrozenTeacher
from deitkit.training.cohort import Cohort
from deitkit.training.student import Student

SETTINGS = DistillationRecipe(
    temperature=2.0, soft_weight=0.3, hard_weight=0.4, token_weight=0.6,
    dkd={"target_weight": 0.9, "others_weight": 5.0, "temperature": 4.0},
    dist={"inter_weight": 1.5, "intra_weight": 2.5, "temperature": 5.0},
    standardised={"label_weight": 0.2, "teacher_weight": 8.0, "temperature": 3.0},
    consistent={"temperature": 1.5},
)  # fmt: skip
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def student_of(method: Method, drop_path: float = 0.1) -> DeiT:
    torch.manual_seed(0)
    model = DeiT(
        image_px=8, patch_px=4, channels=3, classes=4, width=16, depth=2, heads=2, tokens=method.tokens,
        drop_path=drop_path,
    )  # fmt: skip
    for parameter in model.parameters():  # heads start near zero; a gradient should not be zero for that reason
        nn.init.normal_(parameter, std=0.2)
    return model


def frozen_cnn() -> FrozenTeacher:
    torch.manual_seed(1)
    cnn = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8 * 36, 4))
    return FrozenTeacher(Classifier(cnn, mean=(0.5,) * 3, std=(0.25,) * 3))


def targets_of(batch: int) -> torch.Tensor:
    return torch.rand(batch, 4, generator=torch.Generator().manual_seed(2)).softmax(dim=-1)


@every_method
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_gradients_reach_every_weight_of_the_student_and_none_of_the_teacher(method: Method, batch: int) -> None:
    student, teacher = student_of(method), frozen_cnn()
    view = torch.rand(batch, 3, 8, 8)
    terms = method.loss_terms(student.train(False)(view), teacher(view), targets_of(batch), SETTINGS)
    sum(terms.values()).backward()
    assert all(loss.shape == () and torch.isfinite(loss) for loss in terms.values())
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in teacher.parameters())


@every_method
def test_teacher_is_bit_equal_after_train_and_three_steps(method: Method) -> None:
    student, teacher = student_of(method).train(), frozen_cnn()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    holder = nn.ModuleDict({"student": student, "teacher": teacher})
    holder.train()
    optimizer = torch.optim.SGD([p for p in holder.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        view = torch.rand(5, 3, 8, 8)
        teacher_logits = teacher(view)
        assert torch.equal(teacher_logits, teacher(view)), "dropout of the teacher is awake"
        optimizer.zero_grad()
        sum(method.loss_terms(student(view), teacher_logits, targets_of(5), SETTINGS).values()).backward()
        optimizer.step()
    assert before.keys() == teacher.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return sum(a * (a / b).log() for a, b in zip(p, q, strict=True))


def correlation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.corrcoef(torch.stack([a, b]))[0, 1]


def naive_losses(head: torch.Tensor, teacher_logits: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every signal written out once more, from the papers' equations, one image at a time; weights are SETTINGS'."""
    sums = dict.fromkeys(("labels", "hard", "soft", "consistent", "standardised", "dkd", "dist"), 0.0)
    for s, z, y in zip(head, teacher_logits, targets, strict=True):
        sums["labels"] -= (y * s.log_softmax(-1)).sum()
        sums["hard"] -= s.log_softmax(-1)[z.argmax()]
        sums["soft"] += 4 * divergence((z / 2).softmax(-1), (s / 2).softmax(-1))
        sums["consistent"] += 2.25 * divergence((z / 1.5).softmax(-1), (s / 1.5).softmax(-1))
        z_scores = [(x - x.mean()) / x.std(correction=0) for x in (z, s)]
        sums["standardised"] += 9 * divergence(*((x / 3).softmax(-1) for x in z_scores))
        p, q, place = (z / 4).softmax(-1), (s / 4).softmax(-1), int(y.argmax())
        both = [torch.stack([x[place], 1 - x[place]]) for x in (p, q)]
        others = [torch.cat([x[:place], x[place + 1 :]]) / (1 - x[place]) for x in (p, q)]
        sums["dkd"] += 16 * (0.9 * divergence(*both) + 5 * divergence(*others))
        sums["dist"] += 25 * 1.5 * (1 - correlation((z / 5).softmax(-1), (s / 5).softmax(-1)))
    p, q = (teacher_logits / 5).softmax(-1), (head / 5).softmax(-1)
    by_class = [1 - correlation(p[:, c], q[:, c]) for c in range(4)]
    sums["dist"] += len(head) * 25 * 2.5 * sum(by_class) / 4
    return {name: total / len(head) for name, total in sums.items()}


# Method without its prefix: what each head learns from, and the weights of labels and teacher.
NAIVE = {
    "none": ("labels", 1, 0), "class-only": ("labels", 1, 0), "distillation-only": ("hard", 0, 1),
    "soft": ("soft", 0.7, 0.3), "hard": ("hard", 0.6, 0.4), "dkd": ("dkd", 1, 1), "dist": ("dist", 1, 1),
    "standardised": ("standardised", 0.2, 8), "consistent": ("consistent", 0, 1),
}  # fmt: skip


@every_method
def test_loss_is_that_of_a_naive_loop(method: Method) -> None:
    student, teacher = student_of(method).eval(), frozen_cnn()
    view, targets = torch.rand(5, 3, 8, 8), targets_of(5)
    output, teacher_logits = student(view), teacher(view)
    first = output.class_logits if output.class_logits is not None else output.distillation_logits
    second = output.distillation_logits if output.distillation_logits is not None else output.class_logits
    signal, labels, share = NAIVE[method.name.removeprefix("mean-pool-").removeprefix("token-")]
    if method.name.startswith("token-"):
        labels, share = 0.4, 0.6
    expected = labels * naive_losses(first, teacher_logits, targets)["labels"]
    expected += share * naive_losses(second, teacher_logits, targets)[signal]
    loss = sum(method.loss_terms(output, teacher_logits, targets, SETTINGS).values())
    assert torch.isclose(loss, expected, rtol=1e-4)


@every_method
def test_a_divided_batch_gives_the_gradient_of_the_whole_batch(method: Method) -> None:
    """Also where the images of a batch enter each other's loss: such a method's batch is not divided."""
    data, train = striped_dataset(classes=4, per_class=5), TrainRecipe(batch_size=12)
    gradients = []
    for micro_batch_size in (None, 5):
        classifier = Classifier(student_of(method, drop_path=0.0), mean=data.mean, std=data.std)
        student = Student(
            method.name, method, classifier, train, precision=CPU_FP32, batch_size=train.batch_size,
            distillation=SETTINGS, speed=SpeedRecipe(micro_batch_size=micro_batch_size),
        )  # fmt: skip
        cohort = Cohort(
            [student], teacher=frozen_cnn(), dataset=data, augment=AugmentRecipe(mixup=0.8), train=train,
            speed=SpeedRecipe(), precision=CPU_FP32, seed=0,
        )  # fmt: skip
        cohort.next_step(cohort.batches.epoch(0, 0))
        gradients.append([parameter.grad for parameter in classifier.parameters()])
    for whole, divided in zip(*gradients, strict=True):
        torch.testing.assert_close(divided, whole, rtol=1e-3, atol=1e-5)


@every_method
def test_terms_are_finite_at_huge_bf16_logits_and_do_not_change_with_a_shift(method: Method) -> None:
    heads = {"class_logits": None, "distillation_logits": None}
    for token in method.tokens or ("class",):
        heads[f"{token}_logits"] = torch.tensor([[1e4, -1e4, 0.0, 5.0]], dtype=torch.bfloat16)
    from deitkit.models.vit import Output

    teacher_logits = torch.tensor([[-1e4, 1e4, 0.0, 1.0]], dtype=torch.bfloat16)
    terms = method.loss_terms(Output(**heads), teacher_logits, targets_of(1), SETTINGS)
    assert all(torch.isfinite(term) for term in terms.values())
    shifted = {name: None if value is None else value.float() + 8 for name, value in heads.items()}
    again = method.loss_terms(Output(**shifted), teacher_logits.float() - 3, targets_of(1), SETTINGS)
    for name in terms:
        assert torch.isclose(terms[name], again[name], rtol=1e-3)


@every_method
def test_readouts_follow_from_the_tokens(method: Method) -> None:
    scores = readout_scores(student_of(method).eval()(torch.rand(2, 3, 8, 8)))
    expected = ["class", "distillation", "joint", "joint-logits"] if len(method.tokens) == 2 else None
    assert list(scores) == (expected or [method.tokens[0] if method.tokens else "class"])


def test_an_unknown_method_names_its_neighbours() -> None:
    with pytest.raises(RecipeError, match="'token-hrad' is not a method; did you mean token-hard"):
        find_method("token-hrad")


@every_method
def test_a_classifier_that_starts_at_zero_learns_as_a_random_one_does(method: Method) -> None:
    """A checkpoint with other classes starts so; the first gradient must have the size that a random head's has."""
    generator = torch.Generator().manual_seed(0)
    images, classes = 64, 10
    features = torch.randn(images, 32, generator=generator)
    teacher = features @ torch.randn(32, classes, generator=generator) * 0.6
    targets = torch.nn.functional.one_hot(teacher.argmax(dim=-1), classes).float()
    norms, agreements = [], []
    for start in (0.0, 0.02):
        torch.manual_seed(0)
        heads = {token: torch.nn.Linear(32, classes) for token in ("class", "distillation")}
        for head in heads.values():
            torch.nn.init.normal_(head.weight, 0, start)
            torch.nn.init.zeros_(head.bias)
        optimizer = torch.optim.SGD([p for head in heads.values() for p in head.parameters()], lr=0.02, momentum=0.9)
        for step in range(300):
            logits = {token: head(features) for token, head in heads.items()}
            output = Output(*(logits[token] if _has_head(method, token) else None for token in logits))
            loss = sum(method.loss_terms(output, teacher, targets, DistillationRecipe()).values())
            optimizer.zero_grad()
            loss.backward()
            if step == 0:
                norms.append(
                    sum(float(p.grad.norm()) for h in heads.values() for p in h.parameters() if p.grad is not None)
                )
            optimizer.step()
        token = "distillation" if _has_head(method, "distillation") else "class"
        agreements.append(float((heads[token](features).argmax(dim=-1) == teacher.argmax(dim=-1)).float().mean()))
    assert norms[0] < 10 * norms[1], norms
    assert agreements[0] > agreements[1] - 0.05, agreements


def _has_head(method: Method, token: str) -> bool:
    return any(term.head == token for term in method.terms)


def focal(logits: Tensor, teacher_logits: Any, targets: Tensor, settings: Any) -> Tensor:
    shares = logits.float().log_softmax(dim=-1)
    return -((1 - shares.exp()) ** 2 * targets * shares).sum(dim=-1).mean()


def test_a_signal_of_labels_with_another_name_is_one_of_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIGNALS, "focal", Signal(focal))
    terms = (Term("class", "focal", lambda settings: 1.0), Term("class", "soft", lambda settings: 1.0))
    method = Method("focal", ("class",), terms, "focal", "focal")
    assert method.uses_labels
    generator = torch.Generator().manual_seed(0)
    logits, teacher, targets = (torch.randn(6, 4, generator=generator) for _ in range(3))
    targets = targets.softmax(dim=-1)
    values = method.loss_terms(Output(logits), teacher, targets, SETTINGS)
    assert values.keys() == {"labels", "teacher"}
    assert values["labels"] == focal(logits, None, targets, SETTINGS)
    own = targets * torch.tensor([2.0, 1.0, 1.0, 0.5])
    weighted = method.loss_terms(Output(logits), teacher, targets, SETTINGS, own)
    assert weighted["labels"] == focal(logits, None, own, SETTINGS)
    assert weighted["teacher"] == values["teacher"]
    assert method.loss_terms(Output(logits), teacher, None, SETTINGS).keys() == {"teacher"}


ONE = Term("class", "labels", lambda settings: 1.0)


@pytest.mark.parametrize(
    ("tokens", "terms", "said"),
    [
        (("distillation", "class"), (ONE,), "its tokens are ('distillation', 'class'): choose from"),
        (
            ("class",),
            (Term("class", "labls", lambda settings: 1.0),),
            "'labls' is not a signal: choose from labels, hard",
        ),
        (
            ("class",),
            (ONE, Term("distillation", "hard", lambda settings: 1.0)),
            "must train its heads, which are class",
        ),
        (("class", "distillation"), (ONE,), "must train its heads, which are class and distillation"),
        (("class",), (), "must train its heads"),
    ],
)
def test_a_method_that_cannot_train_is_one_sentence(
    tokens: tuple[str, ...], terms: tuple[Term, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "mine", Method("mine", tokens, terms, "mine", "mine"))
    with pytest.raises(RecipeError) as caught:
        find_method("mine")
    assert str(caught.value).startswith("methods: 'mine' cannot train: ")
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["Mine", "a/b", "a+ema", "a,b", "", "x" * 65, BASELINE])
def test_a_name_that_makes_no_folder_is_one_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, name, Method(name, ("class",), (ONE,), "mine", "mine"))
    with pytest.raises(RecipeError, match="cannot train: it names a folder: use lower-case letters, digits, - and _"):
        find_method(name)


def test_a_method_is_found_under_its_own_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = replace(METHODS["soft"], name="mine")
    monkeypatch.setitem(METHODS, "yours", mine)
    with pytest.raises(
        RecipeError, match="'yours' cannot train: its name is 'mine': put it into METHODS under its name"
    ):
        find_method("yours")
    monkeypatch.setitem(METHODS, "mine", mine)
    assert find_method("mine") is find_method(mine) is mine
    with pytest.raises(RecipeError, match="METHODS has another method of the name 'soft'"):
        find_method(replace(METHODS["soft"], terms=(ONE,)))


def test_what_takes_the_place_of_a_shipped_method_or_signal_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(is_shipped(method) for method in METHODS.values())
    monkeypatch.setitem(METHODS, "none", replace(METHODS["none"], title="mine"))
    monkeypatch.setitem(SIGNALS, "soft", Signal(focal, "soft"))
    of_user = {name for name, method in METHODS.items() if not is_shipped(method)}
    assert of_user == {"none", "soft", "token-soft", "mean-pool-soft"}


def test_a_signal_without_a_teacher_sees_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also beside one with a teacher: it counts as one of the labels."""
    seen = []

    def watching(logits: Tensor, teacher_logits: Tensor | None, targets: Tensor, settings: Any) -> Tensor:
        seen.append(teacher_logits)
        return logits.mean()

    monkeypatch.setitem(SIGNALS, "watching", Signal(watching))
    terms = (Term("class", "watching", lambda settings: 1.0), Term("class", "soft", lambda settings: 1.0))
    logits = torch.randn(3, 4)
    Method("mine", ("class",), terms, "mine", "mine").loss_terms(Output(logits), logits, targets_of(3), SETTINGS)
    assert seen == [None]


def test_only_losses_of_the_softmax_say_so_and_only_those_of_an_order_need_three_classes() -> None:
    """A shift changes no softmax, and a factor of all logits is a temperature, which changes no z-score."""
    teacher = torch.randn(5, 4, generator=torch.Generator().manual_seed(3))
    all_but_two = teacher.scatter(1, teacher.topk(2, largest=False).indices, 0.0)
    same_softmax = all_but_two - all_but_two.logsumexp(-1, keepdim=True)
    logits, targets = torch.randn(5, 4, generator=torch.Generator().manual_seed(4)), targets_of(5)
    for name, signal in SIGNALS.items():
        if signal.by_softmax:
            values = [signal.loss(logits, given, targets, SETTINGS) for given in (all_but_two, same_softmax)]
            torch.testing.assert_close(*values, msg=name)
    assert {name for name, method in METHODS.items() if method.needs_all_logits} == {
        "standardised",
        "token-standardised",
    }
    few = {"standardised", "token-standardised", "dist", "token-dist"}
    assert {name for name, method in METHODS.items() if method.least_classes > 2} == few
