"""A model with Qwen3's layers as a Qwen3, which `transformers`, llama.cpp and others run.

Block 1 of a flow is exported in the limit of sharp codes (docs/math.md), where it is a language
model that embeds a token as the mean of its code.

Ours normalises layers, queries and keys by LayerNorm without a bias, theirs by the root mean
square. The two agree on numbers with the mean zero. So what is written to the residual stream loses
its mean, and so do queries and keys of a head.

Ours begins with a learned start vector, theirs with a token. It takes the place of the byte 255,
which no UTF-8 text has: the model has learnt that it never comes.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn

from tarflowlm.data import Tokenizer
from tarflowlm.data.library import BYTE_SYMBOLS, SEPARATOR
from tarflowlm.data.tokenizer import Document
from tarflowlm.errors import UserError
from tarflowlm.files import write_json
from tarflowlm.flow.conditioner import Conditioner
from tarflowlm.flow.transformer import PreNormLayer
from tarflowlm.runs import TOKENIZER, WEIGHTS
from tarflowlm.runs.checkpoint import Checkpoint
from tarflowlm.runs.weights import write_weights

START = "<|start|>"
NEVER = BYTE_SYMBOLS[255]
"""The stand-in of the byte that no text has."""

GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Names of a layer's weights in a GGUF, by those of `transformers`."""
GGUF = "model.gguf"


def save_qwen3(
    checkpoint: Checkpoint, folder: Path, embedding: Tensor, block: Conditioner, head: nn.Linear
) -> None:
    """Write what `transformers` loads into a folder, and with the package gguf `model.gguf`.

    `embedding` [V, D], `block` and `head` are what the model has of a language model.
    """
    model = checkpoint.model.config
    if model.trunk.input_taps:
        rule = "train with --model.trunk.input-taps 0"
        raise UserError(f"{checkpoint.directory.name} convolves its inputs: {rule}")
    document, start = tokenizer_with_start(checkpoint.tokenizer, checkpoint.directory.name)
    added = {token["content"]: token["id"] for token in document["added_tokens"]}
    end = added.get(SEPARATOR, start)
    trunk = model.trunk
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "bos_token_id": start,
        "eos_token_id": end,
        "pad_token_id": end,
        "vocab_size": model.vocab_size,
        "hidden_size": trunk.width,
        "intermediate_size": trunk.hidden,
        "num_hidden_layers": len(block.transformer.layers),
        "num_attention_heads": trunk.num_heads,
        "num_key_value_heads": trunk.num_heads,
        "head_dim": trunk.head_width,
        "max_position_embeddings": model.context,
        "rms_norm_eps": block.transformer.norm.eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    usual = {"temperature": checkpoint.run.temperature, "top_p": checkpoint.run.top_p}
    named = SEPARATOR if SEPARATOR in added else START
    special = {"bos_token": START, "eos_token": named, "pad_token": named}
    weights = weights_of(embedding, start, block, head)
    write_json(folder / "config.json", config)
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sampling = {"do_sample": True, "top_k": 0, "suppress_tokens": [start]}
    write_json(folder / "generation_config.json", ids | sampling | usual)
    library = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.context,
    }
    write_json(folder / "tokenizer_config.json", library | special)
    write_json(folder / TOKENIZER, document)
    write_weights(folder / WEIGHTS, weights, {"format": "pt"})
    if find_spec("gguf") is not None:
        write_gguf(folder / GGUF, checkpoint, config, document, weights)


