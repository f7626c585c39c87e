"""What is pushed says what it is, and comes back as it was."""

import json
import shlex
from dataclasses import replace

import pytest
import torch
from hub_server import Repository

import tarflowlm
from tarflowlm.cli.configured import TrainArgs
from tarflowlm.cli.main import main
from tarflowlm.cli.parsing import parse
from tarflowlm.errors import UserError
from tarflowlm.generation import generate
from tarflowlm.presets import preset
from tarflowlm.runs.checkpoint import load_checkpoint
from tarflowlm.runs.hub import FILES
from tarflowlm.sharing.card import training_command

TEST = {"bound": "elbo", "bpc": 1.90625, "nats_per_token": 1.3213, "stderr": 0.004, "windows": 4096}


@pytest.fixture
def finished(trained):
    """The run with its results."""
    (trained / "summary.json").write_text(json.dumps({"test": TEST}), encoding="utf-8")
    return trained


def files_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_what_is_pushed_comes_back_bit_for_bit(hub, log_in, finished):
    log_in()
    url = tarflowlm.load(finished).push_to_hub("ada/mine", licence="cc0-1.0")
    assert url == f"{hub.url}/ada/mine"
    (ours, tokenizer), (theirs, _) = tarflowlm.from_pretrained("ada/mine"), tarflowlm.load(finished)
    expected = theirs.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(ours.draft.parameters(), theirs.draft.parameters(), strict=True))
    first, second = (
        generate(m, num_tokens=16, num=2, generator=torch.Generator().manual_seed(0)).tokens for m in (ours, theirs)
    )
    assert torch.equal(first, second)
    card = hub.repositories["ada/mine"].files["README.md"].decode()
    assert all(tokenizer.decode(row) in card for row in first.tolist())


def test_what_is_pushed_is_what_is_fetched(hub, log_in, finished):
    log_in()
    tarflowlm.load(finished).push_to_hub("hf:ada/mine")
    wanted = {f"{folder}/{file}".lstrip("/") for folder, files in FILES.items() for file in files}
    assert hub.repositories["ada/mine"].files.keys() == wanted | {"README.md"}


def test_a_card_says_what_the_model_is(finished, tmp_path):
    card = (tarflowlm.load(finished).save_pretrained(tmp_path / "mine", licence="cc0-1.0") / "README.md").read_text(
        "utf-8"
    )
    for part in (
        'license: "cc0-1.0"', "upper bound, elbo", "<= 1.9062 bits per character", "4,096 windows", "`./text.txt`",
        "128 tokens", "tarflowlm train mini-mixd", "27 (char)", "--seed 0", "## Limits",
    ):  # fmt: skip
        assert part in card
    assert str(tmp_path) not in card
    plain = tarflowlm.load(tmp_path / "mine").save_pretrained(tmp_path / "again")
    # its card is kept
    assert (plain / "README.md").read_text("utf-8") == card
    with pytest.raises(UserError, match=r"licence 'mit': .*README\.md has a head"):
        tarflowlm.load(tmp_path / "mine").save_pretrained(tmp_path / "third", licence="mit")
    assert not (tmp_path / "third").exists()


def test_results_that_are_not_there_are_not_made_up(trained, tmp_path):
    card = (tarflowlm.load(trained).save_pretrained(tmp_path / "mine") / "README.md").read_text(encoding="utf-8")
    assert "| test | not recorded |" in card
    assert "| licence | not stated by its owner |" in card
    assert "model-index" not in card


@pytest.mark.parametrize("name", ["mini-mixd", "mini-ar", "quickstart"])
def test_the_command_of_a_card_gives_the_run(name):
    run = preset(name)
    steps = tuple(2 * n for n in run.train.stage_steps)
    train = replace(run.train, stage_steps=steps, compile=False, checkpoint_activations=True, track=("wandb",))
    model = replace(run.model, context=64, trunk=replace(run.model.trunk, width=96))
    if name != "mini-ar":
        model = replace(model, blocks=tuple(replace(block, sees_channels=False) for block in model.blocks))
    data = replace(run.data, source="my text.txt")
    run = replace(run, seed=7, train=train, model=model, data=data, optim=replace(run.optim, lr=1e-3))
    _, _, given, *words = shlex.split(training_command(run))
    assert given == name
    assert parse(TrainArgs, words, "train", default=TrainArgs(run=preset(name))).configured() == run
    assert training_command(replace(run, name="mine")) is None


