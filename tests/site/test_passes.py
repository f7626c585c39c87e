"""The page of passes writes what Python writes from the same noise, asks for nothing from
elsewhere, and works by keyboard.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import tarflowlm
from browser import BROWSER, OPTIONS, PALE, need_browser
from docs_cases import module_at
from helpers import FILLS, tiny_flow
from tarflowlm.data import CharTokenizer
from tarflowlm.generation.sampling import Noise

need_browser("playwright")
pytestmark = pytest.mark.slow

SEEDS = range(10)


@pytest.fixture(scope="module")
def build():
    return module_at("site/passes/build.py")


@pytest.fixture(scope="module")
def shipped(build, tmp_path_factory) -> Path:
    """The page of the shipped model, as the command writes it."""
    out = tmp_path_factory.mktemp("page") / "passes.html"
    build.main(["english-passes", "--out", str(out)])
    return out


@pytest.fixture
def open_page():
    """Opens a file in a narrow window; it loads nothing else and logs no error."""
    from playwright.sync_api import sync_playwright

    asked, said = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=OPTIONS)

        def make(path: Path):
            page = browser.new_page(viewport={"width": 400, "height": 860})
            page.set_default_timeout(120_000)
            page.on("request", lambda request: asked.append(request.url))
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.goto(path.as_uri())
            return page

        yield make
        browser.close()
    assert all(request.startswith(("file:", "data:")) for request in asked), asked
    assert not said


def assert_same_tokens(
    page, lm, *, length: int, prompt: str, temperature: float, seeds: Sequence[int] = SEEDS
) -> None:
    """Noise, the tokens after every pass and the text are equal for all seeds."""
    given = lm.encode(prompt) if prompt else None
    result = tarflowlm.generate(
        lm.model,
        num_tokens=length,
        num=len(seeds),
        prompt=given,
        temperature=temperature,
        decoder="sweeps",
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
    )
    call = "([noise, prompt, temperature]) => generate(noise, prompt, temperature)"
    for seed in seeds:
        streams = [torch.Generator().manual_seed(seed)]
        noise = Noise(lm.model, streams, 1).normal(length)[0]
        found = page.evaluate(call, [noise.tolist(), prompt, temperature])
        expected = [tokens[seed].tolist() for tokens in result.passes(lm.model)]
        # Python shows the noise that belongs to the prompt, the page the one drawn for it
        start = len(prompt)
        assert found["passes"][0][start:] == expected[0][start:]
        assert found["passes"][1:] == expected[1:], (seed, found["text"])
        assert found["text"] == lm.decode(expected[-1])


@pytest.mark.parametrize(
    ("prompt", "seeds"),
    [("once upon a time ", range(3)), pytest.param("", SEEDS, marks=pytest.mark.nightly)],
)
def test_the_shipped_model_writes_as_in_python(open_page, shipped, prompt, seeds):
    page = open_page(shipped)
    page.get_by_role("button", name="Pause").click()
    lm = tarflowlm.load("english-passes")
    options = {"prompt": prompt, "temperature": lm.run.temperature}
    assert_same_tokens(page, lm, length=96, **options, seeds=seeds)
    for text in ("In 1984,", " A.D. 7 ", "\u212aing \u0130n caf\u00e9s<|endoftext|>now"):
        assert page.evaluate("text => readPrompt(text)", text) == lm.encode(text).tolist()


@pytest.mark.nightly
def test_other_models_write_as_in_python(build, open_page, tmp_path):
    # three blocks in float32 that read no tokens and convolve no inputs
    model = tiny_flow(context=24, alternate=False, seed=3, scale=0.6, **FILLS).float().eval()
    lm = tarflowlm.Pretrained(model, CharTokenizer("abcde", "none"))
    path = tmp_path / "tiny.html"
    path.write_text(build.build(lm, "tiny"), encoding="utf-8")
    page = open_page(path)
    for prompt in ("", "bad"):
        assert_same_tokens(page, lm, length=24, prompt=prompt, temperature=1.0)


@pytest.mark.nightly
def test_a_visit_by_keyboard(open_page, shipped):
    page = open_page(shipped)
    page.get_by_label("Beginning").fill("The 2 ")
    page.get_by_label("Seed").fill("3")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Pause").press("Enter")
    shown = page.locator("#stage").inner_text
    assert shown().replace("\n", "").startswith("the two ")
    before = page.locator(".written").count()
    page.get_by_role("button", name="Block 2 writes").wait_for()
    for _ in range(4):
        page.get_by_role("button", name="Step").press("Enter")
    assert page.locator(".written, .gap").count() >= before + 3
    page.get_by_label("Speed").press("End")
    page.get_by_role("button", name="Play").press("Enter")
    page.get_by_role("button", name="Again").wait_for()
    text = page.locator("#text").inner_text()
    again = page.evaluate("generate(drawNoise(3, LENGTH), 'The 2 ').text")
    assert text == again.strip()
    assert page.get_by_role("status").inner_text().startswith("Block 1 has filled in")
    # a look back
    page.get_by_role("button", name="Noise").press("Enter")
    assert page.locator(".noise").count() > 100
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_the_first_example_fills_every_gap(open_page, shipped):
    page = open_page(shipped)
    page.get_by_label("Speed").press("End")
    page.get_by_role("button", name="Again").wait_for()
    status = page.get_by_role("status").inner_text()
    assert int(re.search(r"filled in (\d+)", status)[1]) >= 10
    assert "no gap is left" in status
    assert page.locator("#stage .gap").count() == 0


@pytest.mark.nightly
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_texts_can_be_read(open_page, shipped, scheme):
    page = open_page(shipped)
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.get_by_label("Speed").press("End")
    page.get_by_role("button", name="Again").wait_for()
    for button in ("Noise", "Block 2 writes", "Block 1 fills in"):
        page.get_by_role("button", name=button).press("Enter")
        assert page.evaluate(PALE) == []


def test_models_of_another_kind_are_refused(build, capsys, tmp_path):
    out = tmp_path / "page.html"
    with pytest.raises(SystemExit) as stop:
        build.main(["english-mini", "--out", str(out)])
    assert stop.value.code == 2
    assert "english-mini" in capsys.readouterr().err
    assert not out.exists()


def test_weights_keep_their_values(build):
    """Two bytes where bfloat16 is exact, else four; tensors of four bytes come first."""
    weights = {"half": torch.tensor([1.5, -0.25]), "full": torch.tensor([[0.1], [3.0]])}
    places, data = build.packed(weights)
    assert json.loads(json.dumps(places)) == [
        {"name": "full", "start": 0, "size": 2, "half": False},
        {"name": "half", "start": 8, "size": 2, "half": True},
    ]
    assert torch.frombuffer(bytearray(data[:8]), dtype=torch.float32).tolist() == [
        torch.tensor(0.1).item(),
        3.0,
    ]
    halves = torch.frombuffer(bytearray(data[8:]), dtype=torch.bfloat16)
    assert halves.tolist() == [1.5, -0.25]
