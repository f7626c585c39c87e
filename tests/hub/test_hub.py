"""Models fetched from the hub and pushed to it, with their cards."""

import json
from dataclasses import replace
from importlib import import_module

import pytest
import torch

import tarflowlm
from tarflowlm.cli.main import main
from tarflowlm.errors import UserError
from tarflowlm.generation import generate
from tarflowlm.runs.checkpoint import load_checkpoint
from tarflowlm.runs.hub import FILES, fetch, purpose
from tarflowlm_apps.studio.catalogue import Catalogue

huggingface_hub = pytest.importorskip("huggingface_hub")
errors = pytest.importorskip("huggingface_hub.errors")
# the client's HTTP library, by the error that its own is based on
http = import_module(errors.HfHubHTTPError.__bases__[0].__module__.partition(".")[0])
TEST = {"bound": "elbo", "bpc": 1.90625, "nats_per_token": 1.3213, "stderr": 0.004, "windows": 4096}
SUMMARY = {"test": TEST, "tokens": 3, "seconds": 1.0, "stage_valid_bpc": [1.9]}


@pytest.fixture
def finished(trained):
    """The run with its results."""
    (trained / "summary.json").write_text(json.dumps(SUMMARY), encoding="utf-8")
    return trained


def sample(model):
    return generate(model, num_tokens=16, num=2, generator=torch.Generator().manual_seed(0)).tokens


@pytest.mark.slow
def test_pushed_model_comes_back_bit_for_bit(hub, finished):
    url = tarflowlm.load(finished).push_to_hub("ada/mine", licence="cc0-1.0")
    assert url.endswith("/ada/mine")
    (ours, tokenizer), (theirs, _) = tarflowlm.from_pretrained("ada/mine"), tarflowlm.load(finished)
    expected = theirs.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())
    first, second = sample(ours), sample(theirs)
    assert torch.equal(first, second)
    card = (hub.repository("ada/mine") / "README.md").read_text(encoding="utf-8")
    assert all(tokenizer.decode(row) in card for row in first.tolist())


def test_only_the_files_of_a_model_are_fetched(shared):
    for name in ("pytorch_model.bin", "modeling.py", "README.md"):
        (shared.repository("ada/tiny") / name).write_text("x", encoding="utf-8")
    folder = fetch("hf:ada/tiny")
    assert {path.name for path in folder.iterdir()} <= {*FILES, "README.md"}


@pytest.mark.parametrize("revision", ["", "@v1"])
def test_all_files_are_of_one_commit_whatever_is_pushed_meanwhile(shared, monkeypatch, revision):
    def download(*args: object, **options: object) -> str:
        out = shared.snapshot_download(*args, **options)
        for file in FILES:
            shared.push("ada/tiny", file, f"{file} of {options}".encode())
        return out

    before = {file: (shared.repository("ada/tiny") / file).read_bytes() for file in FILES}
    monkeypatch.setattr(huggingface_hub.snapshot_download, "side_effect", download)
    folder = fetch(f"hf:ada/tiny{revision}")
    assert {file: (folder / file).read_bytes() for file in FILES} == before


def test_flipped_byte_is_refused_and_the_remedy_works(shared, refused):
    weights = shared.repository("ada/tiny") / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    refused(
        "sample",
        "hf:ada/tiny",
        names=["hf:ada/tiny", "model.safetensors", "sha256", "run this again"],
    )
    weights.write_bytes(before)
    tarflowlm.load("hf:ada/tiny")


def test_a_model_without_one_of_its_files_is_refused(shared, refused):
    (shared.repository("ada/tiny") / "model.safetensors").unlink()
    names = ["hf:ada/tiny", "its model.safetensors is not on the hub", "connection"]
    refused("sample", "hf:ada/tiny", names=names)


def test_models_of_other_kinds_are_refused_before_their_weights(hub, refused):
    other = hub.repository("ada/other")
    other.mkdir(parents=True)
    (other / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    (other / "model.safetensors").write_bytes(b"x" * 1000)
    refused("sample", "hf:ada/other", names=["hf:ada/other", "not a model of tarflowlm"])
    assert "model.safetensors" not in hub.downloaded


def answer(kind, status):
    return kind(
        "no", response=http.Response(status, request=http.Request("GET", "http://127.0.0.1"))
    )


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (answer(errors.RepositoryNotFoundError, 404), "no such model.*HF_TOKEN"),
        (answer(errors.RevisionNotFoundError, 404), "no such revision"),
        (answer(errors.HfHubHTTPError, 403), "403.*hf auth login"),
        (answer(errors.HfHubHTTPError, 503), "answers 503; try again later"),
        (errors.OfflineModeIsEnabled("no"), "HF_HUB_OFFLINE"),
        (errors.LocalEntryNotFoundError("no"), "cannot be reached"),
        (errors.HFValidationError("a name"), "a name"),
        (ConnectionError("cut"), r"failed \(cut\)"),
        (http.ConnectError("no route"), r"failed \(no route\)"),
    ],
)
def test_errors_of_the_hub_are_one_line_with_a_remedy(hub, error, message):
    hub.error = error
    with pytest.raises(UserError, match=rf"hf:ada/tiny: .*{message}"):
        tarflowlm.load("hf:ada/tiny")
    with pytest.raises(UserError, match="name a model of the hub as"):
        tarflowlm.load("hf:tiny")


