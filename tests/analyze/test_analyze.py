"""What `deitkit analyze` computes, against naive loops and cases by hand; and what it leaves in a run folder."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deitkit.analyze.agreement import (
    agreement,
    confusion_matrix,
    disagreement,
    divergence,
    most_confused,
    per_class_accuracy,
    precision_and_f1,
)
from deitkit.analyze.calibration import brier_score, negative_log_likelihood, reliability
from deitkit.analyze.tokens import (
    attention_by_block,
    attention_maps,
    learned_similarity,
    patch_maps,
    recorded,
    recorded_similarity,
    rollout,
)
from deitkit.evaluation.readouts import readout_scores
from deitkit.models.classifier import Classifier
from deitkit.models.vit import DeiT, Output


def drawn(seed: int, n: int = 300, classes: int = 6) -> tuple[Tensor, Tensor]:
    """Probabilities that lean towards their labels, and the labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    logits = 2 * torch.randn(n, classes, generator=generator)
    return (logits + 2 * torch.nn.functional.one_hot(labels, classes)).softmax(dim=-1), labels


def test_disagreement_is_a_mean_over_the_seeds_of_both() -> None:
    truth = torch.tensor([0, 1, 2, 1])
    judges = {
        "truth": {0: truth, 1: truth},
        "a": {0: torch.tensor([0, 1, 2, 2]), 1: torch.tensor([1, 1, 2, 2])},
        "b": {1: torch.tensor([1, 1, 0, 1])},
        "stopped": {},
    }
    matrix = disagreement(judges)
    assert matrix[0] == [0, (1 / 4 + 2 / 4) / 2, 2 / 4, None]
    assert matrix[1][2] == 2 / 4  # under seed 1 alone
    assert all(matrix[i][j] == matrix[j][i] for i in range(4) for j in range(4))


def test_confusion_counts_and_words() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    decisions = torch.tensor([1, 1, 0, 1, 2, 0])
    counts = confusion_matrix(decisions, labels, 4)
    naive = [[sum(a == i and b == j for a, b in zip(labels.tolist(), decisions.tolist())) for j in range(4)]
             for i in range(4)]  # fmt: skip
    assert counts.tolist() == naive
    assert per_class_accuracy(counts) == [pytest.approx(1 / 3), 1 / 2, 0, None]
    worst, *others = most_confused(counts)
    assert worst.model_dump() == {"true": 0, "decided": 1, "count": 2, "of": 3, "share": pytest.approx(2 / 3)}
    assert [(pair.true, pair.decided) for pair in others] == [(1, 2), (2, 0)], "the diagonal is no mistake"
    assert most_confused(torch.eye(3, dtype=torch.int64)) == ()


def test_agreement_tells_inherited_from_corrected_mistakes() -> None:
    labels = torch.tensor([0, 0, 1, 1, 1])
    teacher = torch.tensor([0, 0, 1, 0, 2])
    student = torch.tensor([0, 1, 1, 0, 1])
    found = agreement(student, teacher, labels)
    assert found == {"overall": 3 / 5, "teacher_right": pytest.approx(2 / 3), "teacher_wrong": 0.5, "corrected": 0.5}
    assert agreement(student, labels, labels)["teacher_wrong"] is None


def test_divergence_to_the_teacher_is_scipys_relative_entropy() -> None:
    from scipy.stats import entropy

    (student, _), (teacher, _) = drawn(0), drawn(1)
    expected = entropy(teacher.double().numpy(), student.double().numpy(), axis=1).mean()
    assert divergence(student, teacher) == pytest.approx(expected, rel=1e-5)
    assert divergence(teacher, teacher) == 0


def test_probabilities_of_each_readout_sum_to_one() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(5, 3, generator=generator) for _ in range(2)]
    scores = readout_scores(Output(*logits))
    found = {name: values.softmax(dim=-1) for name, values in scores.items()}
    for name, values in found.items():
        torch.testing.assert_close(values.sum(dim=-1), torch.ones(5), msg=name)
    torch.testing.assert_close(found["joint"], (found["class"] + found["distillation"]) / 2)


def naive_bins(probabilities: Tensor, labels: Tensor, bins: int) -> list[list[tuple[float, bool]]]:
    """Each image's confidence and whether it is right, by bin ((m - 1) / M, m / M], as Guo et al. write it."""
    found: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for row, label in zip(probabilities.double().tolist(), labels.tolist(), strict=True):
        place = next(m for m in range(bins) if max(row) <= (m + 1) / bins)
        found[place].append((max(row), row.index(max(row)) == label))
    return found