def write_gguf(
    path: Path,
    checkpoint: Checkpoint,
    config: dict[str, Any],
    document: Document,
    weights: dict[str, Tensor],
) -> None:
    """Write what llama.cpp and the programs around it load: the same numbers in float32."""
    import gguf

    file = gguf.GGUFWriter(path, "qwen3")
    file.add_name(checkpoint.run.name)
    file.add_context_length(config["max_position_embeddings"])
    file.add_embedding_length(config["hidden_size"])
    file.add_block_count(config["num_hidden_layers"])
    file.add_feed_forward_length(config["intermediate_size"])
    file.add_head_count(config["num_attention_heads"])
    file.add_head_count_kv(config["num_key_value_heads"])
    file.add_key_length(config["head_dim"])
    file.add_value_length(config["head_dim"])
    file.add_layer_norm_rms_eps(config["rms_norm_eps"])
    file.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    file.add_file_type(gguf.LlamaFileType.ALL_F32)
    file.add_sampling_temp(checkpoint.run.temperature)
    file.add_sampling_top_p(checkpoint.run.top_p)
    file.add_sampling_top_k(0)
    # byte-level BPE with GPT-2's pattern of words
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("gpt-2")
    added = {one["id"]: one["content"] for one in document["added_tokens"]}
    tokens = {number: token for token, number in document["model"]["vocab"].items()} | added
    kinds = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    file.add_token_list([tokens[number] for number in range(config["vocab_size"])])
    file.add_token_types([kinds[number in added] for number in range(config["vocab_size"])])
    merges = document["model"]["merges"]
    file.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in merges])
    file.add_bos_token_id(config["bos_token_id"])
    file.add_eos_token_id(config["eos_token_id"])
    file.add_pad_token_id(config["pad_token_id"])
    file.add_add_bos_token(True)
    for name, weight in weights.items():
        file.add_tensor(gguf_name(name), weight.numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def gguf_name(name: str) -> str:
    """The name of a weight in a GGUF."""
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in whole:
        return whole[name]
    _, _, index, *parts, _ = name.split(".")
    return f"blk.{index}.{GGUF_NAMES['.'.join(parts)]}.weight"


def tokenizer_with_start(tokenizer: Tokenizer, name: str) -> tuple[Document, int]:
    """Its document, in which the byte 255 is the token `START`, and that token's number.

    UserError for a tokenizer that is no byte-level BPE with a token for every byte.
    """
    document = json.loads(tokenizer.to_json())
    vocabulary = dict(document["model"]["vocab"])
    if tokenizer.kind != "bpe" or NEVER not in vocabulary:
        raise UserError(f"{name} reads {tokenizer.kind}s: export a model of byte-level word pieces")
    start = vocabulary.pop(NEVER)
    document["model"]["vocab"] = vocabulary | {START: start}
    library = tokenizers.Tokenizer.from_str(json.dumps(document))
    library.add_special_tokens([START])
    special = [(START, start)]
    library.post_processor = TemplateProcessing(single=f"{START} $A", special_tokens=special)
    return json.loads(library.to_str()), start


def weights_of(
    embedding: Tensor, start: int, block: Conditioner, head: nn.Linear
) -> dict[str, Tensor]:
    """The state dict of Qwen3 in `transformers`; the token `start` embeds the start vector."""
    transformer = block.transformer
    embedding = embedding.clone()
    embedding[start] = block.start
    found = {
        "model.embed_tokens.weight": centred(embedding, -1),
        "model.norm.weight": transformer.norm.weight,
        "lm_head.weight": head.weight,
    }
    for index, layer in enumerate(transformer.layers):
        assert isinstance(layer, PreNormLayer)
        assert layer.gate is not None
        attention = layer.attention
        q, k, v = attention.qkv.weight.chunk(3)
        by_head = (-1, transformer.config.head_width)
        for name, weight in {
            "input_layernorm": layer.attention_norm.weight,
            "self_attn.q_proj": centred(q.unflatten(0, by_head), 1).flatten(0, 1),
            "self_attn.k_proj": centred(k.unflatten(0, by_head), 1).flatten(0, 1),
            "self_attn.v_proj": v,
            "self_attn.q_norm": attention.query_scale,
            "self_attn.k_norm": attention.key_scale,
            "self_attn.o_proj": centred(attention.out.weight, 0),
            "post_attention_layernorm": layer.mlp_norm.weight,
            "mlp.gate_proj": layer.gate.weight,
            "mlp.up_proj": layer.up.weight,
            "mlp.down_proj": centred(layer.down.weight, 0),
        }.items():
            found[f"model.layers.{index}.{name}.weight"] = weight
    return {name: weight.detach().float() for name, weight in found.items()}


def centred(x: Tensor, axis: int) -> Tensor:
    return x - x.mean(axis, keepdim=True)
