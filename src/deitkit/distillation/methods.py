"""The table of methods: the tokens of a student, and the loss terms that train it.

To add a method, add a row to ``METHODS``, and at most one pure function to ``losses``. Of the names only ``none`` (CNNs
train by it too), ``token-hard`` and those beside published figures (``report/published.py``) are known elsewhere.
"""

import difflib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from deitkit.distillation.losses import (
    decoupled_distillation_loss,
    hard_distillation_loss,
    label_loss,
    relation_distillation_loss,
    soft_distillation_loss,
    standardised_distillation_loss,
)
from deitkit.errors import RecipeError
from deitkit.models.vit import Output
from deitkit.recipe.contradictions import VARIANT_NAME
from deitkit.recipe.schema import DistillationRecipe

Logits: TypeAlias = Float[Tensor, "batch classes"]
Weight: TypeAlias = Callable[[DistillationRecipe], float]


@dataclass(frozen=True)
class Signal:
    """A training signal of a head.

    Args:
        loss: Maps the head's logits, the teacher's logits (None without ``teacher``), the targets and the settings to a
            loss, which is one number.
        teacher: The part of the teacher's output that is used: ``soft`` (probabilities), ``hard`` (decision) or None.
        whole_batch: Whether the loss relates the images of a batch, so that it is not a mean over its parts.
        by_softmax: Whether a loss of soft answers depends on the teacher's softmax alone, which ``teacher.cache_top``
            keeps but for that of the small logits among themselves.
        least_classes: The number of classes from which on every part of the loss has a gradient.
    """

    loss: Callable[[Logits, Any, Logits, DistillationRecipe], Tensor]
    teacher: str | None = None
    whole_batch: bool = False
    by_softmax: bool = False
    least_classes: int = 2


def _soft(logits: Logits, teacher_logits: Logits, targets: Logits, settings: DistillationRecipe) -> Tensor:
    return soft_distillation_loss(logits, teacher_logits, temperature=settings.temperature, scale=settings.soft_scale)


def _decoupled(logits: Logits, teacher_logits: Logits, targets: Logits, settings: DistillationRecipe) -> Tensor:
    return decoupled_distillation_loss(
        logits,
        teacher_logits,
        targets,
        target_weight=settings.dkd.target_weight,
        others_weight=settings.dkd.others_weight,
        temperature=settings.dkd.temperature,
    )


def _relations(logits: Logits, teacher_logits: Logits, targets: Logits, settings: DistillationRecipe) -> Tensor:
    return relation_distillation_loss(
        logits,
        teacher_logits,
        inter_weight=settings.dist.inter_weight,
        intra_weight=settings.dist.intra_weight,
        temperature=settings.dist.temperature,
    )


def _standardised(logits: Logits, teacher_logits: Logits, targets: Logits, settings: DistillationRecipe) -> Tensor:
    return standardised_distillation_loss(logits, teacher_logits, temperature=settings.standardised.temperature)


def _consistent(logits: Logits, teacher_logits: Logits, targets: Logits, settings: DistillationRecipe) -> Tensor:
    return soft_distillation_loss(logits, teacher_logits, temperature=settings.consistent.temperature)


SIGNALS: dict[str, Signal] = {
    "labels": Signal(lambda logits, teacher_logits, targets, settings: label_loss(logits, targets)),
    "hard": Signal(
        lambda logits, teacher_logits, targets, settings: hard_distillation_loss(logits, teacher_logits), "hard"
    ),
    "soft": Signal(_soft, "soft", by_softmax=True),
    "dkd": Signal(_decoupled, "soft", by_softmax=True),
    "dist": Signal(_relations, "soft", whole_batch=True, by_softmax=True, least_classes=3),
    "standardised": Signal(_standardised, "soft", least_classes=3),
    "consistent": Signal(_consistent, "soft", by_softmax=True),
}


@dataclass(frozen=True)
class Term:
    """One term of a loss: a head, its signal, and its weight."""

    head: str  # class | distillation
    signal: str  # a key of SIGNALS
    weight: Weight

    @property
    def is_of_labels(self) -> bool:
        """Whether it uses labels and no teacher."""
        return SIGNALS[self.signal].teacher is None

    def value(
        self, output: Output, teacher_logits: Logits | None, targets: Logits, settings: DistillationRecipe
    ) -> Tensor:
        """Return the weighted term."""
        logits = output.class_logits if self.head == "class" else output.distillation_logits
        assert logits is not None, f"the student has no {self.head} head"
        own_logits = None if self.is_of_labels else teacher_logits
        return self.weight(settings) * SIGNALS[self.signal].loss(logits, own_logits, targets, settings)


# How the table names the readouts of a student with two heads.
READOUT_TITLES = {
    "class": "class embedding",
    "distillation": "distil. embedding",
    "joint": "class + distillation",
    "joint-logits": "class + distillation, mean of logits",
}


