"""A difference of two accuracies, and what it is relative to."""

from dataclasses import dataclass
from typing import Literal

Interval = tuple[float, float]
# Labels alone, the checkpoint before fine-tuning, the base of an ablation, the teacher, the CNN baseline.
Reference = Literal["labels", "before", "base", "teacher", "baseline"]


@dataclass(frozen=True)
class Difference:
    """A difference of two accuracies on the same images.

    Attributes:
        mean: Over the seeds, as a fraction.
        ci95: Its 95 % interval: over the test images for one seed, over seeds on the same test images for several.
        p: The p value of ``test``, two-sided.
        test: ``McNemar``, ``McNemar by class``, ``paired t``, or of folds ``corrected resampled t`` or ``sign test``.
        p_holm: The p value corrected for all rows with a difference to the same reference; None where it was not.
        ci95_new_images: Of several seeds: the 95 % interval for other seeds and other test images; None where ``ci95``
            covers other images already.
    """

    mean: float
    ci95: Interval | None
    p: float
    test: str
    p_holm: float | None = None
    ci95_new_images: Interval | None = None

    @property
    def corrected_p(self) -> float:
        """The p value that holds beside those of the other rows, where it was corrected."""
        return self.p if self.p_holm is None else self.p_holm

    @property
    def is_zero(self) -> bool:
        """Whether it is none, but for rounding in a mean over seeds."""
        return abs(self.mean) < 1e-9

    @property
    def is_significant(self) -> bool:
        """Whether chance explains the difference in fewer than 5 of 100 cases, after the correction."""
        return self.corrected_p < 0.05

    @property
    def holds_for_new_images(self) -> bool:
        """Whether it is significant, and the test images are enough to tell that it is no accident of theirs."""
        low, high = self.ci95_new_images or (0.0, 0.0)
        return self.is_significant and (self.ci95_new_images is None or low > 0 or high < 0)
