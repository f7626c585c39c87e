"""Figures that no recipe makes: their records, and the two measurements that make some of them."""

import re

import pytest
import torch

import tarflowlm
from docs_cases import ROOT
from reproduction import figures, paired, written_back
from reproduction.passes import CONTROL


def test_records_of_figures_are_rows_of_tables_with_a_command():
    lines = figures.lines()
    for line in lines:
        assert list(line) == ["table", "cells", "command", "seed", "hardware"]
        assert line["command"]
        assert list(line["cells"]) == list(figures.rows(line["table"])[0])
    shown = [
        name
        for page in figures.PAGES
        for name in re.findall(r"<!-- figures: ([\w-]+) -->", page.read_text(encoding="utf-8"))
    ]
    assert sorted([*shown, CONTROL]) == sorted({line["table"] for line in lines})
    fig6 = (ROOT / "docs" / "reproduce" / "fig6.md").read_text(encoding="utf-8")
    assert figures.markdown(CONTROL) in fig6


def test_a_page_gets_the_rows_on_record():
    page = f"before\n{figures.begin('other-english')}\nold\n{figures.END}\nafter"
    written = figures.written(page)
    assert written.startswith("before\n<!--")
    assert written.endswith("-->\nafter")
    assert "old" not in written
    assert "| WikiText-2, test | <= 3.053 | 3.008 |\n" in written
    assert figures.written(written) == written
    assert figures.number("<= 3,008.5 ± 2") == 3008.5


@pytest.mark.slow
def test_the_control_puts_noise_where_a_letter_follows_from_those_before():
    tokenizer = tarflowlm.load("english-mini-ar").tokenizer
    text = " once upon a time there was a king who lived in the castle of the princess and"
    tokens = torch.from_numpy(tokenizer.encode(text)).long()[None]
    found = written_back.blanked(tokens)
    changed = (found != tokens)[0].nonzero()[:, 0].tolist()
    assert 0 < len(changed) < 0.3 * len(text)
    # the first letters follow from nothing
    assert min(changed) > 1


@pytest.mark.slow
def test_paired_difference_is_that_of_the_bits(capsys):
    paired.main("english-mini", "english-mini-ar", "tales", "3")
    printed = capsys.readouterr().out
    first, second, difference, error = map(float, re.findall(r"[+-]?\d\.\d{4}", printed))
    assert difference == pytest.approx(first - second, abs=2e-4)
    assert 0 < error < 0.1
