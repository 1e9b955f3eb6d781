"""`deitkit verify`: a finished run's saved students, asked once more; does its table hold?

Each row's accuracy is measured anew and compared with what ``results.json`` says. Nothing is written.
"""

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

# Of another processor or version of torch: this many images in a thousand may lie so close to a boundary between two
# classes that rounding decides. On the machine of the run a row holds exactly or not at all.
ELSEWHERE = 0.005


def verify_run(folder: Path, watcher: Any) -> dict[str, Any]:
    """Return what is recorded and what is measured of every row and seed, and whether all of it holds.

    Args:
        folder: Of a finished run; of an ablation every variant is measured.
        watcher: Is told how it goes.

    Raises:
        CheckpointError: The run is not finished, or one of its models cannot be read.
        DataError: The data cannot be loaded.
    """
    from deitkit.data.dataset import load_dataset
    from deitkit.run.results import read_results

    results = read_results(folder)
    load = lru_cache(maxsize=1)(lambda data: load_dataset(data, watcher.reading))
    if not results.get("variants"):
        return _verify(folder, results["rows"], load, watcher)
    found = []
    for name in results["variants"]:
        watcher.say(f"variant {name}")
        rows = [row for row in results["rows"] if row["variant"] == name]
        found.append(_verify(folder / "variants" / name, rows, load, watcher))
    return {
        "holds": all(part["holds"] for part in found),
        "same_data": all(part["same_data"] for part in found),
        "same_teachers": _all_or_none(part["same_teachers"] for part in found),
        "tolerance": max(part["tolerance"] for part in found),
        "rows": [row for part in found for row in part["rows"]],
    }


def _verify(folder: Path, recorded_rows: list[dict[str, Any]], load: Any, watcher: Any) -> dict[str, Any]:
    """Measure the students in a folder, and compare them with rows of its own table or of the ablation's."""
    from deitkit.comparison.finetune import BEFORE
    from deitkit.comparison.finished_run import load_as_trained, student_name, students_of
    from deitkit.evaluation.predict import predict_all
    from deitkit.evaluation.readouts import readout_scores, top_k_accuracy
    from deitkit.recipe.load import load_recipe
    from deitkit.run.results import read_results
    from deitkit.system.device import Precision, choose_device, describe_machine
    from deitkit.teachers.prepare import teacher_folders

    results, recipe = read_results(folder), load_recipe(str(folder / "recipe.yaml"))
    device = choose_device("auto")
    precision = Precision.choose(recipe.train.precision, device)
    dataset = load(recipe.data)
    same_data = dataset.fingerprint == results["dataset"]["fingerprint"]
    homes_of_teachers = teacher_folders(recipe, folder / "teacher")
    same_teachers = _all_or_none(
        _has_sha256(home / "model.safetensors", card["sha256"])
        for card, home in zip(results.get("teachers", []), homes_of_teachers, strict=False)
        if card.get("sha256")
    )
    tolerance = 0.0 if results.get("machine") == describe_machine(device, precision) else ELSEWHERE
    rows = []
    for place, seed in enumerate(results["seeds"]):
        watcher.say(f"seed {seed}: measuring its students on {len(dataset.test)} test images")
        homes = students_of(folder, results, seed)
        students = [load_as_trained(home, recipe.speed, device) for home in homes.values()]
        outputs = dict(zip(homes, predict_all(students, dataset.test, precision), strict=True))
        for row in recorded_rows:
            recorded = row["top1"][place] if place < len(row["top1"]) else None
            output = outputs.get(student_name(row))
            measured = None
            if output is not None:
                measured = top_k_accuracy(readout_scores(output)[row["readout"]], dataset.test.labels)
            # A student that stopped, or that was never the run's, has nothing to hold; one that is gone does not hold.
            holds: bool | None = None
            if recorded is not None and row["method"] != BEFORE:
                holds = measured is not None and abs(recorded - measured) <= tolerance + 1e-9
            rows.append({"row": row["row"], "seed": seed, "recorded": recorded, "measured": measured, "holds": holds})
    return {
        "holds": same_data and same_teachers is not False and all(row["holds"] is not False for row in rows),
        "same_data": same_data,
        "same_teachers": same_teachers,
        "tolerance": tolerance,
        "rows": rows,
    }


def _has_sha256(path: Path, sha256: str) -> bool:
    from deitkit.models.weights.read import file_sha256

    return path.exists() and file_sha256(path) == sha256


def _all_or_none(answers: Iterable[bool | None]) -> bool | None:
    """Return whether all that are known are True; None where nothing is known."""
    known = [answer for answer in answers if answer is not None]
    return all(known) if known else None