def test_card_describes_the_model(finished, tmp_path):
    folder = tarflowlm.load(finished).save_pretrained(tmp_path / "mine", licence="cc0-1.0")
    card = (folder / "README.md").read_text(encoding="utf-8")
    for part in (
        "license: cc0-1.0",
        "<= 1.9062 bits per character",
        "4,096 windows",
        "`./text.txt`",
        "128 tokens",
        "preset `mini-mixd`",
        "`model.context` ",
        "27 (char)",
        "--seed 0",
        "licence: not stated by its owner",
        "## Intended use",
        "## Limits",
    ):
        assert part in card
    assert str(tmp_path) not in card
    assert purpose(card).endswith("(<=).")
    # a card that is there is kept
    plain = tarflowlm.load(folder).save_pretrained(tmp_path / "again")
    assert (plain / "README.md").read_text(encoding="utf-8") == card
    with pytest.raises(UserError, match=r"licence 'mit': .*README\.md has a head"):
        tarflowlm.load(folder).save_pretrained(tmp_path / "third", licence="mit")
    with pytest.raises(UserError, match="give an identifier of the hub"):
        tarflowlm.load(finished).save_pretrained(tmp_path / "third", licence="Apache 2.0")
    assert not (tmp_path / "third").exists()


def test_the_head_of_a_card_tells_the_hub_what_is_known(finished, tmp_path):
    lm = tarflowlm.load(finished)
    card = huggingface_hub.ModelCard.load(lm.save_pretrained(tmp_path / "own") / "README.md")
    (result,) = card.data.eval_results
    assert (result.metric_name, result.metric_value) == ("bits per character (<=)", 1.9062)
    assert result.dataset_name == "text.txt, test split"
    assert (card.data.language, card.data.datasets) == (None, None)
    (finished / "summary.json").unlink()
    texts = {
        "stories": ("en", ["roneneldan/TinyStories"], "CDLA-Sharing-1.0"),
        "tales": ("en", None, "public domain"),
        "hf:ada/set/folder#story": (None, ["ada/set"], "that of [the set]"),
    }
    for number, (source, (language, datasets, licence)) in enumerate(texts.items()):
        trained = replace(lm, run=replace(lm.run, data=replace(lm.run.data, source=source)))
        folder = trained.save_pretrained(tmp_path / str(number))
        card = huggingface_hub.ModelCard.load(folder / "README.md")
        assert (card.data.language, card.data.datasets) == (language, datasets)
        assert licence in card.text
        assert "model-index" not in card.content


@pytest.mark.slow
def test_private_repositories(hub, finished, run_json):
    assert run_json("push", finished, "ada/mine", "--private")["url"].endswith("/ada/mine")
    assert "ada/mine" in hub.private
    hub.repository("ada/open").mkdir(parents=True)
    with pytest.raises(UserError, match="ada/open exists and is public"):
        tarflowlm.load(finished).push_to_hub("ada/open", private=True)
    assert not list(hub.repository("ada/open").iterdir())


def test_dry_run_uploads_nothing_and_lists_everything(
    hub, finished, tmp_path, monkeypatch, run_json, refused
):
    monkeypatch.chdir(tmp_path)
    shown = run_json("push", finished, "hf:ada/mine", "--dry-run", "--half")
    assert (shown["url"], shown["out"], shown["repository"]) == (None, "mine", "ada/mine")
    assert shown["files"].keys() == {path.name for path in (tmp_path / "mine").iterdir()}
    assert load_checkpoint("mine").run.name == "mini-mixd"
    assert not hub.repository("ada/mine").exists()
    refused("push", finished, "ada/mine", "--dry-run", names=["mine", "exists already"])
    main(["push", "english-mini-ar", "ada/english", "--dry-run"])
    assert "# english-mini-ar" in (tmp_path / "english" / "README.md").read_text(encoding="utf-8")


def test_models_of_the_hub_are_used_but_not_written_to(shared, run_json, refused):
    # the folder in the cache has another name
    found = run_json("score", "hf:ada/tiny", "--text", "abc", "--baseline", "hf:ada/tiny")
    assert found["characters"] == 3
    assert found["model"] == found["baseline"]["model"] == "hf:ada/tiny"
    assert run_json("info", "hf:ada/tiny")["name"] == "hf:ada/tiny"
    assert Catalogue(["hf:ada/tiny"]).models == ["hf:ada/tiny"]
    refused("report", "hf:ada/tiny", names=["run of yours", "--out"])
