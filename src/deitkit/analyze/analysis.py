"""`deitkit analyze`: a finished run's students and teacher, asked once about the test images, beyond accuracy.

From a run folder to ``analysis.json`` and the pictures beside it. What a reader of them sees is drawn by ``report``.
"""

import json
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from deitkit import __version__
from deitkit.analyze.agreement import disagreement, mean
from deitkit.analyze.collect import ask, has_both_tokens
from deitkit.analyze.pictures import Example, draw_attention
from deitkit.analyze.row_statistics import Judge
from deitkit.analyze.tokens import attention_maps, learned_similarity
from deitkit.comparison.finished_run import load_as_trained, student_name, students_of, teachers_of
from deitkit.data.dataset import Dataset, load_dataset
from deitkit.errors import CheckpointError, DataError, Interrupted, RecipeError
from deitkit.evaluation.readouts import default_readout, readout_probabilities, readout_scores
from deitkit.models.classifier import Classifier
from deitkit.models.vit import DeiT
from deitkit.recipe.load import load_recipe
from deitkit.report.analysis import FORMAT
from deitkit.report.write import write_report
from deitkit.run.observer import Watcher
from deitkit.run.provenance import code_sha256
from deitkit.run.results import read_results
from deitkit.system.device import Precision, choose_device
from deitkit.system.files import write_text
from deitkit.system.seeding import derived_generator
from deitkit.teachers.frozen import mean_teacher_logits

TRUTH, TEACHER = "truth", "teacher"
PAPER_READOUTS = ("class", "distillation", "joint")  # of Table 4


def analyze_run(folder: Path, *, images: int = 8, seed: int | None = None, watcher: Watcher) -> dict[str, Any]:
    """Analyze a finished run into its folder, and return what ``analysis.json`` then holds.

    Args:
        folder: A run folder with ``results.json``.
        images: How many test images the attention maps are drawn for.
        seed: Of the students; all seeds of the run by default.
        watcher: Is told how it goes, and asked whether to stop.

    Raises:
        CheckpointError: The run is not finished, or its models cannot be read.
        DataError: The data are not those that the run was tested on.
        RecipeError: A seed that the run does not have.
        Interrupted: The watcher asked to stop; nothing was written.
    """
    results = read_results(folder)
    if results.get("variants"):
        raise CheckpointError(f"{folder} is an ablation: analyze one of its variants, such as {folder}/variants/base")
    if seed is not None and seed not in results["seeds"]:
        raise RecipeError(f"--seed {seed} is no seed of {folder}: choose from {', '.join(map(str, results['seeds']))}")
    recipe = load_recipe(str(folder / "recipe.yaml"))
    device = choose_device("auto")
    precision = Precision.choose(recipe.train.precision, device)
    dataset = load_dataset(recipe.data, watcher.reading)
    _require_same_data(dataset, results)
    hearing = Hearing(dataset, results)
    load = partial(load_as_trained, speed=recipe.speed, device=device)
    seeds = results["seeds"] if seed is None else [seed]
    homes = {number: students_of(folder, results, number) for number in seeds}
    if not any(homes.values()):
        raise CheckpointError(
            f"{folder} holds no student that ended its training, as seed-{seeds[0]}/METHOD: train one"
        )
    teachers = [] if results["teacher"] is None else teachers_of(folder, recipe, dataset, precision, watcher)
    pictures: list[dict[str, Any]] = []
    for number in seeds:
        students = {name: load(path) for name, path in homes[number].items()}
        hearing.hold(number, students, teachers, precision, watcher)
        if not pictures and images:
            chosen = torch.randperm(len(dataset.test), generator=derived_generator(0, "analysis"))[:images]
            last = {student_name(row) for row in results["rows"] if row["weights"] == "last"}
            shown = {name: student for name, student in students.items() if name in last}
            pictures = draw_students(shown, dataset, chosen, folder / "analysis", number)
    analysis = hearing.describe() | {"attention": pictures}
    write_text(folder / "analysis.json", json.dumps(analysis, ensure_ascii=False) + "\n")
    write_report(folder)
    return analysis


def draw_students(
    students: dict[str, Classifier], dataset: Dataset, chosen: Int64[Tensor, " images"], folder: Path, seed: int
) -> list[dict[str, Any]]:
    """Draw a contact sheet of each student that has tokens; returns what analysis.json says of it."""
    drawn = []
    pixels, names = dataset.test.pixels(chosen).float() / 255, dataset.class_names
    labels = dataset.test.labels[chosen].tolist()
    for name, student in students.items():
        if not isinstance(student.model, DeiT) or not student.model.config["tokens"]:
            continue
        examples = []
        for image, label in zip(pixels, labels, strict=True):
            view = image[None].to(student.mean.device)
            decision = decide(student, view)
            examples.append(Example(image, names[label], names[decision], attention_maps(student, view)))
        path = folder / f"attention-{name}.png"
        draw_attention(examples, path)
        drawn.append({"student": name, "seed": seed, "file": path.name, "images": chosen.tolist()})
    return drawn


@torch.inference_mode()
def decide(student: Classifier, view: Float[Tensor, "1 channels height width"]) -> int:
    """Return the class that a student gives an image by its default readout."""
    scores = readout_scores(student(view))
    return int(scores[default_readout(list(scores))].argmax())


