"""From predictions to rows: a comparison's accuracies, differences, significance, winner and verdict.

Pure functions of what the cohorts left behind; nothing here trains or draws.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from deitkit.data.dataset import Dataset
from deitkit.distillation.methods import METHODS
from deitkit.evaluation.readouts import default_readout, top_k_accuracy, top_k_hits
from deitkit.evaluation.statistics import Difference, mean_interval, paired_difference, wilson_interval
from deitkit.recipe.schema import Recipe
from deitkit.report.published import published_rows
from deitkit.run.metrics import read_metrics

# What `none` is called where only the seed's reading of it was trained.
REFERENCES = ("none", "mean-pool-none", "class-only")

TITLES = {
    ("token-hard", "class"): "DeiT distilled: class embedding",
    ("token-hard", "distillation"): "DeiT distilled: distil. embedding",
    ("token-hard", "joint"): "DeiT distilled: class + distillation",
    ("token-hard", "joint-logits"): "DeiT distilled: class + distillation, mean of logits",
    ("token-soft", "class"): "DeiT distilled (soft): class embedding",
    ("token-soft", "distillation"): "DeiT distilled (soft): distil. embedding",
    ("token-soft", "joint"): "DeiT distilled (soft): class + distillation",
    ("token-soft", "joint-logits"): "DeiT distilled (soft): class + distillation, mean of logits",
    ("none", "class"): "no distillation",
    ("soft", "class"): "usual distillation",
    ("hard", "class"): "hard distillation",
    ("class-only", "class"): "only a class token",
    ("distillation-only", "distillation"): "only a distillation token",
    ("mean-pool-none", "class"): "no distillation, mean pooling",
    ("mean-pool-soft", "class"): "usual distillation, mean pooling",
    ("mean-pool-hard", "class"): "hard distillation, mean pooling",
    ("dkd", "class"): "decoupled distillation (DKD)",
    ("dist", "class"): "distillation of relations (DIST)",
    ("standardised", "class"): "distillation of standardised logits",
    ("consistent", "class"): "consistent distillation, without labels",
}


def summarise(
    recipe: Recipe,
    dataset: Dataset,
    predictions: dict[int, Any],
    answers: Float[Tensor, "n classes"] | None,
    metrics: Path,
) -> dict[str, Any]:
    """Return ``rows``, ``winner``, ``verdict``, ``published`` and ``notes`` of results.json.

    Args:
        recipe: Of the comparison.
        dataset: Its test and validation labels.
        predictions: For each seed: student -> status, parameters and scores by weights, split and readout.
        answers: The teacher's logits on the test images.
        metrics: The run's metrics.jsonl, for speed.
    """
    speed = _speed(metrics)
    rows = [
        _row(name, weights, readout, recipe, dataset, predictions, answers) | speed.get(name, _NO_SPEED)
        for name, weights, readout in _row_keys(predictions[recipe.seeds[0]])
    ]
    winner = _winner(rows)
    summary: dict[str, Any] = {
        "rows": rows,
        "winner": winner["row"] if winner else None,
        "verdict": _verdict(winner, rows, len(recipe.seeds)),
        "published": published_rows(recipe.published),
        "notes": _notes(dataset),
    }
    if answers is not None:
        summary["teacher_test_top1"] = top_k_accuracy(answers, dataset.test.labels)
    return summary


def _row_keys(students: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    for name, student in students.items():
        for weights, splits in student["scores"].items():
            for readout in splits["test"]:
                yield name, weights, readout


def _row(
    name: str,
    weights: str,
    readout: str,
    recipe: Recipe,
    dataset: Dataset,
    predictions: dict[int, Any],
    answers: Float[Tensor, "n classes"] | None,
) -> dict[str, Any]:
    """Describe one student and readout over all seeds; a stopped seed has no accuracy and leaves the statistics."""
    labels = dataset.test.labels
    finished = [seed for seed in recipe.seeds if predictions[seed][name]["status"] is None]
    scores = {seed: predictions[seed][name]["scores"][weights] for seed in finished}
    hits = row_hits(predictions, name, weights, readout, labels)
    top1 = [hits[seed].double().mean().item() if seed in hits else None for seed in recipe.seeds]
    values = [value for value in top1 if value is not None]
    top5 = None
    if dataset.classes > 5:
        top5 = [
            top_k_accuracy(scores[seed]["test"][readout], labels, 5) if seed in scores else None
            for seed in recipe.seeds
        ]
    agreement = None
    if answers is not None and values:
        decisions = answers.argmax(dim=-1)
        agreement = float(np.mean([top_k_accuracy(scores[seed]["test"][readout], decisions) for seed in finished]))
    stopped = [f"seed {seed} {predictions[seed][name]['status']}" for seed in recipe.seeds if seed not in finished]
    method = METHODS.get(name)
    return {
        "row": f"{name}/{readout}" + ("+ema" if weights == "ema" else ""),
        "label": _label(name, weights, readout, recipe),
        "method": name,
        "readout": readout,
        "weights": weights,
        "labels": method.uses_labels if method else True,
        "teacher": method.teacher_signal if method else None,
        "tokens": method.token_layout if method else "-",
        "top1": top1,
        "top5": top5,
        "n": len(labels),
        "top1_mean": float(np.mean(values)) if values else None,
        "top1_std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "top1_ci95": _interval(values, len(labels)),
        "validation_top1": [
            top_k_accuracy(scores[seed]["validation"][readout], dataset.validation.labels) if seed in scores else None
            for seed in recipe.seeds
        ],
        **_against_none(name, hits, dataset, predictions),
        "teacher_agreement": agreement,
        "parameters": predictions[recipe.seeds[0]][name]["parameters"],
        "status": "; ".join(stopped) or "ok",
    }


def row_hits(
    predictions: dict[int, Any], name: str, weights: str, readout: str, labels: Int64[Tensor, " n"]
) -> dict[int, Bool[Tensor, " n"]]:
    """Return which test images a row gets right, for each seed that did not stop."""
    students = {seed: students[name] for seed, students in predictions.items()}
    return {
        seed: top_k_hits(student["scores"][weights]["test"][readout], labels)
        for seed, student in students.items()
        if student["status"] is None
    }


def _interval(values: list[float], n: int) -> tuple[float, float] | None:
    if not values:
        return None
    return wilson_interval(round(values[0] * n), n) if len(values) == 1 else mean_interval(values)


def _label(name: str, weights: str, readout: str, recipe: Recipe) -> str:
    if name not in METHODS:
        assert recipe.baseline is not None
        architecture = recipe.teacher.name if recipe.baseline.name == "teacher" else recipe.baseline.name
        title = f"CNN baseline ({architecture}), labels alone"
    else:
        title = TITLES.get((name, readout), f"{name}, {readout}")
    return f"{title}, EMA" if weights == "ema" else title


def _against_none(name: str, hits: dict[int, Tensor], dataset: Dataset, predictions: dict[int, Any]) -> dict[str, Any]:
    """Compare a row with the student that learned from labels alone, over the seeds that both finished."""
    empty = {"difference_vs_none": None, "difference_ci95": None, "p_vs_none": None, "p_test": None}
    students = next(iter(predictions.values()))
    reference = next((candidate for candidate in REFERENCES if candidate in students), None)
    if reference is None or name == reference:
        return empty
    other = row_hits(predictions, reference, "last", "class", dataset.test.labels)
    difference = paired_over_seeds(hits, other)
    if difference is None:
        return empty
    return {
        "difference_vs_none": difference.mean,
        "difference_ci95": difference.ci95,
        "p_vs_none": difference.p,
        "p_test": difference.test,
    }


def paired_over_seeds(hits: dict[int, Bool[Tensor, " n"]], other: dict[int, Bool[Tensor, " n"]]) -> Difference | None:
    """Return how far one row lies above another over the seeds that both finished; None where there is no such seed."""
    seeds = [seed for seed in hits if seed in other]
    return paired_difference([hits[seed] for seed in seeds], [other[seed] for seed in seeds]) if seeds else None


_NO_SPEED = {"images_per_second": None, "train_seconds": None}


def _speed(metrics: Path) -> dict[str, dict[str, float]]:
    """Return each student's own images/s and seconds per seed, without the part that all students share."""
    seconds: dict[str, float] = {}
    images: dict[str, float] = {}
    seeds = set()
    for record in read_metrics(metrics.parent):
        name = record["student"]
        seeds.add(record["seed"])
        seconds[name] = seconds.get(name, 0.0) + record["seconds"]
        images[name] = images.get(name, 0.0) + record["seconds"] * record["images_per_second"]
    return {
        name: {"images_per_second": images[name] / seconds[name], "train_seconds": seconds[name] / len(seeds)}
        for name in seconds
    }


