"""The docs site: built without a warning, and every page whole in a browser, wide and narrow, without a network."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deitkit.recipe.load import describe_fields

pytest.importorskip("mkdocs")

ROOT = Path(__file__).parents[1]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def site() -> Path:
    built = subprocess.run(
        [sys.executable, str(ROOT / "site" / "build.py")], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    return ROOT / "build" / "site"


def test_every_equation_is_mathml(site: Path) -> None:
    page = (site / "docs" / "methods.html").read_text(encoding="utf-8")
    assert page.count("<math") > 40
    assert "arithmatex" not in page
    assert "\\" not in "".join(part.split("</math>")[0] for part in page.split("<math")[1:])


def test_every_field_of_a_recipe_is_on_its_page(site: Path) -> None:
    page = (site / "docs" / "fields.html").read_text(encoding="utf-8")
    fields = list(describe_fields())
    assert len(fields) > 100
    assert [field for field, _, _ in fields if f"<code>{field}</code>" not in page] == []
    assert page.count("<h2") == len({field.rpartition(".")[0] for field, _, _ in fields})


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_every_page_is_whole_and_loads_nothing_from_elsewhere(site: Path, width: int) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    wrong: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("request", lambda sent: None if sent.url.startswith(("file:", "data:")) else wrong.append(sent.url))
        pages = [path for path in sorted(site.rglob("*.html")) if path.name != "404.html"]  # which is for a server
        assert len(pages) > 40
        for path in pages:
            page.goto(path.as_uri())
            page.wait_for_load_state("load")
            over = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
            missing = page.evaluate("[...document.images].filter(image => !image.naturalWidth).map(image => image.src)")
            if over > 0 or missing:
                wrong.append(f"{path.relative_to(site)}: {over} px too wide, missing {missing}")
        browser.close()
    assert not wrong
