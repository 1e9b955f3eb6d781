"""A comparison, whole: recipe -> teacher -> cohorts over seeds -> test set, once -> results.json -> report.

Each stage leaves its result in the run folder, so that a run that was stopped goes on where it was.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deitkit import __version__
from deitkit.answers import Answers
from deitkit.checkpoint import drop_state, load_tree, save_classifier, save_tree
from deitkit.code import code_sha256
from deitkit.cohort import Cohort
from deitkit.data.batches import Batches
from deitkit.data.preview import draw_views
from deitkit.data.sources import Dataset, load_dataset
from deitkit.device import Precision, choose_device, describe_machine
from deitkit.errors import RecipeError
from deitkit.evaluate import predict_all, readout_scores, top_k_accuracy
from deitkit.files import write_text
from deitkit.finetune import Before, ask_checkpoint, beside_checkpoint
from deitkit.methods import METHODS, find_method
from deitkit.models.classifier import Classifier
from deitkit.models.exchange import load_initial, weights_file
from deitkit.models.vit import create_student
from deitkit.models.weights import file_sha256
from deitkit.models.zoo import create_classifier
from deitkit.optim import peak_learning_rate
from deitkit.recipe import Recipe
from deitkit.report import write_report
from deitkit.rows import summarise
from deitkit.runs import Watcher, begin_run, check_run, train_to_end
from deitkit.seeding import derived_seed, seeded
from deitkit.speed import accelerate
from deitkit.student import Student
from deitkit.teacher import TeacherCard
from deitkit.teachers import Teachers, common_card, mean_answer, prepare_teachers

BASELINE = "cnn-baseline"


def compare(
    recipe: Recipe, folder: Path, *, watcher: Watcher, resume: bool = False, dataset: Dataset | None = None
) -> dict[str, Any]:
    """Run a comparison into a folder and return its ``results.json``.

    Args:
        recipe: What to compare.
        folder: New or empty; with ``resume`` one that this recipe has begun.
        watcher: Is told how it goes, and asked whether to stop.
        resume: Go on with a run that was stopped; one that ended is only reported again.
        dataset: What ``recipe.data`` names, if it is loaded already.

    Raises:
        Interrupted: The watcher asked to stop; the run can be resumed.
    """
    device = choose_device(recipe.device)
    precision = Precision.choose(recipe.train.precision, device)
    for name in recipe.methods:
        find_method(name)
    check_run(folder, recipe, resume)
    watcher.say(f"device {device}, precision {precision.name}")
    if dataset is None:
        dataset = load_dataset(recipe.data, watcher.reading)
    watcher.say(
        f"data {dataset.name}: {len(dataset.train)} training, {len(dataset.validation)} validation, "
        f"{len(dataset.test)} test images, {dataset.classes} classes"
    )
    if dataset.duplicates.count:
        watcher.say(dataset.duplicates.told())
    if recipe.train.learning_rate_per is not None:
        watcher.say(
            f"learning rate {peak_learning_rate(recipe.train, recipe.train):g}: {recipe.train.learning_rate:g} for "
            f"{recipe.train.learning_rate_per} images, {recipe.train.batch_size} in a step"
        )
    start = rehearse(recipe, dataset, precision)
    for line in start:
        watcher.say(line)
    before = ask_checkpoint(recipe, dataset, precision, watcher)
    begin_run(folder, recipe)
    machine = describe_machine(device, precision)
    environment = machine | {"deitkit": __version__, "code": code_sha256()}
    write_text(folder / "environment.json", json.dumps(environment, indent=2) + "\n")
    draw_views(dataset, recipe.augment, recipe.train.label_smoothing, folder / "views.png")

    teachers: Teachers | None = None
    cards: list[TeacherCard] = []
    if needs_teacher(recipe):
        teachers, cards = prepare_teachers(
            recipe, dataset, folder=folder / "teacher", precision=precision, watcher=watcher
        )
    for seed in recipe.seeds:
        if not (folder / f"seed-{seed}" / "predictions.safetensors").exists():
            _run_seed(recipe, dataset, teachers, seed, folder=folder, precision=precision, watcher=watcher)
    results = _results(recipe, dataset, teachers, cards, before, folder=folder, precision=precision)
    results["machine"] = machine
    results["notes"] += [f"{line[0].upper()}{line[1:]}." for line in start]
    _hand_over(results, folder)
    write_text(folder / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    write_report(folder)
    return results


def needs_teacher(recipe: Recipe) -> bool:
    """Return whether any method of a recipe learns from a teacher."""
    return any(find_method(name).teacher_signal for name in recipe.methods)


def rehearse(recipe: Recipe, dataset: Dataset, precision: Precision) -> list[str]:
    """Build once and throw away: what cannot be built is a mistake to hear of before the teacher trains.

    Returns:
        What the students start from, line by line, where that is a checkpoint.
    """
    Batches(dataset.train, recipe.train.batch_size, 0, precision.device)
    start: list[str] = []
    build_students(recipe, dataset, recipe.seeds[0], precision, start.append)
    return start


def build_students(
    recipe: Recipe, dataset: Dataset, seed: int, precision: Precision, say: Callable[[str], None] = lambda line: None
) -> list[Student]:
    """Build the students of one seed, and the CNN baseline where the recipe has one, all from the same start.

    ``say`` is told what the students start from where that is a checkpoint, and how it was made to fit them.
    """
    image_px = (dataset.image_px[0], dataset.image_px[1])
    students = []
    changes: dict[str, list[str]] = {}
    for name in recipe.methods:
        model = create_student(
            recipe.model,
            image_px=image_px,
            channels=dataset.channels,
            classes=dataset.classes,
            tokens=METHODS[name].tokens,
            seed=derived_seed(seed, "student"),
        )
        if recipe.model.checkpoint is not None:
            lines = load_initial(
                model,
                recipe.model.checkpoint,
                class_names=dataset.class_names,
                mean=dataset.mean,
                std=dataset.std,
            )
            for line in lines:
                changes.setdefault(line, []).append(name)
        classifier = accelerate(Classifier(model, mean=dataset.mean, std=dataset.std), recipe.speed, precision.device)
        students.append(Student(name, METHODS[name], classifier, recipe.train, recipe.train.ema_decay))
    if recipe.model.checkpoint is not None:
        say(f"students start from {_initial(recipe)}")
    for line, names in changes.items():
        say(line if len(names) == len(recipe.methods) else f"{', '.join(names)}: {line}")
    if recipe.baseline is not None:
        students.append(_build_baseline(recipe, dataset, seed, precision))
    return students


def _initial(recipe: Recipe) -> str | None:
    """Name the weights that students start from, as a teacher's are named."""
    if recipe.model.checkpoint is None:
        return None
    return f"{recipe.model.checkpoint.name} (sha256 {file_sha256(weights_file(recipe.model.checkpoint))[:8]})"


