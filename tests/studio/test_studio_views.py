"""The views without a browser: what they show, that texts are texts, and that any value is answered in words."""

import re
from dataclasses import replace
from html import unescape

import pytest
import torch

from tarflowlm.data import ByteTokenizer
from tarflowlm.errors import UserError
from tarflowlm.generation import generate
from tarflowlm.studio import request
from tarflowlm.studio.catalogue import collect
from tarflowlm.studio.curves import runs, ticks
from tarflowlm.studio.edit import TARGETS, blanked, blend, named, replace_words, rewrite
from tarflowlm.studio.infill import infill, weighed
from tarflowlm.studio.job import Job
from tarflowlm.studio.pieces import guarded
from tarflowlm.studio.rows import symbols
from tarflowlm.studio.score import _symbols, compare
from tarflowlm.studio.write import _generate, _order, _so_far, write

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"

VALID = {
    write: ["flow", "the ", 12, 1.0, 1.0, 1, 0],
    infill: ["flow", "the ___ saw", 3, 2, 1.0, 0],
    replace_words: ["flow", "the cat saw", "cat", 2, 2, 0],
    rewrite: ["flow", "the cat saw", "words", 0.5, 2, 0],
    blend: ["flow", "the cat saw", "nine old men", "words", 0],
    compare: [["flow", "baseline"], "the cat saw"],
    runs: [["flow", "baseline"], "tokens"],
}
"""Values that every view accepts."""


def shown(view, catalogue, values) -> str:
    """What a view shows at the end, without its style."""
    *_, last = guarded(view)(catalogue, *values)
    return re.sub(r"<style>.*?</style>", "", last, flags=re.DOTALL)


def words(html: str) -> str:
    return unescape(re.sub(r"<[^>]+>", "", html))


@pytest.mark.parametrize("view", VALID, ids=lambda view: view.__name__)
def test_a_view_answers(catalogue, view):
    html = shown(view, catalogue, VALID[view])
    assert "st-card" in html
    assert "st-notice" not in html


@pytest.mark.parametrize("value", [None, "x" * 5000, float("nan"), 10**9, 10**400, "../../etc", ["flow"], [], {}])
@pytest.mark.parametrize("view", VALID, ids=lambda view: view.__name__)
def test_any_value_is_answered_in_words(catalogue, caplog, view, value):
    for place in range(len(VALID[view])):
        values = list(VALID[view])
        values[place] = value
        html = shown(view, catalogue, values)
        assert "Traceback" not in html
        assert "This did not work" not in html, caplog.text


@pytest.mark.parametrize("view", VALID, ids=lambda view: view.__name__)
def test_a_text_is_shown_as_text(catalogue, view):
    for place, value in enumerate(VALID[view]):
        if isinstance(value, str):
            html = shown(view, catalogue, [*VALID[view][:place], HOSTILE, *VALID[view][place + 1 :]])
            assert not re.search(r"<script|<img", html)


def test_an_unexpected_error_is_no_stack(caplog):
    def broken():
        yield "<p>"
        raise ZeroDivisionError("<b>secret</b>")

    *_, last = guarded(broken)()
    assert "This did not work" in last
    assert "secret" not in last
    assert "ZeroDivisionError" in caplog.text


def test_what_is_written_is_what_the_library_writes(catalogue):
    checkpoint = catalogue.load("flow")
    prompt = torch.from_numpy(checkpoint.tokenizer.encode("the "))
    expected = generate(
        checkpoint.model,
        num_tokens=12,
        prompt=prompt,
        generator=torch.Generator().manual_seed(0),
        decoder="auto",
    )
    html = shown(write, catalogue, VALID[write])
    stage = re.search(r'class="st-stage">(.*?)</div>', html)
    assert words(stage[1]) == checkpoint.tokenizer.decode(expected.tokens[0])


def test_upper_case_and_signs_are_normalised(catalogue):
    assert "the cat " in words(shown(write, catalogue, ["flow", "The Cat, ", 12, 1.0, 1.0, 1, 0]))


def test_a_template_keeps_what_is_given(catalogue):
    html = shown(infill, catalogue, VALID[infill])
    texts = [words(found) for found in re.findall(r'class="st-stage">(.*?)</div>', html)]
    assert texts
    assert all(re.fullmatch("the ... saw", text) for text in texts)
    assert "count" in words(html)


def test_weights_of_equal_texts_add_up():
    tokens = torch.tensor([[1, 2], [3, 4], [1, 2]])
    found = weighed(tokens, torch.tensor([0.5, 0.0, 0.5]).log())
    assert [(c.tokens.tolist(), round(c.weight, 6)) for c in found.found] == [([1, 2], 1.0), ([3, 4], 0.0)]
    assert found.effective == pytest.approx(2.0)
    assert weighed(tokens, torch.full((3,), -torch.inf)).effective == pytest.approx(3.0)


def test_only_whole_words_are_replaced(catalogue):
    tokenizer = catalogue.load("flow").tokenizer
    tokens = torch.from_numpy(tokenizer.encode("cat a catcat cat"))
    template = blanked(tokens, named(tokenizer, tokens, "Cat"))
    assert "".join("_" if t < 0 else tokenizer.decode([t]) for t in template.tolist()) == "___ a catcat ___"
    with pytest.raises(UserError, match="no word of the text"):
        named(tokenizer, tokens, "dog")


