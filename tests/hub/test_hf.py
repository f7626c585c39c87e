"""`transformers` finds our models without code from a repository."""

import pytest
import torch

import tarflowlm
from tarflowlm.errors import UserError
from tarflowlm.objective import negative_bound

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("tarflowlm.hf")

TOKENS = torch.arange(32).reshape(2, 16) % 27


def seeded():
    return torch.Generator().manual_seed(0)


def test_a_folder_gives_config_and_model(trained, tmp_path):
    folder = tarflowlm.load(trained).save_pretrained(tmp_path / "mine")
    config = transformers.AutoConfig.from_pretrained(folder)
    assert isinstance(config, hf.TarFlowLMConfig)
    assert config.model["context"] == 16
    model = transformers.AutoModel.from_pretrained(folder)
    assert not model.training
    bound = model(TOKENS, generator=seeded()).bound
    assert torch.equal(bound, negative_bound(tarflowlm.load(trained)[0], TOKENS, generator=seeded()))
    again = transformers.AutoModel.from_pretrained(model.save_pretrained(tmp_path / "again"))
    assert torch.equal(again(TOKENS, generator=seeded()).bound, bound)


def test_what_has_no_effect_is_refused(trained):
    with pytest.raises(UserError, match="dtype"):
        transformers.AutoModel.from_pretrained(trained, dtype=torch.float16)
    with pytest.raises(UserError, match="from_pretrained"):
        transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(trained))


def test_there_are_no_logits_of_a_next_token(trained):
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        transformers.AutoModelForCausalLM.from_pretrained(trained)
