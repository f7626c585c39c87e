"""A model as a checkpoint of `transformers`: block 1 in the limit of sharp codes (docs/math.md).

It embeds tokens as the means of their codes. Its Transformer is Persimmon's with biases of zero.
The start vector embeds an extra token. The head W x + b becomes (W - mean(W) + b / D) (x + 1),
because a layer-normalised x has the mean zero.
"""

import json
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn

from tarflowlm.baseline import TokenLM
from tarflowlm.data import Tokenizer as OurTokenizer
from tarflowlm.data.library import SEPARATOR
from tarflowlm.data.tokenizer import Document
from tarflowlm.errors import UserError, command
from tarflowlm.files import new_folder, read_json, write_json
from tarflowlm.flow.conditioner import Conditioner
from tarflowlm.flow.mixd import MixDCoupling
from tarflowlm.model import as_flow
from tarflowlm.runs import TOKENIZER, WEIGHTS
from tarflowlm.runs.checkpoint import Checkpoint
from tarflowlm.runs.weights import write_weights
from tarflowlm_apps.transformers_export.qwen3 import GGUF, save_qwen3

START, PAD = "<|start|>", "<|pad|>"
EDGE = "\x02"
CODE = "modeling_tarflowlm.py"
"""Our code in an export with `input_taps`, which `transformers` asks to trust."""
TEMPLATE = Path(__file__).with_name("template")
"""Shared by all checkpoints; names.json: weights of a layer, and modules of Persimmon."""


@torch.no_grad()
def save_causal_lm(checkpoint: Checkpoint, out: Path) -> Path:
    """Write what `AutoModelForCausalLM` and `AutoTokenizer` load into the new directory `out`.

    UserError for patches, where block 1 is no tied Mix-d that acts on all tokens, for layers of a
    user's own, and for files that `transformers`, if it is there, does not load.
    """
    parts = _token_model(checkpoint)
    trunk = checkpoint.model.config.trunk
    name = checkpoint.directory.name
    if trunk.layer_class is not None:
        raise UserError(f"{name} has the layer {trunk.layer!r} of your own: export one with ours")
    with new_folder(out) as folder:
        (save_qwen3 if trunk.is_gated else save_persimmon)(checkpoint, folder, *parts)
        if find_spec("transformers") is not None:
            check_loads(folder, name)
    return out


def what_loads(folder: Path) -> Iterator[str]:
    """A line for each program that loads an exported folder: how it does."""
    trust = ", trust_remote_code=True" if (folder / CODE).exists() else ""
    place = folder.as_posix()
    yield f'transformers: AutoModelForCausalLM.from_pretrained("{place}"{trust})'
    if (folder / GGUF).exists():
        yield f"llama.cpp: llama-server -m {command([str(folder / GGUF)])}"
    elif read_json(folder / "config.json")["model_type"] == "qwen3":
        yield "without model.gguf, for llama.cpp: pip install 'tarflowlm[export]'"


def check_loads(folder: Path, name: str) -> None:
    """UserError unless `transformers` finds all weights in a folder, and in their shapes."""
    from transformers import AutoModelForCausalLM, logging

    verbosity, shows_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    finally:
        logging.set_verbosity(verbosity)
        if shows_bars:
            logging.enable_progress_bar()
    _, found = loaded
    wrong = [str(key) for kind in found.values() for key in kind]
    if wrong:
        what = f"{name} is no model of transformers ({', '.join(wrong[:2]):.100})"
        raise UserError(f"{what}: export one whose Transformer is ours")