@pytest.mark.parametrize("options", [["--blocks", "2"], ["--blocks", "1", "--steps", "7"], ["--train.mode", "joint"]])
def test_the_command_of_a_card_says_which_blocks(options):
    default = TrainArgs(run=preset("mini-mixd"))
    joint = ["--train.stage-steps", "7"] if "joint" in options else []
    run = parse(TrainArgs, [*options, *joint], "train", default=default).configured()
    words = shlex.split(training_command(run))[3:]
    assert parse(TrainArgs, words, "train", default=default).configured() == run


def test_a_second_push_replaces_the_first(hub, log_in, finished):
    log_in()
    tarflowlm.load(finished).push_to_hub("ada/mine")
    for path in (finished / "draft").iterdir():
        path.unlink()
    tarflowlm.load(finished).push_to_hub("ada/mine")
    assert not [path for path in hub.repositories["ada/mine"].files if path.startswith("draft/")]
    assert tarflowlm.from_pretrained("hf:ada/mine")[0].draft is None


def test_private_means_private(hub, log_in, finished, refused, run_json):
    log_in()
    assert run_json("push", finished, "ada/mine", "--private")["url"] == f"{hub.url}/ada/mine"
    assert hub.repositories["ada/mine"].private
    hub.repositories["ada/open"] = Repository()
    hub.repositories["ada/open"].commit({})
    with pytest.raises(UserError, match="ada/open exists and is public"):
        tarflowlm.load(finished).push_to_hub("ada/open", private=True)
    assert not hub.repositories["ada/open"].files


def test_a_dry_run_uploads_nothing_and_shows_everything(hub, finished, tmp_path, monkeypatch, run_json, refused):
    monkeypatch.chdir(tmp_path)
    shown = run_json("push", finished, "hf:ada/mine", "--dry-run", "--half")
    assert (shown["url"], shown["out"], shown["repository"]) == (None, "mine", "ada/mine")
    assert not hub.requests
    assert shown["files"].keys() == files_in(tmp_path / "mine")
    assert load_checkpoint("mine").run.name == "mini-mixd"
    refused("push", finished, "ada/mine", "--dry-run", names=["mine", "exists already", "--out"])


def test_what_cannot_be_pushed_costs_one_line(hub, finished, run, refused, tmp_path):
    refused("push", finished, "mine", names=["'mine'", "OWNER/NAME"])
    refused("push", finished, "ada/..", names=["'ada/..'", "OWNER/NAME"])
    refused("push", finished, "ada/mine", "--dry-run", "--private", names=["--private", "--dry-run"])
    refused("push", tmp_path / "none", "ada/mine", names=["none", "is not a directory"])
    done = run("push", finished, "ada/mine")
    assert done.status == 2
    # after a line that says what is uploaded
    assert done.err.splitlines()[-1].startswith("tarflowlm: ada/mine: ")
    assert "HF_TOKEN" in done.err
    assert not hub.repositories


def test_a_model_of_the_hub_is_scored_and_described(shared, run_json):
    assert run_json("score", "hf:ada/tiny", "--text", "abc")["characters"] == 3
    assert run_json("info", "hf:ada/tiny")["name"] == "hf:ada/tiny"


def test_revisions_belong_to_the_hub(trained):
    with pytest.raises(UserError, match="revision 'v1'"):
        tarflowlm.from_pretrained(trained, revision="v1")


@pytest.mark.parametrize("name", ["../none", "./none"])
def test_a_folder_that_is_not_there_is_no_name_on_the_hub(hub, name):
    with pytest.raises(UserError, match="is not a directory"):
        tarflowlm.from_pretrained(name)
    assert not hub.requests


def test_push_takes_shipped_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["push", "english-mini-ar", "ada/english", "--dry-run"])
    assert "# english-mini-ar" in (tmp_path / "english" / "README.md").read_text(encoding="utf-8")
