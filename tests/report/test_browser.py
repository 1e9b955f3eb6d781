"""The page in a real browser: whatever names it is given, none becomes an element or a script."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from deitkit.report.write import write_report
from report.test_report import Page, make_folder, make_hostile, make_metrics, make_results
from report.test_report_analysis import make_analysis, make_analyzed, make_hostile_analysis

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ATTACK = """"'><img src=x onerror="document.title='ran'"><svg onload="document.title='ran'"></title></script>""" + (
    "<script>document.title='ran'</script>"
)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")


def opened(page: Path) -> tuple[str, Page]:
    """Return the title and the document that a browser has made of a page, its scripts run and its charts drawn."""
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    shown = subprocess.run([*command, page.as_uri()], capture_output=True, timeout=120, check=True).stdout.decode()
    title = re.search("<title>(.*?)</title>", shown, re.DOTALL)
    return title.group(1) if title else "", Page(shown)


def test_the_attack_works_on_a_page_that_does_not_escape(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(f'<title>mine</title><p title="{ATTACK}">{ATTACK}', encoding="utf-8")
    title, attacked = opened(tmp_path / "page.html")
    assert title == "ran"
    assert [name for name, _ in attacked.attributes if name.startswith("on")]


def test_no_name_becomes_an_element_or_runs(tmp_path: Path) -> None:
    _, plain = opened(write_report(make_analyzed(tmp_path / "plain", make_analysis(), make_results()))[-1])
    results, metrics = make_hostile(make_results(), make_metrics(), ATTACK)
    folder = make_analyzed(tmp_path / "hostile", make_hostile_analysis(make_analysis(), ATTACK), results)
    title, hostile = opened(write_report(make_folder(folder, results, metrics))[-1])
    assert plain.tags["svg"] > 0, "the charts were not drawn"
    assert title != "ran"
    for tag in ("script", "img"):
        assert hostile.tags[tag] == plain.tags[tag], tag
    assert not [name for name, _ in hostile.attributes if name.startswith("on")]
    assert hostile.text.count(ATTACK) >= 20


def test_at_the_width_of_a_phone_every_accuracy_is_beside_its_row(tmp_path: Path) -> None:
    page = write_report(make_analyzed(tmp_path / "run", make_analysis(), make_results()))[-1]
    frame = tmp_path / "phone.html"
    script = """
    frame.onload = () => {
      const inside = frame.contentDocument, cut = frame.contentWindow.innerWidth;
      const rows = [...inside.querySelectorAll('.scroll table')[0].querySelectorAll('tbody tr')];
      const heads = [...inside.querySelectorAll('.scroll table')[0].querySelectorAll('thead th')];
      const cells = rows.map((row) => row.cells[heads.findIndex((head) => head.textContent == 'top-1 %')]);
      document.title = cells.filter((cell) => cell.getBoundingClientRect().right > cut).length + ' of ' + cells.length;
    }"""
    frame.write_text(
        '<title>?</title><iframe id="frame" style="width: 390px; height: 900px; border: 0" '
        f'src="{page.as_uri()}"></iframe>'
        f"<script>{script}</script>"
    )
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += ["--virtual-time-budget=5000", "--dump-dom", frame.as_uri()]
    shown = subprocess.run(command, capture_output=True, timeout=120, check=True).stdout.decode()
    title = re.search("<title>(.*?)</title>", shown)
    assert title is not None
    cut, _, rows = title.group(1).partition(" of ")
    assert (cut, int(rows) > 5) == ("0", True)