def _winner(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the student's row with the best mean validation accuracy; the test set chooses nothing.

    Of a student with two heads only the joint readout of the paper may win; of equals the first.
    """
    candidates = [row for row in reported_rows(rows) if row["method"] in METHODS and row["status"] == "ok"]
    return max(candidates, key=_validation_mean, default=None)


def reported_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows by which students are judged: of a student with two heads the paper's joint readout."""
    readouts: dict[str, list[str]] = {}
    for row in rows:
        readouts.setdefault(row["method"], []).append(row["readout"])
    return [row for row in rows if row["readout"] == default_readout(readouts[row["method"]])]


def _validation_mean(row: dict[str, Any]) -> float:
    return float(np.mean([value for value in row["validation_top1"] if value is not None]))


def _verdict(winner: dict[str, Any] | None, rows: list[dict[str, Any]], seeds: int) -> str:
    """Say in one or two sentences which student wins, by how much, and how sure that is."""
    if winner is None:
        return "No student reached the end of its training."
    over = f"mean of {seeds} seeds" if seeds > 1 else "one seed"
    text = (
        f"{winner['row']} wins on the validation images and scores {100 * winner['top1_mean']:.2f} % on the test images"
    )
    text += f" ({over}, n = {winner['n']})"
    if winner["difference_vs_none"] is not None:
        points = 100 * winner["difference_vs_none"]
        sure = winner["p_vs_none"] < 0.05
        text += f", {points:+.2f} points against labels alone"
        text += f" (p = {winner['p_vs_none']:.2g}, {winner['p_test']}{'' if sure else ': it may be luck'})"
    elif any(row["difference_vs_none"] is not None for row in rows):
        text += ": no teaching beat labels alone there"
    best = max((row for row in rows if row["method"] in METHODS and row["top1_mean"]), key=lambda row: row["top1_mean"])
    if best["top1_mean"] > winner["top1_mean"]:
        text += f". On the test images {best['row']} is higher ({100 * best['top1_mean']:.2f} %), but nothing is chosen"
        text += " there"
    return text + "."


def _notes(dataset: Dataset) -> list[str]:
    """Say what a reader of the table must know of this run beside its figures."""
    notes = []
    if dataset.skipped:
        notes.append(f"{len(dataset.skipped)} files could not be read and were left out, first {dataset.skipped[0]}.")
    if dataset.duplicates.count:
        notes.append(f"{dataset.duplicates.sentence()}.")
    return notes
