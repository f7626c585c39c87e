"""The page in a browser: every view once, nothing from elsewhere, no script in a text, no foreign
host.
"""

import json
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path

import pytest

from browser import BROWSER, OPTIONS, PALE, need_browser

need_browser("gradio", "playwright")
pytestmark = pytest.mark.slow

SETTLED = 1000
"""Milliseconds after which a request has closed its connection: to reload before is an error."""
PWN = "document.title='pwned'"
HOSTILE = f'the <script>{PWN}</script><img src=x onerror="{PWN}"> ${{{PWN}}}'


@pytest.fixture(scope="module")
def served(folder, tmp_path_factory) -> Path:
    """The folder of runs that is served; more may come."""
    return shutil.copytree(folder, tmp_path_factory.mktemp("served") / "runs")


@pytest.fixture(scope="module")
def url(served):
    """Address of the command, serving. It ends in silence when interrupted."""
    command = [
        sys.executable,
        "-m",
        "tarflowlm",
        "studio",
        "english-mini",
        str(served),
        "--no-browser",
    ]
    program = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell that runs the tests in the background has them ignore interrupts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        found = program.stdout.readline().strip()
        assert found.startswith("http://127.0.0.1:"), program.stderr.read()
        yield found
        program.send_signal(signal.SIGINT)
        _, errors = program.communicate(timeout=30)
        assert program.returncode == 0, errors
        assert "Traceback" not in errors
    finally:
        program.kill()


@pytest.fixture
def open_page(url):
    """Opens the page; it asks for nothing from elsewhere and logs no error in the browser's
    console.
    """
    from playwright.sync_api import sync_playwright

    asked, said = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=OPTIONS)

        def make():
            page = browser.new_page(viewport={"width": 400, "height": 900}, reduced_motion="reduce")
            page.set_default_timeout(60_000)
            page.on("request", lambda request: asked.append(request.url))
            page.on(
                "console",
                lambda message: said.append(message.text) if message.type == "error" else None,
            )
            page.on("pageerror", lambda error: said.append(str(error)))
            page.goto(url)
            page.get_by_label("Start").first.wait_for()
            return page

        yield make
        browser.close()
    assert all(request.startswith((url, "data:", "blob:")) for request in asked), asked
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


def written(page, start: str):
    """The stage with the text that the page has written from `start`."""
    use(page, "Write", "Write", until=f'--prompt "{start}', Start=start)
    view = page.locator(".st-view:visible").first
    view.get_by_text("in all").first.wait_for()
    return view.locator(".st-stage").first


def arrive(page, tab, until):
    """Open a tab for the first time, which shows an example."""
    page.get_by_role("tab", name=tab, exact=True).click()
    page.locator(".st-view:visible").get_by_text(until).first.wait_for()


def test_every_view(open_page):
    page = open_page()
    page.get_by_text("--length 96").first.wait_for()  # written on arrival
    page.get_by_role("button", name="More").locator("visible=true").click()
    use(page, "Write", "Write", until="--length 40", Start="The people of", Length="40")
    page.locator(".st-view:visible").get_by_text("in all").wait_for()
    stage = page.locator(".st-view:visible .st-stage").first
    assert stage.inner_text().startswith("the people of")
    asked = '--template "the ___ of"'
    assert "independent tries" in use(
        page, "Infill", "Fill in", until=asked, Text_with_blanks="the ___ of"
    )
    arrive(page, "Edit", until="the original")
    for kind, button in (("Words", "Resample"), ("Level", "Re-noise")):
        page.get_by_role("tab", name=kind).click()
        use(page, "Edit", button, until="tokens changed")
    arrive(page, "Score", until="english-mini against baseline")
    page.locator(".st-view:visible .st-heat").first.press("ArrowRight")
    told = page.locator(".st-view:visible .st-heat + p").first.inner_text()
    assert re.fullmatch(r". ?: .* bits", told), told
    page.get_by_role("tab", name="Runs").click()
    page.locator(".st-view:visible svg").first.wait_for()
    page.get_by_label("baseline", exact=True).uncheck()
    page.locator(".st-view:visible").get_by_role("columnheader", name="baseline").wait_for(
        state="hidden"
    )
    # nothing is wider than the screen
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    use(page, "Write", "Write", Start=HOSTILE, Length="200")
    use(page, "Infill", "Fill in", Text_with_blanks=HOSTILE, until="has no blank")
    long = f"the {200 * '_'} of"
    use(page, "Infill", "Fill in", until="trying", Text_with_blanks=long)
    page.get_by_role("button", name="Stop").locator("visible=true").click()
    view = page.locator(".st-view:visible")
    view.get_by_text("stopped").wait_for()
    # the last progress may come after the click, and is stopped again
    view.get_by_role("button", name="copy").wait_for()
    assert page.title() == "tarflowlm studio"


