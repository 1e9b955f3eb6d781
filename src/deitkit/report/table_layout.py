"""What the table says: its columns, lines and footnotes as plain text. How a format draws them is not decided here."""

from dataclasses import dataclass
from typing import Any

from deitkit.report.published import paper_model, published_beside, published_only

Number = int | float  # JSON writes a whole number as an int

NOTHING = "–"
WINNER_MARK = "★"
LABELS_MARK = "*"
STATUS_MARK = "†"
ONE_SEED = (
    "Of one seed, intervals and p are those of the test images: they tell these students apart, and not what trained "
    "them; --seeds 5 does."
)


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
    verdict: str
    provenance: str


def lay_out(results: dict[str, Any]) -> Layout:
    """Turn results into columns, lines and footnotes; columns in which no line says anything are left out."""
    beside = published_beside(results)
    lines = [_line(row, results, beside) for row in results["rows"]]
    lines.sort(key=lambda line: line.group == "baseline")
    lines += _teacher_lines(results)
    used = {key for line in lines for key, cell in line.cells.items() if cell != NOTHING}
    return Layout(
        title=title_of(results),
        columns=tuple(column for column in _columns(results) if column.key in used),
        lines=tuple(lines),
        published_only=tuple(_published_text(entry) for entry in published_only(results)),
        footnotes=tuple(_footnotes(results)),
        verdict=results.get("verdict") or "",
        provenance=provenance_of(results),
    )


def title_of(results: dict[str, Any]) -> str:
    """Return one line that names the data set and how much of it was used."""
    data = results["dataset"]
    train, test = data["train"], data["test"]
    return f"{data['name']}: {train:,} training images, {test:,} test images, {_count(len(results['seeds']), 'seed')}"


def provenance_of(results: dict[str, Any]) -> str:
    """Return one line that says where the figures come from: recipe, code, data, teacher, seeds, machine, day."""

    def hashed(name: str, sha256: str | None) -> str:
        return f"{name} ({sha256[:8]})" if sha256 else name

    units = {"cores": " cores", "memory_gib": " GiB"}
    machine = [
        f"{name} {value}" if name == "torch" else f"{value}{units.get(name, '')}"
        for name, value in results["machine"].items()
        if name not in ("platform", "python")
    ]
    teachers = [(card["name"], card.get("sha256")) for card in results.get("teachers") or [results["teacher"]] if card]
    # An ablation names them row by row.
    teachers += [(row["teacher_name"], row.get("teacher_sha256")) for row in results["rows"] if row.get("teacher_name")]
    return "; ".join(
        [
            f"recipe {results['recipe'].get('name') or 'custom'}",
            hashed(f"deitkit {results['deitkit']}", results.get("code")),
            "data " + hashed(results["dataset"]["name"], results["dataset"]["fingerprint"]),
            *("teacher " + hashed(*teacher) for teacher in dict.fromkeys(teachers)),
            "seeds " + ", ".join(str(seed) for seed in results["seeds"]),
            ", ".join(machine),
            results["created"][:10],
        ]
    )


def reference_row(results: dict[str, Any]) -> dict[str, Any] | None:
    """Return the row that "vs none" compares with: the first method there is that learns from labels alone."""
    last = [row for row in results["rows"] if row["weights"] == "last"]
    rows = (row for method in ("none", "mean-pool-none", "class-only") for row in last if row["method"] == method)
    return next(rows, None)


def percent(value: Number | None, images: int) -> str:
    """Return a fraction in per cent, with as many digits as that number of images can tell apart."""
    return NOTHING if value is None else f"{100 * value:.{2 if images >= 1000 else 1}f}"


def millions(count: int | None) -> str:
    """Return a number of parameters as a person reads it."""
    if count is None:
        return NOTHING
    return f"{count / 1e6:.2f} M" if count >= 1e6 else f"{count / 1e3:.0f} k"


