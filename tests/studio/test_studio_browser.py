"""The page in a browser: every view once, nothing from elsewhere, no script in a text, no stack.

Needs Chromium. Where TARFLOWLM_BROWSER is set to its path the tests insist on it; elsewhere they skip without one.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from studio_cases import ENDLESS

INSISTED = os.environ.get("TARFLOWLM_BROWSER")
BROWSER = INSISTED or shutil.which("chromium") or shutil.which("chromium-browser")
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
if not INSISTED and (MISSING or BROWSER is None):
    pytest.skip(f"no {' and '.join(MISSING) or 'chromium'} to test the page with", allow_module_level=True)

OPTIONS = [
    "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run", "--disable-quic",
]  # fmt: skip
PWN = "document.title='pwned'"
HOSTILE = f'the <script>{PWN}</script><img src=x onerror="{PWN}"> ${{{PWN}}}'
PATIENCE = 40_000
"""Milliseconds that a machine with other work may take."""


@pytest.fixture(scope="module")
def server(folder):
    """The command, serving: its `url`, and `next_line` of its output. It ends in silence when interrupted."""
    program = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("studio_cases.py"), "english-mini", folder, "english-passes",
         "--no-browser"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # a shell that runs the tests in the background has them ignore interrupts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        url = program.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:"), program.stderr.read()
        yield SimpleNamespace(url=url, next_line=lambda: program.stdout.readline().strip())
        program.send_signal(signal.SIGINT)
        _, errors = program.communicate(timeout=30)
        assert program.returncode == 0, errors
        assert "Traceback" not in errors
    finally:
        program.kill()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=BROWSER, args=OPTIONS)
        yield found
        found.close()


@pytest.fixture
def page(browser, server):
    """The page, opened; it asks for nothing from elsewhere, and says no error in the browser's console."""
    found = browser.new_page()
    found.set_default_timeout(PATIENCE)
    asked, said = [], []
    found.on("request", lambda request: asked.append(request.url))
    found.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    found.on("pageerror", lambda error: said.append(str(error)))
    found.goto(server.url)
    yield found
    found.close()
    assert all(url.startswith((server.url, "data:", "blob:")) for url in asked), asked
    assert not said


def use(page, tab: str, button: str, *, until: str = "in all", **texts: str) -> str:
    """The text of a view after a click on a button, once it shows `until`."""
    page.get_by_role("tab", name=tab, exact=True).click()
    for label, text in texts.items():
        page.get_by_label(label.replace("_", " ")).locator("visible=true").first.fill(text)
    page.get_by_role("button", name=button, exact=True).locator("visible=true").first.click()
    out = page.locator(".st-view:visible")
    out.get_by_text(until).first.wait_for()
    assert "Traceback" not in page.content()
    return out.inner_text()


def test_write_streams_and_shows_how(page):
    assert "pass 1 ·" in use(page, "Write", "Write")
    stage = page.locator(".st-view:visible .st-stage").first
    text = stage.inner_text()
    assert text.startswith("the people of")
    slider = page.get_by_label("pass", exact=True)
    slider.fill("0")
    assert stage.inner_text() != text
    slider.fill(slider.get_attribute("max"))
    assert stage.inner_text() == text


def test_a_model_brings_the_temperature_that_suits_it(page):
    temperature = page.get_by_label("number input for Temperature").locator("visible=true")
    assert temperature.input_value() == "0.7"
    for name, suited in (("english-passes", "1"), ("flow", "0.7")):
        page.get_by_label("Model").locator("visible=true").first.click()
        page.get_by_role("option", name=name, exact=True).click()
        page.wait_for_function("([n, v]) => n.value === v", arg=[temperature.element_handle(), suited])


def test_infill(page):
    shown = use(page, "Infill", "Fill in", Text_with_blanks="the ___ of")
    assert "tries count" in shown


def test_every_edit(page):
    assert "the original" in use(page, "Edit", "Replace")
    page.get_by_role("tab", name="Rewrite").click()
    assert "tokens changed" in use(page, "Edit", "Rewrite", until="tokens changed")
    page.get_by_role("tab", name="Blend").click()
    assert "100 %" in use(page, "Edit", "Blend", until="100 %")


def test_score(page):
    shown = use(page, "Score", "Score")
    assert "≤" in shown
    assert "english-mini against baseline" in shown


def test_runs_are_compared(page):
    page.get_by_role("tab", name="Runs").click()
    out = page.locator(".st-view:visible")
    out.get_by_text("finished").first.wait_for()
    page.get_by_label("baseline").uncheck()
    out.get_by_role("cell", name="baseline").wait_for(state="hidden")
    assert "flow" in out.inner_text()


def test_a_script_in_a_text_does_nothing(page):
    use(page, "Write", "Write", Start=HOSTILE, until="in all")
    use(page, "Infill", "Fill in", Text_with_blanks=HOSTILE, until="nothing to fill in")
    use(page, "Edit", "Replace", Words_to_replace=HOSTILE, until="no word of the text")
    assert page.title() == "tarflowlm studio"


def test_an_error_is_shown_in_words(page):
    assert "nothing to fill in" in use(page, "Infill", "Fill in", Text_with_blanks="none", until="to fill in").lower()


def test_two_visitors_are_served_in_turn(browser, server):
    pages = [browser.new_page() for _ in range(2)]
    for page in pages:
        page.goto(server.url)
        page.get_by_label("Start").first.wait_for()
    for page in pages:
        page.get_by_role("button", name="Write", exact=True).first.click()
    for page in pages:
        page.locator(".st-view:visible").get_by_text("in all").wait_for(timeout=PATIENCE)
        page.close()


def test_a_closed_tab_frees_the_model(browser, server):
    page = browser.new_page()
    page.goto(server.url)
    page.get_by_label("Seed").first.fill(str(ENDLESS))
    page.get_by_role("button", name="Write", exact=True).first.click()
    assert server.next_line() == "begun"
    page.close()
    assert server.next_line() == "ended"


def answer(url: str, data: object = None) -> int:
    body = None if data is None else json.dumps(data).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=20) as found:
            return found.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize(
    "path",
    [
        "gradio_api/file=/etc/passwd",
        "gradio_api/file=../../../../etc/passwd",
        "gradio_api/file%3D/etc/passwd",
        "static/../../../../../etc/passwd",
        "static/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "gradio_api/proxy=http://127.0.0.1/",
        "gradio_api/openapi.json",
    ],
)
def test_no_file_is_served(server, path):
    assert answer(server.url + path) in (403, 404)


def test_nothing_is_taken(server):
    assert answer(server.url + "gradio_api/upload", {"files": "x"}) == 404


def test_views_have_no_public_endpoint(server):
    with urllib.request.urlopen(server.url + "gradio_api/info", timeout=20) as found:
        assert json.load(found) == {"named_endpoints": {}, "unnamed_endpoints": {}}


def test_paths_of_the_machine_stay_on_it(server, folder):
    with urllib.request.urlopen(server.url + "config", timeout=20) as found:
        assert str(Path(folder).parent) not in found.read().decode()
