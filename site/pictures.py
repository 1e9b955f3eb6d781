"""Draw the docs' pictures of a terminal, the page and the demo; needs Chromium.

`python site/pictures.py RUN OTHER IMAGE`: the table and the page of RUN, the demo of OTHER on IMAGE.
"""

import argparse
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright
from rich.console import Console

from deitkit.report.table import rich_table
from deitkit.run.results import read_results

IMAGES = Path(__file__).parent.parent / "docs" / "images"
WIDTH = 1180  # px


def draw_terminal(run: Path) -> None:
    """Draw the end of a comparison as it is printed."""
    results = read_results(run)
    console = Console(record=True, width=132, force_terminal=True, file=io.StringIO())
    console.print(f"$ deitkit compare {results.recipe['name']}\n", highlight=False)
    console.print(rich_table(results))
    svg = re.sub(r"@font-face \{.*?\}", "", console.export_svg(title="deitkit"), flags=re.DOTALL)
    (IMAGES / "terminal.svg").write_text(svg, encoding="utf-8")


def draw_page(browser: Browser, run: Path) -> None:
    """Draw the top of report.html."""
    page = browser.new_page(viewport={"width": WIDTH, "height": 1000})
    page.goto((run / "report.html").resolve().as_uri())
    page.wait_for_timeout(2000)
    page.screenshot(path=IMAGES / "page.png")


def draw_demo(browser: Browser, run: Path, image: Path) -> None:
    """Draw the demo after an image was given to it."""
    command = [sys.executable, "-m", "deitkit", "demo", str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().split()[1]
            page = browser.new_page(viewport={"width": WIDTH, "height": 900})
            page.goto(address)
            page.set_input_files("#image input[type=file]", image)
            page.wait_for_selector("#maps figure img")
            page.wait_for_timeout(2000)
            page.screenshot(path=IMAGES / "demo.png", full_page=True)
        finally:
            server.terminate()


def main() -> None:
    """Draw all three."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("run", "other", "image"):
        parser.add_argument(name, type=Path)
    wanted = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    draw_terminal(wanted.run)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        draw_page(browser, wanted.run)
        draw_demo(browser, wanted.other, wanted.image)
        browser.close()


if __name__ == "__main__":
    main()
