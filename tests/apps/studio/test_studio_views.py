"""The views without a browser: the right tokens, texts as texts, and an answer in words to any
value.
"""

import json
import re
import shlex
import shutil
from html import unescape
from urllib.parse import parse_qsl

import pytest
import torch
from studio_cases import shown, stages, words

from helpers import mostly_nightly, save_run, tiny_flow
from tarflowlm.data import CharTokenizer
from tarflowlm.errors import UserError
from tarflowlm.generation import generate
from tarflowlm.generation.texts import Samples
from tarflowlm.pretrained import Pretrained
from tarflowlm.requests import Writing
from tarflowlm.terminal.texts import trust
from tarflowlm_apps.studio.catalogue import Catalogue
from tarflowlm_apps.studio.edit import KINDS, change, exchange, rewrite
from tarflowlm_apps.studio.pieces import guarded, quoted
from tarflowlm_apps.studio.runs import runs
from tarflowlm_apps.studio.score import compare
from tarflowlm_apps.studio.values import from_address, seed
from tarflowlm_apps.studio.write import infill, offer, write

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"

VALID = {
    write: ["flow", "", "the ", 12, 1.0, 1.0, 1, 0, "", ""],
    infill: ["flow", "the ___ saw", 3, 2, 1.0, 0],
    rewrite: ["flow", "the cat saw", "cat", 2, 0],
    exchange: ["flow", "the cat saw", "cat", "dog", 1, 2, 0],
    change: ["flow", "the cat saw", "latents", 0.5, 2, 0],
    compare: [["flow", "baseline"], "the cat saw"],
    runs: [["flow", "baseline"]],
}
"""Values that every view accepts."""
EVERY_VIEW = pytest.mark.parametrize("view", VALID, ids=lambda view: view.__name__)


@pytest.mark.slow
@EVERY_VIEW
def test_view_answers(catalogue, view):
    html = shown(view, catalogue, VALID[view])
    assert "st-card" in html
    assert "st-notice" not in html


@pytest.mark.slow
@EVERY_VIEW
@pytest.mark.parametrize("value", [None, "x" * 5000, float("nan"), 10**400, ["flow"], HOSTILE])
def test_any_value_is_answered_in_words(catalogue, caplog, view, value):
    for place in range(len(VALID[view])):
        html = shown(view, catalogue, [*VALID[view][:place], value, *VALID[view][place + 1 :]])
        assert "Traceback" not in html
        assert "This did not work" not in html, caplog.text
        assert not re.search(r"<script|<img", html)


def test_unexpected_error_is_no_stack(caplog):
    def broken():
        yield "<p>"
        raise ZeroDivisionError("<b>secret</b>")

    *_, last = guarded(broken)()
    assert "This did not work" in last
    assert "secret" not in last
    assert "ZeroDivisionError" in caplog.text


def test_written_text_is_the_library_s(catalogue):
    checkpoint = catalogue.load("flow")
    prompt = torch.from_numpy(checkpoint.tokenizer.encode("the "))
    generator = torch.Generator().manual_seed(0)
    expected = generate(
        checkpoint.model, num_tokens=12, prompt=prompt, generator=generator, decoder="auto"
    )
    html = shown(write, catalogue, VALID[write])
    expected_text = checkpoint.tokenizer.decode(expected.tokens[0])
    assert stages(html) == [expected_text]
    rows = stages(html, "tl-text")
    assert rows[-1] == expected_text
    assert len(rows) > 1
    assert '<span class="tl-given">the </span>' in html


def test_two_models_write_side_by_side(catalogue):
    html = shown(write, catalogue, ["flow", "baseline", *VALID[write][2:]])
    alone = [["flow", ""], ["baseline", ""]]
    texts = [stages(shown(write, catalogue, [*names, *VALID[write][2:]])) for names in alone]
    assert stages(html) == [*texts[0], *texts[1]]
    assert html.count("st-column") == html.count("st-asked") == 2


