"""Build the docs site into build/site: `make docs`. A broken link, anchor or picture is an error."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
PAGES = ROOT / "build" / "pages"
# Besides Markdown: pictures, and the files that pages link to.
COPIED = ("*.md", "docs/**/*", "results/**/*", "benchmarks/*", "src/deitkit/distillation/*.py", "LICENSE")


def main() -> int:
    """Copy what the site shows, at its place in the repository so that links hold, and build it."""
    shutil.rmtree(PAGES, ignore_errors=True)
    for pattern in COPIED:
        for path in ROOT.glob(pattern):
            if path.is_file():
                target = PAGES / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
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
