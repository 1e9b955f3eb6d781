"""The table of a comparison for a terminal, in Markdown, LaTeX and CSV; its content is in ``table_layout``."""

import csv
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from deitkit.report.ablation import lay_out_any
from deitkit.report.published import PAPER, REPRODUCTION, published_by_row
from deitkit.report.table_layout import WINNER_MARK, Column, Layout, Line
from deitkit.run.results import Cost, Results
from deitkit.system.files import write_text

_ASCII = str.maketrans({"±": "+-", "−": "-", "–": "-", "★": ">", "†": "!", "⚗": "*", "’": "'"})
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$", "|": r"\textbar{}",
    '"': r"\textquotedbl{}", "[": "{[}", "]": "{]}", "±": r"$\pm$", "−": r"$-$", "–": r"\textendash{}", "★": r"$\star$",
    "→": r"$\rightarrow$", "…": r"\dots{}", "×": r"$\times$", "≥": r"$\geq$",
    "†": r"$\dagger$", "*": r"$\ast$", "⚗": r"\textsuperscript{d}",
}  # fmt: skip


# The width of a page's text, of the names of rows, of other texts, between two columns, and of a small character.
_LATEX_PAGE_CM, _LATEX_ROW_CM, _LATEX_TEXT_CM, _LATEX_GAP_CM, _LATEX_CHARACTER_CM = 17.5, 4.0, 3.0, 0.28, 0.18


