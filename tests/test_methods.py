"""Properties of every method, over the whole table."""

import pytest
import torch
from torch import nn

from deitkit.errors import RecipeError
from deitkit.evaluate import readout_scores
from deitkit.methods import METHODS, Method, find_method
from deitkit.models.classifier import Classifier
from deitkit.models.vit import DeiT
from deitkit.recipe import DistillationRecipe
from deitkit.teacher import FrozenTeacher

SETTINGS = DistillationRecipe(temperature=2.0, soft_weight=0.3, hard_weight=0.4, token_weight=0.6)
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def student_of(method: Method) -> DeiT:
    torch.manual_seed(0)
    model = DeiT(
        image_px=8, patch_px=4, channels=3, classes=4, width=16, depth=2, heads=2, tokens=method.tokens, drop_path=0.1
    )
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
        answer = teacher(view)
        assert torch.equal(answer, teacher(view)), "dropout of the teacher is awake"
        optimizer.zero_grad()
        sum(method.loss_terms(student(view), answer, targets_of(5), SETTINGS).values()).backward()
        optimizer.step()
    assert before.keys() == teacher.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


@every_method
def test_loss_is_that_of_a_naive_loop(method: Method) -> None:
    """Written out once more, from the paper's equations, one image at a time."""
    student, teacher = student_of(method).eval(), frozen_cnn()
    view, targets = torch.rand(3, 3, 8, 8), targets_of(3)
    output, answer = student(view), teacher(view)
    weight = {"soft": 0.3, "hard": 0.4, "token": 0.6}.get(method.name.removeprefix("mean-pool-").split("-")[0])
    expected = 0.0
    for index in range(3):
        first = output.class_logits if output.class_logits is not None else output.distillation_logits
        second = output.distillation_logits if output.distillation_logits is not None else output.class_logits
        labels = -(targets[index] * first[index].log_softmax(-1)).sum()
        hard = -second[index].log_softmax(-1)[answer[index].argmax()]
        p, q = (answer[index] / 2).softmax(-1), (second[index] / 2).softmax(-1)
        soft = 4 * (p * (p / q).log()).sum()
        if method.teacher_signal is None:
            expected += labels
        elif not method.uses_labels:
            expected += hard
        else:
            expected += (1 - weight) * labels + weight * (soft if method.teacher_signal == "soft" else hard)
    loss = sum(method.loss_terms(output, answer, targets, SETTINGS).values())
    assert torch.isclose(loss, expected / 3, rtol=1e-4)


@every_method
def test_terms_are_finite_at_huge_bf16_logits_and_do_not_change_with_a_shift(method: Method) -> None:
    heads = {"class_logits": None, "distillation_logits": None}
    for token in method.tokens or ("class",):
        heads[f"{token}_logits"] = torch.tensor([[1e4, -1e4, 0.0, 5.0]], dtype=torch.bfloat16)
    from deitkit.models.vit import Output

    answer = torch.tensor([[-1e4, 1e4, 0.0, 1.0]], dtype=torch.bfloat16)
    terms = method.loss_terms(Output(**heads), answer, targets_of(1), SETTINGS)
    assert all(torch.isfinite(term) for term in terms.values())
    shifted = {name: None if value is None else value.float() + 8 for name, value in heads.items()}
    again = method.loss_terms(Output(**shifted), answer.float() - 3, targets_of(1), SETTINGS)
    for name in terms:
        assert torch.isclose(terms[name], again[name], rtol=1e-3)


@every_method
def test_readouts_follow_from_the_tokens(method: Method) -> None:
    scores = readout_scores(student_of(method).eval()(torch.rand(2, 3, 8, 8)))
    expected = ["class", "distillation", "joint", "joint-logits"] if len(method.tokens) == 2 else None
    assert list(scores) == (expected or [method.tokens[0] if method.tokens else "class"])


def test_an_unknown_method_names_its_neighbours() -> None:
    with pytest.raises(RecipeError, match="'token-hrad' is no method; did you mean token-hard"):
        find_method("token-hrad")
