"""`export --causal-lm`: block 1 and the baseline as causal language models of `transformers`.

Importing that takes longer than a fast test may.
"""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import tarflowlm
from helpers import FILLS, TEXT8, TRUNK, save_run, tiny_ar, tiny_flow
from tarflowlm.baseline import TokenLM
from tarflowlm.data import load_tokenizer
from tarflowlm.errors import UserError
from tarflowlm.flow.transformer import PreNormLayer
from tarflowlm.model_config import LAYERS, TransformerConfig
from tarflowlm.runs.checkpoint import load_checkpoint
from tarflowlm.runs.hub import FOLDER
from tarflowlm_apps.transformers_export.checkpoint import save_causal_lm, what_loads

pytestmark = pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers")
SIZE = {"vocab_size": 27, "context": 16}
TAPS = {**SIZE, "trunk": replace(TRUNK, input_taps=3)}
MODELS = {
    "one block": lambda: tiny_flow(couplings=("mixd",), **SIZE),
    "stack": lambda: tiny_flow(reads_tokens=True, channel_mix=False, layers=(2, 1), **SIZE),
    "taps": lambda: tiny_flow(reads_tokens=True, **TAPS),
    "baseline": lambda: tiny_ar(**TAPS),
    # alone, a block with certainty acts on all tokens
    "certainty": lambda: tiny_flow(couplings=("mixd",), components=(0,), certainty=0.3, **SIZE),
}
OTHERS = {
    "patches": lambda: tiny_flow(couplings=("mixd",), patch=2, **SIZE),
    "baseline of patches": lambda: tiny_ar(patch=2, **SIZE),
    "another coupling": lambda: tiny_flow(couplings=("mix1", "mixd"), **SIZE),
    "components of its own": lambda: tiny_flow(couplings=("mixd",), components=(27,), **SIZE),
    "block 1 fills in": lambda: tiny_flow(**FILLS, **SIZE),
}
TEXTS = ["the king of", "the people of the land"]


