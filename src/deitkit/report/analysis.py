"""The analysis on the page, from ``analysis.json`` and its pictures."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deitkit.report.analysis_charts import (
    MOST_CLASSES,
    Chart,
    accuracy_by_class_chart,
    confusion_charts,
    reliability_charts,
    similarity_chart,
)
from deitkit.report.figures import COLOURS, data_uri
from deitkit.report.numbers import percent
from deitkit.report.published import PAPER_DISAGREEMENT
from deitkit.run.analysis import Analysis, ClassSummary
from deitkit.run.results import Results

MOST_PAIRS = 10
MANY_CLASSES = 30  # whose table is folded away


@dataclass(frozen=True)
class PublishedPair:
    """Disagreement of two rows, ours and the paper's, in per cent."""

    first: str
    second: str
    ours: str
    paper: str


@dataclass(frozen=True)
class ConfusedPair:
    """A frequent error: true class, predicted class, and each row's share of the true class in per cent."""

    true: str
    decided: str
    shares: tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """What the template draws.

    Attributes:
        analysis: As in the file.
        charts: By place on the page, then by tab.
        published: The disagreements that the paper states too.
        pairs: The most frequent errors.
        pictures: Student and data URI of its contact sheet.
        part_of_classes: Whether the matrices show a part of the classes only.
        many_classes: Whether the classes are too many for an open table in their own order.
        warning: What a reader must know before all else; empty if nothing.
    """

    analysis: Analysis
    charts: dict[str, dict[str, Chart]]
    published: tuple[PublishedPair, ...]
    pairs: tuple[ConfusedPair, ...]
    pictures: tuple[tuple[str, str], ...]
    part_of_classes: bool
    many_classes: bool
    warning: str

    def classes_of(self, row: ClassSummary) -> list[int]:
        """Return the classes in the order of a table of a row: their own, or of many those with the lowest F1 first."""
        places = list(range(len(row.f1)))
        if not self.many_classes:
            return places
        return sorted(places, key=lambda place: (row.f1[place] is None, row.f1[place]))  # None: without test images


def lay_out_analysis(
    analysis: Analysis, results: Results, colours: Mapping[str, str], folder: Path, warning: str = ""
) -> Section:
    """Gather what the page shows of an analysis.

    Args:
        analysis: Of the run.
        results: Of the run, for the names of its classes.
        colours: Of the students, as in the other figures.
        folder: Of the run.
        warning: For its top.
    """
    names = results.dataset.class_names

    def colour(student: str) -> str:
        return colours.get(student.removesuffix("+ema"), COLOURS[-1])  # the teacher's is grey

    charts = {
        "similarity": {"": similarity_chart(analysis.tokens, colour)} if analysis.tokens else {},
        "by-class": {"": accuracy_by_class_chart(analysis.classes, names, colour)},
        "confusion": confusion_charts(analysis.classes, names),
        "reliability": reliability_charts(analysis.rows, colour),
    }
    return Section(
        analysis=analysis,
        charts={name: tabs for name, tabs in charts.items() if tabs},
        published=tuple(_published_pairs(analysis)),
        pairs=tuple(_confused_pairs(analysis, names)),
        pictures=tuple(_pictures(analysis, folder)),
        part_of_classes=len(names) > MOST_CLASSES,
        many_classes=len(names) > MANY_CLASSES,
        warning=warning,
    )


def _published_pairs(analysis: Analysis) -> Iterator[PublishedPair]:
    rows, shares = analysis.disagreement.rows, analysis.disagreement.shares
    for first, second, published in PAPER_DISAGREEMENT:
        if first in rows and second in rows:
            ours = percent(shares[rows.index(first)][rows.index(second)], analysis.n)
            yield PublishedPair(first, second, ours, f"{100 * published:.1f}")


def _confused_pairs(analysis: Analysis, names: Sequence[str]) -> Iterator[ConfusedPair]:
    """Yield the errors with the highest share in any row's class, with each row's share."""
    highest: dict[tuple[int, int], float] = {}
    shares: list[dict[tuple[int, int], float]] = []
    for entry in analysis.classes:
        totals: dict[int, int] = {}
        for true, _, count in entry.confusion:
            totals[true] = totals.get(true, 0) + count
        shares.append({(true, other): count / totals[true] for true, other, count in entry.confusion if true != other})
        for error in entry.most_confused:
            pair = (error.true, error.decided)
            highest[pair] = max(highest.get(pair, 0), error.share)
    for true, decided in sorted(highest, key=lambda pair: -highest[pair])[:MOST_PAIRS]:
        own = tuple(f"{100 * share.get((true, decided), 0):.1f}" for share in shares)
        yield ConfusedPair(names[true], names[decided], own)


def _pictures(analysis: Analysis, folder: Path) -> Iterator[tuple[str, str]]:
    for sheet in analysis.attention:
        picture = data_uri(folder / "analysis" / Path(sheet.file).name)
        if picture is not None:
            yield sheet.student, picture
