"""The options of every command. A new one is a decision: it is added here on purpose."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import get_type_hints

import pytest

from tarflowlm.cli import train
from tarflowlm.cli.main import COMMANDS, command_module
from tarflowlm.config import DataConfig, TokenizerConfig
from tarflowlm.options import flag
from tarflowlm.requests import Request

OPTIONS = {
    "quickstart": "device json minutes out seed",
    "data": "json out source tokenizer unwrap",
    "train": "checkpoint-every data device json minutes normalize out run steps unwrap",
    "eval": (
        "data device directory json latents normalize precision samples seed split stride windows"
    ),
    "score": "baseline device directory file json normalize samples seed text texts",
    "sample": (
        "blank contains decoder device directory json length matches max-new-tokens min-p no-stop "
        "normalize num out particles passes prompt prompts seed sentences stop stream temperature "
        "template top-k top-p without words"
    ),
    "info": "compare directories disk json",
    "runs": "compare directories disk json",
    "edit": (
        "around candidates decoder device directory everywhere json level "
        "normalize num pick replace rewrite seed strength temperature text "
        "words"
    ),
    "report": "device directories json out",
    "studio": "device host models no-browser port",
    "export": "causal-lm directory half json out",
    "push": "directory dry-run half json licence out private repository",
    "serve": "api-key at-once device directory host json most-texts no-key port samples seconds",
}
"""Names of the fields of `Args`: words without dashes, options, and configurations."""
TUNING = "data device from json lr minutes out seed steps unwrap"
RESUMING = "device json minutes resume steps"


def names_of(args: type) -> set[str]:
    """The options of a dataclass, as they are typed."""
    return {"from" if one.name == "parent" else one.name.replace("_", "-") for one in fields(args)}


def options_of(args: type) -> Iterator[str]:
    """The options of a dataclass, and of a request in it."""
    for name, hint in get_type_hints(args).items():
        if is_dataclass(hint) and issubclass(hint, Request):
            yield from options_of(hint)
        elif name in {one.name for one in fields(args)} - {"allowed", "adjust"}:
            yield flag(name).removeprefix("--")


@pytest.mark.parametrize("command", COMMANDS)
def test_options_do_not_grow_by_themselves(command):
    assert set(options_of(command_module(command).Args)) == set(OPTIONS[command].split())


def test_options_of_tuning_and_resuming_do_not_grow_by_themselves():
    assert names_of(train.TuneArgs) == set(TUNING.split())
    assert names_of(train.ResumeArgs) == set(RESUMING.split())


def test_short_options_say_how_a_text_is_read():
    argv = ["mini-mixd", "--out", "run", "--data", "novel.txt"]
    assert train.read(argv).configured().data == DataConfig(source="novel.txt")
    data = train.read([*argv, "--normalize", "text8", "--unwrap"]).configured().data
    assert data == DataConfig(source="novel.txt", tokenizer=TokenizerConfig(), unwrap=True)


def test_help_pages_wrap_to_the_terminal(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    assert "With word pieces, a blank includes the space" in run("sample", "--help").out
