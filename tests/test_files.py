"""A file that is replaced is the old one or the new one, never a part of either."""

import json
import os
import stat
from pathlib import Path

import pytest

from tarflowlm import files
from tarflowlm.errors import UserError
from tarflowlm.files import read_json, replacing, write_json


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_new_content_takes_the_place_of_the_old(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old", encoding="utf-8")
    with replacing(path) as temporary:
        temporary.write_text("new", encoding="utf-8")
        assert path.read_text(encoding="utf-8") == "old"
        assert temporary.parent == path.parent
    assert path.read_text(encoding="utf-8") == "new"
    assert names(tmp_path) == ["a.txt"]


def test_others_may_read_the_result(tmp_path):
    with replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("new", encoding="utf-8")
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o644


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existed", [True, False])
def test_a_failing_writer_leaves_things_as_they_were(tmp_path, error, existed):
    path = tmp_path / "a.txt"
    if existed:
        path.write_text("old", encoding="utf-8")
    before = names(tmp_path)

    def write_and_fail():
        with replacing(path) as temporary:
            temporary.write_text("half of the n", encoding="utf-8")
            raise error

    with pytest.raises(error):
        write_and_fail()
    assert names(tmp_path) == before
    assert not existed or path.read_text(encoding="utf-8") == "old"


@pytest.mark.parametrize("step", ["sync_file", "chmod", "replace"])
def test_a_failing_step_leaves_things_as_they_were(tmp_path, monkeypatch, step):
    path = tmp_path / "a.txt"
    path.write_text("old", encoding="utf-8")

    def fails(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(files if step == "sync_file" else Path, step, fails)
    with pytest.raises(OSError, match="no space"), replacing(path) as temporary:
        temporary.write_text("new", encoding="utf-8")
    monkeypatch.undo()
    assert path.read_text(encoding="utf-8") == "old"
    assert names(tmp_path) == ["a.txt"]


def test_the_data_is_synced_before_the_rename_and_the_folder_after(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, Path.replace

    def logged_fsync(descriptor):
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def logged_replace(self, target):
        done.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(Path, "replace", logged_replace)
    with replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("new", encoding="utf-8")
    assert done == ["file", "rename", "folder"]


def test_a_folder_that_is_missing_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "missing" / "a.txt"):
        pass


def test_json_comes_back_as_it_was(tmp_path):
    value = {"text": "naïve ∑ 語", "list": [1, 2.5, None, True], "nested": {"a": {}}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    # readable by people, too
    assert "naïve ∑ 語" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_a_value_json_cannot_hold_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"new": object()})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"old": 1}
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"a": 1', b"\xff\xfe\x00", b"[" * 100_000, b"nonsense"], ids=lambda c: repr(c[:8])
)
def test_what_is_not_json_is_named(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json cannot be read as JSON"):
        read_json(tmp_path / "a.json")


def test_missing_json_and_folders_are_named(tmp_path):
    with pytest.raises(UserError, match=r"a\.json is missing"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").mkdir()
    with pytest.raises(UserError, match=r"a\.json cannot be read"):
        read_json(tmp_path / "a.json")
