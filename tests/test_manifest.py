"""manifest.json names what is not as it was written, and is true at every instant of a replacement."""

import hashlib
import json

import pytest

from tarflowlm.errors import UserError
from tarflowlm.files import write_json
from tarflowlm.runs import manifest
from tarflowlm.runs.manifest import is_whole, problem_of, replacing_listed, write_manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"aaaa")
    (tmp_path / "b.bin").write_bytes(b"bb")
    write_manifest(tmp_path, ["a.bin", "b.bin"])
    return tmp_path


def test_it_holds_size_and_sha256_of_every_file(folder):
    document = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert document["files"]["a.bin"] == [{"size": 4, "sha256": hashlib.sha256(b"aaaa").hexdigest()}]
    assert set(document["files"]) == {"a.bin", "b.bin"}


CHANGES = {
    "truncated": (b"aaa", "truncated: 3 bytes where 4 belong"),
    "empty": (b"", "truncated: 0 bytes"),
    "longer": (b"aaaaa", "altered: 5 bytes where 4 belong"),
    "flipped": (b"aaab", "sha256"),
}


@pytest.mark.parametrize(("content", "message"), CHANGES.values(), ids=CHANGES.keys())
def test_every_change_is_named(folder, content, message):
    assert problem_of(folder) is None
    (folder / "a.bin").write_bytes(content)
    problem = problem_of(folder)
    assert problem is not None
    assert str(folder / "a.bin") in problem
    assert message in problem
    assert problem_of(folder, ["b.bin"]) is None
    assert not is_whole(folder, "b.bin")


def test_missing_and_unlisted_files_are_named(folder):
    (folder / "a.bin").unlink()
    assert problem_of(folder) == f"{folder / 'a.bin'} is missing"
    assert problem_of(folder, ["a.bin"]) is None  # its reader says so
    (folder / "c.bin").write_bytes(b"c")
    assert problem_of(folder, ["c.bin"]) == f"{folder / 'c.bin'} is not in manifest.json"
    assert not is_whole(folder, "c.bin")


@pytest.mark.parametrize("kill_at", ["the manifest", "the rename", "the second manifest", "nothing"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_replacement_is_whole_wherever_it_is_cut(folder, monkeypatch, kill_at, exists):
    """Also a second one after a first that was cut."""

    class Killed(BaseException):
        pass

    path = folder / ("a.bin" if exists else "new.bin")
    writes = []

    def write(target, value):
        writes.append(target)
        if (kill_at, len(writes)) in (("the manifest", 1), ("the second manifest", 2)):
            raise Killed
        write_json(target, value)
        if (kill_at, len(writes)) == ("the rename", 1):
            raise Killed

    def replace(content: bytes) -> None:
        with replacing_listed(path) as temporary:
            temporary.write_bytes(content)

    for content in (b"first", b"the second"):
        writes.clear()
        with monkeypatch.context() as patch:
            patch.setattr(manifest, "write_json", write)
            if kill_at == "nothing":
                replace(content)
            else:
                with pytest.raises(Killed):
                    replace(content)
        if path.exists():
            assert is_whole(folder, path.name)
    replace(b"the last")
    assert path.read_bytes() == b"the last"
    records = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"][path.name]
    assert len(records) == 1
    assert is_whole(folder, path.name)


def test_a_reader_that_is_overtaken_by_a_writer_looks_again(folder, monkeypatch):
    record, replaced = manifest._record, []

    def overtaken(path):
        if not replaced and path.name == "a.bin":
            replaced.append(path)
            with replacing_listed(path) as temporary:
                temporary.write_bytes(b"newer")
        return record(path)

    (folder / "a.bin").write_bytes(b"aaaa")
    monkeypatch.setattr(manifest, "_record", overtaken)
    assert problem_of(folder, ["a.bin"]) is None
    assert replaced


BROKEN = {
    "foreign": {"files": {}},
    "version": {"format": "tarflowlm-manifest", "version": 99, "files": {}},
    "no-files": {"format": "tarflowlm-manifest", "version": 1},
    "no-records": {"format": "tarflowlm-manifest", "version": 1, "files": {"a.bin": 3}},
    "no-sizes": {"format": "tarflowlm-manifest", "version": 1, "files": {"a.bin": [{"sha256": "x"}]}},
    "size": {"format": "tarflowlm-manifest", "version": 1, "files": {"a.bin": [{"size": "4", "sha256": "x"}]}},
    "list": [],
}


@pytest.mark.parametrize("document", BROKEN.values(), ids=BROKEN.keys())
def test_what_is_no_manifest_is_named(folder, document):
    write_json(folder / "manifest.json", document)
    with pytest.raises(UserError, match=r"manifest\.json is"):
        problem_of(folder)
    assert not is_whole(folder, "a.bin")
