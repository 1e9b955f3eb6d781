"""The losses: pure functions of tensors, each with its equation and source, independent of models and methods.

All are computed in float32 for logits of any precision, so that large bf16 logits stay finite.
"""

from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Logits: TypeAlias = Float[Tensor, "batch classes"]

# A student's row that varies less than CONSTANT, as that of a classifier that starts at zero, has no scale of its own,
# and its gradient no bound. It is scaled as if it varied by TYPICAL, about what a random classifier does. Both are
# standard deviations: of logits, or of probabilities relative to their mean.
CONSTANT, TYPICAL = 1e-4, 0.2


def label_loss(student_logits: Logits, targets: Logits) -> Float[Tensor, ""]:
    """Cross-entropy with dense targets: -mean over the batch of sum_c y_c log p_c.

    Args:
        student_logits: The student's logits.
        targets: Rows that sum to 1: smoothed and mixed labels.
    """
    return -(targets * F.log_softmax(student_logits.float(), dim=-1)).sum(dim=-1).mean()


def hard_distillation_loss(student_logits: Logits, teacher_logits: Logits) -> Float[Tensor, ""]:
    """Cross-entropy with the teacher's decision: CE(student, argmax teacher), never smoothed.

    Source: Touvron et al. 2020, section 4, "hard-label distillation" (the second of its two terms).
    """
    return F.cross_entropy(student_logits.float(), teacher_logits.argmax(dim=-1))


def soft_distillation_loss(
    student_logits: Logits, teacher_logits: Logits, *, temperature: float, scale: str = "batch-mean"
) -> Float[Tensor, ""]:
    """Kullback-Leibler divergence at a temperature: t^2 KL(softmax(teacher / t) || softmax(student / t)).

    Source: Touvron et al. 2020, section 4, "soft distillation" (without lambda, which the method applies).

    Args:
        student_logits: The student's logits.
        teacher_logits: The teacher's logits.
        temperature: t, greater than 0.
        scale: ``batch-mean`` averages over the batch, as in the equation; ``legacy`` also divides by the number of
            classes, as in the released code.
    """
    assert scale in ("batch-mean", "legacy")
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2
    return divergence / student_logits.shape[-1] if scale == "legacy" else divergence


def decoupled_distillation_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    targets: Logits,
    *,
    target_weight: float,
    others_weight: float,
    temperature: float,
) -> Float[Tensor, ""]:
    """Decoupled distillation (DKD): the target class versus all others, plus the others among themselves.

    With p_y the probability of the target class at temperature t, the loss is t^2 times target_weight KL(teacher's
    (p_y, 1 - p_y) || student's) + others_weight KL(teacher's others || student's), where the others are the softmax
    over the other classes alone. Standard distillation weights the second by the teacher's 1 - p_y, which is almost 0
    where the teacher is confident.

    Source: Zhao et al. 2022, section 3 (alpha and beta are the two weights). Labels are not mixed there; here the class
    of a mixed target is that of its largest share, as in the code of Hao et al. 2023 (OFA-KD), which also mixes.

    Args:
        student_logits: The student's logits.
        teacher_logits: The teacher's logits.
        targets: Rows that sum to 1, from the labels; only the position of their maximum is used.
        target_weight: Weight of the target class versus the rest.
        others_weight: Weight of the other classes among themselves.
        temperature: t, greater than 0.
    """
    target = targets.argmax(dim=-1, keepdim=True)
    others = torch.arange(targets.shape[-1] - 1, device=targets.device)
    others = others + (others >= target)  # in each row, every class except the target

    def decouple(logits: Tensor) -> tuple[Tensor, Tensor]:
        log_p = F.log_softmax(logits.float() / temperature, dim=-1)
        rest = log_p.gather(-1, others)
        binary = torch.cat([log_p.gather(-1, target), rest.logsumexp(dim=-1, keepdim=True)], dim=-1)
        return binary, F.log_softmax(rest, dim=-1)

    student_target, student_others = decouple(student_logits)
    teacher_target, teacher_others = decouple(teacher_logits)
    target_loss = F.kl_div(student_target, teacher_target, reduction="batchmean", log_target=True)
    others_loss = F.kl_div(student_others, teacher_others, reduction="batchmean", log_target=True)
    return temperature**2 * (target_weight * target_loss + others_weight * others_loss)


def relation_distillation_loss(
    student_logits: Logits, teacher_logits: Logits, *, inter_weight: float, intra_weight: float, temperature: float
) -> Float[Tensor, ""]:
    """Relational distillation (DIST): Pearson correlations with the teacher instead of equal probabilities.

    With the softmax at temperature t, the loss is t^2 times inter_weight (1 - the mean over images of the correlation
    over classes) + intra_weight (1 - the mean over classes of the correlation over images). The second relates all
    images of a batch, so the loss of a batch is not the mean of the losses of its parts.

    Source: Huang et al. 2022 (DIST; beta and gamma are the two weights), with the t^2 of the released code.

    Args:
        student_logits: The student's logits.
        teacher_logits: The teacher's logits.
        inter_weight: Weight of the correlation between the classes of an image.
        intra_weight: Weight of the correlation within a class, between images.
        temperature: t, greater than 0.
    """
    student = F.softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.softmax(teacher_logits.float() / temperature, dim=-1)
    inter_loss = 1 - _row_correlations(student, teacher).mean()
    intra_loss = 1 - _row_correlations(student.T, teacher.T).mean()
    return temperature**2 * (inter_weight * inter_loss + intra_weight * intra_loss)


def _row_correlations(
    student: Float[Tensor, "rows columns"], teacher: Float[Tensor, "rows columns"]
) -> Float[Tensor, " rows"]:
    """Return the Pearson correlation of corresponding rows; about 0 where a row is constant."""
    mean = student.mean(dim=-1, keepdim=True)
    student, teacher = student - mean, teacher - teacher.mean(dim=-1, keepdim=True)
    unit = mean.detach() * student.shape[-1] ** 0.5  # the norm of a row with a standard deviation of its mean
    norm = student.norm(dim=-1, keepdim=True)
    norm = torch.where(norm < CONSTANT * unit, TYPICAL * unit, norm).clamp(min=1e-8)
    return (student / norm * F.normalize(teacher, dim=-1, eps=1e-8)).sum(dim=-1)


def standardised_distillation_loss(
    student_logits: Logits, teacher_logits: Logits, *, temperature: float
) -> Float[Tensor, ""]:
    """Soft distillation of standardised logits: each row of both is first scaled to mean 0 and standard deviation 1.

    A small student then matches the relations of its teacher's logits, not their magnitude. With two classes only their
    order remains, which has no gradient.

    Source: Sun et al. 2024, algorithm 1. The standard deviation divides by the number of classes, as in the paper; the
    released code divides by one less.

    Args:
        student_logits: The student's logits.
        teacher_logits: The teacher's logits.
        temperature: The paper's base temperature, greater than 0.
    """
    student = student_logits.float() - student_logits.float().mean(dim=-1, keepdim=True)
    variance = student.square().mean(dim=-1, keepdim=True)
    deviation = torch.where(variance < CONSTANT**2, TYPICAL**2, variance + 1e-7).sqrt()
    teacher = F.layer_norm(teacher_logits.float(), teacher_logits.shape[-1:], eps=1e-7)  # the z-score
    return soft_distillation_loss(student / deviation, teacher, temperature=temperature)
