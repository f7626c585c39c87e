"""A hub of our own, a client that knows no other, and a tiny model to put there."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_server import TOKEN, Hub, Repository, serve
from tarflowlm.draft import DraftConfig
from tarflowlm.runs.drafts import save_draft

from tarflowlm.config import RunConfig, TrainConfig
from tarflowlm.data import TEXT8_ALPHABET, CharTokenizer, DataConfig
from tarflowlm.runs.checkpoint import save_weights, write_run

constants = pytest.importorskip("huggingface_hub.constants")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    """The hub that the client uses, with an empty cache, no token, and uploads over plain HTTP."""
    with serve() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        template = f"{served.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield served


@pytest.fixture
def log_in(monkeypatch) -> Callable[[], None]:
    return lambda: monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def model(tiny_flow):
    return tiny_flow(vocab_size=27, context=16).float().eval()


@pytest.fixture
def trained(tmp_path, model) -> Path:
    """A run directory of a tiny model with a draft."""
    run = RunConfig(
        name="mini-mixd",
        model=model.config,
        data=DataConfig(source="/somewhere/else/text.txt"),
        train=TrainConfig(stage_steps=(1,), mode="joint"),
    )
    folder = tmp_path / "run"
    folder.mkdir()
    write_run(folder, run, CharTokenizer(TEXT8_ALPHABET))
    save_weights(folder, model.state_dict(), {"blocks": "2", "step": "1", "tokens": "128"})
    save_draft(folder, model.new_draft(DraftConfig()))
    return folder


@pytest.fixture
def shared(hub, trained) -> Hub:
    """The hub, with that model at ada/tiny."""
    names = ["config.json", "tokenizer.json", "model.safetensors", "manifest.json"]
    names += ["draft/config.json", "draft/draft.safetensors", "draft/manifest.json"]
    hub.repositories["ada/tiny"] = Repository()
    hub.repositories["ada/tiny"].commit({name: (trained / name).read_bytes() for name in names})
    return hub
