"""The page: one self-contained HTML file with the table, the charts and the facts of a comparison."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from deitkit.report.ablation import difference_chart, lay_out_any
from deitkit.report.analysis import Section, lay_out_analysis
from deitkit.report.charts import accuracy_chart, curve_charts
from deitkit.report.cost_chart import cost_chart
from deitkit.report.figures import colours_of, curves_of, data_uri, may_have_seen, teacher_text, validation_peaks
from deitkit.report.numbers import NOTHING, millions, percent
from deitkit.report.published import PAPER, REPRODUCTION
from deitkit.report.table_layout import WINNER_MARK
from deitkit.run.analysis import Analysis, read_analysis
from deitkit.run.layout import REPORT
from deitkit.run.metrics import EpochMetrics
from deitkit.run.results import AblationResults, Results
from deitkit.system.files import write_text

EARLIER_TABLE = "This is the analysis of an earlier table with other rows or seeds: run `deitkit analyze` again."
_UNITS = {"memory_gib": "memory (GiB)"}


def write_page(
    results: Results, metrics: Sequence[EpochMetrics], teacher_metrics: Sequence[EpochMetrics], folder: Path
) -> list[Path]:
    """Write ``report.html``, which needs no network, with ``views.png`` and ``analysis.json`` where they exist.

    Args:
        results: Of the run.
        metrics: One entry per seed, student and epoch.
        teacher_metrics: The same of a teacher that was trained here, or empty.
        folder: The run folder.

    Raises:
        CheckpointError: The folder cannot be written.
    """
    found, section = read_analysis(folder), None
    if found is not None:
        warning = "" if _is_of(found, results) else EARLIER_TABLE
        section = lay_out_analysis(found, results, colours_of(metrics, results.rows), folder, warning)
    page = render_page(results, metrics, teacher_metrics, data_uri(folder / "views.png"), section)
    write_text(folder / REPORT, page)
    return [folder / REPORT]


def _is_of(analysis: Analysis, results: Results) -> bool:
    """Return whether an analysis is of some seeds of a table, and knew all rows that finished under these."""
    if not {*analysis.seeds} <= {*results.seeds}:
        return False
    places = [results.seeds.index(seed) for seed in analysis.seeds]
    finished = {
        row.row for row in results.rows if row.kind != "checkpoint" and any(row.top1[n] is not None for n in places)
    }
    analysed = {row.row for row in analysis.rows} - {"teacher"}
    return analysed <= finished <= {*analysed, *analysis.left_out}


def render_page(
    results: Results,
    metrics: Sequence[EpochMetrics],
    teacher_metrics: Sequence[EpochMetrics],
    views: str | None,
    analysis: Section | None = None,
) -> str:
    """Return the page; ``views`` is a data URI of augmented views, ``analysis`` what `deitkit analyze` found."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader("deitkit.report", package_path=""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "millions": millions}
    template = environment.get_template("page.html.j2")
    rows = difference_chart(results) if isinstance(results, AblationResults) else accuracy_chart(results, metrics)
    charts: dict[str, Any] = {"rows": {"": rows}}
    cost = None if isinstance(results, AblationResults) else cost_chart(results, metrics)
    if cost is not None:
        charts["cost"] = {"": cost}
    charts["curves"] = curve_charts(results, metrics)
    charts["teacher"] = curve_charts(results.model_copy(update={"teacher": None}), teacher_metrics)
    charts |= analysis.charts if analysis is not None else {}
    curves = curves_of(metrics, lambda line: line.main_accuracy)
    layout = lay_out_any(results)
    headline, details = _first_sentence(
        " ".join(text for text in (layout.advice, layout.verdict) if text) or layout.title
    )
    return template.render(
        results=results,
        layout=layout,
        headline=headline,
        details=details,
        # The accuracy first: a phone shows what stands beside the name.
        columns=sorted((one for one in layout.columns if one.key != "interval"), key=lambda one: one.key != "top1"),
        ablation=isinstance(results, AblationResults),
        teachers=results.teachers,
        mark=WINNER_MARK,
        nothing=NOTHING,
        reference=results.reference,
        charts={name: views for name, views in charts.items() if views},
        peaks=validation_peaks(metrics),
        teacher_text=teacher_text(results, curves) if results.teacher is not None and curves else "",
        may_have_seen=may_have_seen,
        several_seeds=len({line.seed for line in metrics}) > 1,
        views=views,
        analysis=analysis,
        published=_published_tables(results),
        recipe=yaml.safe_dump(results.recipe, sort_keys=False, allow_unicode=True),
        machine={_UNITS.get(key, key.replace("_", " ")): value for key, value in results.machine.items()},
        plotly=Markup(get_plotlyjs()),
    )


def _first_sentence(text: str) -> tuple[str, str]:
    """Return the first sentence and the rest; a full stop in a number or a name does not end a sentence."""
    first, stop, rest = text.partition(". ")
    return first + stop.strip(), rest


def _published_tables(results: Results) -> list[dict[str, Any]]:
    """Return each published table as a heading, models as columns, and rows of figures in per cent."""
    titles = {
        REPRODUCTION: ("The reproduction's table (CIFAR-10, 20 epochs)", "github.com/kimyunoo/4782_final"),
        PAPER: ("The paper's table (ImageNet, 300 epochs)", "arxiv.org/abs/2012.12877"),
    }
    tables = []
    for name, (title, source) in titles.items():
        entries = [entry for entry in results.published if entry.table == name]
        models = list(dict.fromkeys(entry.model for entry in entries)) if name == PAPER else ["top-1 %"]
        rows: dict[tuple[str, str | None], dict[str, Any]] = {}
        for entry in entries:
            key = (entry.row, entry.teacher)
            row = rows.setdefault(key, {"row": entry.row, "teacher": entry.teacher or "none", "figures": {}})
            row["figures"][entry.model if name == PAPER else "top-1 %"] = 100 * entry.top1
        if entries:
            form = "%.1f" if name == PAPER else "%.2f"
            links = {"source": source, "address": f"https://{source}"}
            tables.append({"title": title, "models": models, "rows": list(rows.values()), "form": form, **links})
    return tables