class TerminalTable:
    """A rich renderable: title, the table with the columns that fit the width, what is published only, verdict."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        plain = (lambda text: _to_ascii(text, options.encoding)) if options.ascii_only else str
        table, left_out = self._fitting_table(console, options, plain)
        yield Text(plain(self.layout.title), style="bold")
        yield table
        if left_out:
            yield Text(plain(f"too narrow for: {', '.join(left_out)}"), style="dim")
        for text in self.layout.published_only:
            yield Text(plain(f"published only: {text}"), style="italic dim")
        for note in self.layout.footnotes:
            yield Text(plain(note), style="dim")
        if self.layout.advice:
            yield Text()
            yield Text(plain(self.layout.advice), style="bold")
        if self.layout.verdict:
            yield Text()
            yield Text(plain(self.layout.verdict), style="" if self.layout.advice else "bold")

    def _fitting_table(self, console: Console, options: ConsoleOptions, plain: Any) -> tuple[Table, list[str]]:
        kept = list(self.layout.columns)
        while True:
            table = _terminal_table(self.layout, kept, plain)
            width = Measurement.get(console, options.update(width=10_000), table).maximum
            if width <= options.max_width or len(kept) == 1:
                return table, [column.title for column in self.layout.columns if column not in kept]
            kept.remove(max(kept, key=lambda column: column.rank))


def rich_table(results: Results) -> TerminalTable:
    """Return the table as a rich renderable; where the terminal is narrow the least important columns are left out."""
    return TerminalTable(lay_out_any(results))


def markdown_table(results: Results) -> str:
    """Return the table with its notes in Markdown, without the verdict."""
    return _markdown(replace(lay_out_any(results), advice="", verdict=""))


def write_tables(results: Results, folder: Path) -> list[Path]:
    """Write ``table.md``, ``table.csv`` and ``table.tex`` (booktabs) into the folder.

    Raises:
        CheckpointError: The folder cannot be written.
    """
    layout = lay_out_any(results)
    texts = {"md": _markdown(layout), "csv": _csv(results), "tex": _latex(layout)}
    for suffix, text in texts.items():
        write_text(folder / f"table.{suffix}", text)
    return [folder / f"table.{suffix}" for suffix in texts]


def _terminal_table(layout: Layout, columns: list[Column], plain: Any) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("row", no_wrap=True)
    for column in columns:
        style = "italic dim" if column.published else ""
        title = (
            plain(column.title)
            if not column.published
            else plain(column.title).replace(" (", "\n(").replace(", as", ",\nas")
        )
        table.add_column(Text(title), justify="right" if column.numeric else "left", no_wrap=True, style=style)
    for line, following in zip(layout.lines, [*layout.lines[1:], None], strict=True):
        mark = f"{WINNER_MARK} " if line.winner else "  "
        cells = [mark + line.name] + [line.cells[column.key] for column in columns]
        ends_group = following is not None and following.group != line.group
        table.add_row(
            *[Text(plain(cell)) for cell in cells], style="bold" if line.winner else "", end_section=ends_group
        )
    return table


def _to_ascii(text: str, encoding: str) -> str:
    return text.translate(_ASCII).encode(encoding, errors="replace").decode(encoding)


def _markdown(layout: Layout) -> str:
    rows = [["row", *(column.title for column in layout.columns)]]
    rows.append(["---", *("---:" if column.numeric else "---" for column in layout.columns)])
    for line in layout.lines:
        cells = [escape_markdown(cell) for cell in (line.label, *(line.cells[column.key] for column in layout.columns))]
        if line.winner:
            cells[0] = f"**{cells[0]}** {WINNER_MARK}"
        rows.append(cells)
    parts = [f"**{escape_markdown(layout.title)}**", "\n".join(f"| {' | '.join(cells)} |" for cells in rows)]
    if layout.published_only:
        parts.append("Published only:\n\n" + "\n".join(f"- {escape_markdown(text)}" for text in layout.published_only))
    parts += [escape_markdown(note) for note in layout.footnotes]
    parts += [f"**{escape_markdown(text)}**" for text in (layout.advice, layout.verdict) if text]
    parts.append(f"*{escape_markdown(layout.provenance)}*")
    return "\n\n".join(parts) + "\n"


def escape_markdown(text: str) -> str:
    """Return a text of a user in one line that Markdown shows as it is."""
    return re.sub(r"([\\`*_|<>~])", r"\\\1", _one_line(text)).replace("](", "]\\(")


def _latex(layout: Layout) -> str:
    columns = _latex_columns(layout)
    left_out = ", ".join(column.title for column in layout.columns if column not in columns)
    widths = [
        rf">{{\ragged{'left' if column.numeric else 'right'}\arraybackslash}}p{{{width:.1f}cm}}"
        for column, width in columns.items()
    ]
    lines = [
        r"% needs \usepackage{array,booktabs}",
        *([f"% too wide for a page, but in table.md and table.csv: {_one_line(left_out)}"] if left_out else []),
        r"\begin{table*}",
        r"  \centering\small\setlength{\tabcolsep}{4pt}",
        rf"  \caption{{{_escape_latex(layout.title)}}}",
        rf"  \begin{{tabular}}{{>{{\raggedright\arraybackslash}}p{{{_LATEX_ROW_CM}cm}}{''.join(widths)}}}",
        r"    \toprule",
        "    " + " & ".join(["row", *(_escape_latex(column.title) for column in columns)]) + r" \\",
        r"    \midrule",
    ]
    for line, before in zip(layout.lines, [layout.lines[0], *layout.lines], strict=False):
        if line.group != before.group:
            lines.append(r"    \midrule")
        lines.append("    " + " & ".join(_latex_cells(line, columns)) + r" \\")
    lines += [r"    \bottomrule", r"  \end{tabular}", ""]
    notes = [f"published only: {text}." for text in layout.published_only] + list(layout.footnotes)
    notes += [layout.advice, layout.verdict, layout.provenance]
    lines += [rf"  \par\smallskip\footnotesize {_escape_latex(note)}" for note in notes if note]
    return "\n".join([*lines, r"\end{table*}", ""])


def _latex_columns(layout: Layout) -> dict[Column, float]:
    """Return the columns that fit a page, the least important being left out, with their widths in cm."""

    def width(column: Column) -> float:
        cells = [line.cells[column.key] for line in layout.lines]
        longest = _LATEX_CHARACTER_CM * max(map(len, (*cells, *column.title.split())))
        return longest if column.numeric else min(longest, _LATEX_TEXT_CM)

    kept = {column: width(column) for column in layout.columns}
    while sum(kept.values()) + _LATEX_GAP_CM * len(kept) > _LATEX_PAGE_CM - _LATEX_ROW_CM:
        del kept[max(kept, key=lambda column: column.rank)]
    return kept


def _latex_cells(line: Line, columns: Iterable[Column]) -> list[str]:
    label = _escape_latex(line.label)
    cells = [rf"\textbf{{{label}}} $\star$" if line.winner else label]
    for column in columns:
        cell = _escape_latex(line.cells[column.key])
        if column.published:
            cell = rf"\textit{{{cell}}}"
        elif line.winner:
            cell = rf"\textbf{{{cell}}}"
        cells.append(cell)
    return cells


def _escape_latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in _one_line(text)).replace("--", "-{}-")


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", "".join(character if character.isprintable() else " " for character in text)).strip()


def _csv(results: Results) -> str:
    """Raw fractions: one line per row, lists spread over columns."""
    published = published_by_row(results)
    records = []
    for row in results.to_json()["rows"]:
        record: dict[str, Any] = {}
        for key, value in row.items():
            record.update(_spread(key, value, results))
        for table in (REPRODUCTION, PAPER):
            entry = published.get(table, {}).get(row["row"])
            record[f"published_{table}"] = None if entry is None else entry.top1
        records.append(record)
    names = list(dict.fromkeys(name for record in records for name in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def _spread(key: str, value: Any, results: Results) -> dict[str, Any]:
    if key in ("top1", "top5", "validation_top1", "validation_balanced"):
        names = [f"{key}_{results.repetition}_{number}" for number in results.repetitions]
        return dict(zip(names, value or [None] * len(names), strict=False))
    if key == "cost":
        return {name: (value or {}).get(name) for name in Cost.model_fields}
    if key == "top1_ci95":
        return _bounds(key, value)
    if key == "differences":
        return dict(pair for reference, found in value.items() for pair in _difference(reference, found).items())
    return {key: value}


def _difference(reference: str, found: dict[str, Any]) -> dict[str, Any]:
    name, p = f"difference_vs_{reference}", f"p_vs_{reference}"
    interval = _bounds(f"{name}_ci95", found["ci95"])
    return {name: found["mean"], **interval, p: found["p"], f"{p}_test": found["test"], f"{p}_holm": found["p_holm"]}


def _bounds(name: str, interval: Any) -> dict[str, Any]:
    return dict(zip((f"{name}_low", f"{name}_high"), interval or (None, None), strict=True))
