"""What others published, as data, and which of our rows each figure compares with. Nothing here was measured by us."""

from collections.abc import Sequence

from deitkit.run.layout import BASELINE
from deitkit.run.results import PublishedFigure, Results, Row

REPRODUCTION, PAPER = "reproduction", "paper"

# method, readout, teacher, row as printed, top-1 in per cent.
# A reproduction of the paper's table: DeiT-Ti, CIFAR-10, 20 epochs. Its readout of two tokens is taken to be joint.
_REPRODUCTION = (
    ("none", "class", None, "no distillation", 67.69),
    ("soft", "class", "soft", "usual distillation", 68.85),
    ("hard", "class", "hard", "hard distillation", 40.19),
    ("distillation-only", "distillation", "hard", "distil embedding", 8.07),
    ("class-only", "class", "hard", "class embedding", 61.69),
    ("token-soft", "joint", "soft", "class + distillation", 69.19),
    ("token-hard", "joint", "hard", "class + distillation", 46.11),
    (BASELINE, "class", None, "ResNet-18 (CNN baseline)", 88.46),
)

# Touvron et al., arXiv 2012.12877, Table 3: ImageNet, 300 epochs; the last column was fine-tuned at 384 px.
_PAPER_MODELS = ("DeiT-Ti", "DeiT-S", "DeiT-B", "DeiT-B 384")
_PAPER = (
    ("none", "class", None, "no distillation", (72.2, 79.8, 81.8, 83.1)),
    ("soft", "class", "soft", "usual (soft) distillation", (72.2, 79.8, 81.8, 83.2)),
    ("hard", "class", "hard", "hard distillation", (74.3, 80.9, 83.0, 84.0)),
    ("token-hard", "class", "hard", "DeiT distilled: class embedding", (73.9, 80.9, 83.0, 84.2)),
    ("token-hard", "distillation", "hard", "DeiT distilled: distil. embedding", (74.6, 81.1, 83.1, 84.4)),
    ("token-hard", "joint", "hard", "DeiT distilled: class + distillation", (74.5, 81.2, 83.4, 84.5)),
)
# In both tables "labels: no", though true labels are part of both losses (deit#215).
_PRINTED_WITHOUT_LABELS = ("soft", "hard", "mean-pool-soft", "mean-pool-hard")
_PAPER_MODEL_OF = {"deit_small": "DeiT-S", "deit_base": "DeiT-B", "vit_base": "DeiT-B", "vit_large": "DeiT-B"}


def published_figures(tables: Sequence[str]) -> tuple[PublishedFigure, ...]:
    """Return the published figures of the named tables.

    Args:
        tables: Of ``reproduction`` and ``paper``, in the order wanted. The paper's four models are separate entries.
    """
    figures = {REPRODUCTION: _reproduction_figures, PAPER: _paper_figures}
    return tuple(entry for table in tables for entry in figures[table]())


def published_by_row(results: Results) -> dict[str, dict[str, PublishedFigure]]:
    """Return, by table and by our row's name, the published figure of the same method and readout.

    Only rows of the last weights have one. The first three rows of the reproduction used mean pooling: they compare
    with our ``mean-pool-*`` rows where there are any. Of the paper's models the one that was trained here counts
    (DeiT-Ti for ``micro``). The published CNN compares with the baseline, or with a CNN that was trained here as the
    only teacher, under the name ``teacher``.
    """
    by_row: dict[str, dict[str, PublishedFigure]] = {}
    for entry in _candidates(results):
        pooled = f"mean-pool-{entry.method}" if entry.table == REPRODUCTION else entry.method
        for method in (pooled, entry.method):
            row = next((row for row in results.rows if _fits(row, method, entry.readout)), None)
            if row is not None:
                by_row.setdefault(entry.table, {})[row.row] = entry
                break
        else:
            if entry.method == BASELINE and _has_cnn_trained_here(results):
                by_row.setdefault(entry.table, {})["teacher"] = entry
    return by_row


def published_only(results: Results) -> list[PublishedFigure]:
    """Return the published figures that have no counterpart among our rows."""
    placed = [entry for rows in published_by_row(results).values() for entry in rows.values()]
    return [entry for entry in _candidates(results) if entry not in placed]


def paper_model(results: Results) -> str:
    """Return the paper's model that compares with the student trained here."""
    student = results.recipe.get("model", {}).get("name")
    return _PAPER_MODEL_OF.get(student, "DeiT-Ti")


def is_printed_without_labels(row: Row) -> bool:
    """Return whether the published tables print "labels: no" for a row whose loss contains true labels."""
    return bool(row.labels) and row.method in _PRINTED_WITHOUT_LABELS


def _has_cnn_trained_here(results: Results) -> bool:
    """Return whether the only teacher is a CNN that was trained on the data, as in the reproduction."""
    return len(results.teachers) == 1 and results.teachers[0].fit == "full" and results.teachers[0].readout is None


def _candidates(results: Results) -> list[PublishedFigure]:
    model = paper_model(results)
    return [entry for entry in results.published if entry.table != PAPER or entry.model == model]


def _fits(row: Row, method: str, readout: str) -> bool:
    return row.method == method and row.readout == readout and row.weights == "last"


def _reproduction_figures() -> list[PublishedFigure]:
    figures = []
    for method, readout, teacher, row, per_cent in _REPRODUCTION:
        model = "ResNet-18" if method == BASELINE else "DeiT-Ti"
        figures.append(_entry(REPRODUCTION, model, "CIFAR-10", method, readout, teacher, row, per_cent))
    return figures


def _paper_figures() -> list[PublishedFigure]:
    return [
        _entry(PAPER, model, "ImageNet", method, readout, teacher, row, per_cent)
        for method, readout, teacher, row, figures in _PAPER
        for model, per_cent in zip(_PAPER_MODELS, figures, strict=True)
    ]


def _entry(
    table: str, model: str, data: str, method: str, readout: str, teacher: str | None, row: str, per_cent: float
) -> PublishedFigure:
    return PublishedFigure(
        table=table,
        model=model,
        data=data,
        row=row,
        method=method,
        readout=readout,
        teacher=teacher,
        top1=round(per_cent / 100, 4),
    )


# Touvron et al., arXiv 2012.12877, Table 4: the share of ImageNet's validation images that two classify differently.
# The teacher is a RegNetY-16GF, the students are DeiT-B; here by the names of our rows.
PAPER_DISAGREEMENT = (
    ("truth", "teacher", 0.171),
    ("truth", "none/class", 0.182),
    ("truth", "token-hard/class", 0.170),
    ("truth", "token-hard/distillation", 0.169),
    ("truth", "token-hard/joint", 0.166),
    ("teacher", "none/class", 0.133),
    ("teacher", "token-hard/class", 0.112),
    ("teacher", "token-hard/distillation", 0.100),
    ("teacher", "token-hard/joint", 0.102),
    ("token-hard/class", "token-hard/distillation", 0.050),
)
# The same, section 4: the cosine of the learned class and distillation vectors, and that after the last block.
PAPER_COSINES = {"learned": 0.06, "last": 0.93}
