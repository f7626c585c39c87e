"""The studio refuses a taken port and names a missing extra."""

import importlib.util
import socket

import pytest

from tarflowlm.errors import UserError
from tarflowlm.report.style import check_package
from tarflowlm.studio.server import free_port


def test_taken_port_is_passed_over_unless_it_was_asked_for():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} .*: choose another"):
            free_port("127.0.0.1", port)
        assert free_port("127.0.0.1", None) != port


def test_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'tarflowlm\[studio\]'"):
        check_package("gradio", "studio")