def test_the_same_request_again_gives_another_text(open_page):
    page = open_page()
    button = partial(page.get_by_role, "button", exact=True)
    view = page.locator(".st-view:visible").first
    view.get_by_text("in all").first.wait_for()
    # Another is in the place of Stop, which is there while something runs
    assert button(name="Stop").locator("visible=true").count() == 0
    texts = [written(page, "the king").inner_text()]
    for name, seed in (("Write", 1), ("Another", 2)):
        button(name=name).locator("visible=true").click()
        view.get_by_text(f"--seed {seed}").first.wait_for()
        view.get_by_text("in all").first.wait_for()
        texts.append(view.locator(".st-stage").first.inner_text())
    assert len(set(texts)) == 3
    # what a screen reader tells
    status = page.get_by_role("status").first
    status.get_by_text("finished").wait_for()
    levels = "[...document.querySelectorAll('h1, h2, h3')].filter((one) => one.checkVisibility())"
    found = page.evaluate(f"{levels}.map((one) => one.tagName)")
    assert (found[0], found.count("H1"), "H2" in found) == ("H1", 1, True)
    # a menu closes when the focus goes on
    menu, options = page.get_by_label("Model", exact=True).first, page.get_by_role("option")
    menu.focus()
    options.first.wait_for()
    page.keyboard.press("Tab")
    options.locator("visible=true").first.wait_for(state="hidden")


def test_the_texts_of_a_run_stay_where_the_reader_has_left_them(open_page, served):
    page = open_page()
    page.locator(".st-view:visible").get_by_text("in all").first.wait_for()
    page.get_by_role("tab", name="Runs").click()
    slider = page.get_by_label("text of flow")
    slider.focus()
    page.keyboard.press("Home")
    card = page.locator(".st-card:visible", has=slider)
    card.get_by_text("step 0:").first.wait_for()
    first = card.locator(".st-stage").inner_text()
    log = served / "flow" / "metrics.jsonl"
    *_, last = (line for line in log.read_text(encoding="utf-8").splitlines() if "valid" in line)
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(json.loads(last) | {"text": "one more"}) + "\n")
    card.get_by_text("one more").wait_for(state="attached")
    assert (slider.input_value(), card.locator(".st-stage").inner_text()) == ("0", first)
    page.keyboard.press("End")
    card.locator(".st-stage").get_by_text("one more").wait_for()


def test_a_word_is_exchanged_and_comes_back(open_page):
    page = open_page()
    view = page.locator(".st-view:visible").first
    view.get_by_text("in all").first.wait_for()
    stage = written(page, "the people of the land had")
    before = stage.inner_text()
    stage.click(position={"x": 50, "y": 14})  # on the second word
    other = page.get_by_role("dialog").locator("[data-word]").first
    other.wait_for()
    word = other.get_attribute("data-word")
    other.click()
    assert stage.inner_text() == before.replace("people", word, 1)
    copied = view.locator("[data-copy]").nth(1).get_attribute("data-copy")
    assert copied.strip() == stage.inner_text().strip()
    # the request stays, and no card takes its place
    assert "of the land had" in view.locator(".st-asked").inner_text()
    assert page.get_by_role("dialog").count() == 0
    page.get_by_role("button", name="back to the text").click()
    assert stage.inner_text() == before
    # what is written next is not the text with the word
    stage = written(page, "the house of the king")
    assert stage.inner_text().startswith("the house of the king")
    assert page.get_by_role("button", name="back to the text").count() == 0


