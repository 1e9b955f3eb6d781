"""The answer for someone who has to decide: keep the CNN, or use which student, at what loss, speed and size."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

from deitkit.report.numbers import megabytes, milliseconds
from deitkit.run.difference import Difference
from deitkit.run.results import Cost, Results, Row
from deitkit.system.words import counted

ALPHA = 0.05
NOTABLE = 1.1  # a ratio of times or sizes below this makes no difference to anyone
WORTH_ACCURACY = 2.0  # from this ratio on, someone may give up accuracy for it
TOLERABLE = 0.02  # accuracy that a student may lose unnoticed, before a tie can count as "as accurate"


@dataclass(frozen=True)
class Rival:
    """The CNN that the winner may replace: the teacher, or the baseline where there is no teacher.

    Attributes:
        name: In a sentence.
        difference: Of the winner's accuracy to its own; of balanced accuracies where the winner was chosen by these.
        by: ``accuracy`` or ``balanced``, by which the winner was chosen.
        cost: Of using it.
        balanced: Its balanced accuracy on the test images, if known.
    """

    name: str
    difference: Difference
    by: str
    cost: Cost
    balanced: float | None

    @property
    def quality(self) -> str:
        """What the difference is of, in a sentence."""
        return "balanced accuracy" if self.by == "balanced" else "accuracy"

    def apart(self) -> str:
        """Say how much more accurate the winner is, or less."""
        points, more = f"{100 * abs(self.difference.mean):.1f} points", self.difference.mean > 0
        if self.by == "balanced":
            return f"{points} {'higher' if more else 'lower'} in balanced accuracy"
        return f"{points} {'more' if more else 'less'} accurate"


def advice(results: Results) -> str:
    """Return whether the winner should replace the CNN, in one or two sentences.

    It is empty without a winner or a CNN, and where a cost is missing.
    """
    winner = results.row(results.winner)
    rival = None if winner is None else _rival(winner, results)
    if winner is None or winner.cost is None or rival is None:
        return ""
    judges = _equal_images(winner.n, results.dataset.test_by_class)
    guess = {
        model: _guesses(balanced, judges, results.dataset.classes)
        for model, balanced in (("winner", winner.balanced_accuracy), ("rival", rival.balanced))
    }
    images = counted(winner.n, "test image")
    if guess["winner"] and guess["rival"]:
        return f"Use neither {winner.row} nor {rival.name}: {images} do not show either to be better than chance."
    if guess["winner"]:
        return f"Keep {rival.name}: {images} do not show {winner.row} to be better than chance."
    if guess["rival"] and (rival.difference.holds_for_new_images or _is_close(rival.difference)):
        return f"Use {winner.row} instead of {rival.name}: it alone is better than chance on {images}."
    savings = {
        "speed": rival.cost.milliseconds / winner.cost.milliseconds,
        "size": rival.cost.file_bytes / winner.cost.file_bytes,
    }
    sentences = (_decision(winner, rival, savings, results), _prices(winner.row, winner.cost, rival), _own_px(results))
    return " ".join(f"{sentence}." for sentence in sentences if sentence)


def _own_px(results: Results) -> str:
    """Say what a teacher that is not tested on larger images would score on them, if notably more than on views."""
    teacher = results.teacher
    if (
        teacher is None
        or teacher.view_test_top1 is not None
        or teacher.own_px_top1 is None
        or teacher.view_px_top1 is None
    ):
        return ""
    if teacher.own_px_top1 - teacher.view_px_top1 < TOLERABLE:
        return ""
    return (
        f"The teacher was judged on the students' {max(results.dataset.image_px)} px; on images of its own "
        f"{teacher.image_px} px it scores {100 * teacher.own_px_top1:.1f} % instead of "
        f"{100 * teacher.view_px_top1:.1f} (of up to 200 validation images)"
    )


def _rival(winner: Row, results: Results) -> Rival | None:
    by = results.recipe.get("compare", {}).get("by", "accuracy")
    differences, teacher = winner.differences_by(by), results.teacher
    difference = differences.get("teacher")
    if difference is not None and teacher is not None and teacher.cost is not None:
        several = len(results.teachers) > 1
        return Rival(
            "the teachers" if several else f"the teacher {teacher.name}",
            difference,
            by,
            teacher.cost,
            teacher.test_balanced,
        )
    difference = differences.get("baseline")
    baseline = next((row for row in results.rows if row.kind == "baseline"), None)
    if difference is not None and baseline is not None and baseline.cost is not None:
        return Rival("the CNN baseline", difference, by, baseline.cost, baseline.balanced_accuracy)
    return None


def _equal_images(images: int, by_class: Sequence[int] | None) -> int:
    """Return how many test images, as many of each class, would judge a balanced accuracy as surely as these.

    A guess's share in a class of n images has the variance p (1 - p) / n, so the rare classes decide.
    """
    if not by_class or min(by_class) == 0:
        return images
    return max(1, round(len(by_class) ** 2 / sum(1 / count for count in by_class)))


def _guesses(balanced: float | None, images: int, classes: int) -> bool:
    """Return whether a balanced accuracy is not significantly above that of a constant answer (binomial test)."""
    if balanced is None:
        return False
    return float(stats.binom.sf(round(balanced * images) - 1, images, 1 / classes)) >= ALPHA


def _is_close(difference: Difference) -> bool:
    """Return whether the test images are enough to exclude a loss of accuracy that anyone would notice."""
    return _interval(difference)[0] >= -TOLERABLE


def _interval(difference: Difference) -> tuple[float, float]:
    """Return where the difference on other images may be."""
    return difference.ci95_new_images or difference.ci95 or (-1.0, 1.0)


def _decision(winner: Row, rival: Rival, savings: Mapping[str, float], results: Results) -> str:
    difference = rival.difference
    points = f"{100 * abs(difference.mean):.1f} points of {rival.quality}"
    if difference.holds_for_new_images and difference.mean < 0:
        worth = [name for name, ratio in savings.items() if ratio >= WORTH_ACCURACY]
        if worth:
            return f"Keep {rival.name} unless {_count(worth)} more than {points}"
        return f"Keep {rival.name}: {winner.row} is {rival.apart()}, {_small_savings(savings)}"
    if difference.holds_for_new_images:
        price = [name for name, ratio in savings.items() if ratio <= 1 / WORTH_ACCURACY]
        unless = f" unless {_count(price)} more than that" if price else ""
        return f"Use {winner.row} instead of {rival.name}{unless}: it is {rival.apart()}"
    if not _is_close(difference):
        return _undecided(winner, rival, results)
    tie = "as accurate within chance"
    if difference.is_significant:  # of several seeds, on these test images
        tie = f"{rival.apart()} on these test images, which chance in their choice may explain"
    notable = [name for name, ratio in savings.items() if ratio >= NOTABLE]
    price = [name for name, ratio in savings.items() if ratio <= 1 / NOTABLE]
    if notable and price:
        where = f"{_count(notable)} more than {' and '.join(price)}"
        return f"{winner.row} may replace {rival.name} where {where}: it is {tie}"
    if notable:
        return f"Use {winner.row} instead of {rival.name} for its {' and '.join(notable)}: it is {tie}"
    return f"Keep {rival.name}: {winner.row} is {tie}, and neither faster nor smaller"


def _undecided(winner: Row, rival: Rival, results: Results) -> str:
    """Say that the test images are too few, what the difference may be, and what would tell more."""
    difference = rival.difference
    low, high = _interval(difference)
    own = winner.balanced_accuracy if rival.by == "balanced" else winner.top1_mean
    score = (own or 0.0) - difference.mean  # of the rival, which bounds what is possible
    low, high = max(low, -score), min(high, 1 - score)
    judges, more, how = f"The {winner.n:,} test images", "more test images", ""
    if len(results.seeds) > 1:
        judges = f"{len(results.seeds)} seeds on {winner.n:,} test images"
        more = "more seeds or test images"
        if difference.is_significant:  # on these images, whatever the seed
            more = "more test images"
    elif _could_be_cross_validated(results):
        how = "; --folds 5 tests on every image once"
    chances = f"{-100 * low:.1f} points lower or {100 * high:.1f} higher"
    if high < 0:  # the interval excludes 0, but the test, corrected for all rows, finds no difference
        chances = f"{-100 * high:.1f} to {-100 * low:.1f} points lower"
    return (
        f"{judges} do not decide between {winner.row} and {rival.name}: its {rival.quality} may be {chances}; {more} "
        f"would tell more{how}"
    )


def _count(names: Sequence[str]) -> str:
    return f"{' and '.join(names)} {'count' if len(names) > 1 else 'counts'}"


def _small_savings(savings: Mapping[str, float]) -> str:
    """Say that speed and size are no reason to give up accuracy."""
    words = []
    for name, worse, no_better, better in (
        ("speed", "slower", "no faster", "times as fast"), ("size", "larger", "no smaller", "times smaller")
    ):  # fmt: skip
        ratio = savings[name]
        words.append(worse if ratio <= 1 / NOTABLE else no_better if ratio < NOTABLE else f"only {ratio:.1f} {better}")
    return " and ".join(words)


def _could_be_cross_validated(results: Results) -> bool:
    """Return whether ``--folds`` takes this comparison, and tests it on every image.

    It does not with a test split, folds, a limit to the images, or a model that came trained on these classes, and so
    maybe on these images.
    """
    if any(card.fit == "none" for card in results.teachers):
        return False
    data, model = results.recipe.get("data", {}), results.recipe.get("model", {})
    limited = any(data.get(field) is not None for field in ("folds", "train_images", "test_images"))
    return results.dataset.divided is True and not limited and model.get("checkpoint") is None


def _prices(name: str, own: Cost, rival: Rival) -> str:
    """Return times and sizes of both."""
    other = rival.cost
    longer = own.milliseconds / other.milliseconds
    words = f"{longer:.1f} times as long" if longer >= 1 else f"{1 / longer:.1f} times as fast"
    if 1 / NOTABLE < longer < NOTABLE:
        words = "about as long"
    times = [milliseconds(cost.milliseconds) for cost in (own, other)]
    sizes = [megabytes(cost.file_bytes) for cost in (own, other)]
    return (
        f"{name} takes {times[0]} ms for an image instead of {times[1]} on this machine ({words}), and its file is "
        f"{sizes[0]} MB instead of {sizes[1]}"
    )
