"""How often the gate refuses a right teacher, and finds a wrong one: a simulation with the gate's own tests.

    python benchmarks/gate.py --draws 1000

A simulated teacher has an accuracy of its own for each class, and up to 7 of 10 mistakes in a class fall on one other
class, as those of real ones do. For each number of images, decisions are drawn and given to the functions that the gate
calls. Printed is the share of draws in which the teacher is refused (right ones) or the fault is found (wrong ones).
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from deitkit.teachers.alternatives import SCREENED, better_order, is_better
from deitkit.teachers.gate import EVIDENCE, Finding, compare_with_chance

SIZES = (12, 24, 50, 100, 200, 500, 1000, 5000)
ALTERNATIVES = 6  # five normalisations and one order of channels
OTHERWISE = 0.2  # share of the images on which an equally good normalisation decides anew


class Simulated:
    """A teacher of ``classes`` classes with this mean accuracy; ``spread`` is that of its classes' accuracies."""

    def __init__(self, classes: int, accuracy: float, generator: torch.Generator, spread: float = 0.1) -> None:
        self.generator, self.classes = generator, classes
        accuracies = accuracy + spread * (2 * torch.rand(classes, generator=generator) - 1)
        self.accuracies = (accuracies - accuracies.mean() + accuracy).clamp(0, 1)
        self.confused_with = torch.arange(classes).roll(1)
        # Of a class's mistakes, but never as often as it is right: another order would then be the better one.
        self.usual = (0.9 * self.accuracies / (1 - self.accuracies).clamp(min=0.01)).clamp(max=0.7)

    def decide(self, labels: Tensor) -> Tensor:
        """Draw a decision for each image: right, the class that is often confused with it, or any other."""
        right = torch.rand(len(labels), generator=self.generator) < self.accuracies[labels]
        usual = torch.rand(len(labels), generator=self.generator) < self.usual[labels]
        anything = (labels + torch.randint(1, self.classes, labels.shape, generator=self.generator)) % self.classes
        return torch.where(right, labels, torch.where(usual, self.confused_with[labels], anything))


def refused(teacher: Simulated, labels: Tensor) -> bool:
    """Return whether a right teacher is refused, with alternatives that are as good as what it uses."""
    decisions = teacher.decide(labels)
    hits = decisions == labels
    chance = labels.bincount().max().item() / len(labels)
    if compare_with_chance(int(hits.sum()), len(labels), chance) is Finding.USELESS:
        return True
    if better_order(decisions, labels, teacher.classes) is not None:
        return True
    sample, sampled = labels[:EVIDENCE], hits[:EVIDENCE]
    for _ in range(ALTERNATIVES):
        anew = torch.rand(len(sample), generator=teacher.generator) < OTHERWISE
        others = torch.where(anew, teacher.decide(sample) == sample, sampled)
        if others[:SCREENED].sum() > sampled[:SCREENED].sum() and is_better(others, sampled):
            return True
    return False


def found(teacher: Simulated, labels: Tensor, moved: int) -> bool:
    """Return whether the gate finds that ``moved`` classes are in another order, and in which."""
    order = torch.arange(teacher.classes)
    order[:moved] = order[:moved].roll(1)  # order[output] is the class that the output means
    decisions = order.argsort()[teacher.decide(labels)]
    guessed = better_order(decisions, labels, teacher.classes)
    return guessed is not None and torch.equal(guessed, order)


def lost(teacher: Simulated, labels: Tensor, cost: float) -> bool:
    """Return whether the gate finds that the used normalisation costs this accuracy."""
    sample = labels[torch.randperm(len(labels), generator=teacher.generator)[:EVIDENCE]]
    right = teacher.decide(sample) == sample
    anew = torch.rand(len(sample), generator=teacher.generator)
    used = torch.where(anew < OTHERWISE, teacher.decide(sample) == sample, right)
    used &= torch.rand(len(sample), generator=teacher.generator) > cost
    return bool(right[:SCREENED].sum() > used[:SCREENED].sum() and is_better(right, used))


def scenarios() -> dict[str, tuple[int, float, Callable[[Simulated, Tensor], bool]]]:
    """Return by title the classes and accuracy of a teacher, and what is asked of it."""
    rows: dict[str, tuple[int, float, Callable[[Simulated, Tensor], bool]]] = {
        f"right: {classes} classes, {100 * accuracy:.0f} %": (classes, accuracy, refused)
        for classes, accuracies in ((2, (0.6, 0.75, 0.95)), (10, (0.3, 0.6, 0.95)), (100, (0.25, 0.7)))
        for accuracy in accuracies
    }
    for accuracy in (0.6, 0.8, 0.95):
        rows[f"2 of 10 classes swapped, {100 * accuracy:.0f} %"] = 10, accuracy, lambda *it: found(*it, 2)
    rows["5 of 10 classes in a ring, 80 %"] = 10, 0.8, lambda *it: found(*it, 5)
    rows["both of 2 classes swapped, 80 %"] = 2, 0.8, lambda *it: found(*it, 2)
    for cost in (0.05, 0.1, 0.2):
        rows[f"a normalisation that costs {100 * cost:.0f} % of the hits, 90 %"] = (
            10,
            0.9,
            lambda *it, c=cost: lost(*it, c),
        )
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Print the share of draws for each scenario and number of images."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    options = parser.parse_args(arguments)
    print("| teacher | " + " | ".join(f"{n} images" for n in options.sizes) + " |")
    print("|---|" + "---:|" * len(options.sizes))
    for title, (classes, accuracy, outcome) in scenarios().items():
        shares = []
        for n in options.sizes:
            generator = torch.Generator().manual_seed(n)
            labels = torch.arange(max(n, classes)) % classes
            labels = labels[torch.randperm(len(labels), generator=generator)][:n]
            count = sum(outcome(Simulated(classes, accuracy, generator), labels) for _ in range(options.draws))
            shares.append(f"{100 * count / options.draws:.1f} %")
        print(f"| {title} | " + " | ".join(shares) + " |", flush=True)


if __name__ == "__main__":
    main()
