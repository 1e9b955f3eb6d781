"""Run by torchrun in several processes: trains cohorts alone and together, and prints how they differ, as JSON."""

import json
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch

from conftest import CPU_FP32, striped_dataset
from deitkit.data.batches import Batches
from deitkit.distillation.methods import METHODS
from deitkit.evaluation.predict import predict_all
from deitkit.models.classifier import Classifier
from deitkit.models.vit import DeiT, Output
from deitkit.recipe.schema import AugmentRecipe, StudentTrainRecipe
from deitkit.recipe.speed import SpeedRecipe
from deitkit.system.ranks import ALONE, Ranks, join_ranks, leave_ranks
from deitkit.training.cohort import Cohort
from deitkit.training.student import Student
from training.test_cohort import Teacher

STEPS = 20
METHODS_TOGETHER = ["none", "soft", "token-hard", "dkd", "dist", "token-dist"]
DATASET = striped_dataset(per_class=64, image_px=16)
STRONG = {"randaugment": "2,9", "erase": 0.5, "erase_mode": "pixel", "mixup": 0.8, "cutmix": 1.0}


def build(ranks: Ranks, names: list[str], train: StudentTrainRecipe, augment: AugmentRecipe, unlabelled: int) -> Cohort:
    students = []
    for name in names:
        torch.manual_seed(0)
        model = DeiT(
            image_px=16, patch_px=4, channels=3, classes=3, width=32, depth=2, heads=2, tokens=METHODS[name].tokens
        )
        classifier = Classifier(model, mean=DATASET.mean, std=DATASET.std)
        student = Student(
            name, METHODS[name], classifier, train,
            precision=CPU_FP32, batch_size=train.batch_size, ema_decay=train.ema_decay,
        )  # fmt: skip
        students.append(student)
    dataset = replace(DATASET, unlabelled=DATASET.validation) if unlabelled else DATASET
    return Cohort(
        students,
        teacher=Teacher(),
        dataset=dataset,
        augment=augment,
        train=train,
        speed=SpeedRecipe(),
        precision=CPU_FP32,
        seed=3,
        ranks=ranks,
        unlabelled_in_step=unlabelled,
    )


def steps(cohort: Cohort) -> None:
    for student in cohort.students:
        student.classifier.train()
    for step in count():
        epoch, cohort.step = divmod(step, cohort.batches.steps_per_epoch)
        if epoch > cohort.epoch or step == 0:
            cohort.epoch, batches = epoch, cohort.batches.epoch(epoch)
        if step == STEPS:
            return
        cohort.next_step(batches)


@torch.no_grad()
def difference(one: Cohort, other: Cohort) -> dict[str, float]:
    """Return the largest difference of a weight, of an averaged weight, or of the sum of losses, of each student."""
    found = {}
    for first, second in zip(one.students, other.students, strict=True):
        assert first.average is not None
        assert second.average is not None
        pairs = [
            *zip(first.classifier.parameters(), second.classifier.parameters(), strict=True),
            *zip(first.average.classifier.parameters(), second.average.classifier.parameters(), strict=True),
            *((first.term_sums[name], second.term_sums[name]) for name in first.term_sums),
        ]
        found[first.name] = max(float((a - b).abs().max()) for a, b in pairs)
    return found


def views_equal(ranks: Ranks, batch_size: int, augment: AugmentRecipe) -> bool:
    """Return whether the views and targets of all processes, put together, are those of one to the bit."""
    train = StudentTrainRecipe(batch_size=batch_size)
    alone, together = (build(each, ["none"], train, augment, 0) for each in (ALONE, ranks))
    equal = []
    for step in range(5):
        whole = alone.make_view(*alone.batches.batch(0, step), step)
        parts = together.make_view(*together.batches.batch(0, step), step)
        places = ranks.places(batch_size)
        equal += [torch.equal(part, all_of_it[places]) for part, all_of_it in zip(parts, whole, strict=True)]
    return not ranks.any(not all(equal))


def names_of_threads() -> list[str]:
    return [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]


def heads(output: Output) -> list[torch.Tensor]:
    assert output.class_logits is not None
    assert output.distillation_logits is not None
    return [output.class_logits, output.distillation_logits]


def main() -> None:
    torch.set_num_threads(1)
    ranks = join_ranks()
    results: dict[str, object] = {}
    for batch_size, optimizer, rate, unlabelled in (
        (32, "adamw", 1e-3, 0),
        (33, "sgd", 1e-2, 9),
        (33, "lamb", 1e-3, 0),
    ):
        train = StudentTrainRecipe(
            batch_size=batch_size, optimizer=optimizer, learning_rate=rate, clip_norm=1.0, ema_decay=0.9,
            warmup_epochs=0, epochs=9,
        )  # fmt: skip
        strong = AugmentRecipe(**STRONG)
        alone, together = (build(each, METHODS_TOGETHER, train, strong, unlabelled) for each in (ALONE, ranks))
        steps(alone)
        steps(together)
        results[f"{optimizer} {batch_size} {unlabelled}"] = difference(alone, together)
    crops = AugmentRecipe(crop="random-resized", scale_min=0.2, colour_jitter=0.3, erase=0.3)
    for name, augment in (("strong", AugmentRecipe(**STRONG)), ("crops", crops)):
        for batch_size in (32, 33):
            results[f"views {name} {batch_size}"] = views_equal(ranks, batch_size, augment)
    for size in (60, 59, 1):  # of which each process has one image less or more, or all of them
        student = build(ALONE, ["token-hard"], StudentTrainRecipe(), AugmentRecipe(), 0).students[0]
        images = DATASET.test[slice(size)]
        (alone,), (shared,) = (
            predict_all([student.classifier], images, CPU_FP32, ranks=each) for each in (ALONE, ranks)
        )
        equal = [torch.allclose(one, other, atol=1e-5) for one, other in zip(heads(alone), heads(shared), strict=True)]
        results[f"predictions {size}"] = not ranks.any(not all(equal))
    everything = Batches(DATASET.train, 33, 0, CPU_FP32.device).batch(0, 0)[1]
    gathered = ranks.gather(everything[ranks.places(33)], [len(ranks.places(33, rank)) for rank in range(ranks.count)])
    results["labels"] = bool(torch.equal(gathered.sort().values, everything.sort().values))
    speaks = ranks.rank == 0
    leave_ranks()
    results["no thread of the group is left"] = "gloo" not in "".join(names_of_threads())
    if speaks:
        sys.stdout.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
