"""Classes of a user's own: a run is loaded with those that it was made with, or one line says what
is missing.
"""

import json
from importlib import import_module

import pytest

import tarflowlm
from helpers import FLOW, TEXT8, save_run, tiny_flow
from tarflowlm.errors import UserError
from tarflowlm.model import TarFlowLM
from tarflowlm.model_config import COUPLINGS, FlowConfig
from tarflowlm.runs.checkpoint import load_checkpoint, read_run

PARTS = """
from dataclasses import dataclass
from typing import ClassVar

import tarflowlm
from tarflowlm.flow.channelwise import AffineCoupling
from tarflowlm.flow.transformer import PreNormLayer
from tarflowlm.model import TarFlowLM
from tarflowlm.model_config import FlowConfig


@tarflowlm.coupling("{coupling}")
class Bent(AffineCoupling):
    pass


@tarflowlm.layer("{layer}")
class Own(PreNormLayer):
    pass


@dataclass(frozen=True, kw_only=True)
class FrozenConfig(FlowConfig):
    family: ClassVar[str] = "{family}"
    model: ClassVar[str] = "my_parts:Frozen"
    kept: int = 3


class Frozen(TarFlowLM):
    def __init__(self, config):
        super().__init__(config)
        self.codebook.requires_grad_(False)
"""
NEW = {"coupling": "bent", "layer": "own", "family": "frozen"}


@pytest.fixture
def parts(tmp_path, monkeypatch, forget):
    """parts(coupling=NAME, ...): the module my_parts, with these names in place of new ones."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(**names: str):
        text = PARTS.format(**NEW | names)
        (tmp_path / "my_parts.py").write_text(text, encoding="utf-8")
        return import_module("my_parts")

    return make


def own_run(folder, parts, **names: str):
    """A run directory of a model of own classes of all kinds."""
    made = parts(**names)
    block = COUPLINGS[names.get("coupling", "bent")](sees_tokens=False)
    trunk = {"width": 8, "num_heads": 2, "layer": names.get("layer", "own")}
    config = made.FrozenConfig(
        vocab_size=27,
        context=16,
        latent_dim=2,
        trunk=FLOW.trunk.unchecked(**trunk),
        blocks=(FLOW.blocks[0], block),
    )
    return save_run(folder, config.build())


def test_a_model_is_of_the_class_that_its_configuration_names(tmp_path, parts):
    folder = own_run(tmp_path / "run", parts)
    model = load_checkpoint(folder).model
    assert type(model).__name__ == "Frozen"
    assert not any(p.requires_grad for p in model.codebook.parameters())
    saved = tarflowlm.load(folder).save_pretrained(tmp_path / "own")
    assert type(load_checkpoint(saved).model).__name__ == "Frozen"


def test_a_run_names_the_modules_of_all_its_classes(tmp_path, parts, forget, run_json):
    folder = own_run(tmp_path / "run", parts)
    document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    own = [f"{kind} {name!r}" for kind, name in NEW.items()]
    assert document["imports"] == dict.fromkeys(own, "my_parts")
    with_them = run_json("info", folder)
    forget()
    with pytest.raises(UserError, match="family 'frozen' of your module my_parts: import that"):
        load_checkpoint(folder)
    # without them it is shown under their names
    assert run_json("info", folder) == with_them
    shown = read_run(folder, is_shown=True).model
    names = (shown.blocks[1].coupling, shown.trunk.layer, shown.family)
    assert names == tuple(NEW.values())


@pytest.mark.parametrize("names", [{"coupling": "mix1"}, {"layer": "qwen3"}, {"family": "ar"}])
def test_a_class_that_a_run_imports_wins_over_one_of_ours(tmp_path, parts, forget, names):
    (key,) = names
    folder = own_run(tmp_path / "run", parts, **names)
    made = load_checkpoint(folder).model.state_dict()
    forget()
    # as if the name were ours since then
    parts(**{key: "another"})
    with pytest.raises(UserError, match=f"{key} '{names[key]}' of your module my_parts: import"):
        load_checkpoint(folder)
    forget()
    parts(**names)
    assert load_checkpoint(folder).model.state_dict().keys() == made.keys()


def test_a_run_of_ours_is_not_loaded_with_a_class_of_the_same_name(tmp_path, parts):
    model = tiny_flow(vocab_size=27, context=16, couplings=("mixd", "mix1"))
    folder = save_run(tmp_path / "run", model)
    parts(coupling="mix1")
    with pytest.raises(UserError, match="coupling 'mix1' of tarflowlm, whose name my_parts has"):
        load_checkpoint(folder)


def test_a_model_without_a_name_of_its_own_is_refused(tmp_path):
    class Nameless(FlowConfig):
        pass

    model = TarFlowLM(Nameless(vocab_size=27, context=16, trunk=FLOW.trunk, blocks=FLOW.blocks))
    with pytest.raises(UserError, match="Nameless has the family 'flow' of another class"):
        tarflowlm.Pretrained(model, TEXT8).save_pretrained(tmp_path / "own")
    assert not list(tmp_path.iterdir())


def test_a_name_of_ours_is_taken_by_no_class_of_a_notebook(forget):
    with pytest.raises(UserError, match="family 'flow' exists already"):
        type("Again", (FlowConfig,), {"family": "flow", "__module__": "__main__"})


def test_an_import_that_cannot_be_says_what_to_do(refused, tmp_path, monkeypatch, parts):
    parts()
    monkeypatch.chdir(tmp_path)
    for name in ("more", "twice"):
        text = (
            "import tarflowlm\n"
            + PARTS.partition("\n\n\n@")[0]
            + (f"\n\n@tarflowlm.coupling('bent')\nclass {name}(AffineCoupling):\n    pass\n")
        )
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        said = refused("info", "--import", name, names=["'bent' exists already", "another name"])
        assert "my_module" not in said
    refused("info", "--import", "my_parts.py", names=["my_parts.py", "leave out .py"])
