"""The content of the table: columns, lines and footnotes as plain text, for every format to draw."""

from collections.abc import Sequence
from dataclasses import dataclass

from deitkit.report.footnotes import LABELS_MARK, STATUS_MARK, footnotes, is_unbalanced
from deitkit.report.numbers import (
    NOTHING,
    Number,
    interval,
    megabytes,
    millions,
    milliseconds,
    p_value,
    percent,
    points,
    whole,
)
from deitkit.report.published import (
    PAPER,
    REPRODUCTION,
    is_printed_without_labels,
    paper_model,
    published_by_row,
    published_only,
)
from deitkit.run.results import Cost, PublishedFigure, Results, Row, TeacherCard, VariantRow
from deitkit.system.words import counted

WINNER_MARK = "★"


@dataclass(frozen=True)
class Column:
    """A column; where there is no room for all, the highest ``rank`` goes first."""

    key: str
    title: str
    rank: int
    numeric: bool = True
    published: bool = False


@dataclass(frozen=True)
class Line:
    """One line of the table; ``cells`` by column key, ``name`` as a recipe spells it, ``label`` as a person does.

    ``link`` is a page of its own, relative to the run folder. Lines of one ``group`` stand together.
    """

    name: str
    label: str
    cells: dict[str, str]
    group: str  # students | baseline | teacher, or what else divides a table
    winner: bool = False
    link: str | None = None


@dataclass(frozen=True)
class Layout:
    """A table, ready to be drawn."""

    title: str
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    published_only: tuple[str, ...]
    footnotes: tuple[str, ...]
    advice: str
    verdict: str
    provenance: str


def lay_out(results: Results) -> Layout:
    """Return results as columns, lines and footnotes, without empty columns."""
    published = published_by_row(results)
    lines = [_line(row, results, published) for row in results.rows]
    lines.sort(key=lambda line: line.group == "baseline")
    lines += _teacher_lines(results, published)
    used = {key for line in lines for key, cell in line.cells.items() if cell != NOTHING}
    return Layout(
        title=title_of(results),
        columns=tuple(column for column in _columns(results) if column.key in used),
        lines=tuple(lines),
        published_only=tuple(_published_text(entry) for entry in published_only(results)),
        footnotes=tuple(footnotes(results)),
        advice=results.advice,
        verdict=results.verdict,
        provenance=provenance_of(results),
    )


def title_of(results: Results) -> str:
    """Return one line with the data set, its numbers of images, and the number of seeds."""
    data = results.dataset
    unlabelled = f" and {data.unlabelled:,} without labels" if data.unlabelled else ""
    train = counted(data.train, "training image") + unlabelled
    repetitions = counted(len(results.repetitions), results.repetition)
    return f"{data.name}: {train}, {counted(data.test, 'test image')}, {repetitions}"


def provenance_of(results: Results) -> str:
    """Return one line with the source of the figures: recipe, code, data, teacher, seeds, machine, day."""

    def hashed(name: str, sha256: str | None) -> str:
        return f"{name} ({sha256[:8]})" if sha256 else name

    units = {"cores": " cores", "threads": " threads", "memory_gib": " GiB"}
    machine = [
        f"{name} {value}" if name == "torch" else f"{value}{units.get(name, '')}"
        for name, value in results.machine.items()
        if name not in ("platform", "python")
    ]
    teachers = [(card.name, card.sha256) for card in results.teachers]
    for row in results.rows:
        if isinstance(row, VariantRow) and row.teacher_name:
            teachers.append((row.teacher_name, row.teacher_sha256))
    return "; ".join(
        [
            f"recipe {results.recipe.get('name') or 'custom'}",
            hashed(f"deitkit {results.deitkit}", results.code),
            "data " + hashed(results.dataset.name, results.dataset.fingerprint),
            *("teacher " + hashed(*teacher) for teacher in dict.fromkeys(teachers)),
            "seeds " + ", ".join(str(seed) for seed in results.seeds),
            ", ".join(machine),
            results.created[:10],
        ]
    )


def _columns(results: Results) -> tuple[Column, ...]:
    paper = paper_model(results).removeprefix("DeiT-")
    return (
        Column("labels", "labels", 5, numeric=False),
        Column("teacher", "teacher", 3, numeric=False),
        Column("top1", "top-1 %", 0),
        Column("balanced", "balanced %", 1),
        Column("macro_f1", "macro F1 %", 9),
        Column("difference", "vs none", 1),
        Column("interval", "95 % interval", 9),
        Column("p", "p", 2),
        Column("gain", "vs before", 1),
        Column("gain_p", "p (before)", 2),
        Column("teacher_difference", "vs teacher", 6),
        Column("teacher_p", "p (teacher)", 10),
        Column("milliseconds", "ms", 4),
        Column("milliseconds_in_batch", "ms in batch", 11),
        Column("megabytes", "MB", 8),
        Column("top5", "top-5 %", 16),
        Column("agreement", "agreement %", 12),
        Column("parameters", "params", 13),
        Column("images_per_second", "images/s", 14),
        Column("seconds", "seconds", 15),
        Column(REPRODUCTION, "reproduction, as published", 7, published=True),
        Column(PAPER, f"paper (ImageNet, {paper})", 7, published=True),
    )


