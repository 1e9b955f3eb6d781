"""A difference of two accuracies, and the fields of a row that hold it."""

from dataclasses import astuple, dataclass
from typing import Any, Literal

Interval = tuple[float, float]
Reference = Literal["none", "before", "base", "teacher", "baseline"]  # what a difference is relative to


# The fields of a row that hold its difference to each reference, in the order of ``Difference``.
DIFFERENCE_FIELDS: dict[Reference, tuple[str, ...]] = {
    "none": ("difference_vs_none", "difference_ci95", "p_vs_none", "p_test", "p_vs_none_holm"),
    **{
        reference: (
            f"difference_vs_{reference}",
            f"difference_vs_{reference}_ci95",
            f"p_vs_{reference}",
            f"p_vs_{reference}_test",
            f"p_vs_{reference}_holm",
        )
        for reference in ("before", "base", "teacher", "baseline")
    },
}


@dataclass(frozen=True)
class Difference:
    """A difference of two accuracies on the same images.

    Attributes:
        mean: Over the seeds, as a fraction.
        ci95: Its 95 % interval.
        p: The p value of ``test``, two-sided.
        test: ``McNemar``, ``paired t``, or of folds ``corrected resampled t`` or ``sign test``.
        p_holm: The p value corrected for all rows with a difference to the same reference; None where it was not.
    """

    mean: float
    ci95: Interval | None
    p: float
    test: str
    p_holm: float | None = None

    @property
    def corrected_p(self) -> float:
        """The p value that holds beside those of the other rows, where it was corrected."""
        return self.p if self.p_holm is None else self.p_holm

    @property
    def is_significant(self) -> bool:
        """Whether chance explains the difference in fewer than 5 of 100 cases, after the correction."""
        return self.corrected_p < 0.05


def difference_fields(reference: Reference, difference: Difference | None) -> dict[str, Any]:
    """Return a difference as fields of a row; all None where there is none."""
    names = DIFFERENCE_FIELDS[reference]
    return dict(zip(names, (None,) * len(names) if difference is None else astuple(difference), strict=True))
