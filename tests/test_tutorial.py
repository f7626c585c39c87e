"""The tutorial runs from top to bottom in an empty folder, and its stored outputs are small and
from one run.

After a change, store new outputs, with nbclient and ipykernel: `jupyter execute --inplace
docs/tutorial.ipynb`. Links of its prose are followed in test_docs.py.
"""

import re
import subprocess
import sys

import pytest

from docs_cases import ROOT, cells

NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"
CODE = cells(NOTEBOOK, "code")
OUTPUTS = [output for cell in CODE for output in cell["outputs"]]
TEXT_BYTES, IMAGE_BYTES = 20_000, 60_000
STAND_IN = """
import sys, types

display = types.ModuleType("IPython.display")
display.HTML = str
display.display = print
sys.modules |= {"IPython": types.ModuleType("IPython"), "IPython.display": display}
"""
"""Replaces what the notebook uses of IPython, which need not be installed."""


@pytest.mark.slow
@pytest.mark.nightly
def test_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    code = "\n\n".join([STAND_IN, *("".join(cell["source"]) for cell in CODE)])
    short = code.replace("\nMINUTES = 5\n", "\nMINUTES = 0.02\n")
    assert short != code
    (tmp_path / "tutorial.py").write_text(short, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "tutorial.py"], capture_output=True, text=True, cwd=tmp_path, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"largest error (\S+)", done.stdout)[1]) < 1e-9
    exact, by_autograd = re.search(r"log \|det J\|: (\S+); by autograd (\S+)", done.stdout).groups()
    assert float(exact) == pytest.approx(float(by_autograd))
    assert re.search(r"test: <= \d", done.stdout)


def test_stored_outputs_are_small():
    for output in OUTPUTS:
        for kind, value in {"text": output.get("text", ""), **output.get("data", {})}.items():
            assert len("".join(value)) <= (
                IMAGE_BYTES if kind.startswith("image/") else TEXT_BYTES
            ), kind
