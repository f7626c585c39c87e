"""Models of `transformers` in the shape of ours: their training steps, and their samplers."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tarflowlm.runs.checkpoint import load_checkpoint
from tarflowlm.training.configure import with_precision
from tarflowlm.training.optim import build_optimizers
from tarflowlm_apps.transformers_export.checkpoint import save_causal_lm


def gpt2(config: Any) -> nn.Module:
    """A GPT-2 in the shape of a `BaselineConfig`: learned positions, biases, output weights tied to
    the embedding.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    trunk = config.trunk
    # GELU in its tanh form by PyTorch's single kernel; the default uses eight operations for the
    # same numbers
    theirs = GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.context,
        n_embd=trunk.width,
        n_layer=config.layers,
        n_head=trunk.num_heads,
        n_inner=trunk.mlp_ratio * trunk.width,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="sdpa",
    )
    return GPT2LMHeadModel(theirs)


def gated_shape(config: Any) -> dict[str, Any]:
    """The shape of models with three matrices in an MLP instead of our two: 2/3 as wide, in whole
    registers.
    """
    trunk, hidden = config.trunk, 2 * config.trunk.mlp_ratio * config.trunk.width // 3
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context,
        "hidden_size": trunk.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": trunk.num_heads,
        "intermediate_size": max(16, hidden - hidden % 16),
        "attn_implementation": "sdpa",
    }


def llama(config: Any) -> nn.Module:
    """A Llama in the shape of a `BaselineConfig`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(**gated_shape(config), use_cache=False, bos_token_id=0, eos_token_id=0)
    )


def modernbert(config: Any) -> nn.Module:
    """A ModernBERT in the shape of a `BaselineConfig`, with full attention in every layer."""
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    # its default of 0.02 is for width 768: at width 128 it learned only the frequencies of letters
    # in 900 steps
    options: dict[str, Any] = dict.fromkeys(
        f"{kind}_token_id" for kind in ("pad", "bos", "eos", "cls", "sep")
    )
    options |= {
        "layer_types": ["full_attention"] * config.layers,
        "initializer_range": config.trunk.width**-0.5,
    }
    return ModernBertForMaskedLM(ModernBertConfig(**gated_shape(config), **options))


def training_steps(run: Any, device: torch.device) -> dict[str, Callable[[Tensor], object]]:
    """A training step of each with AdamW and the settings of `run`, by name: a function of tokens
    [B, T].
    """

    def step(model: nn.Module, optimizers: list[torch.optim.Optimizer], tokens: Tensor) -> None:
        # without a start vector, nothing predicts the first token; products are as precise as ours
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            logits = model(input_ids=tokens).logits[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits.float(), tokens[:, 1:].flatten())
        descend(loss, model, optimizers, run.optim.grad_clip)

    half = with_precision(run.train, device).precision == "bfloat16"
    models = {
        "GPT-2": gpt2(run.model).to(device).train(),
        "Llama": llama(run.model).to(device).train(),
    }
    optim = replace(run.optim, optimizer="adamw")
    return {
        name: partial(step, model, build_optimizers(optim, model)) for name, model in models.items()
    }


def descend(
    loss: Tensor, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], clip: float
) -> None:
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def samplers(config: Any, device: torch.device) -> dict[str, Callable[[int, int], Tensor]]:
    """Name -> function (batch, length) that samples tokens from a random first one on."""

    def sample(model: nn.Module, batch: int, length: int) -> Tensor:
        return continued(model, torch.randint(V, (batch, 1), device=device), length, V)

    models, V = {"GPT-2": gpt2(config), "Llama": llama(config)}, config.vocab_size
    return {name: partial(sample, model.to(device).eval()) for name, model in models.items()}


@torch.inference_mode()
def continued(model: nn.Module, first: Tensor, length: int, vocab_size: int) -> Tensor:
    """The tokens `first` [B, 1] and tokens below `vocab_size` drawn after them with a KV cache,
    [B, length].
    """
    from transformers import DynamicCache

    # transformers 5.24 renamed it
    name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
    drawn, cache = [first], {name: DynamicCache()}
    for _ in range(length - 1):
        logits = model(input_ids=drawn[-1], use_cache=True, **cache).logits[:, -1, :vocab_size]
        drawn.append(torch.multinomial(logits.softmax(-1), 1))
    return torch.cat(drawn, 1)


def exported(lm: Any) -> Any:
    """Block 1 of `lm` as a model of transformers. A text begins with `config.bos_token_id`."""
    from transformers import AutoModelForCausalLM

    with TemporaryDirectory() as folder:
        path = save_causal_lm(lm, Path(folder) / "model")
        return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)


def writers(lm: Any, assistant: str | None, length: int) -> dict[str, tuple[nn.Module, Any]]:
    """Name -> a model, and a function that writes a text of `length` tokens with it, by `generate`
    of transformers: a GPT-2 in the shape of `lm`, with random weights, and `lm` exported. The run
    `assistant`, exported, guesses for the latter.
    """
    from transformers import GenerationConfig

    device = lm.model.device

    def write(model: Any, options: dict[str, Any]) -> Tensor:
        # a text of an exported model begins with its start token
        start = torch.tensor([[model.config.bos_token_id]], device=device)
        found = model.generate(start, **options)
        assert found.shape == (1, length + 1)
        return found

    V, ours = lm.model.config.vocab_size, exported(lm)
    found = {"GPT-2, generate": (gpt2(lm.model.config), {})}
    found["exported, generate"] = ours, {}
    found["exported, prompt look-up"] = ours, {"prompt_lookup_num_tokens": 10}
    if assistant is not None:
        small = exported(load_checkpoint(assistant)).eval().to(device)
        found["exported, assisted"] = ours, {"assistant_model": small}
    config = GenerationConfig(do_sample=True, top_k=0, max_length=length + 1, pad_token_id=V - 1)
    for model, _ in found.values():
        model.eval().to(device).generation_config = config
    return {
        name: (model, partial(write, model, options)) for name, (model, options) in found.items()
    }