def _line(row: Row, results: Results, published: dict[str, dict[str, PublishedFigure]]) -> Line:
    images = row.n
    difference, gain, lag = (row.differences.get(name) for name in ("labels", "before", "teacher"))
    labels = NOTHING if row.labels is None else "yes" if row.labels else "no"
    cells = {
        "labels": labels + LABELS_MARK if results.published and is_printed_without_labels(row) else labels,
        "teacher": NOTHING if row.labels is None else row.teacher or "none",
        "top1": accuracy(row) + (STATUS_MARK if row.status != "ok" else ""),
        "balanced": percent(row.balanced_accuracy, images) if is_unbalanced(results) else NOTHING,
        "macro_f1": percent(row.macro_f1, images) if is_unbalanced(results) else NOTHING,
        "difference": points(difference, images),
        "interval": interval(difference, images),
        "p": p_value(difference),
        "top5": percent(_mean(row.top5), images),
        "agreement": percent(row.teacher_agreement, images),
        "parameters": millions(row.parameters),
        "images_per_second": whole(row.images_per_second),
        "seconds": whole(row.train_seconds),
        "gain": points(gain, images),
        "gain_p": p_value(gain),
        "teacher_difference": points(lag, images),
        "teacher_p": p_value(lag),
        **_cost_cells(row.cost),
    }
    cells |= _published_cells(row.row, published)
    label = row.label
    spelled = f"{row.method}, {row.readout}"
    if spelled not in label and row.kind != "baseline":
        label = f"{label} ({spelled})"  # so that no two rows look alike
    return Line(
        name=row.row,
        label=label,
        cells=cells,
        group="baseline" if row.kind == "baseline" else "students",
        winner=row.row == results.winner,
    )


def _cost_cells(cost: Cost | None) -> dict[str, str]:
    if cost is None:
        return dict.fromkeys(("milliseconds", "milliseconds_in_batch", "megabytes"), NOTHING)
    return {
        "milliseconds": milliseconds(cost.milliseconds),
        "milliseconds_in_batch": milliseconds(cost.milliseconds_in_batch),
        "megabytes": megabytes(cost.file_bytes),
    }


def _published_cells(row: str, published: dict[str, dict[str, PublishedFigure]]) -> dict[str, str]:
    entries = {table: published.get(table, {}).get(row) for table in (REPRODUCTION, PAPER)}
    return {table: NOTHING if entry is None else _published_figure(entry) for table, entry in entries.items()}


def _teacher_lines(results: Results, published: dict[str, dict[str, PublishedFigure]]) -> list[Line]:
    """Return a line for every teacher, and one for the mean of several."""
    cells = _published_cells("teacher", published)
    lines = [_teacher_line(f"teacher: {teacher.name}", teacher, results, cells) for teacher in results.teachers]
    if len(lines) > 1 and results.teacher is not None:
        lines.append(_teacher_line("teachers: mean of their outputs", results.teacher, results, cells))
    return lines


def _teacher_line(name: str, teacher: TeacherCard, results: Results, published: dict[str, str]) -> Line:
    cells = {column.key: NOTHING for column in _columns(results)} | published
    if teacher.test_top1 is None:
        name += " (validation images)"
        cells["top1"] = percent(teacher.top1, teacher.n)
    else:
        cells["top1"] = percent(teacher.test_top1, results.dataset.test)
        if is_unbalanced(results):
            cells["balanced"] = percent(teacher.test_balanced, results.dataset.test)
            cells["macro_f1"] = percent(teacher.test_macro_f1, results.dataset.test)
    cells |= {"parameters": millions(teacher.parameters)} | _cost_cells(teacher.cost)
    return Line(name=name, label=name, cells=cells, group="teacher")


def accuracy(row: Row) -> str:
    """Return a row's top-1 with its spread over seeds, or the Wilson interval of its one seed."""
    finished = [value for value in row.top1 if value is not None]
    if row.top1_mean is None:
        return "stopped"
    text = percent(row.top1_mean, row.n)
    if len(finished) > 1:
        return f"{text} ± {percent(row.top1_std, row.n)}"
    if len(row.top1) > 1:
        return f"{text} (1 of {len(row.top1)})"
    low, high = row.top1_ci95 or (None, None)
    return text if low is None else f"{text} [{percent(low, row.n)}, {percent(high, row.n)}]"


def _published_text(entry: PublishedFigure) -> str:
    reproduced = entry.table == REPRODUCTION
    source = "reproduction, as published" if reproduced else f"paper ({entry.data}, {entry.model})"
    return f"{source}: {entry.row}, teacher {entry.teacher or 'none'}: {_published_figure(entry)} %"


def _published_figure(entry: PublishedFigure) -> str:
    return f"{100 * entry.top1:.{2 if entry.table == REPRODUCTION else 1}f}"  # the digits that were printed


def _mean(values: Sequence[Number | None] | None) -> float | None:
    finished = [value for value in values or [] if value is not None]
    return sum(finished) / len(finished) if finished else None
