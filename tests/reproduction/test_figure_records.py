"""Figures that no recipe makes: their records, and a measurement that makes some of them."""

import re

import pytest

from docs_cases import ROOT
from reproduction import figures, paired
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
def test_paired_difference_is_that_of_the_bits(capsys):
    paired.main("english-mini", "english-mini-ar", "tales", "3")
    printed = capsys.readouterr().out
    first, second, difference, error = map(float, re.findall(r"[+-]?\d\.\d{4}", printed))
    assert difference == pytest.approx(first - second, abs=2e-4)
    assert 0 < error < 0.1