def test_normalised_text_is_shown(catalogue):
    html = words(shown(write, catalogue, ["flow", "", "The 9 Cats, ", 20, 1.0, 1.0, 1, 0, "", ""]))
    assert "the nine cats " in html
    assert "read as: the nine cats" in html


def test_each_text_says_what_it_rests_on(catalogue):
    html = shown(write, catalogue, ["flow", "", "the ___ saw", 24, 1.0, 1.0, 2, 0, "", ""])
    request = Writing(template="the ___ saw", temperature=1.0, num=2, seed=0)
    (written,) = Samples(request, catalogue.load("flow"), past_end=True).batches()
    rests = [trust(written.generation.evidence, slice(row, row + 1)) for row in range(2)]
    assert rests[0] != rests[1]
    assert re.findall(r"This text ([^<]+)\.<", html) == rests


def test_a_text_of_a_stack_ends_with_its_document(tmp_path):
    tokenizer = CharTokenizer("abc ", "none", has_end=True)
    save_run(tmp_path / "stack", tiny_flow(vocab_size=5, context=32), tokenizer=tokenizer)
    catalogue = Catalogue([str(tmp_path)])
    values = ["stack", "", "a b", 30, 1.0, 1.0, 3, 0, "", ""]
    html = shown(write, catalogue, values)
    lm = Pretrained(**vars(catalogue.load("stack")))
    texts = lm.write("a b", length=30, temperature=1.0, num=3, seed=0)
    assert [text.removesuffix("∎") for text in stages(html)] == texts
    assert any(text.endswith("∎") for text in stages(html))


def test_an_escaped_blank_is_a_character(catalogue):
    html = shown(write, catalogue, ["baseline", "", r"the \_cat\_ ", 24, 1.0, 1.0, 1, 0, "", ""])
    assert "read as: the cat" in words(html)
    html = shown(write, catalogue, ["baseline", "", r"the \_cat\_ _", 24, 1.0, 1.0, 1, 0, "", ""])
    assert "st-notice" not in html
    assert re.fullmatch("the cat .", stages(html)[0])


def test_template_keeps_given_tokens(catalogue):
    html = shown(infill, catalogue, VALID[infill])
    assert {bool(re.fullmatch("the ... saw", text)) for text in stages(html)} == {True}
    assert "independent tries of 3" in words(html)


def test_likely_lengths_of_a_gap_are_shown(catalogue):
    for name in ("flow", "baseline"):
        html = shown(infill, catalogue, [name, "the [...3] saw", 3, 2, 1.0, 0])
        assert {bool(re.fullmatch("the .{1,3} saw", text)) for text in stages(html)} == {True}
        assert "How long the gaps may be" in words(html)
        assert len(re.findall(r"<li title", html)) == 3
        assert "[...3]" in words(html)


def test_a_gap_of_a_text_with_blanks_is_as_long_as_it_was_drawn(catalogue):
    text = "t_e [...8] saw"
    html = shown(write, catalogue, ["flow", "", text, 20, 0.8, 1.0, 1, 0, "", ""])
    expected = Pretrained(**vars(catalogue.load("flow"))).fill(text, temperature=0.8, seed=0)
    assert stages(html) == [expected]
    assert '<span class="tl-given"> saw</span>' in html or 'tl-given">saw' in html


def test_only_whole_words_are_rewritten(catalogue):
    html = shown(rewrite, catalogue, ["flow", "cat a catcat cat", "Cat", 3, 0])
    _, *found = stages(html)
    assert {bool(re.fullmatch("... a catcat ...", text)) for text in found} == {True}
    assert "--rewrite Cat --everywhere" in words(html)
    html = shown(rewrite, catalogue, ["flow", "cat a catcat", "dog", 3, 0])
    assert "st-notice" in html
    assert "words to rewrite" in shown(rewrite, catalogue, ["flow", "cat a catcat", " , ", 3, 0])