@dataclass(frozen=True)
class Method:
    """A supervision scheme: one row of the table below.

    Attributes:
        name: In recipes, tables and files.
        tokens: Of the student: ``class``, ``distillation``, both, or none for mean pooling.
        terms: Of the loss.
        title: For the readers of a table.
        summary: What it is, in a line.
        note: A remark for the readers of a table with this method, as a sentence; may be empty.
    """

    name: str
    tokens: tuple[str, ...]
    terms: tuple[Term, ...]
    title: str
    summary: str
    note: str = ""

    def title_of(self, readout: str) -> str:
        """Return the title of a row of the table: of a student with two heads with its readout."""
        return f"{self.title}: {READOUT_TITLES[readout]}" if len(self.tokens) > 1 else self.title

    def loss_terms(
        self,
        output: Output,
        teacher_logits: Logits | None,
        targets: Logits | None,
        settings: DistillationRecipe,
        label_targets: Logits | None = None,
    ) -> dict[str, Float[Tensor, ""]]:
        """Return the weighted terms by name; their sum is the loss.

        Args:
            output: The student's heads.
            teacher_logits: The teacher's logits for the same view; None only for methods without a teacher.
            targets: Dense targets from the labels; None for images without labels. The terms of labels then leave them
                out, and where the teacher's term distinguishes the target class, that is the teacher's decision.
            settings: Weights and temperature.
            label_targets: Of the labels' terms, where their images have weights; by default ``targets``.
        """
        terms = self.terms
        if targets is None:
            assert teacher_logits is not None, "without labels only a teacher teaches"
            terms = tuple(term for term in terms if not term.is_of_labels)
            targets = F.one_hot(teacher_logits.argmax(dim=-1), teacher_logits.shape[-1]).float()
        values: dict[str, Tensor] = {}
        for term in terms:
            name = "labels" if term.is_of_labels else "teacher"
            own = targets if label_targets is None or name == "teacher" else label_targets
            value = term.value(output, teacher_logits, own, settings)
            values[name] = values[name] + value if name in values else value
        return values

    @property
    def uses_labels(self) -> bool:
        """Whether true labels enter the loss."""
        return any(term.is_of_labels for term in self.terms)

    @property
    def teacher_signal(self) -> str | None:
        """The part of the teacher's output that is used: ``soft``, ``hard`` or None."""
        return next((SIGNALS[term.signal].teacher for term in self.terms if SIGNALS[term.signal].teacher), None)

    @property
    def needs_whole_batch(self) -> bool:
        """Whether the loss of a batch is not the mean of the losses of its parts."""
        return any(SIGNALS[term.signal].whole_batch for term in self.terms)

    @property
    def needs_all_logits(self) -> bool:
        """Whether the loss depends on more of the teacher's logits than their softmax."""
        signals = [SIGNALS[term.signal] for term in self.terms]
        return any(signal.teacher == "soft" and not signal.by_softmax for signal in signals)

    @property
    def least_classes(self) -> int:
        """The number of classes from which on every term has a gradient."""
        return max(SIGNALS[term.signal].least_classes for term in self.terms)

    @property
    def token_layout(self) -> str:
        """The tokens, formatted for a reader."""
        return "+".join(self.tokens) or "mean pool"


_BOTH = ("class", "distillation")


def _unit_weight(settings: DistillationRecipe) -> float:
    return 1.0


def _shared(signal: str, weight: Weight, heads: tuple[str, str] = ("class", "class")) -> tuple[Term, ...]:
    """Return terms with a total weight of 1: 1 - weight for the labels, weight for the teacher."""
    return Term(heads[0], "labels", lambda settings: 1 - weight(settings)), Term(heads[1], signal, weight)


def _with_token(signal: str) -> tuple[Term, ...]:
    """Return terms of the labels on the class head, and of the teacher on the distillation head."""
    return _shared(signal, lambda settings: settings.token_weight, _BOTH)


def _weighted(signal: str, labels: Weight, teacher: Weight) -> tuple[Term, ...]:
    """Return terms of labels and teacher on one head, with independent weights."""
    return Term("class", "labels", labels), Term("class", signal, teacher)


_LABELS = (Term("class", "labels", _unit_weight),)
_SOFT = _shared("soft", lambda settings: settings.soft_weight)
_HARD = _shared("hard", lambda settings: settings.hard_weight)
_STANDARDISED = _weighted(
    "standardised",
    lambda settings: settings.standardised.label_weight,
    lambda settings: settings.standardised.teacher_weight,
)

_SINGLE_NOTE = (
    "class-only and distillation-only are students of their own, with that one token, as in the reproduction."
)

