"""The command line of `reproduction`, which lies beside the package."""

from types import SimpleNamespace

import pytest

from reproduction.__main__ import reproduce
from tarflowlm.cli.main import main


@pytest.fixture
def run(capsys):
    """run(*argv): exit status, stdout and stderr of `python -m reproduction`."""

    def call(*argv: object) -> SimpleNamespace:
        status = 0
        try:
            main([str(word) for word in argv], dispatch=reproduce)
        except SystemExit as stop:
            status = stop.code or 0
        out, err = capsys.readouterr()
        return SimpleNamespace(status=status, out=out, err=err)

    return call
