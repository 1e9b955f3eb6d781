"""The page in a real browser: whatever names it is given, none becomes an element or a script."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from deitkit.report.write import write_report
from report.test_report import Page, make_folder, make_hostile, make_metrics, make_results, make_row
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


def on_a_phone(page: Path, frame: Path, found: str) -> str:
    """Return what a script finds ``inside`` a page that is 390 px wide, as text."""
    script = f"""
    frame.onload = () => {{
      const inside = frame.contentDocument, cut = frame.contentWindow.innerWidth;
      {found}
    }}"""
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
    return title.group(1)


def test_at_the_width_of_a_phone_every_accuracy_is_beside_its_row(tmp_path: Path) -> None:
    page = write_report(make_analyzed(tmp_path / "run", make_analysis(), make_results()))[-1]
    found = on_a_phone(
        page,
        tmp_path / "phone.html",
        """
      const rows = [...inside.querySelectorAll('.scroll table')[0].querySelectorAll('tbody tr')];
      const heads = [...inside.querySelectorAll('.scroll table')[0].querySelectorAll('thead th')];
      const cells = rows.map((row) => row.cells[heads.findIndex((head) => head.textContent == 'top-1 %')]);
      document.title = cells.filter((cell) => cell.getBoundingClientRect().right > cut).length + ' of ' + cells.length;
      """,
    )
    cut, _, rows = found.partition(" of ")
    assert (cut, int(rows) > 5) == ("0", True)


def test_at_the_width_of_a_phone_a_long_legend_leaves_room_for_the_curves(tmp_path: Path) -> None:
    results, metrics = make_results(), []
    names = [f"student-number-{number}" for number in range(22)]
    results["rows"] = [make_row("none", "class", [0.6, 0.61]) | {"method": name, "row": name} for name in names]
    for name in names:
        metrics += [line | {"student": name} for line in make_metrics(epochs=3) if line["student"] == "none"]
    page = write_report(make_folder(tmp_path / "run", results, metrics))[-1]
    found = on_a_phone(
        page,
        tmp_path / "phone.html",
        """
      const box = (what) => inside.querySelector('#curves ' + what).getBoundingClientRect();
      const entries = [...inside.querySelectorAll('#curves .legendtext')].map((one) => one.getBoundingClientRect());
      const legend = box('.legend .bg');
      const within = entries.filter((one) => one.top >= legend.top && one.bottom <= legend.bottom);
      document.title = [within.length, box('.nsewdrag').height, box('.xtitle').right <= cut].join(' ');
      """,
    )
    entries, height, title_fits = found.split()
    assert (int(entries), title_fits) == (22, "true")
    assert float(height) > 200