class Hearing:
    """Everybody's answers about the test images, seed by seed.

    Args:
        dataset: Its test images are asked about.
        results: ``results.json`` of the run; its rows are the judges, in their order.
    """

    def __init__(self, dataset: Dataset, results: dict[str, Any]) -> None:
        self.dataset, self.results = dataset, results
        self.labels = dataset.test.labels
        self.teacher = Judge(TEACHER)
        self.rows = {row["row"]: Judge(row["row"]) for row in results["rows"]}
        self.seeds: list[int] = []
        self._answer: Float[Tensor, "n classes"] | None = None  # the teacher's probabilities, the same under every seed
        self._cosines: dict[str, list[Float[Tensor, "layers n"]]] = {}
        self._learned: dict[str, list[float]] = {}

    def hold(
        self,
        seed: int,
        students: dict[str, Classifier],
        teachers: list[Classifier],
        precision: Precision,
        watcher: Watcher,
    ) -> None:
        """Ask the students of a seed, and the teachers unless they have answered already."""

        def tell(done: int) -> None:
            if watcher.should_stop():
                raise Interrupted("stopped; nothing was written")
            watcher.reading(f"seed {seed}: asking {len(panel)} models", done, len(self.labels))

        asked = teachers if self._answer is None else []
        names = [f"{TEACHER} {number}" for number in range(len(asked))]
        panel = dict(zip(names, asked, strict=True)) | students
        outputs, cosines = ask(panel, self.dataset.test, precision, tell)
        self.seeds.append(seed)
        if asked:
            logits = [outputs[name].class_logits for name in names]
            self._answer = mean_teacher_logits([answer for answer in logits if answer is not None]).softmax(dim=-1)
        if self._answer is not None:
            self.teacher.hear(seed, self._answer, self.labels)
        for row in self.results["rows"]:
            if student_name(row) in students:
                scores = readout_scores(outputs[student_name(row)])[row["readout"]]
                probabilities = readout_probabilities(row["readout"], scores)
                self.rows[row["row"]].hear(seed, probabilities, self.labels, self._answer)
        for name, values in cosines.items():
            self._cosines.setdefault(name, []).append(values)
        for name, classifier in students.items():
            if has_both_tokens(classifier):
                self._learned.setdefault(name, []).append(learned_similarity(classifier))

    def describe(self) -> dict[str, Any]:
        """Return ``analysis.json`` as docs/design.md has it, without the pictures."""
        heard = [judge for judge in (self.teacher, *self.rows.values()) if judge.decisions]
        return {
            "format": FORMAT,
            "deitkit": __version__,
            "code": code_sha256(),
            "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "seeds": self.seeds,
            "n": len(self.labels),
            "notes": list(self._notes()),
            "disagreement": self._disagreement(),
            "judges": [judge.describe() for judge in heard],
            "classes": [
                judge.describe_classes(self.labels, self.dataset.classes)
                for judge in heard
                if judge is self.teacher or judge.name in self._by_students()
            ],
            "tokens": [self._similarity(name, values) for name, values in self._cosines.items()],
        }

    def _by_students(self) -> list[str]:
        """Return the row that stands for each student: its default readout, of its last weights."""
        rows: dict[str, list[dict[str, Any]]] = {}
        for row in self.results["rows"]:
            if row["weights"] == "last":
                rows.setdefault(row["method"], []).append(row)
        chosen = []
        for of_one in rows.values():
            readout = default_readout([row["readout"] for row in of_one])
            chosen += [row["row"] for row in of_one if row["readout"] == readout]
        return chosen

    def _disagreement(self) -> dict[str, Any]:
        judges = {TRUTH: dict.fromkeys(self.seeds, self.labels)}
        shown = [self.teacher] + [
            self.rows[row["row"]] for row in self.results["rows"] if row["readout"] in PAPER_READOUTS
        ]
        judges |= {judge.name: judge.decisions for judge in shown if judge.decisions}
        return {"judges": list(judges), "shares": disagreement(judges)}

    def _similarity(self, name: str, values: list[Float[Tensor, "layers n"]]) -> dict[str, Any]:
        cosines = torch.cat(values, dim=1).double()
        return {
            "student": name,
            "learned": mean(self._learned[name]),
            "cosine": cosines.mean(dim=1).tolist(),
            "deviation": cosines.std(dim=1).tolist(),
        }

    def _notes(self) -> list[str]:
        notes = []
        if self.dataset.fingerprint != self.results["dataset"]["fingerprint"]:
            notes.append(
                "The data do not have the fingerprint of the run's: files were changed since, or are read another way."
            )
        for name, judge in self.rows.items():
            if not judge.decisions:
                notes.append(f"{name} is left out: it stopped, or the run does not hold its model.")
        return notes


def _require_same_data(dataset: Dataset, results: dict[str, Any]) -> None:
    """Raise DataError unless there are as many test images, of the same classes, as the run was tested on."""
    described = results["dataset"]
    if len(dataset.test) != described["test"] or list(dataset.class_names) != described["class_names"]:
        raise DataError(
            f"data.name={dataset.name} has {len(dataset.test)} test images of {dataset.classes} classes, the run was "
            f"tested on {described['test']} of {described['classes']}: put its data back as they were"
        )
