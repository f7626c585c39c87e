"""`export --causal-lm` of a model with Qwen3's layers: the same logits in `transformers`, from
safetensors and from a GGUF.
"""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from helpers import TRUNK, save_run, tiny_ar, tiny_flow
from tarflowlm.data.bpe import train_bpe
from tarflowlm.errors import UserError
from tarflowlm.flow.codebook import Codebook
from tarflowlm.runs.checkpoint import load_checkpoint
from tarflowlm_apps.transformers_export.checkpoint import save_causal_lm, what_loads
from tarflowlm_apps.transformers_export.qwen3 import GGUF, START

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers"),
]
TEXT = "Once upon a time there was a big dog. The dog was very happy, and the cat was, too. "
WORDS = train_bpe([TEXT], 270, alphabet=None, normalization="none", has_end=True)
TRUNK = replace(TRUNK, width=32, num_heads=2, layer="qwen3")
SIZE = {"vocab_size": WORDS.vocab_size, "context": 16, "trunk": TRUNK}
MODELS = {
    "flow": lambda: tiny_flow(
        couplings=("mixd", "mix1"), reads_tokens=True, channel_mix=False, **SIZE
    ),
    "baseline": lambda: tiny_ar(layers=2, **SIZE),
}


@pytest.fixture(params=MODELS)
def exported(request, tmp_path):
    """The checkpoint, and the folder that is written of it."""
    save_run(tmp_path / "run", MODELS[request.param](), tokenizer=WORDS)
    checkpoint = load_checkpoint(tmp_path / "run")
    return checkpoint, save_causal_lm(checkpoint, tmp_path / "exported")


def expected_logits(model, tokens):
    if isinstance(getattr(model, "codebook", None), Codebook):
        block = model.prior.block(0)
        return block.coupling.weight_head(block.features(model.codebook.mean[tokens]))
    return model.logits(tokens)


@torch.no_grad()
@pytest.mark.parametrize("gguf", [False, True], ids=["safetensors", "gguf"])
def test_logits_are_those_of_the_model(exported, gguf):
    import transformers

    checkpoint, folder = exported
    if gguf and find_spec("gguf") is None:
        pytest.skip("needs gguf")
    # of a GGUF, transformers does not read the width of heads
    config = transformers.AutoConfig.from_pretrained(folder)
    file = {"gguf_file": GGUF, "config": config} if gguf else {}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **file)
    assert type(theirs) is transformers.Qwen3ForCausalLM
    tokens = torch.randint(270, (3, 16), generator=torch.Generator().manual_seed(0))
    start = torch.full((3, 1), theirs.config.bos_token_id)
    tokens[tokens == start[0]] = 0  # the byte that no text has
    logits = theirs.eval()(torch.cat((start, tokens[:, :-1]), 1)).logits
    expected = expected_logits(checkpoint.model, tokens)
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)


def test_what_loads_it_depends_on_the_package_gguf(exported):
    _, folder = exported
    *_, line = what_loads(folder)
    assert ("llama-server" in line) == (find_spec("gguf") is not None)
    (folder / GGUF).unlink(missing_ok=True)
    *_, line = what_loads(folder)
    assert "pip install" in line


@torch.no_grad()
def test_llama_cpp_has_the_same_probabilities(exported):
    """Where it is installed: `pip install xllamacpp`."""
    llama = pytest.importorskip("xllamacpp")
    pytest.importorskip("gguf")
    checkpoint, folder = exported
    options = llama.CommonParams()
    options.model.path = str(folder / GGUF)
    options.n_ctx, options.n_parallel, options.n_gpu_layers = 256, 1, 0
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
    options.cache_type_k = options.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    server = llama.Server(options)
    num_compared = 0
    for length in range(4, 40):
        prompt = {"prompt": TEXT[:length], "temperature": 0.0, "n_predict": 1, "n_probs": 10}
        choices = server.handle_completions(prompt).get("choices", [{}])
        if not choices[0].get("logprobs"):
            continue  # it drew a part of a character, which it holds back
        tokens = [*checkpoint.tokenizer.encode(TEXT[:length]), 0]
        expected = expected_logits(checkpoint.model, torch.tensor([tokens]))[0, -1].log_softmax(-1)
        for one in choices[0]["logprobs"]["content"][0]["top_logprobs"]:
            assert one["logprob"] == pytest.approx(float(expected[one["id"]]), abs=0.02)
        num_compared += 1
    assert num_compared


def test_texts_become_the_same_tokens(exported):
    import transformers

    checkpoint, folder = exported
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text in (TEXT, " a dog\n\n12 \U0001f600 caf\u00e9s"):
        ids = tokenizer(text).input_ids
        assert ids == [tokenizer.bos_token_id, *checkpoint.tokenizer.encode(text)]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.bos_token == START
    assert tokenizer.eos_token_id == WORDS.end


def test_models_that_cannot_be_written_are_refused(tmp_path):
    letters = save_run(tmp_path / "letters", tiny_ar(vocab_size=27, context=16, trunk=TRUNK))
    with pytest.raises(UserError, match=r"letters reads chars: .*word pieces"):
        save_causal_lm(load_checkpoint(letters), tmp_path / "out")
    taps = tiny_ar(**SIZE | {"trunk": replace(TRUNK, input_taps=2)})
    with pytest.raises(UserError, match=r"taps convolves its inputs: .*--model.trunk.input-taps 0"):
        save_causal_lm(
            load_checkpoint(save_run(tmp_path / "taps", taps, tokenizer=WORDS)), tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()