@pytest.mark.nightly
def test_every_tab_by_keyboard_alone(open_page):
    """Enter does what the button says, arrows choose a word, Escape leaves its list."""
    page = open_page()
    view = page.locator(".st-view:visible").first
    view.get_by_text("in all").first.wait_for()
    press = page.keyboard.press

    def tab_to(name: str) -> None:
        page.get_by_role("tab", name="Write", exact=True).focus()
        active = "document.activeElement.innerText"
        for _ in range(9):
            if page.evaluate(active) == name:
                break
            press("Tab")
        assert page.evaluate(active) == name
        press("Enter")

    start = page.get_by_label("Start").first
    start.focus()
    press("Control+a")
    page.keyboard.type("the king")
    press("Shift+Enter")
    page.keyboard.type("of")
    assert start.input_value() == "the king\nof"
    press("Enter")
    view.get_by_text("the king of").first.wait_for()
    view.get_by_text("in all").first.wait_for()
    stage = view.locator(".st-stage").first
    for _ in range(40):
        press("Tab")
        if page.evaluate("document.activeElement.className") == "st-stage":
            break
    before = stage.inner_text()
    for _ in range(2):
        press("ArrowRight")
    assert page.evaluate("getSelection().toString()") == "king"
    press("Enter")
    dialog = page.get_by_role("dialog")
    dialog.locator("[data-word]").first.wait_for()
    press("Escape")
    assert (dialog.count(), stage.inner_text()) == (0, before)
    press("Enter")
    dialog.locator("[data-word]:focus").wait_for()
    word = dialog.locator("[data-word]").first.get_attribute("data-word")
    press("Enter")
    assert stage.inner_text() == before.replace("king", word, 1)
    for tab in ("Infill", "Edit", "Score", "Runs"):
        tab_to(tab)
        shown = page.locator(".st-view:visible").first
        shown.get_by_text("in all").first.wait_for() if tab != "Runs" else shown.wait_for()


@pytest.mark.nightly
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_texts_can_be_read(open_page, scheme):
    """Their contrast is at least 4.5, in every tab, with all that is folded, and at a word."""
    page = open_page()
    view = page.locator(".st-view:visible").first
    view.get_by_text("in all").first.wait_for()
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 1280, "height": 900})
    page.wait_for_timeout(SETTLED)
    page.reload()
    view.get_by_text("in all").first.wait_for()
    view.locator(".st-stage").first.click(position={"x": 50, "y": 14})
    page.get_by_role("dialog").locator("[data-word]").first.wait_for()
    for tab in ("Write", "Infill", "Edit", "Score", "Runs"):
        page.get_by_role("tab", name=tab, exact=True).click()
        if tab != "Runs":
            page.locator(".st-view:visible").get_by_text("in all").first.wait_for()
        more = page.get_by_role("button", name="More").locator("visible=true")
        if more.count():
            more.click()
        for name in ("Words", "Level") if tab == "Edit" else ():
            page.get_by_role("tab", name=name).click()
            assert page.evaluate(PALE) == [], name
        page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        assert page.evaluate(PALE) == [], tab
    use(page, "Infill", "Fill in", Text_with_blanks="nothing", until="has no blank")
    assert page.evaluate(PALE) == []


@pytest.mark.nightly
def test_the_address_is_that_of_the_request(open_page, url):
    page = open_page()
    view = page.locator(".st-view:visible").first
    view.get_by_text("in all").first.wait_for()
    written(page, "the people of")
    assert "text=the+people+of" in page.url
    page.wait_for_timeout(SETTLED)
    page.reload()
    view.get_by_text("the people of").first.wait_for()
    view.get_by_text("in all").first.wait_for()
    page.wait_for_timeout(SETTLED)
    # a link to a model that the page does not have says so
    page.goto(f"{url}?model=nope&text=the")
    page.get_by_text("no model of the link's name").wait_for()
    view.get_by_text("in all").first.wait_for()


@pytest.mark.nightly
def test_a_run_that_begins_later_appears(open_page, served):
    page = open_page()
    # a reload would abort what is being written on arrival
    page.locator(".st-view:visible").get_by_text("in all").first.wait_for()
    page.get_by_role("tab", name="Runs").click()
    page.get_by_label("baseline", exact=True).wait_for()
    shutil.copytree(served / "flow", served / "late")
    page.get_by_label("late", exact=True).check()
    page.locator(".st-view:visible").get_by_role("columnheader", name="late").wait_for()
    page.reload()
    page.get_by_label("Model", exact=True).first.click()
    page.get_by_role("option", name="late").wait_for()


def ask(url: str, **headers: str) -> tuple[int, dict, str]:
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=20
        ) as found:
            return (
                found.status,
                {name.lower(): value for name, value in found.headers.items()},
                found.read().decode(),
            )
    except urllib.error.HTTPError as error:
        return error.code, {}, ""


def test_foreign_pages_and_files_are_refused(url, served):
    # DNS rebinding: a foreign name that points at this machine
    assert ask(url, Host="elsewhere.example:7860")[0] == 400
    status, headers, config = ask(url + "config", Origin="http://elsewhere.example")
    assert status == 200
    assert "access-control-allow-origin" not in headers
    assert str(served.parent) not in config
    assert '"named_endpoints":{}' in ask(url + "gradio_api/info")[2]
    for path in ("file=/etc/passwd", "file=../../../../etc/passwd", "proxy=http://127.0.0.1/"):
        assert ask(f"{url}gradio_api/{path}")[0] in (400, 403, 404)