@given(st.integers(0, 2**16), st.sampled_from([1, 10, 15]))
def test_calibration_errors_are_those_of_a_naive_loop(seed: int, bins: int) -> None:
    probabilities, labels = drawn(seed, n=60)
    found = reliability(probabilities, labels, bins)
    gaps = []
    for members in naive_bins(probabilities, labels, bins):
        confidence = sum(value for value, _ in members)
        hits = sum(right for _, right in members)
        gaps.append((abs(confidence - hits) / max(len(members), 1), len(members)))
    assert found.counts.tolist() == [count for _, count in gaps]
    assert found.expected_error == pytest.approx(sum(gap * count for gap, count in gaps) / 60)
    assert found.maximum_error == pytest.approx(max(gap for gap, _ in gaps))


@pytest.mark.parametrize("n", [100, 1000, 10_000])
def test_the_error_by_chance_is_that_of_labels_drawn_from_the_probabilities(n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = (2 * torch.randn(n, 10, generator=generator)).softmax(dim=-1)
    drawn = [
        reliability(probabilities, torch.multinomial(probabilities, 1, generator=generator)[:, 0]) for _ in range(60)
    ]
    assert drawn[0].error_by_chance == pytest.approx(sum(each.expected_error for each in drawn) / 60, rel=0.08)


def test_calibration_by_hand() -> None:
    probabilities = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.5, 0.5], [0.0, 1.0]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 0, 1])
    found = reliability(probabilities, labels, bins=2)
    # 0.5 belongs to the lower bin: right, and sure by half. The upper: 2 of 3 right, sure by 2.6 of 3.
    assert found.counts.tolist() == [1, 3]
    assert found.expected_error == pytest.approx((0.5 + 0.6) / 4)
    assert found.maximum_error == pytest.approx(0.5)
    assert found.curve()[1].model_dump() == {
        "low": 0.5, "high": 1, "count": 3, "confidence": pytest.approx(2.6 / 3), "accuracy": pytest.approx(2 / 3),
    }  # fmt: skip
    pooled = found + found
    assert pooled.counts.tolist() == [2, 6]
    assert pooled.expected_error == pytest.approx(found.expected_error)
    assert brier_score(probabilities, labels) == pytest.approx((0.08 + 1.28 + 0.5 + 0) / 4)
    assert negative_log_likelihood(probabilities, labels) == pytest.approx(-math.log(0.8 * 0.2 * 0.5) / 4)


def test_a_true_class_that_rounded_to_zero_costs_much_and_not_infinitely() -> None:
    assert 80 < negative_log_likelihood(torch.tensor([[1.0, 0.0]]), torch.tensor([1])) < 90


def test_likelihood_is_torchs_cross_entropy() -> None:
    probabilities, labels = drawn(4)
    expected = torch.nn.functional.nll_loss(probabilities.log(), labels).item()
    assert negative_log_likelihood(probabilities, labels) == pytest.approx(expected, rel=1e-5)


def random_student(tokens: tuple[str, ...], depth: int = 3) -> tuple[DeiT, Classifier]:
    """A student with parameters far from their start, so that attention is not uniform."""
    model = DeiT(
        image_px=32, patch_px=8, channels=3, classes=5, width=24, depth=depth, heads=3, tokens=tokens
    ).eval()  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.6, generator=generator)
    return model, Classifier(model, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.2)).eval()


def views(count: int = 4) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def timm_twin(model: DeiT) -> timm.models.VisionTransformerDistilled:
    """The same student as timm has it, attending by plain products."""
    twin = timm.models.deit.VisionTransformerDistilled(
        img_size=32, patch_size=8, num_classes=5, embed_dim=24, depth=len(model.blocks), num_heads=3
    )
    twin.load_state_dict(model.state_dict(), strict=True)
    for block in twin.blocks:
        block.attn.fused_attn = False
    return twin.eval()


def test_attention_is_that_of_timm() -> None:
    model, classifier = random_student(("class", "distillation"))
    found = attention_by_block(classifier, views())
    twin = timm_twin(model)
    with recorded([block.attn.attn_drop for block in twin.blocks]) as expected, torch.no_grad():
        twin((views() - classifier.mean) / classifier.std)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(3, 4, 3, 18))
    assert found.max() > 0.5, "uniform attention would show nothing"