def _columns(results: dict[str, Any]) -> tuple[Column, ...]:
    paper = paper_model(results).removeprefix("DeiT-")
    return (
        Column("labels", "labels", 4, numeric=False),
        Column("teacher", "teacher", 3, numeric=False),
        Column("top1", "top-1 %", 0),
        Column("difference", "vs none", 1),
        Column("interval", "95 % interval", 7),
        Column("p", "p", 2),
        Column("gain", "vs before", 1),
        Column("gain_p", "p (before)", 2),
        Column("top5", "top-5 %", 12),
        Column("agreement", "agreement %", 8),
        Column("parameters", "params", 9),
        Column("images_per_second", "images/s", 10),
        Column("seconds", "seconds", 11),
        Column("seed", "seed, as published", 5, published=True),
        Column("paper", f"paper (ImageNet, {paper})", 6, published=True),
    )


def _line(row: dict[str, Any], results: dict[str, Any], beside: dict[str, dict[str, dict[str, Any]]]) -> Line:
    images = row["n"]
    low, high = row.get("difference_ci95") or (None, None)
    labels = NOTHING if row["labels"] is None else "yes" if row["labels"] else "no"
    cells = {
        "labels": labels + LABELS_MARK if _on_one_head(row) else labels,
        "teacher": NOTHING if row["labels"] is None else row["teacher"] or "none",
        "top1": accuracy(row) + (STATUS_MARK if row["status"] != "ok" else ""),
        "difference": points(row.get("difference_vs_none"), images),
        "interval": NOTHING if low is None else f"[{points(low, images)}, {points(high, images)}]",
        "p": p_value(row.get("p_vs_none")),
        "top5": percent(_mean(row.get("top5")), images),
        "agreement": percent(row.get("teacher_agreement"), images),
        "parameters": millions(row.get("parameters")),
        "images_per_second": _plain(row.get("images_per_second"), "{:,.0f}"),
        "seconds": _plain(row.get("train_seconds"), "{:,.0f}"),
        "gain": points(row.get("difference_vs_before"), images),
        "gain_p": p_value(row.get("p_vs_before")),
    }
    for table in ("seed", "paper"):
        entry = beside.get(table, {}).get(row["row"])
        cells[table] = NOTHING if entry is None else _published_figure(entry)
    label = row["label"]
    spelled = f"{row['method']}, {row['readout']}"
    if spelled not in label and row["method"] != "cnn-baseline":
        label = f"{label} ({spelled})"  # the two readings of one table must not look alike
    return Line(
        name=row["row"],
        label=label,
        cells=cells,
        group="baseline" if row["method"] == "cnn-baseline" else "students",
        winner=row["row"] == results.get("winner"),
    )


def teachers_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the card of every teacher; a run of a former version names the only one."""
    only = [results["teacher"]] if results.get("teacher") else []
    return results.get("teachers") or only


def _teacher_lines(results: dict[str, Any]) -> list[Line]:
    """Return a line for every teacher, and one for the mean answer of several."""
    teachers = teachers_of(results)
    lines = [_teacher_line(f"teacher: {teacher['name']}", teacher, results) for teacher in teachers]
    if len(teachers) > 1:
        lines.append(_teacher_line("teachers: mean answer", results["teacher"], results))
    return lines


def _teacher_line(name: str, teacher: dict[str, Any], results: dict[str, Any]) -> Line:
    keys = [column.key for column in _columns(results)]
    tested = teacher.get("test_top1") is not None
    images = results["dataset"]["test"] if tested else teacher["n"]
    cells = dict.fromkeys(keys, NOTHING)
    cells["top1"] = percent(teacher["test_top1"] if tested else teacher["top1"], images)
    cells["parameters"] = millions(teacher.get("parameters"))
    name += "" if tested else " (validation images)"
    return Line(name=name, label=name, cells=cells, group="teacher")


def accuracy(row: dict[str, Any]) -> str:
    """Return a row's top-1 with its spread over seeds, or the Wilson interval of its one seed."""
    finished = [value for value in row["top1"] if value is not None]
    mean, images = row.get("top1_mean"), row["n"]
    if mean is None:
        return "stopped"
    text = percent(mean, images)
    if len(finished) > 1:
        return f"{text} ± {percent(row.get('top1_std'), images)}"
    if len(row["top1"]) > 1:
        return f"{text} (1 seed)"
    low, high = row.get("top1_ci95") or (None, None)
    return text if low is None else f"{text} [{percent(low, images)}, {percent(high, images)}]"