def build_answers(recipe: Recipe, dataset: Dataset, teachers: Teachers, seed: int, precision: Precision) -> Answers:
    """Open what the teachers said, or will say, to the views of one seed."""
    return Answers(
        teachers.classifiers,
        fingerprint=dataset.fingerprint,
        augment=recipe.augment,
        batch_size=recipe.train.batch_size,
        repeats=recipe.train.repeats,
        steps=len(dataset.train) // recipe.train.batch_size,
        classes=dataset.classes,
        seed=seed,
        precision=precision,
    )


def _baseline_name(recipe: Recipe) -> str:
    assert recipe.baseline is not None
    return recipe.teacher.name if recipe.baseline.name == "teacher" else recipe.baseline.name


def _build_baseline(recipe: Recipe, dataset: Dataset, seed: int, precision: Precision) -> Student:
    assert recipe.baseline is not None
    if Path(_baseline_name(recipe)).exists():
        raise RecipeError(
            f"baseline.name={recipe.baseline.name} is a path: name an architecture, such as cifar/resnet56"
        )
    with seeded(seed, BASELINE):
        built = create_classifier(_baseline_name(recipe), classes=dataset.classes, channels=dataset.channels)
    classifier = accelerate(Classifier(built.model, mean=dataset.mean, std=dataset.std), recipe.speed, precision.device)
    return Student(BASELINE, METHODS["none"], classifier, recipe.baseline, recipe.train.ema_decay)


def _run_seed(
    recipe: Recipe,
    dataset: Dataset,
    teachers: Teachers | None,
    seed: int,
    *,
    folder: Path,
    precision: Precision,
    watcher: Watcher,
) -> None:
    """Train one cohort to its end, save its students, and ask them about the test images, once."""
    students = build_students(recipe, dataset, seed, precision)
    answers = None
    if teachers is not None and recipe.teacher.cache:
        answers = build_answers(recipe, dataset, teachers, seed, precision)
    cohort = Cohort(
        students,
        teacher=teachers,
        dataset=dataset,
        augment=recipe.augment,
        train=recipe.train,
        distillation=recipe.distillation,
        speed=recipe.speed,
        precision=precision,
        seed=seed,
        answers=answers,
    )
    home = folder / f"seed-{seed}"
    train_to_end(
        cohort,
        title=f"seed {seed}",
        checkpoint=home / "checkpoint.safetensors",
        metrics=folder / "metrics.jsonl",
        watcher=watcher,
        log_folder=folder / "tensorboard" / f"seed-{seed}",
    )
    weights = {student.name: _weights(student) for student in students}
    scores: dict[str, dict[str, dict[str, Any]]] = {
        name: {which: {} for which in classifiers} for name, classifiers in weights.items()
    }
    for split in ("validation", "test"):
        everyone = [(name, which, classifier) for name, some in weights.items() for which, classifier in some.items()]
        outputs = predict_all([classifier for _, _, classifier in everyone], getattr(dataset, split), precision)
        for (name, which, _), output in zip(everyone, outputs, strict=True):
            scores[name][which][split] = readout_scores(output)
    predictions: dict[str, Any] = {}
    for student in students:
        card = _student_card(recipe, dataset, student, seed)
        save_classifier(home / student.name, student.classifier, card)
        if "ema" in weights[student.name]:
            save_classifier(home / f"{student.name}+ema", weights[student.name]["ema"], card)
        predictions[student.name] = {
            "status": student.stopped,
            "parameters": sum(parameter.numel() for parameter in student.classifier.model.parameters()),
            "scores": scores[student.name],
        }
    save_tree(home / "predictions.safetensors", predictions)
    drop_state(home / "checkpoint.safetensors")


