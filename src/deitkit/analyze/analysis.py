"""`deitkit analyze`: the students and teacher of a finished run on the test images, beyond accuracy.

Writes ``analysis.json`` and pictures into the run folder; ``report`` draws them.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from deitkit.analyze.agreement import disagreement
from deitkit.analyze.collect import has_both_tokens, predict_with_similarity
from deitkit.analyze.pictures import Example, draw_attention
from deitkit.analyze.row_statistics import RowStatistics
from deitkit.analyze.tokens import attention_maps, learned_similarity
from deitkit.comparison.finished_run import load_as_trained, students_of, teachers_of
from deitkit.comparison.images import as_begun
from deitkit.data.dataset import Dataset, load_labelled
from deitkit.errors import CheckpointError, DataError, Interrupted, RecipeError
from deitkit.evaluation.readouts import readout_scores
from deitkit.evaluation.statistics import mean_of_finished
from deitkit.models.classifier import Classifier
from deitkit.models.vit import DeiT
from deitkit.recipe.load import load_recipe
from deitkit.report.write import write_report
from deitkit.run.analysis import FORMAT, Analysis, AttentionSheet, Disagreement, TokenSimilarity, write_analysis
from deitkit.run.observer import Watcher
from deitkit.run.provenance import envelope
from deitkit.run.reported import default_readout, reported_rows
from deitkit.run.results import Results, read_results, require_single
from deitkit.system.device import Precision
from deitkit.system.seeding import derived_generator
from deitkit.teachers.frozen import mean_teacher_logits

TRUTH, TEACHER = "truth", "teacher"
PAPER_READOUTS = ("class", "distillation", "joint")  # of Table 4


def analyze_run(folder: Path, *, images: int = 8, seed: int | None = None, watcher: Watcher) -> Analysis:
    """Analyze a finished run, write the analysis into its folder, and return it.

    Args:
        folder: A run folder with ``results.json``.
        images: How many test images the attention maps are drawn for.
        seed: Of the students; all seeds of the run by default.
        watcher: Receives progress, and may request a stop.

    Raises:
        CheckpointError: The run is not finished, or its models cannot be read.
        DataError: The data are not those that the run was tested on.
        RecipeError: The run does not have the seed.
        Interrupted: The watcher requested a stop; nothing was written.
    """
    results = read_results(folder)
    require_single(results, folder, "analyze")
    if seed is not None and seed not in results.seeds:
        known = ", ".join(map(str, results.seeds))
        raise RecipeError(f"--seed {seed} is not a seed of {folder}: choose from {known}")
    recipe = load_recipe(str(folder / "recipe.yaml"))
    precision = Precision.here(recipe)
    dataset = load_labelled(as_begun(recipe.data, folder), watcher.reading)
    _require_same_data(dataset, results)
    statistics = RunStatistics(dataset, results)
    load = partial(load_as_trained, speed=recipe.speed, device=precision.device)
    seeds = results.seeds if seed is None else (seed,)
    homes = {number: students_of(folder, results, number) for number in seeds}
    if not any(homes.values()):
        raise CheckpointError(
            f"{folder} contains no student that finished its training, as seed-{seeds[0]}/METHOD: train one"
        )
    teachers = [] if results.teacher is None else teachers_of(folder, recipe, dataset, precision, watcher).classifiers
    last = {row.folder_name for row in results.rows if row.weights == "last"}
    shown: dict[str, tuple[int, Classifier]] = {}  # each student of the first seed that has it
    for number in seeds:
        students = {name: load(path) for name, path in homes[number].items()}
        statistics.add_seed(number, students, teachers, precision, watcher)
        if images:
            shown |= {name: (number, student) for name, student in students.items() if name in last - shown.keys()}
    chosen = torch.randperm(len(dataset.test), generator=derived_generator(0, "analysis"))[:images]
    analysis = statistics.summary(draw_students(shown, dataset, chosen, folder / "analysis") if shown else ())
    write_analysis(analysis, folder)
    write_report(folder)
    return analysis


def draw_students(
    students: Mapping[str, tuple[int, Classifier]], dataset: Dataset, chosen: Int64[Tensor, " images"], folder: Path
) -> list[AttentionSheet]:
    """Draw a contact sheet of each student with tokens, which is given with its seed."""
    drawn = []
    pixels, names = dataset.test.pixels(chosen).float() / 255, dataset.class_names
    labels = dataset.test.labels[chosen].tolist()
    for name, (seed, student) in students.items():
        if not isinstance(student.model, DeiT) or not student.model.config["tokens"]:
            continue
        examples = []
        for image, label in zip(pixels, labels, strict=True):
            view = image[None].to(student.mean.device)
            examples.append(Example(image, names[label], names[decide(student, view)], attention_maps(student, view)))
        path = folder / f"attention-{name}.png"
        draw_attention(examples, path)
        drawn.append(AttentionSheet(student=name, seed=seed, file=path.name, images=tuple(chosen.tolist())))
    return drawn


@torch.inference_mode()
def decide(student: Classifier, view: Float[Tensor, "1 channels height width"]) -> int:
    """Return the class that a student predicts for an image, by its default readout."""
    scores = readout_scores(student(view))
    return int(scores[default_readout(list(scores))].argmax())


class RunStatistics:
    """Statistics of the teacher and of all rows of a run, accumulated seed by seed.

    Args:
        dataset: Its test images are predicted.
        results: Of the run.
    """

    def __init__(self, dataset: Dataset, results: Results) -> None:
        self.dataset, self.results = dataset, results
        self.labels = dataset.test.labels
        self.teacher = RowStatistics(TEACHER)
        self.rows = {row.row: RowStatistics(row.row) for row in results.rows}
        self.seeds: list[int] = []
        self._teacher_probabilities: Float[Tensor, "n classes"] | None = None  # the same under every seed
        self._cosines: dict[str, list[Float[Tensor, "layers n"]]] = {}
        self._learned: dict[str, list[float]] = {}

    def add_seed(
        self,
        seed: int,
        students: Mapping[str, Classifier],
        teachers: Sequence[Classifier],
        precision: Precision,
        watcher: Watcher,
    ) -> None:
        """Predict the test images with the students of a seed, and with the teachers the first time."""

        def on_progress(done: int) -> None:
            if watcher.should_stop():
                raise Interrupted("stopped; nothing was written")
            watcher.reading(f"seed {seed}: predictions of {len(classifiers)} models", done, len(self.labels))

        new_teachers = teachers if self._teacher_probabilities is None else ()
        names = [f"{TEACHER} {number}" for number in range(len(new_teachers))]
        classifiers = dict(zip(names, new_teachers, strict=True)) | dict(students)
        outputs, cosines = predict_with_similarity(classifiers, self.dataset.test, precision, on_progress)
        self.seeds.append(seed)
        if new_teachers:
            logits = [logits for name in names if (logits := outputs[name].class_logits) is not None]
            self._teacher_probabilities = mean_teacher_logits(logits).softmax(dim=-1)
        if self._teacher_probabilities is not None:
            self.teacher.add(seed, self._teacher_probabilities, self.labels)
        for row in self.results.rows:
            if row.folder_name in students:
                probabilities = readout_scores(outputs[row.folder_name])[row.readout].softmax(dim=-1)
                self.rows[row.row].add(seed, probabilities, self.labels, self._teacher_probabilities)
        for name, classifier in students.items():
            if has_both_tokens(classifier):
                self._cosines.setdefault(name, []).append(cosines[name])
                self._learned.setdefault(name, []).append(learned_similarity(classifier))

    def summary(self, pictures: Sequence[AttentionSheet]) -> Analysis:
        """Return the analysis, with the pictures that were drawn."""
        predicted = [row for row in (self.teacher, *self.rows.values()) if row.decisions]
        by_class = [TEACHER, self.results.winner]
        by_class += [row.row for row in reported_rows(self.results.rows) if row.weights == "last"]
        return Analysis(
            **envelope(FORMAT),
            seeds=tuple(self.seeds),
            n=len(self.labels),
            notes=tuple(self._notes()),
            left_out=tuple(name for name, row in self.rows.items() if not row.decisions),
            disagreement=self._disagreement(),
            rows=tuple(row.summary() for row in predicted),
            classes=tuple(
                row.class_summary(self.labels, self.dataset.classes) for row in predicted if row.name in by_class
            ),
            tokens=tuple(self._similarity(name, values) for name, values in self._cosines.items()),
            attention=tuple(pictures),
        )

    def _disagreement(self) -> Disagreement:
        decisions = {TRUTH: dict.fromkeys(self.seeds, self.labels)}
        shown = [self.rows[row.row] for row in self.results.rows if row.readout in PAPER_READOUTS]
        decisions |= {row.name: row.decisions for row in (self.teacher, *shown) if row.decisions}
        shares = tuple(tuple(row) for row in disagreement(decisions))
        return Disagreement(rows=tuple(decisions), shares=shares)

    def _similarity(self, name: str, values: Sequence[Float[Tensor, "layers n"]]) -> TokenSimilarity:
        cosines = torch.cat(list(values), dim=1).double()
        return TokenSimilarity(
            student=name,
            learned=mean_of_finished(self._learned[name]),
            cosine=tuple(cosines.mean(dim=1).tolist()),
            deviation=tuple(cosines.std(dim=1).tolist()),
        )

    def _notes(self) -> Iterator[str]:
        if self.dataset.fingerprint != self.results.dataset.fingerprint:
            yield "The data have another fingerprint than the run's: files changed since, or are read another way."
        for name, row in self.rows.items():
            missing = [seed for seed in self.seeds if seed not in row.decisions]
            if missing:
                where = f" of seed {', '.join(map(str, missing))}" if row.decisions else ""
                yield f"{name}{where} is left out: it stopped, or the run folder does not contain its model."


def _require_same_data(dataset: Dataset, results: Results) -> None:
    """Raise DataError unless there are as many test images, of the same classes, as the run was tested on."""
    described = results.dataset
    if len(dataset.test) != described.test or tuple(dataset.class_names) != described.class_names:
        raise DataError(
            f"data.name={dataset.name} has {len(dataset.test)} test images of {dataset.classes} classes, but the run "
            f"was tested on {described.test} of {described.classes}: restore its data"
        )