def opened(folder: Path):
    """The model and the tokenizer of an exported folder."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    return model.eval(), tokenizer


def exact_logits(model, tokens):
    """log w of block 1 on the means of the codes, or the logits of the baseline."""
    if isinstance(model, TokenLM):
        return model.logits(tokens)
    block = model.prior.block(0)
    return block.coupling.weight_head(block.features(model.codebook.mean[tokens]))


@torch.no_grad()
def check_logits(model, exported, tokens):
    V = model.config.vocab_size
    start = torch.full((len(tokens), 1), V)
    logits = exported(torch.cat((start, tokens[:, :-1]), dim=1)).logits
    expected = exact_logits(model, tokens)
    torch.testing.assert_close(logits[..., :V], expected, rtol=0, atol=1e-5)
    # the two tokens that are no text have no share
    log_p = logits.log_softmax(-1)
    torch.testing.assert_close(log_p[..., :V], expected.log_softmax(-1), rtol=0, atol=2e-5)


def exported_tiny(make, tmp_path):
    folder = save_run(tmp_path / "run", make())
    checkpoint = load_checkpoint(folder)
    return checkpoint, *opened(save_causal_lm(checkpoint, tmp_path / "exported"))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_block_1_on_the_means_of_the_codes(name, tmp_path):
    import transformers

    checkpoint, exported, _ = exported_tiny(MODELS[name], tmp_path)
    is_stock = not checkpoint.model.config.trunk.input_taps
    assert is_stock == (type(exported) is transformers.PersimmonForCausalLM)
    tokens = torch.randint(27, (3, 16), generator=torch.Generator().manual_seed(0))
    for length in (1, 2, 16):
        check_logits(checkpoint.model, exported, tokens[:, :length])


@pytest.mark.slow
def test_a_shipped_model(tmp_path, run_json):
    out = tmp_path / "exported"
    shown = run_json("export", "english-mini", "--causal-lm", "--out", out)
    assert shown["bytes"] == sum(path.stat().st_size for path in out.iterdir())
    lm = tarflowlm.load("english-mini")
    exported, tokenizer = opened(out)
    text = "the king of the land had three sons and the youngest of them kept the geese"
    check_logits(lm.model, exported, lm.encode(text)[None])
    # by default it draws as our samplers do, without top_k
    how = exported.generation_config
    assert (how.do_sample, how.temperature, how.top_k) == (True, lm.run.temperature, 0)
    assert how.top_p == lm.run.top_p
    ids = tokenizer(text, return_tensors="pt").input_ids
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(exported.generate(ids, max_new_tokens=12))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert tokenizer.decode(drawn[0][0], skip_special_tokens=True).startswith(text)


def test_an_export_says_what_loads_it(tmp_path, run):
    out = tmp_path / "exported"
    done = run("export", save_run(tmp_path / "taps", MODELS["taps"]()), "--causal-lm", "--out", out)
    line = f'transformers: AutoModelForCausalLM.from_pretrained("{out}", trust_remote_code=True)'
    assert line in done.err.splitlines()
    plain = load_checkpoint(save_run(tmp_path / "plain", MODELS["stack"]()))
    (line,) = what_loads(save_causal_lm(plain, tmp_path / "theirs"))
    assert "trust_remote_code" not in line


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stack", "taps"])
def test_generation_with_a_cache_and_padding_changes_nothing(name, tmp_path):
    _, exported, tokenizer = exported_tiny(MODELS[name], tmp_path)
    batch = tokenizer([text[:6] for text in TEXTS] + [TEXTS[1][:10]], padding=True)
    batch = batch.convert_to_tensors("pt")
    how = {"max_new_tokens": 5, "do_sample": False}
    cached = exported.generate(**batch, **how)
    assert torch.equal(cached, exported.generate(**batch, **how, use_cache=False))
    one = tokenizer(TEXTS[0][:6], return_tensors="pt")
    alone = exported.generate(**one, **how)
    assert torch.equal(cached[0, -5:], alone[0, -5:])
    # an assistant gets its cache by name
    assert torch.equal(exported.generate(**one, **how, assistant_model=exported), alone)


@pytest.mark.slow
def test_tokens_behind_a_cache_need_those_before_them(tmp_path):
    """Their inputs are mixed with earlier ones, which the cache does not hold."""
    _, exported, tokenizer = exported_tiny(MODELS["taps"], tmp_path)
    ids = tokenizer(TEXTS[0], return_tensors="pt").input_ids
    whole = exported(ids).logits[:, -1]
    first = exported(ids[:, :-1], use_cache=True)
    name = "cache" if "cache" in first else "past_key_values"
    with pytest.raises(ValueError, match="inputs_embeds"):
        exported(ids[:, -1:], **{name: first[name]})
    last = exported(inputs_embeds=exported.mix(ids)[:, -1:], **{name: first[name]})
    V = SIZE["vocab_size"]
    torch.testing.assert_close(last.logits[:, -1, :V], whole[:, :V], rtol=0, atol=1e-5)
    # those of tokens that never come are large: their rounding is, too
    torch.testing.assert_close(last.logits[:, -1, V:], whole[:, V:], rtol=1e-6, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stories", "english-small", "english-mini"])
def test_texts_become_the_same_tokens(name, tmp_path):
    import transformers

    lm = tarflowlm.load(name)
    folder = save_causal_lm(lm, tmp_path / "exported")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    people = "The people  of 12 \U0001f600 caf\u00e9s,\n\nand so on."
    for text in (people, " Once upon a ", '"Hi," 12 said. ', "3 cats", "\n\na"):
        ids = tokenizer(text).input_ids
        ours = lm.encode(text).tolist()
        assert ids == [tokenizer.convert_tokens_to_ids("<|start|>"), *ours]
        assert tokenizer.decode(ids, skip_special_tokens=True) == lm.decode(ours)
    assert tokenizer.model_max_length == lm.config.context


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_are_refused(name, tmp_path):
    lm = tarflowlm.Pretrained(OTHERS[name]().float(), TEXT8)
    with pytest.raises(UserError, match=r"own predicts no single tokens: .* certainty 0"):
        save_causal_lm(lm, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_layers_of_one_s_own_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(LAYERS, "mine", type("Mine", (PreNormLayer,), {}))
    model = tiny_ar(trunk=replace(TRUNK, layer="mine"), **SIZE).float()
    with pytest.raises(UserError, match="layer 'mine' of your own: export"):
        save_causal_lm(tarflowlm.Pretrained(model, TEXT8), tmp_path / "exported")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("trunk", [TRUNK, replace(TRUNK, layer="qwen3")])
def test_files_that_do_not_load_are_not_kept(trunk, tmp_path, monkeypatch):
    """As after a change of the Transformer that the export does not follow."""
    monkeypatch.setattr(TransformerConfig, "hidden", 24)
    if trunk.is_gated:
        tokenizer, size = load_tokenizer(FOLDER / "english-small"), {"context": 16}
        size["vocab_size"] = tokenizer.vocab_size
    else:
        tokenizer, size = TEXT8, SIZE
    lm = tarflowlm.Pretrained(tiny_ar(trunk=trunk, **size).float(), tokenizer)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"own is no model of transformers .*mlp"):
        save_causal_lm(lm, tmp_path / "exported")
    assert not list(tmp_path.iterdir())


def test_refusals_of_the_command(tmp_path, refused):
    out = tmp_path / "exported"
    refused("export", "english-passes", "--causal-lm", "--out", out, names=["english-passes"])
    refused("export", "english-mini", "--causal-lm", "--half", "--out", out, names=["--half"])


@pytest.mark.slow
def test_an_exported_folder_is_no_place_and_no_model_of_ours(tmp_path, refused):
    out = tmp_path / "exported"
    save_causal_lm(load_checkpoint("english-mini"), out)
    refused("export", "english-mini", "--causal-lm", "--out", out, names=["exists already"])
    refused("sample", out, names=["config.json"])
