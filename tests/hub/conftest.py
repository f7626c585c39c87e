"""A hub in a folder that takes the place of the client's two calls."""

import fnmatch
import hashlib
import inspect
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

huggingface_hub = pytest.importorskip("huggingface_hub")
REAL_DOWNLOAD, REAL_API = huggingface_hub.snapshot_download, huggingface_hub.HfApi


class Hub:
    """Repositories are folders root/OWNER/NAME, snapshots copies of them; calls must suit the real
    client.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.downloaded, self.private = root, [], set()
        self.error: Exception | None = None

    def repository(self, name: str) -> Path:
        return self.root / "hub" / name

    def snapshot_download(self, *args, **options) -> str:
        inspect.signature(REAL_DOWNLOAD).bind(*args, **options)
        if self.error is not None:
            raise self.error
        (name,), patterns = args, options["allow_patterns"]
        source = self.repository(name)
        out = self.root / "cache" / hashlib.sha1(name.encode()).hexdigest()[:8]
        out.mkdir(parents=True, exist_ok=True)
        for path in source.iterdir():
            if any(
                fnmatch.fnmatch(path.name, p)
                for p in ([patterns] if isinstance(patterns, str) else patterns)
            ):
                if not (out / path.name).exists():
                    shutil.copy(path, out / path.name)
                self.downloaded.append(path.name)
        return str(out)

    def api(self, **options) -> "Hub":
        inspect.signature(REAL_API).bind(**options)
        return self

    def create_repo(self, name: str, **options) -> None:
        inspect.signature(REAL_API.create_repo).bind(self, name, **options)
        if self.error is not None:
            raise self.error
        if not self.repository(name).exists() and options.get("private"):
            self.private.add(name)
        self.repository(name).mkdir(parents=True, exist_ok=True)

    def repo_info(self, name: str, **options) -> SimpleNamespace:
        return SimpleNamespace(private=name in self.private)

    def upload_folder(self, **options) -> None:
        inspect.signature(REAL_API.upload_folder).bind(self, **options)
        shutil.copytree(
            options["folder_path"], self.repository(options["repo_id"]), dirs_exist_ok=True
        )


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    found = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", found.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", found.api)
    return found


@pytest.fixture
def shared(hub, trained) -> Hub:
    """The hub, with that model at ada/tiny."""
    shutil.copytree(trained, hub.repository("ada/tiny"))
    return hub