def test_a_word_takes_the_place_of_another(catalogue):
    html = shown(exchange, catalogue, ["flow", "the cat saw", "cat", "dog", 0, 2, 0])
    # equal edits are one
    assert stages(html) == ["the cat saw", "the dog saw"]
    assert "edits 1 and 2" in words(html)
    assert "--replace cat dog --around 0" in words(html)
    assert "st-notice" in shown(exchange, catalogue, ["flow", "the cat saw", "cat", " ", 0, 1, 0])


def test_words_are_wanted_and_letters_forbidden(catalogue):
    html = shown(write, catalogue, ["flow", "", "the ", 14, 1.0, 1.0, 1, 0, "cat", "e"])
    assert "st-notice" not in html, words(html)
    (text,) = stages(html)
    assert " cat" in text
    assert "e" not in text.removeprefix("the ")
    assert "--contains cat" in words(html)
    assert "--without e" in words(html)
    html = shown(write, catalogue, ["flow", "", "the _", 24, 1.0, 1.0, 1, 0, "cat", ""])
    assert "st-notice" in html


def test_a_request_that_is_asked_again_gets_the_next_seed():
    gr = pytest.importorskip("gradio")
    from tarflowlm_apps.studio.page import newest, next_seed

    def view(*given):
        yield str(given)

    one, other, last = gr.Request(session_hash="1"), gr.Request(session_hash="2"), {}
    list(newest(view, last)(one, "text", 0, "more"))
    again = next_seed(1, last)
    assert again(one, "text", 0, "more") == 1
    assert again(one, "another text", 0, "more") == 0
    assert again(other, "text", 0, "more") == 0
    assert again(one, "text", None, "more") is None
    assert next_seed(1)(other, "text", 7, "more") == 8


@pytest.mark.parametrize("kind", KINDS)
def test_edit_of_strength_zero_changes_nothing(catalogue, kind):
    html = words(shown(change, catalogue, ["flow", "the cat saw", kind, 0.0, 1, 0]))
    assert "0 of 11 tokens changed" in html


def test_bound_of_a_flow_is_marked(catalogue):
    html = shown(compare, catalogue, VALID[compare])
    assert re.findall(r"<b>(≤?).{0,3}[\d.]+</b> bits per character", html) == ["≤", ""]
    assert [stages(html, "st-heat")[n] for n in range(3)] == ["the cat saw"] * 3


def test_a_scored_text_is_watched_in_passes():
    """Where more than one block changes the text; passes end with the text itself."""
    catalogue = Catalogue()
    html = shown(compare, catalogue, [["english-passes", "english-mini"], "the little girl ran"])
    assert "Passes of english-passes" in html
    assert "Passes of english-mini" not in html
    *_, last = re.findall(r'<div class="tl-text">(.*?)</div>', html.split("Passes of ")[1])
    assert words(last) == "the little girl ran"
    beyond = "the little girl ran " * 20
    assert "Passes of" not in shown(compare, catalogue, [["english-passes"], beyond])


def test_characters_of_several_tokens_are_whole_and_named_as_rare(catalogue):
    models = Catalogue(["stories"])
    html = shown(compare, models, [["stories"], "Der M\u00fcller \u201csah\u201d \u2013 den"])
    text = "Der M\u00fcller \u201csah\u201d - den"
    assert stages(html, "st-heat") == [text]
    assert f"read as: {text}" in words(html)
    assert "Hardly ever in the text that it learnt from, if at all: \u00fc" in words(html)
    assert "Hardly ever" not in shown(compare, catalogue, VALID[compare])


@pytest.mark.slow
def test_curves_follow_the_chosen_runs(catalogue, folder):
    both, one = (shown(runs, catalogue, [names]) for names in (["flow", "baseline"], ["flow"]))
    assert (both.count("<svg"), one.count("<svg")) == (2, 1)
    assert ("baseline" in words(both), "baseline" in words(one)) == (True, False)
    assert "finished" in words(both)
    more = Catalogue([str(folder), "english-mini"])
    html = shown(runs, more, [["flow", "english-mini"]])
    assert html.count("<svg") == 1
    assert "first 12 of 13 runs" in words(shown(runs, catalogue, [["flow"] * 13]))