def test_words_are_redrawn_where_particles_know_little():
    """Of english-passes, whose last block writes the text."""
    text = "the government of the united states is a great nation"
    html = shown(replace_words, collect(["english-passes"]), ["english-passes", text, "great, states", 2, 1, 0])
    original, *texts = (words(found) for found in re.findall(r'class="st-stage">(.*?)</div>', html))
    assert original == text
    assert len(texts) == 2
    assert text not in texts
    # what was there may be shown, crossed out, before what is there
    assert all(found.startswith("the government of the united ") for found in texts)


def test_word_pieces_are_shown_as_text():
    text = "a na\u00efve \u2014 word"
    tokenizer = ByteTokenizer()
    tokens = torch.from_numpy(tokenizer.encode(text))
    assert "".join(symbols(tokens.tolist(), tokenizer)) == text
    assert "".join(symbols(tokens[:4].tolist(), tokenizer)) == "a na"
    assert "".join(symbols(tokens[:5].tolist(), tokenizer)) == "a na\ufffd"
    assert named(tokenizer, tokens, "na\u00efve") == [(2, 8)]
    assert "\\xc3" in _symbols(tokens, tokenizer)


def test_an_edit_of_strength_zero_changes_nothing(catalogue):
    for target in TARGETS:
        html = words(shown(rewrite, catalogue, ["flow", "the cat saw", target, 0.0, 1, 0]))
        assert "0 of 11 tokens changed" in html


@pytest.mark.parametrize("target", TARGETS)
def test_the_way_to_another_text_begins_and_ends_at_them(catalogue, target):
    html = shown(blend, catalogue, ["flow", "the cat saw", "nine old men saw", target, 0])
    texts = [words(found) for found in re.findall(r'class="tl-text">(.*?)</div>', html)]
    assert (texts[0], texts[-1]) == ("the cat saw", "nine old me")


def test_a_baseline_cannot_be_edited(catalogue):
    assert "choose a flow" in shown(rewrite, catalogue, ["baseline", "the cat saw", "noise", 0.5, 1, 0])


def test_the_bound_of_a_flow_is_marked(catalogue):
    html = words(shown(compare, catalogue, VALID[compare]))
    flow, baseline = re.findall(r"(\D\D)[\d.]+ bits per character", html)
    assert flow == "≤ "
    assert baseline != "≤ "


def test_curves_are_drawn_and_follow_the_run(catalogue):
    html = shown(runs, catalogue, VALID[runs])
    assert html.count("<svg") == 2
    assert "finished" in words(html)
    assert shown(runs, catalogue, [["flow"], "seconds"]).count("<path") < html.count("<path")


def test_a_model_without_its_log_has_no_curve(catalogue):
    both = replace(catalogue, places=catalogue.places | collect([]).places)
    html = shown(runs, both, [["flow", "english-mini"], "tokens"])
    assert "English-mini is a model without its training log" in html
    assert html.count("<svg") == 2


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1.9, 5.2), (0, 1e7), (0, 3e-4)])
def test_ticks_are_few_and_round(low, high):
    found = ticks(float(low), float(high))
    assert 2 <= len(found) <= 8
    assert all(low <= value <= high for value in found)


def test_a_catalogue_knows_its_names_alone(catalogue, folder):
    assert catalogue.models == ["flow", "baseline"]
    assert catalogue.flows == ["flow"]
    for name in (str(folder / "flow"), "../flow", "", None, 3, "english-mini"):
        with pytest.raises(UserError, match="no model of that name"):
            catalogue.load(name)


def test_a_catalogue_tells_runs_of_one_name_apart(folder, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "flow").symlink_to(tmp_path / "copy")
    (tmp_path / "copy").mkdir()
    for name in ("config.json", "manifest.json"):
        (tmp_path / "copy" / name).write_bytes((folder / "flow" / name).read_bytes())
    found = collect([str(folder), str(tmp_path / "other")])
    assert found.models == ["flow", "other/flow", "baseline"]
    with pytest.raises(UserError, match="no weights yet"):
        found.load("other/flow")


def test_without_names_the_catalogue_has_all_that_are_shipped():
    assert collect([]).models == ["english-small", "english-mini", "english-passes", "english-mini-ar"]


def test_a_catalogue_refuses_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match="neither a run directory"):
        collect([str(tmp_path)])


@pytest.mark.parametrize("value", [True, 1.5, float("inf"), "3", None, 0, 5])
def test_a_whole_number_is_within_bounds(value):
    with pytest.raises(UserError, match=r"^samples"):
        request.whole(value, "samples", 1, 4)


def test_the_progress_of_a_text_in_windows_counts_all_of_them(catalogue):
    checkpoint = catalogue.load("flow")
    order = _order(checkpoint, "the ", 80, 1.0, 1.0, 1, 0)
    job = Job(lambda job: _generate(checkpoint, order, job))
    list(job.follow())
    job.ticks = job.ticks[: len(job.ticks) // 2]
    assert "width:50.0%" in _so_far(checkpoint, order, job)
