"""Locks have one holder."""

import errno
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tarflowlm.errors import UserError
from tarflowlm.files import LOCK, cache_root, is_written, waiting_lock, writer_lock


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """No lock is in the user's cache."""
    monkeypatch.setenv("TARFLOWLM_CACHE", str(tmp_path_factory.mktemp("cache")))


def test_without_a_home_the_cache_has_to_be_named(monkeypatch):
    monkeypatch.delenv("TARFLOWLM_CACHE")

    def expanduser(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", expanduser)
    with pytest.raises(UserError, match="there is no home directory; set TARFLOWLM_CACHE"):
        cache_root()


def test_writer_lock_refuses_a_second_writer(tmp_path):
    assert not is_written(tmp_path)
    with writer_lock(tmp_path):
        assert is_written(tmp_path)
        with pytest.raises(UserError, match="is being written by"), writer_lock(tmp_path):
            pass
    assert not is_written(tmp_path)
    with pytest.raises(KeyError), writer_lock(tmp_path):
        raise KeyError
    with writer_lock(tmp_path):
        pass
    assert {path.name for path in tmp_path.iterdir()} <= {LOCK}


def test_waiting_lock_is_held_by_one_thread_at_a_time(tmp_path):
    inside, seen = 0, []

    def work():
        nonlocal inside
        for _ in range(10):
            with waiting_lock(tmp_path / "x"):
                inside += 1
                seen.append(inside)
                time.sleep(0.0005)
                inside -= 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: work(), range(4)))
    assert seen == [1] * 40
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_file_system_without_locks_is_a_notice(tmp_path, monkeypatch, caplog, number):
    def flock(*_: object) -> None:
        raise OSError(number, "no locks")

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", flock)
    for _ in range(2):  # nothing stays that would refuse the next one
        with writer_lock(tmp_path), waiting_lock(tmp_path / "x"):
            assert is_written(tmp_path) is None
    assert f"{tmp_path}: no locks on this file system" in caplog.text
