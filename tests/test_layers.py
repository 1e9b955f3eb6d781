"""Imports go one way: from the command line down to the losses. An upward edge fails."""

import ast
from pathlib import Path

import deitkit

# Each may import from the groups after it, and from its own.
LAYERS = (
    {"cli"},
    {"terminal", "bench", "models_command", "analyze", "convert", "verify"},
    {"variants"},
    {"compare", "inference"},
    {"estimate"},
    {"seed_run", "rows", "finetune"},
    {"build"},
    {"teacher", "teachers"},
    {"runs"},
    {"report"},
    {"saved_teacher"},
    {"cohort", "student", "checkpoint"},
    {"answers"},
    {"evaluate", "methods", "data", "optim", "speed", "parts"},
    {"models", "losses", "muon"},
    {"code", "device", "process", "seeding", "files", "cuda_graph"},
    {"recipe_file"},
    {"recipe"},
    {"errors"},
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
SOURCE = Path(deitkit.__file__).parent


def imported_parts(path: Path) -> set[str]:
    """Return the parts of deitkit that a file imports, wherever in it."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        parts |= {name.split(".")[1] for name in names if name.startswith("deitkit.")}
    return parts


def test_every_part_has_its_layer_and_imports_downwards_only() -> None:
    wrong = []
    for path in SOURCE.rglob("*.py"):
        part = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if part in ("__init__", "__main__"):
            continue
        assert part in RANK, f"{path} is in no layer: place it in LAYERS"
        wrong += [f"{part} imports {other}" for other in imported_parts(path) if RANK[other] < RANK[part]]
    assert not wrong, wrong


def test_the_report_reads_run_folders_and_never_imports_training() -> None:
    for path in (SOURCE / "report").rglob("*.py"):
        assert imported_parts(path) <= {"report", "errors", "files", "recipe", "recipe_file"}, path
