"""The demo's page in a real browser: it answers, refuses, escapes, and speaks to nobody but this machine."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from demo.test_shown import saved_student

pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ATTACK = """"'><img src=x onerror="document.title='ran'"><script>document.title='ran'</script>"""

pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")

# Runs the command line, and writes every address outside this machine that is connected to or looked up.
WATCHED = """
import socket, sys

def watch(event, arguments):
    if event == "socket.connect" and arguments[0].family != socket.AF_UNIX:
        address = arguments[1][0]
    elif event == "socket.getaddrinfo":
        address = arguments[0]
    else:
        return
    if address not in (None, "127.0.0.1", "localhost", "::1", b"127.0.0.1"):
        print(f"REACHED {address}", file=sys.stderr, flush=True)

sys.addaudithook(watch)
from deitkit.cli.main import main
main()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with both tokens, whose classes have hostile names."""
    return saved_student(
        tmp_path_factory.mktemp("models") / ATTACK.replace("/", "|"), class_names=[ATTACK, "cat", "dog"]
    )


@pytest.fixture(scope="module")
def served(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """The address of a running demo and its process."""
    log = tmp_path_factory.mktemp("log") / "log"
    temporary = tmp_path_factory.mktemp("temporary")
    settings = {**os.environ, "TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1", "HTTP_PROXY": "http://127.0.0.1:9"}
    with log.open("w") as out:
        command = [sys.executable, "-c", WATCHED, "demo", str(model)]
        process = subprocess.Popen(command, stdout=out, stderr=out, text=True, env=settings)
    try:
        for _ in range(1800):
            text = log.read_text()
            if "open http" in text or process.poll() is not None:
                break
            time.sleep(0.1)
        assert "open http://127.0.0.1:" in text, text
        yield text.split("open ")[1].split()[0], process
    finally:
        process.terminate()  # SIGINT may be ignored where the tests run in the background
        code = process.wait(30)
    text = log.read_text()
    assert code == 0, text
    assert text.count("Traceback") == text.count("InvalidPathError"), text  # Gradio's word on a forged request
    assert "REACHED" not in text
    assert "stopped" in text
    assert not list(temporary.rglob("*.png")), "uploaded images stay behind"


@pytest.fixture
def page(served: tuple[str, Any], request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page in a browser; afterwards nothing was loaded from elsewhere, nothing failed, and no name became code."""
    width = getattr(request, "param", 1280)
    wrong: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        shown = browser.new_page(viewport={"width": width, "height": 844})
        shown.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        shown.on("pageerror", lambda error: wrong.append(str(error)))
        shown.on("request", lambda sent: None if _is_ours(sent.url, served[0]) else wrong.append(sent.url))
        shown.goto(served[0])
        shown.wait_for_selector("input[type=file]", state="attached")
        shown.wait_for_timeout(500)
        yield shown
        assert shown.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0
        assert shown.title() != "ran"
        assert not shown.query_selector_all("img[src=x]")
        browser.close()
    assert not wrong


def _is_ours(url: str, address: str) -> bool:
    return url.startswith((address, "data:", "blob:"))


def colour(path: Path, value: int) -> Path:
    Image.new("RGB", (40, 30), (value, 255 - value, 90)).save(path)
    return path


def give(page: Any, path: Path) -> None:
    for clear in page.query_selector_all("#image button[aria-label='Clear']"):
        clear.click()
        sync_api.expect(page.locator("#maps figure")).to_have_count(0)
    page.set_input_files("#image input[type=file]", path)


def shares(page: Any) -> dict[str, str]:
    page.wait_for_selector(".confidence-set")
    return dict(zip(*(page.locator(f".confidence-set {part}").all_inner_texts() for part in (".text", ".confidence"))))


@pytest.mark.parametrize("page", [1280, 390], indirect=True)
def test_an_image_is_answered_with_its_attention_and_a_second_one_too(page: Any, model: Path, tmp_path: Path) -> None:
    from deitkit.api import load_model

    for value in (0, 255):
        path = colour(tmp_path / f"{value}.png", value)
        give(page, path)
        page.wait_for_selector("#maps figure img")
        page.wait_for_timeout(1500)
        (expected,) = load_model(model).predict(path)
        assert [int(share.rstrip("%")) for share in shares(page).values()] == [
            round(100 * share) for _, share in expected["classes"]
        ]
        assert next(iter(shares(page))) == expected["classes"][0][0]
        assert page.locator("#maps figcaption").all_inner_texts() == [
            "what the student sees", "class, last block", "class, rollout",
            "distillation, last block", "distillation, rollout",
        ]  # fmt: skip
        sizes = page.eval_on_selector_all("#maps img", "all => all.map(image => image.naturalWidth)")
        assert min(sizes) >= 240


@pytest.mark.parametrize(
    "content",
    [
        b"\x89PNG\r\n\x1a\n damaged",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(/etc/passwd) (r) file pop\n",
        b"<svg xmlns='http://www.w3.org/2000/svg' onload=\"document.title='ran'\"/>",
    ],
    ids=["damaged", "PostScript", "SVG"],
)
def test_a_hostile_file_is_refused_and_takes_the_last_answer_away(page: Any, tmp_path: Path, content: bytes) -> None:
    give(page, colour(tmp_path / "first.png", 0))
    page.wait_for_selector("#maps figure img")
    bad = tmp_path / "bad.png"
    bad.write_bytes(content)
    give(page, bad)
    page.wait_for_selector("#problem")
    page.wait_for_timeout(1500)
    assert page.inner_text("#problem").startswith("This file is damaged")
    assert page.locator(".confidence-set").count() == 0
    assert page.locator("#maps figure").count() == 0
    give(page, colour(tmp_path / "second.png", 200))
    page.wait_for_selector("#maps figure img")
    assert page.locator("#problem").count() == 0 or not page.inner_text("#problem")


def test_a_decompression_bomb_is_refused(page: Any, tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.png"
    Image.new("L", (20_000, 20_000)).save(bomb)
    give(page, bomb)
    page.wait_for_selector("#problem")
    assert "far too large" in page.inner_text("#problem")


def test_no_file_of_the_machine_can_be_read_through_the_page(page: Any, served: tuple[str, Any], model: Path) -> None:
    for file in (model / "model.json", Path("/etc/passwd")):
        for route in ("file=", "gradio_api/file="):
            answer = page.request.get(f"{served[0]}{route}{file}")
            assert answer.status in (403, 404), file
    config = page.request.get(f"{served[0]}config").json()
    of_image = next(number for number, one in enumerate(config["dependencies"]) if len(one["inputs"]) == 2)
    inputs = [{"path": str(model / "model.json"), "meta": {"_type": "gradio.FileData"}}, []]
    body = {"data": inputs, "fn_index": of_image, "session_hash": "a"}
    answer = page.request.post(f"{served[0]}gradio_api/run/predict", data=json.dumps(body))
    assert answer.status >= 400


def test_two_people_at_once_do_not_disturb_each_other(served: tuple[str, Any], tmp_path: Path) -> None:
    files = [colour(tmp_path / f"{value}.png", value) for value in (10, 240)]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        pages = [browser.new_page() for _ in range(3)]
        for shown in pages:
            shown.goto(served[0])
            shown.wait_for_selector("input[type=file]", state="attached")
        for file in files * 2:
            for shown in pages:
                give(shown, file)
        for shown in pages:
            sync_api.expect(shown.locator("#maps figure")).to_have_count(5, timeout=60_000)
        browser.close()  # the fixture finds no traceback in the server's output


def test_the_server_listens_on_this_machine_only(served: tuple[str, Any]) -> None:
    import psutil

    _, process = served
    addresses = {
        connection.laddr.ip
        for connection in psutil.Process(process.pid).net_connections()
        if connection.status == psutil.CONN_LISTEN
    }
    assert addresses == {"127.0.0.1"}