def _footnotes(results: dict[str, Any]) -> list[str]:
    rows, seeds = results["rows"], len(results["seeds"])
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "[95 % Wilson interval], one seed"
    counts = " or ".join(f"{count:,}" for count in sorted({row["n"] for row in rows}))
    notes = [f"top-1: {spread}, on {counts} test images; weights of the last epoch, never of the best."]
    tests = sorted({row["p_test"] for row in rows if row.get("p_test")})
    reference = reference_row(results)
    if tests and reference is not None:
        notes.append(
            f"vs none: points of top-1 more than '{reference['row']}', with their 95 % interval; p: {', '.join(tests)}."
        )
    if tests and seeds == 1:
        notes.append(ONE_SEED)
    gains = sorted({row["p_vs_before_test"] for row in rows if row.get("p_vs_before_test")})
    if gains:
        notes.append(f"vs before: points of top-1 more than the model before fine-tuning; p: {', '.join(gains)}.")
    if any(_on_one_head(row) for row in rows):
        notes.append(
            f"{LABELS_MARK} The paper prints 'labels: no' for these rows; true labels are in their loss (deit#215)."
        )
    tokens = [row for row in rows if row["method"].startswith("token-")]
    if len({row["readout"] for row in tokens}) > 1:
        notes.append("Rows of one token-... method are one trained student, read out through one head or both.")
    if any(row["method"] in ("class-only", "distillation-only") for row in rows):
        notes.append(
            "class-only and distillation-only are students of their own, with that one token (the seed's reading)."
        )
    notes += [f"{STATUS_MARK} {row['row']}: {row['status']}." for row in rows if row["status"] != "ok"]
    notes += [f"teacher: {teacher['verdict']}." for teacher in teachers_of(results) if teacher.get("weak")]
    return notes + list(results.get("notes", [])) + _published_notes(results)


def _published_notes(results: dict[str, Any]) -> list[str]:
    notes, tables = [], {entry["table"] for entry in results.get("published", [])}
    if "seed" in tables:
        notes.append(
            "seed, as published: not measured here; DeiT-Ti on CIFAR-10 for 20 epochs, taught by an untrained head; "
            "its 'no', 'usual' and 'hard' rows used mean pooling, its CNN is a ResNet-18."
        )
    if "paper" in tables:
        notes.append(
            "paper: not measured here; ImageNet for 300 epochs (arXiv 2012.12877), not comparable with our column."
        )
    return notes


def _published_text(entry: dict[str, Any]) -> str:
    source = "seed, as published" if entry["table"] == "seed" else f"paper ({entry['data']}, {entry['model']})"
    return f"{source}: {entry['row']}, teacher {entry['teacher'] or 'none'}: {_published_figure(entry)} %"


def _published_figure(entry: dict[str, Any]) -> str:
    return f"{100 * entry['top1']:.{2 if entry['table'] == 'seed' else 1}f}"  # the digits that were printed


def _on_one_head(row: dict[str, Any]) -> bool:
    return row["method"].removeprefix("mean-pool-") in ("soft", "hard") and row["labels"]


def points(value: Number | None, images: int) -> str:
    """Return a difference of fractions in points, with a sign."""
    if value is None:
        return NOTHING
    return f"{100 * value:+.{2 if images >= 1000 else 1}f}".replace("-", "−")


def p_value(p: Number | None) -> str:
    """Return a p value as a table shows it."""
    if p is None:
        return NOTHING
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _plain(value: Number | None, form: str) -> str:
    return NOTHING if value is None else form.format(value)


def _mean(values: list[Number | None] | None) -> float | None:
    finished = [value for value in values or [] if value is not None]
    return sum(finished) / len(finished) if finished else None


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
