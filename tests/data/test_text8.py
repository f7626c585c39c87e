"""TEXT8 from a server on this machine: resumed, refused where it is another text, and taken from where it lies."""

import hashlib
import io
import lzma
import socket
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tarflowlm.data import TokenizerConfig, cached_corpus, prepare_corpus
from tarflowlm.data.download import sources_dir
from tarflowlm.data.sources import TEXT8, Text8, Text8Spec
from tarflowlm.errors import UserError

CHARS = TokenizerConfig()


def zipped(text: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("text8", text)
    return buffer.getvalue()


class Server(ThreadingHTTPServer):
    """Serves one file; `ranges` tells whether it can send the rest of it, `stop_after` where it breaks off."""

    def __init__(self, content: bytes) -> None:
        self.content, self.ranges, self.stop_after, self.status = content, True, None, 200
        self.requests: list[str | None] = []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/dc/text8.zip"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        wanted, content = self.headers.get("Range"), self.server.content
        self.server.requests.append(wanted)
        if self.server.status != 200:
            self.send_error(self.server.status)
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.server.ranges else 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : self.server.stop_after])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(words, monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    server = Server(zipped(words))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def spec(server, words) -> Text8Spec:
    def digest(n):
        return hashlib.sha256(words[:n].encode()).hexdigest()

    return Text8Spec(server.url, len(words), 1000, digest(1000), 3000, digest(3000))


def cached() -> list[str]:
    """What the cache of raw texts holds, lock files left out."""
    found = sources_dir().iterdir() if sources_dir().exists() else ()
    return sorted(path.name for path in found if path.suffix != ".lock")


def changed(text: str, at: int) -> str:
    return text[:at] + ("q" if text[at] != "q" else "z") + text[at + 1 :]


def test_it_is_fetched_once_and_cut_90_5_5(server, spec, words, tmp_path):
    calls = []
    corpus = prepare_corpus(Text8(spec), CHARS, tmp_path / "out", progress=lambda *call: calls.append(call))
    n = len(words)
    sizes = [corpus.num_characters(name) for name in ("train", "valid", "test")]
    assert sizes == [n * 90 // 100, n * 95 // 100 - n * 90 // 100, n - n * 95 // 100]
    assert corpus.tokenizer.decode(corpus.split("train")[:100]) == words[:100]
    assert corpus.meta.source == corpus.meta.identity == "text8"
    fetched = [call[1:] for call in calls if call[0] == "fetch"]
    assert fetched[-1] == (len(server.content), len(server.content))
    assert cached() == ["text8.zip"]
    prepare_corpus(Text8(spec), TokenizerConfig(kind="byte"), tmp_path / "bytes")
    assert server.requests == [None]


def test_what_is_prepared_needs_neither_file_nor_server(server, spec, monkeypatch):
    monkeypatch.setattr("tarflowlm.data.sources._REGISTRY", {"text8": lambda: Text8(spec)})
    first = cached_corpus("text8")
    (sources_dir() / "text8.zip").unlink()
    server.status = 404
    assert cached_corpus("text8").meta == first.meta
    assert len(server.requests) == 1


def test_the_text_is_taken_as_it_is(server, spec, words, tmp_path):
    """A space at its end counts, though normalising would drop it."""
    text = words[:-1] + " "
    server.content = zipped(text)
    corpus = prepare_corpus(Text8(spec), CHARS, tmp_path / "out")
    assert sum(corpus.num_characters(name) for name in ("train", "valid", "test")) == spec.size


def test_an_interrupted_download_is_resumed(server, spec, words, tmp_path):
    half = server.stop_after = len(server.content) // 2
    message = rf"cannot fetch http://.*ended after {half:,} of {len(server.content):,} bytes.*: put text8 or"
    with pytest.raises(UserError, match=message) as caught:
        prepare_corpus(Text8(spec), CHARS, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    server.stop_after = None
    corpus = prepare_corpus(Text8(spec), CHARS, tmp_path / "out")
    assert server.requests == [None, f"bytes={half}-"]
    assert corpus.num_characters("train") == len(words) * 90 // 100
    assert cached() == ["text8.zip"]


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("left", ["part", "foreign", "whole", "too much"])
def test_whatever_a_kill_left_the_file_is_right(server, spec, ranges, left):
    server.ranges = ranges
    content = server.content
    rest = {"part": content[:99], "foreign": b"x" * 99, "whole": content, "too much": content + b"x"}[left]
    sources_dir().mkdir(parents=True)
    (sources_dir() / ".text8.part.zip").write_bytes(rest)
    Text8(spec).obtain()
    assert cached() == ["text8.zip"]
    assert (sources_dir() / "text8.zip").read_bytes() == content


def test_a_server_without_the_file_is_one_line(server, spec):
    server.status = 404
    with pytest.raises(UserError, match=rf"answers 404 .*put text8 or text8\.zip .* into {sources_dir()}") as caught:
        Text8(spec).obtain()
    assert "\n" not in str(caught.value)
    assert cached() == []


def test_offline_is_one_line(spec, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(UserError, match=r"cannot fetch http.*refused.*: put text8 or text8\.zip") as caught:
        Text8(replace(spec, url=f"http://127.0.0.1:{port}/text8.zip")).obtain()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: changed(text, 999), "its first 1,000 characters differ"),
        (lambda text: text[:-1], "characters instead of"),
        (lambda text: text + "a", "characters instead of"),
        (lambda text: text[:5000] + "Q" + text[5001:], "it holds 'Q'"),
        (lambda text: text[:-1] + "\n", r"it holds '\\n'"),
        (lambda text: text[:5000] + "é" + text[5001:], "it holds 'é'"),
    ],
)
def test_another_text_is_refused(change, message, server, spec, words):
    server.content = zipped(change(words))
    with pytest.raises(UserError, match=rf"what http.* sends is not text8, .*{message}.*: put text8 or") as caught:
        Text8(spec).obtain()
    assert "\n" not in str(caught.value)
    assert cached() == []
    Path("text8").write_text(change(words), encoding="utf-8")
    with pytest.raises(UserError, match=rf"text8 is not text8, .*{message}.*: put text8 or .* in its place"):
        Text8(spec).obtain()
    assert Path("text8").exists()
    assert len(server.requests) == 1


def test_what_is_no_archive_is_refused(server, spec):
    server.content = b"<html>moved</html>"
    with pytest.raises(UserError, match=r"not a complete \.zip file"):
        Text8(spec).obtain()
    assert cached() == []


def test_a_later_difference_is_a_notice(server, spec, words, tmp_path):
    server.content = zipped(changed(words, 2999))
    notices = []
    prepare_corpus(Text8(spec), CHARS, tmp_path / "out", notice=notices.append)
    assert len(notices) == 1
    assert "between characters 1,000 and 3,000" in notices[0]
    server.content = zipped(changed(words, 3000))
    (sources_dir() / "text8.zip").unlink()
    Text8(spec).obtain(notice=notices.append)
    assert len(notices) == 1


@pytest.mark.parametrize("name", ["text8", "text8.zip"])
@pytest.mark.parametrize("folder", [".", "data", "cache"])
def test_a_file_that_is_there_is_taken(name, folder, server, spec, words):
    place = sources_dir() if folder == "cache" else Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    (place / name).write_bytes(zipped(words) if name.endswith(".zip") else words.encode())
    source = Text8(spec)
    assert source.obtain() == ((place / name).resolve(),)
    assert sum(len(text) for batch in source.stream("text8").batches for text in batch.texts) == len(words)
    assert server.requests == []
    # by its path it is a text file like any other
    assert cached_corpus(str((place / name).resolve())).num_characters("train") == len(words) * 90 // 100


def test_the_hashes_are_those_of_text8(shared_data):
    with lzma.open(shared_data("text8_prefix_3010294.txt.xz")) as file:
        start = file.read()
    assert len(start) == TEXT8.known_size
    assert hashlib.sha256(start).hexdigest() == TEXT8.known_sha256
    assert hashlib.sha256(start[: TEXT8.prefix_size]).hexdigest() == TEXT8.prefix_sha256