def _weights(student: Student) -> dict[str, Classifier]:
    """Return the last weights, and their average if it was kept."""
    average = {"ema": student.average.classifier} if student.average is not None else {}
    return {"last": student.classifier, **average}


def _student_card(recipe: Recipe, dataset: Dataset, student: Student, seed: int) -> dict[str, Any]:
    card = {
        "method": student.name,
        "seed": seed,
        "recipe": recipe.name,
        "dataset": dataset.name,
        "channels": dataset.channels,
        "class_names": list(dataset.class_names),
        "input_px": list(dataset.image_px),
        "eval_crop": recipe.data.eval_crop,
        "split": {"split_seed": recipe.data.split_seed, "test_fraction": recipe.data.test_fraction},
    }
    if student.name == BASELINE:
        card["architecture"] = _baseline_name(recipe)
    else:
        card["initial"] = _initial(recipe)
    return card


def _results(
    recipe: Recipe,
    dataset: Dataset,
    teachers: Teachers | None,
    cards: list[TeacherCard],
    before: Before | None,
    *,
    folder: Path,
    precision: Precision,
) -> dict[str, Any]:
    """Gather the seeds' predictions into rows, in the format of docs/design.md."""
    answers, teacher_entry, each = None, None, []
    if teachers is not None:
        said = teachers.answers(dataset.test, precision)
        each = [
            {**card.__dict__, "test_top1": top_k_accuracy(answer, dataset.test.labels)}
            for card, answer in zip(cards, said, strict=True)
        ]
        answers = mean_answer(said)
        teacher_entry = {**common_card(teachers, cards, dataset, precision).__dict__}
    predictions = {seed: load_tree(folder / f"seed-{seed}" / "predictions.safetensors") for seed in recipe.seeds}
    summary = summarise(recipe, dataset, predictions, answers, folder / "metrics.jsonl")
    if before is not None:
        summary = beside_checkpoint(summary, before, dataset, predictions, answers)
    if teacher_entry is not None:
        teacher_entry["test_top1"] = summary.pop("teacher_test_top1")
    return {
        "format": 1,
        "deitkit": __version__,
        "code": code_sha256(),
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "recipe": recipe.model_dump(mode="json"),
        "dataset": {
            "name": dataset.name,
            "train": len(dataset.train),
            "validation": len(dataset.validation),
            "test": len(dataset.test),
            "classes": dataset.classes,
            "class_names": list(dataset.class_names),
            "image_px": list(dataset.image_px),
            "channels": dataset.channels,
            "skipped": len(dataset.skipped),
            "skipped_files": list(dataset.skipped),
            "fingerprint": dataset.fingerprint,
            "duplicates": asdict(dataset.duplicates),
        },
        "teacher": teacher_entry,
        "teachers": each,
        "initial": _initial(recipe),
        "seeds": list(recipe.seeds),
        **summary,
    }


def _hand_over(results: dict[str, Any], folder: Path) -> None:
    """Copy the winner's model to ``winner/``, with the readout that it won by."""
    if results["winner"] is None:
        return
    row = next(row for row in results["rows"] if row["row"] == results["winner"])
    seed = max(zip(row["validation_top1"], results["seeds"], strict=True), key=lambda pair: pair[0] or 0.0)[1]
    source = folder / f"seed-{seed}" / (row["method"] + ("+ema" if row["weights"] == "ema" else ""))
    shutil.copytree(source, folder / "winner", dirs_exist_ok=True)
    card = json.loads((folder / "winner" / "model.json").read_text(encoding="utf-8"))
    card |= {"readout": row["readout"], "test_top1": row["top1"][results["seeds"].index(seed)]}
    write_text(folder / "winner" / "model.json", json.dumps(card, indent=2, ensure_ascii=False) + "\n")