def save_persimmon(
    checkpoint: Checkpoint, folder: Path, embedding: Tensor, block: Conditioner, head: nn.Linear
) -> None:
    """Write the files of a Persimmon into a folder; parts as for `save_qwen3`."""
    shape = checkpoint.model.config
    trunk = shape.trunk
    V = shape.vocab_size
    document = json.loads(checkpoint.tokenizer.to_json())
    document["normalizer"] = _normalizer(checkpoint.tokenizer, document["normalizer"])
    library = Tokenizer.from_str(json.dumps(document))
    library.add_special_tokens([START, PAD])
    library.post_processor = TemplateProcessing(single=f"{START} $A", special_tokens=[(START, V)])
    end = START if library.token_to_id(SEPARATOR) is None else SEPARATOR
    special = {"bos_token": START, "eos_token": end, "pad_token": PAD}
    ids = {f"{name}_id": library.token_to_id(token) for name, token in special.items()}
    config = ids | {
        "vocab_size": V + 2,
        "hidden_size": trunk.width,
        "intermediate_size": trunk.width * trunk.mlp_ratio,
        "num_hidden_layers": len(block.transformer.layers),
        "num_attention_heads": trunk.num_heads,
        "max_position_embeddings": shape.context,
    }
    usual = {"temperature": checkpoint.run.temperature, "top_p": checkpoint.run.top_p}
    if trunk.input_taps:
        shutil.copy(TEMPLATE / f"{CODE}.txt", folder / CODE)
        config |= read_json(TEMPLATE / "config_of_taps.json") | {"input_taps": trunk.input_taps}
    files = {
        "config.json": config,
        "generation_config.json": ids | usual,
        "tokenizer_config.json": special | {"model_max_length": shape.context},
    }
    for name, values in files.items():
        write_json(folder / name, read_json(TEMPLATE / name) | values)
    library.save(str(folder / TOKENIZER))
    write_weights(folder / WEIGHTS, _weights(embedding, block, head), {"format": "pt"})


def _normalizer(tokenizer: OurTokenizer, given: Document | None) -> Document | None:
    """A normaliser that reads a text as `data.prompts.read` does, in the terms of `tokenizers`.

    `given` reads training text: in text8 it begins with a space. A text that a user gives has a
    space at either end only if there is white space; a control character keeps its place.
    """
    if given is None:
        has_capitals = tokenizer.alphabet != tokenizer.alphabet.lower()
        return None if has_capitals else {"type": "Lowercase"}
    keeps = [_replaces(end, EDGE) for end in (r"^\s+", r"\s+$")]
    *before, _letters, strip, _space = given["normalizers"]
    after = [_replaces(f"[^a-z{EDGE}]+", " "), strip, _replaces(f" ?{EDGE} ?", " ")]
    return {"type": "Sequence", "normalizers": [*keeps, *before, *after]}


def _replaces(pattern: str, content: str) -> Document:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def _token_model(checkpoint: Checkpoint) -> tuple[Tensor, Conditioner, nn.Linear]:
    """Embedding [V, D], Transformer and head of a model of single tokens."""
    model = checkpoint.model
    if model.config.patch == 1:
        if isinstance(model, TokenLM):
            return model.embedding.weight, model, model.head
        flow = as_flow(model)
        block = flow.prior.block(0)
        tied = block.coupling
        if isinstance(tied, MixDCoupling) and tied.uses_encoder_codebook:
            embedding = block.input(flow.codebook.mean)
            if block.token_embedding is not None:
                embedding += block.token_embedding.weight
            return embedding, block, tied.weight_head
    rule = "export a baseline, or a flow whose block 1 is mixd with components 0 and certainty 0"
    raise UserError(f"{checkpoint.directory.name} predicts no single tokens: {rule}, with patch 1")


def _weights(embedding: Tensor, block: Conditioner, head: nn.Linear) -> dict[str, Tensor]:
    """The state dict of Persimmon, and the taps."""
    transformer = block.transformer
    start = block.start[None]
    D = start.shape[1]
    W = head.weight * transformer.norm.weight
    rows = W - W.mean(-1, keepdim=True) + head.bias[:, None] / D
    found = {
        "model.embed_tokens.weight": torch.cat((embedding, start, 0 * start)),
        "model.final_layernorm.weight": torch.ones(D),
        "model.final_layernorm.bias": torch.ones(D),
        # START and PAD, which are no text, have the logit -1e4
        "lm_head.weight": torch.cat((rows, rows.new_full((2, D), -1e4 / D))),
    }
    if transformer.input_taps is not None:
        found["taps"] = transformer.input_taps
    names = read_json(TEMPLATE / "names.json")
    for index, layer in enumerate(transformer.layers):
        for key, weight in layer.state_dict().items():
            name = names[key]
            if key == "attention.qkv.weight":
                # rows by [q k v, head]; there by [head, q k v]
                heads = weight.unflatten(0, (3, transformer.config.num_heads, -1))
                weight = heads.transpose(0, 1).flatten(0, 2)
            found[f"model.layers.{index}.{name}.weight"] = weight
            found[f"model.layers.{index}.{name}.bias"] = torch.zeros(len(weight))
    return found
