"""Where the parts of a run lie in its folder; the whole layout is in docs/design.md."""

from pathlib import Path

REPORT = "report.html"  # written last
BASELINE = "cnn-baseline"  # the CNN baseline's folder among those of the methods, and its name in tables


def seed_folder(folder: Path, seed: int) -> Path:
    """Return the folder of a seed's students."""
    return folder / f"seed-{seed}"


def seed_of(home: Path) -> int:
    """Return the seed whose folder this is."""
    return int(home.name.removeprefix("seed-"))


def teacher_folders(folder: Path, count: int) -> list[Path]:
    """Return the folders of a run's teachers: ``teacher``, ``teacher-2``, ..."""
    return [folder / ("teacher" if number == 1 else f"teacher-{number}") for number in range(1, count + 1)]


def variant_folder(folder: Path, name: str) -> Path:
    """Return the run folder of a variant of an ablation."""
    return folder / "variants" / name


def fold_folder(folder: Path, fold: int) -> Path:
    """Return the run folder of a fold of a cross-validation, counted from 1."""
    return folder / "folds" / str(fold)
