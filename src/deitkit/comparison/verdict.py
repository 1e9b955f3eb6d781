"""The verdict: which student is best, by more than chance or not, and how far it is from labels alone and teacher."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deitkit.run.difference import Difference, Reference
from deitkit.run.results import Row


@dataclass(frozen=True)
class Standing:
    """What a verdict rests on.

    Attributes:
        winner: The row of the student with the best validation accuracy.
        leads: Its lead over each other student, by row, on the validation images, in what it was chosen by.
        chosen_on: Which these are, in words.
        over: What the accuracies are of: one seed, or the mean of several seeds or folds.
        teacher_top1: The teacher's accuracy on the test images; None without a teacher.
        by: ``accuracy`` or ``balanced``, by which the winner was chosen.
        only_answer: The class that it answers to every test image, if it is always the same.
        answers_frequent: Whether that class is more frequent in training than others, and may be drawn less often.
    """

    winner: Row
    leads: Mapping[str, Difference]
    chosen_on: str
    over: str
    teacher_top1: float | None
    only_answer: str | None
    answers_frequent: bool
    by: str


def verdict(standing: Standing | None, rows: Sequence[Row]) -> str:
    """Return the outcome of a comparison in a few sentences; without a winner in one."""
    if standing is None:
        return "No student reached the end of its training."
    sentences = [
        _outcome(standing, rows),
        _lead(standing),
        _by_balance(standing),
        _only_answer(standing),
        _teacher(standing),
        *_baselines(standing.winner, rows),
        _best_on_test(standing.winner, rows),
    ]
    return " ".join(f"{sentence}." for sentence in sentences if sentence)


def _outcome(standing: Standing, rows: Sequence[Row]) -> str:
    """Say what the winner scores, and whether that is more than labels alone by more than chance."""
    winner, difference = standing.winner, standing.winner.differences.get("labels")
    assert winner.top1_mean is not None
    scores = f"scores {_percent(winner.top1_mean)} on the test images ({standing.over}, n = {winner.n:,})"
    if not standing.leads:
        return f"{winner.row} {scores}"
    best = "ties for first place" if _equal(standing) else "is best" if _tied(standing) else "wins"
    text = f"{winner.row} {best} on the validation images and {scores}"
    reference = next((row.row for row in rows if row.reference), "")
    if difference is not None:
        other = "labels alone" if winner.teacher is not None else reference
        text += f", {_points(difference)} against {other} ({p_in_words(difference)})"
    taught = any(row.teacher is not None and row.differences.get("labels") is not None for row in rows)
    if winner.teacher is None and taught:
        text += "; on the validation images no distilled student beat labels alone"
    return text


def _equal(standing: Standing) -> list[str]:
    """Return the other students that are as good as the winner on the validation images."""
    return [name for name, lead in standing.leads.items() if lead.is_zero]


def _tied(standing: Standing) -> list[str]:
    """Return the other students that chance may have put behind the winner on the validation images."""
    equal = _equal(standing)
    ahead = {name for name, lead in standing.leads.items() if lead.holds_for_new_images and lead.mean > 0}
    return [name for name in standing.leads if name not in ahead and name not in equal]


def _lead(standing: Standing) -> str:
    equal, tied = _equal(standing), _tied(standing)
    sentences = []
    if equal:
        are = "is" if len(equal) == 1 else "are"
        sentences.append(f"{_list(equal)} {are} as good on {standing.chosen_on}; the first of the methods is taken")
    if tied:
        sentences.append(f"On {standing.chosen_on} alone it is statistically indistinguishable from {_list(tied)}")
    return ". ".join(sentences)


def _by_balance(standing: Standing) -> str:
    """Say what the winner scores in what it was chosen by, where that is not accuracy."""
    balanced = standing.winner.balanced_accuracy
    if standing.by != "balanced" or balanced is None:
        return ""
    text = f"It was chosen by balanced accuracy, {_percent(balanced)} on the test images"
    others: dict[Reference, str] = {"labels": "labels alone", "teacher": "the teacher", "baseline": "the CNN baseline"}
    found = {name: standing.winner.balanced_differences.get(name) for name in others}
    against = [
        f"{_points(difference)} against {others[name]} ({p_in_words(difference)})"
        for name, difference in found.items()
        if difference is not None
    ]
    return f"{text}: {_list(against)}" if against else text


def _only_answer(standing: Standing) -> str:
    if standing.only_answer is None:
        return ""
    learnt = (
        "only which class is frequent; data.sampling=balanced trains on all classes alike"
        if standing.answers_frequent
        else "nothing yet; train longer (train.epochs), or with another train.learning_rate"
    )
    return f"It answers '{standing.only_answer}' to every test image: it has learnt {learnt}"


def _teacher(standing: Standing) -> str:
    difference = standing.winner.differences.get("teacher")
    if difference is None or standing.teacher_top1 is None:
        return ""
    return _other("The teacher", standing.teacher_top1, difference)


def _baselines(winner: Row, rows: Sequence[Row]) -> list[str]:
    """Compare with the CNN on labels alone, by what both differ from the same reference."""
    found = [row for row in rows if row.kind == "baseline" and row.weights == "last" and row.top1_mean is not None]
    difference = winner.differences.get("baseline")
    return [] if difference is None else [_other("The CNN baseline", row.top1_mean or 0.0, difference) for row in found]


def _other(name: str, top1: float, difference: Difference) -> str:
    gap = 100 * abs(difference.mean)
    scores = f"{name} scores {_percent(top1)}"
    if difference.is_zero:
        return f"{scores}, as much"
    return f"{scores}, {gap:.2f} points {'less' if difference.mean > 0 else 'more'} ({p_in_words(difference)})"


def _best_on_test(winner: Row, rows: Sequence[Row]) -> str:
    tested = {row.row: row.top1_mean for row in rows if row.kind == "student" and row.top1_mean is not None}
    best = max(tested, key=lambda name: tested[name])
    if winner.top1_mean is None or tested[best] <= winner.top1_mean + 1e-9:  # but for rounding
        return ""
    return f"On the test images {best} is higher ({_percent(tested[best])}), but nothing is chosen there"


def p_in_words(difference: Difference) -> str:
    """Return a p value with its test, and a warning where chance may explain the difference."""
    if not difference.is_significant:
        return f"{_p(difference)}: chance may explain it"
    return _p(difference) + ("" if difference.holds_for_new_images else ": it may not hold on other test images")


def _p(difference: Difference) -> str:
    p = difference.corrected_p
    return f"{'p < 1e-15' if p < 1e-15 else f'p = {p:.2g}'}, {difference.test}"


def _percent(top1: float) -> str:
    return f"{100 * top1:.2f} %"


def _points(difference: Difference) -> str:
    return f"{0.0 if difference.is_zero else 100 * difference.mean:+.2f} points"


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