def test_attention_is_what_the_fused_kernel_does_to_identity_values() -> None:
    model, classifier = random_student(("class",), depth=1)
    with recorded([model.blocks[0].attn.qkv]) as found:
        classifier(views())
    query, key, _ = found[0].view(4, 17, 3, 3, 8).permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(query, key, torch.eye(17).expand(4, 3, 17, 17))
    torch.testing.assert_close(attention_by_block(classifier, views())[0], expected)


def test_similarity_of_tokens_is_that_of_timms_by_image_and_layer() -> None:
    model, classifier = random_student(("class", "distillation"))
    with recorded_similarity(classifier) as found, torch.no_grad():
        for batch in views().split([3, 1]):
            classifier(batch)
    twin = timm_twin(model)
    with recorded([twin.norm_pre, *twin.blocks]) as expected, torch.no_grad():
        twin((views() - classifier.mean) / classifier.std)
    assert [[len(batch) for batch in layer] for layer in found] == [[3, 1]] * 4
    for layer, x in zip(found, expected, strict=True):
        for image, cosine in enumerate(torch.cat(layer)):
            one, other = x[image, 0].double(), x[image, 1].double()
            assert cosine == pytest.approx((one @ other / one.norm() / other.norm()).item(), abs=1e-5)
    assert torch.cat(found[0]).std() < 1e-6, "before the first block nothing depends on the image"
    assert torch.cat(found[3]).std() > 1e-3
    with torch.no_grad():
        model.dist_token.copy_(-2 * model.cls_token)
    assert learned_similarity(classifier) == pytest.approx(-1)


def test_looking_leaves_a_student_as_it_was() -> None:
    model, classifier = random_student(("class", "distillation"))
    before = classifier(views()).class_logits
    attention_by_block(classifier, views())
    with recorded_similarity(classifier):
        classifier(views())
    torch.testing.assert_close(classifier(views()).class_logits, before, rtol=0, atol=0)
    assert not any(module._forward_hooks for module in model.modules())


def test_rollout_of_one_block_and_of_three() -> None:
    _, classifier = random_student(("class", "distillation"))
    attention = attention_by_block(classifier, views())
    first = attention[0].mean(dim=1)
    half = first + torch.eye(18)
    torch.testing.assert_close(rollout(attention[:1]), half / half.sum(dim=-1, keepdim=True))
    found = rollout(attention)
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(4, 18))
    # Entry by entry: from token i after the last block down every path to token j of the input.
    mixes = [(block.mean(dim=1)[0] + torch.eye(18)) / 2 for block in attention]
    expected = sum(mixes[2][1, a] * mixes[1][a, b] * mixes[0][b, 5] for a in range(18) for b in range(18))
    assert found[0, 1, 5] == pytest.approx(expected.item(), rel=1e-4)


def test_maps_are_rows_of_the_tokens_on_the_grid_of_patches() -> None:
    _, classifier = random_student(("class", "distillation"))
    rows = torch.arange(18 * 18.0).view(1, 18, 18)
    maps = patch_maps(rows, classifier)
    assert list(maps) == ["class", "distillation"]
    assert maps["distillation"].shape == (1, 4, 4)
    assert maps["distillation"][0, 2, 3] == rows[0, 1, 2 + 4 * 2 + 3]
    _, pooled = random_student(())
    assert patch_maps(rows[:, :16, :16], pooled) == {}


def test_maps_of_an_image_are_those_of_its_batch() -> None:
    _, classifier = random_student(("class", "distillation"))
    attention = attention_by_block(classifier, views())
    found = attention_maps(classifier, views()[2:3])
    kinds = ["class, last block", "class, rollout", "distillation, last block", "distillation, rollout"]
    assert list(found) == kinds
    heads = [attention[2, 2, head, 1, 2:].view(4, 4) for head in range(3)]
    torch.testing.assert_close(found["distillation, last block"], sum(heads) / 3)
    torch.testing.assert_close(found["class, rollout"], rollout(attention)[2, 0, 2:].view(4, 4))
    assert attention_maps(random_student(())[1], views()[:1]) == {}


def test_precision_and_f1_of_a_case_computed_by_hand() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    one, two = torch.tensor([0, 0, 1, 1, 0, 1]), torch.tensor([0, 0, 0, 1, 1, 1])
    # answers 0: 6, of them 5 right, of 6 images; answers 1: 6, 3 right, of 4; answers 2: none, of 2 images
    precision, f1 = precision_and_f1([one, two], labels, 4)
    assert precision == pytest.approx((5 / 6, 3 / 6, 0, 0))
    assert f1 == pytest.approx((5 / 6, 2 * 0.5 * 0.75 / 1.25, 0, 0))