def test_texts_of_a_run_are_shown_as_it_learnt(catalogue, folder):
    html = shown(runs, catalogue, [["flow"]])
    lines = (folder / "flow" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    valid = [line for line in map(json.loads, lines) if line["split"] == "valid"]
    assert stages(html, "tl-text") == [line["text"] for line in valid]
    assert stages(html) == [valid[-1]["text"]]
    assert stages(html, "tl-label")[0] == f"step 0: ≤ {valid[0]['bpc']:.2f} bits per character"
    assert 'aria-label="text of flow"' in html


def test_without_a_run_the_page_says_how_to_make_one():
    html = words(shown(runs, Catalogue(["english-mini"]), [[]]))
    assert "No run yet" in html
    assert "tarflowlm quickstart" in html
    assert "tarflowlm studio stories runs" in html


def test_catalogue_has_its_names_alone(catalogue, folder):
    assert catalogue.models == ["flow", "baseline"]
    assert catalogue.pair == ["flow", "baseline"]
    for name in (str(folder / "flow"), "../flow", 3, "english-mini"):
        with pytest.raises(UserError, match="no model of that name"):
            catalogue.load(name)
    for name in ("", None):
        with pytest.raises(UserError, match="choose a model"):
            catalogue.load(name)
    assert Catalogue().pair == ["stories", "stories-ar"]
    assert Catalogue().models == [
        "stories",
        "english-mini",
        "english-passes",
        "english-small",
        "english-mini-ar",
        "stories-ar",
    ]


def test_runs_of_one_name_are_all_in_the_catalogue(folder, tmp_path):
    for place in ("b/x", "c/x", "x"):
        shutil.copytree(folder / "flow", tmp_path / place)
    inner = tmp_path / "c"
    catalogue = Catalogue([str(tmp_path / "x"), str(tmp_path)])
    names = {entry.place: name for name, entry in catalogue.entries.items()}
    assert len(names) == 3
    # a new run takes no name of another one, and a folder that lost its runs stops no other
    shutil.copytree(folder / "flow", tmp_path / "a" / "x")
    shutil.rmtree(tmp_path / "x")
    # a model of another library is none of ours
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    catalogue.refresh()
    found = {entry.place: name for name, entry in catalogue.entries.items()}
    assert found[inner / "x"] == names[inner / "x"]
    assert set(found) == {tmp_path / place / "x" for place in "abc"}
    assert set(Catalogue([str(tmp_path)]).entries) == {"x", f"{tmp_path}/b/x", f"{inner}/x"}
    with pytest.raises(UserError, match="configuration of a run"):
        Catalogue([str(tmp_path / "other")])


def test_the_request_is_above_its_result(catalogue, folder):
    html = shown(write, catalogue, ["flow", "", "the 'cat", 12, 0.8, 1.0, 2, 3, "", ""])
    assert words(html).startswith("tarflowlm sample")
    command, *_ = re.findall(r"<code>(.*?)</code>", html)
    program, name, model, *options = shlex.split(words(command))
    assert (program, name, model) == ("tarflowlm", "sample", f"{folder}/flow")
    given = {"--prompt": "the 'cat", "--length": "12", "--temperature": "0.8"}
    given |= {"--num": "2", "--seed": "3"}
    assert dict(zip(options[::2], options[1::2], strict=True)) == given
    html = shown(compare, catalogue, VALID[compare])
    asked = f'score {folder}/flow --text "the cat saw" --baseline {folder}/baseline'
    assert words(html).startswith(f"tarflowlm {asked}")
    assert f'data-copy="tarflowlm score {folder}' in html


def test_others_for_a_word_come_from_a_model_that_fills_gaps():
    catalogue = Catalogue()
    html = shown(offer, catalogue, ["english-passes", "The little girl [...] into the wood."])
    assert words(html).startswith("stories would also write:")
    assert all(word and word == word.strip() for word in re.findall('data-word="(.*?)"', html))
    # the last word of a text is one token
    assert "data-word" in shown(offer, catalogue, ["stories", "The little [...]"])
    assert "st-notice" in shown(offer, catalogue, ["english-mini", "the little [...]"])
    assert catalogue.for_gaps("english-mini-ar") == "english-mini-ar"


NEAR = {
    "letters": ("flow", "the cat saw a mat ", " and the old men"),
    # each letter of another script takes several tokens
    "tokens": ("stories", 12 * "девочка пошла в лес ", 20 * " и там"),
}


@pytest.mark.parametrize("case", mostly_nightly(NEAR, "letters"))
def test_others_for_a_word_of_a_long_text_come_from_the_words_near_it(folder, case):
    name, before, after = NEAR[case]
    html = shown(offer, Catalogue([str(folder), "stories"]), [name, f"{before}[...]{after}"])
    assert "st-notice" not in html
    assert "data-word" in html
    # studio.js finds the word by what it has asked for
    assert f'data-gap="{name}\n{before}[...]{after}"' in html


def test_passes_play_where_blocks_share_the_work():
    """Elsewhere the page says that there is nothing to see, and which model shows something."""
    catalogue = Catalogue()
    for name, plays in (("english-passes", True), ("english-mini", False)):
        html = shown(write, catalogue, [name, "", "", 24, 0.8, 1.0, 1, 0, "", ""])
        assert ("data-play" in html) is plays


def test_the_first_example_comes_to_its_end():
    pytest.importorskip("gradio")
    from tarflowlm_apps.studio.page import EXAMPLES

    _, model, text, length, seed = EXAMPLES[0]
    html = shown(write, Catalogue(), [model, "", text, length, 0.9, 0.9, 1, seed, "", ""])
    assert stages(html)[0].endswith(".∎"), stages(html)
    assert "cut at" not in html


def test_the_example_of_passes_fills_every_gap():
    pytest.importorskip("gradio")
    from tarflowlm_apps.studio.page import EXAMPLES

    (example,) = (one for one in EXAMPLES if one[1] == "english-passes")
    _, model, text, length, seed = example
    html = shown(write, Catalogue(), [model, "", text, length, 0.8, 1.0, 1, seed, "", ""])
    *_, first, last = re.findall(r"after block \d: [^<]+", html.split("st-rows")[1])
    assert re.fullmatch(r"after block 2: \d+ of \d+ written, ([5-9]|\d\d) still noise", first)
    assert re.fullmatch(r"after block 1: ([5-9]|\d\d) of \d+ changed", last)
    # given letters are no change
    assert text in stages(html, "tl-given")[-1] or 'tl-given">' + text in html


def test_a_model_without_passes_names_one_with_them():
    catalogue = Catalogue(["english-passes", "english-mini"])
    assert catalogue.for_passes == "english-passes"
    two_blocks = Catalogue()
    html = shown(write, two_blocks, ["stories", "", "Once upon", 24, 0.8, 1.0, 1, 0, "", ""])
    is_one_block = two_blocks.entry("stories").run.model.num_blocks == 1
    assert ("Choose english-passes to see two steps" in html) is not is_one_block


def test_a_gap_that_a_model_cannot_fill_is_offered_to_one_that_can():
    catalogue = Catalogue()
    html = shown(
        write, catalogue, ["english-passes", "", "the [...] of the king", 24, 0.8, 1, 1, 0, "", ""]
    )
    (link,) = re.findall('href="([^"]+)"', html)
    asked = dict(parse_qsl(unescape(link).removeprefix("?")))
    assert (asked["model"], asked["text"]) == ("stories", "the [...] of the king")
    html = shown(infill, catalogue, ["english-passes", "the [...] of the king", 2, 2, 0.8, 0])
    assert "or choose stories" in words(html)


def test_parts_of_words_are_not_rewritten(catalogue):
    html = shown(rewrite, catalogue, ["flow", "the fox ran", "o", 1, 0])
    assert "'o' is part of a word: give 'fox'" in words(html)
    # a discrete model rewrites, too, and its bits are exact
    html = shown(rewrite, catalogue, ["baseline", "the fox ran", "fox", 1, 0])
    assert re.fullmatch("the ... ran", stages(html)[-1])
    assert "≤" not in html


def test_words_of_a_command_are_quoted_for_all_shells():
    texts = ["the cat", "the king's son", "a\nb", "--x"]
    assert [quoted(text) for text in texts] == ['"the cat"', '"the king\'s son"', '"a\nb"', "--x"]
    for text in (*texts, 'say "no"', "$HOME", "100 %", "a\\b", "", "`x`"):
        assert shlex.split(quoted(text)) == [text]


def test_numbers_are_written_out():
    with pytest.raises(UserError, match="seed: give a number from 0 to 2,147,483,648"):
        seed(2**40)


def test_a_run_that_begins_later_is_found(folder, tmp_path):
    shutil.copytree(folder / "flow", tmp_path / "first")
    catalogue = Catalogue([str(tmp_path)])
    shutil.copytree(folder / "baseline", tmp_path / "more" / "second")
    assert catalogue.runs == ["first"]
    catalogue.refresh()
    assert catalogue.runs == ["first", "second"]
    assert catalogue.entry("second").command_name == str(tmp_path / "more" / "second")
    # a run that cannot be read takes none of the others away
    (tmp_path / "first" / "config.json").write_text("{", encoding="utf-8")
    shutil.copytree(folder / "baseline", tmp_path / "third")
    catalogue.refresh()
    assert catalogue.runs == ["first", "second", "third"]


def test_a_run_that_is_removed_is_chosen_no_more(folder, tmp_path):
    pytest.importorskip("gradio")
    from tarflowlm_apps.studio.page import build

    for name in ("flow", "baseline"):
        shutil.copytree(folder / name, tmp_path / name)
    blocks = build(Catalogue([str(tmp_path)]))
    look = next(one.fn for one in blocks.fns.values() if getattr(one.fn, "__name__", "") == "look")
    _, boxes, _ = look(["flow", "baseline"])
    # the choice is the visitor's, who may be clicking
    assert "value" not in boxes.constructor_args
    shutil.rmtree(tmp_path / "flow")
    _, boxes, html = look(["flow", "baseline"])
    assert boxes.constructor_args["value"] == ["baseline"]
    assert "st-notice" not in html


def test_a_link_brings_its_request_back(catalogue):
    html = shown(write, catalogue, ["flow", ["baseline"], "a & b", 12, 0.8, 1.0, 1, 3, "", ""])
    (link,) = re.findall('href="([^"]+)"', html)
    asked = dict(parse_qsl(unescape(link).removeprefix("?")))
    usual = ["baseline", [], "", 96, 1.0, 1.0, 1, 0, "", ""]
    assert from_address(asked, usual, catalogue.models) == [
        "flow",
        ["baseline"],
        "a & b",
        12,
        0.8,
        1.0,
        1,
        3,
        "",
        "",
    ]
    assert from_address({}, usual, catalogue.models) == usual
    bad = {"model": "../etc", "beside": "etc", "length": "x", "seed": "1e9", "temperature": HOSTILE}
    assert from_address(bad, usual, catalogue.models) == usual


@pytest.mark.slow
def test_a_visitor_s_next_request_ends_the_one_before():
    gr = pytest.importorskip("gradio")
    from tarflowlm_apps.studio.page import newest

    ended = []

    def view(name):
        try:
            for number in range(3):
                yield f"{name}{number}"
        finally:
            ended.append(name)

    handle, one, other = (
        newest(view, {}),
        gr.Request(session_hash="1"),
        gr.Request(session_hash="2"),
    )
    first, elsewhere = handle(one, "a"), handle(other, "b")
    assert (next(first), next(elsewhere)) == ("a0", "b0")
    second = handle(one, "c")
    assert next(second) == "c0"
    assert list(first) == []
    assert ended == ["a"]
    assert (list(second), list(elsewhere)) == (["c1", "c2"], ["b1", "b2"])
