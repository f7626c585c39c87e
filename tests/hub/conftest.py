"""A hub in a folder that takes the place of the client's calls."""

import fnmatch
import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest

huggingface_hub = pytest.importorskip("huggingface_hub")


class Hub:
    """Repositories are folders root/OWNER/NAME; what was downloaded is copied below root/cache,
    into a folder with the name of its commit.
    """

    commit = "0123456789abcdef0123456789abcdef01234567"
    """The newest one, which every branch and tag means."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.downloaded: list[str] = []
        self.private: set[str] = set()
        self.error: Exception | None = None

    def repository(self, name: str) -> Path:
        return self.root / "hub" / name

    def snapshot_download(self, name, *, allow_patterns, revision) -> str:
        if self.error is not None:
            raise self.error
        earlier = self.root / "earlier" / str(revision) / name
        commit, files = self.commit, self.repository(name)
        if earlier.exists():
            commit, files = revision, earlier
        out = self.root / "cache" / name / commit
        out.mkdir(parents=True, exist_ok=True)
        for path in files.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                if not (out / path.name).exists():
                    shutil.copy(path, out / path.name)
                self.downloaded.append(path.name)
        return str(out)

    def push(self, name: str, file: str, content: bytes) -> None:
        """A new commit of the repository, with another content of a file."""
        shutil.copytree(self.repository(name), self.root / "earlier" / self.commit / name)
        (self.repository(name) / file).write_bytes(content)
        self.commit = hashlib.sha1(content).hexdigest()

    def create_repo(self, name, *, private, **_options) -> None:
        if not self.repository(name).exists() and private:
            self.private.add(name)
        self.repository(name).mkdir(parents=True, exist_ok=True)

    def repo_info(self, name, **_options) -> SimpleNamespace:
        return SimpleNamespace(private=name in self.private)

    def upload_folder(self, *, repo_id, folder_path, **_options) -> None:
        shutil.copytree(folder_path, self.repository(repo_id), dirs_exist_ok=True)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    found = Hub(tmp_path)
    # calls that the real client would not take are errors
    api = create_autospec(huggingface_hub.HfApi, instance=True)
    for call in ("create_repo", "repo_info", "upload_folder"):
        getattr(api, call).side_effect = getattr(found, call)
    download = create_autospec(
        huggingface_hub.snapshot_download, side_effect=found.snapshot_download
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda **_options: api)
    return found


@pytest.fixture
def shared(hub, trained) -> Hub:
    """The hub, with that model at ada/tiny."""
    shutil.copytree(trained, hub.repository("ada/tiny"))
    return hub