# fmt: off
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("none", ("class",), _LABELS, "no distillation", "labels alone: a plain ViT"),
        Method("soft", ("class",), _SOFT, "usual distillation",
               "usual distillation: labels and the teacher's softmax, on one head"),
        Method("hard", ("class",), _HARD, "hard distillation", "labels and the teacher's decision, on one head"),
        Method("token-hard", _BOTH, _with_token("hard"), "DeiT distilled",
               "DeiT: a token and a head for the teacher"),
        Method("token-soft", _BOTH, _with_token("soft"), "DeiT distilled (soft)",
               "DeiT with the teacher's softmax"),
        Method("mean-pool-none", (), _LABELS, "no distillation, mean pooling",
               "'none' without any token, as in the reproduction"),
        Method("mean-pool-soft", (), _SOFT, "usual distillation, mean pooling",
               "'soft' without any token, as in the reproduction"),
        Method("mean-pool-hard", (), _HARD, "hard distillation, mean pooling",
               "'hard' without any token, as in the reproduction"),
        Method("class-only", ("class",), _LABELS, "only a class token",
               "'class embedding' of the reproduction: only a class token", _SINGLE_NOTE),
        Method("distillation-only", ("distillation",), (Term("distillation", "hard", _unit_weight),),
               "only a distillation token",
               "'distil embedding' of the reproduction: only a distillation token, only the teacher's decision",
               _SINGLE_NOTE),
        Method("dkd", ("class",), _weighted("dkd", _unit_weight, _unit_weight), "decoupled distillation (DKD)",
               "decoupled: separate terms for target and other classes"),
        Method("dist", ("class",), _weighted("dist", _unit_weight, _unit_weight), "distillation of relations (DIST)",
               "correlations with the teacher, by image and class"),
        Method("standardised", ("class",), _STANDARDISED, "distillation of standardised logits",
               "labels and the teacher's softmax, logits standardised"),
        Method("token-dkd", _BOTH, _with_token("dkd"), "DeiT distilled (DKD)",
               "DeiT with the loss of 'dkd'"),
        Method("token-dist", _BOTH, _with_token("dist"), "DeiT distilled (DIST)",
               "DeiT with the loss of 'dist'"),
        Method("token-standardised", _BOTH, _with_token("standardised"),
               "DeiT distilled (standardised logits)", "DeiT with the teacher's softmax, logits standardised"),
        Method("consistent", ("class",), (Term("class", "consistent", _unit_weight),),
               "consistent distillation, without labels", "the teacher's softmax alone, without labels"),
    )
}
# fmt: on


def reference_method(names: Collection[str]) -> str | None:
    """Return the method to which a comparison's others are compared: the first of the table without a teacher."""
    return next((name for name, method in METHODS.items() if name in names and method.teacher_signal is None), None)


_SHIPPED_METHODS, _SHIPPED_SIGNALS = METHODS.copy(), SIGNALS.copy()  # all others are the user's
_NO_NAMES = ("cnn-baseline",)  # of a student without a method: BASELINE of run/layout.py


def is_shipped(method: Method) -> bool:
    """Return whether a method and its signals are deitkit's, none replaced by one of the user's of the same name."""
    of_deitkit = (SIGNALS.get(term.signal) is _SHIPPED_SIGNALS.get(term.signal) for term in method.terms)
    return _SHIPPED_METHODS.get(method.name) is method and all(of_deitkit)


def find_method(wanted: str | Method) -> Method:
    """Return a method of the table by its name, or itself.

    Raises:
        RecipeError: The name is unknown (the message has the nearest ones), the table has another method of that name,
            or the method cannot train.
    """
    name = wanted.name if isinstance(wanted, Method) else wanted
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=2) or list(METHODS)
        raise RecipeError(f"methods: '{name}' is not a method; did you mean {' or '.join(near)}? See `deitkit methods`")
    method = METHODS[name]
    if isinstance(wanted, Method) and wanted is not method:
        raise RecipeError(
            f"methods: METHODS has another method of the name '{name}': put yours there under a name of its own"
        )
    if not is_shipped(method):
        _require_consistent(name, method)
    return method


def _require_consistent(name: str, method: Method) -> None:
    """Raise RecipeError for a method of the user's with an unfit name, or whose tokens, heads or signals do not exist.

    Args:
        name: Its key in ``METHODS``.
        method: Of the user's.
    """
    heads = method.tokens or ("class",)
    layouts = ((), ("class",), ("distillation",), _BOTH)
    problem = None
    if method.name != name:
        problem = f"its name is '{method.name}': put it into METHODS under its name"
    elif not VARIANT_NAME.fullmatch(name) or name in _NO_NAMES:
        problem = f"it names a folder: use lower-case letters, digits, - and _, and not '{_NO_NAMES[0]}'"
    elif method.tokens not in layouts:
        problem = f"its tokens are {method.tokens}: choose from {', '.join(map(str, layouts))}"
    elif {term.head for term in method.terms} != {*heads}:
        problem = f"its terms must train its heads, which are {' and '.join(heads)}"
    elif unknown := [term.signal for term in method.terms if term.signal not in SIGNALS]:
        problem = f"'{unknown[0]}' is not a signal: choose from {', '.join(SIGNALS)}, or add it to SIGNALS"
    if problem is not None:
        raise RecipeError(f"methods: '{name}' cannot train: {problem}")
