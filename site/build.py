"""Build the docs site into build/site: `make docs`. A broken link, anchor or picture is an error."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from deitkit.recipe.load import describe_fields

HERE = Path(__file__).parent
ROOT = HERE.parent
PAGES = ROOT / "build" / "pages"
# Besides Markdown: pictures, and the files that pages link to.
COPIED = ("*.md", "docs/**/*", "results/**/*", "benchmarks/*", "examples/*", "src/deitkit/**/*.py", "LICENSE")
FIELDS = """# Fields of a recipe

Look up a field, its default and its meaning, as `deitkit recipes --fields` prints them. How recipes are written is in
[recipes](recipes.md).
"""


def fields_page() -> str:
    """Return the page of all fields, by section, as the program describes them."""
    sections: dict[str, list[str]] = {}
    for field, default, meaning in describe_fields():
        section = field.rpartition(".")[0] or "recipe"
        cells = (f"`{field}`", f"`{default}`", meaning.replace("|", "\\|"))
        sections.setdefault(section, []).append(f"| {' | '.join(cells)} |")
    head = "| field | default | meaning |\n|---|---|---|\n"
    return FIELDS + "".join(f"\n## {name}\n\n{head}{chr(10).join(rows)}\n" for name, rows in sections.items())


def main() -> int:
    """Copy what the site shows, at its place in the repository so that links hold, and build it."""
    shutil.rmtree(PAGES, ignore_errors=True)
    for pattern in COPIED:
        for path in ROOT.glob(pattern):
            if path.is_file():
                target = PAGES / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
    (PAGES / "docs" / "fields.md").write_text(fields_page(), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--config-file",
        str(HERE / "mkdocs.yml"),
    ]
    return subprocess.run(command, check=False, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}).returncode


if __name__ == "__main__":
    sys.exit(main())
