"""What the page itself never sends is refused, nothing is kept, and the terminal stays short."""

import json
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("gradio")
from tarflowlm_apps.studio.server import serving

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url(catalogue):
    with serving(catalogue, host="127.0.0.1", port=None) as found:
        yield found.rstrip("/")


def post(url: str, body: bytes, kind: str = "application/json") -> int:
    request = urllib.request.Request(url, body, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=60) as found:
            return found.status
    except urllib.error.HTTPError as error:
        return error.code


def test_uploads_are_refused(url):
    kept = Path(tempfile.gettempdir()) / "gradio"
    before = set(kept.rglob("*"))
    head = b'Content-Disposition: form-data; name="files"; filename="a.txt"'
    body = b"--a\r\n" + head + b"\r\n\r\nx\r\n--a--\r\n"
    for path in ("gradio_api/upload", "gradio_api/upload/", "upload"):
        assert post(f"{url}/{path}", body, "multipart/form-data; boundary=a") == 404
    assert set(kept.rglob("*")) == before


@pytest.mark.parametrize("values", [["x" * 100_000], [{"a": [1]}], []])
def test_a_call_with_wrong_values_costs_a_line(url, capfd, values):
    with urllib.request.urlopen(f"{url}/config", timeout=60) as found:
        functions = json.loads(found.read())["dependencies"]
    # of a function with a choice of models: it must be one of these
    function = max((one for one in functions if one["backend_fn"]), key=lambda x: len(x["inputs"]))
    data = values * len(function["inputs"])
    body = {"data": data, "fn_index": function["id"], "session_hash": "stranger"}
    body |= {"trigger_id": None, "event_data": None}
    capfd.readouterr()
    if post(f"{url}/gradio_api/queue/join", json.dumps(body).encode()) == 200:
        events = f"{url}/gradio_api/queue/data?session_hash=stranger"
        with urllib.request.urlopen(events, timeout=60) as lines:
            assert any(b"process_completed" in line for line in lines)
    err = capfd.readouterr().err
    assert "Traceback" not in err
    assert len(err) < 500
