"""The losses: pure functions of tensors, each with its equation and source. They know of no model and no method.

All are computed in float32 whatever the logits' precision, so that bf16 logits of any size stay finite.
"""

from typing import TypeAlias

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Logits: TypeAlias = Float[Tensor, "batch classes"]


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
        scale: ``batch-mean`` averages over the batch, as the equation says; ``legacy`` divides by the number of classes
            as well, as the released code does.
    """
    assert scale in ("batch-mean", "legacy")
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2
    return divergence / student_logits.shape[-1] if scale == "legacy" else divergence
