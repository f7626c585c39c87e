"""The baseline beside a GPT-2 and a Llama of `transformers` of the same shape: a training step, and sampling.

In training all have the same layers, width, heads, vocabulary, batch, context, optimiser settings and gradient
clipping. Theirs are the published architectures with random weights, no dropout, no KV cache in training, and
attention by `scaled_dot_product_attention`. Options that only affect speed are set to the faster choice.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from rich.table import Table
from torch import Tensor, nn

from tarflowlm.baseline import BaselineConfig, TokenLM
from tarflowlm.bench.measure import median_ratio, seconds_per_call
from tarflowlm.device import now
from tarflowlm.errors import UserError
from tarflowlm.language_model import LanguageModel, seeded
from tarflowlm.runs.config import RunConfig
from tarflowlm.shapes import TransformerConfig
from tarflowlm.terminal.tables import column_table
from tarflowlm.training.optim import build_optimizers

PARTS = ("forward", "backward", "step")
"""Of a training step. The last is clipping, the optimisers, and the release of the gradients."""


@dataclass(frozen=True)
class _Contender:
    model: nn.Module
    loss: Callable[[Int[Tensor, "B T"]], Tensor]
    """Mean nats per token."""
    optimizers: list[torch.optim.Optimizer]
    grad_clip: float


def peers(run: RunConfig, vocab_size: int, *, rounds: int, steps: int, device: torch.device) -> list[dict[str, Any]]:
    """Rows {"name", "milliseconds", "forward", "backward", "step", "ratio", "parameters"} at the shape of `run`.

    Ours comes first. Milliseconds are of a whole training step and of its parts. Parts are timed in separate steps,
    because on a GPU the synchronisation between them takes time. Numbers are medians over rounds that time each model
    in turn; the ratio is our time over that model's (`median_ratio`).

    Raises UserError if `run` is not a baseline of one token per position, or if `transformers` is missing.
    """
    config = run.model
    if not isinstance(config, BaselineConfig) or config.patch > 1:
        raise UserError(f"--peers compares a baseline without patches: put one, like mini-ar, in place of {run.name}")
    config = replace(config, vocab_size=vocab_size)
    run = replace(run, model=config, optim=replace(run.optim, optimizer="adamw"))
    with seeded(run.seed):
        models = {run.name: TokenLM(config), "GPT-2": gpt2(config), "Llama": llama(config)}
    contenders = {name: _contender(model.to(device).train(), run) for name, model in models.items()}
    generator = torch.Generator(device=device).manual_seed(0)
    shape = (run.train.batch_size, config.context)
    tokens = torch.randint(vocab_size, shape, generator=generator, device=device)
    whole: dict[str, list[float]] = {name: [] for name in contenders}
    parts: dict[str, list[tuple[float, ...]]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            # a first step brings the allocator back to this model's sizes
            _train(contender, tokens, 1)
            whole[name].append(_train(contender, tokens, steps))
            parts[name].append(_train_in_parts(contender, tokens, steps))
    return [
        {
            "name": name,
            "milliseconds": 1000 * statistics.median(whole[name]),
            **{part: 1000 * statistics.median(times[at] for times in parts[name]) for at, part in enumerate(PARTS)},
            "ratio": median_ratio(whole[run.name], whole[name]),
            "parameters": sum(p.numel() for p in models[name].parameters()),
        }
        for name in contenders
    ]


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise UserError("--peers needs transformers: pip install 'tarflowlm[quality]'") from None
    return transformers


def gpt2(config: BaselineConfig) -> nn.Module:
    """A GPT-2 of our shape: learned positions, biases, output weights tied to the embedding.

    GELU in its tanh form by PyTorch's single kernel; the default uses eight operations for the same numbers.
    """
    transformers = _transformers()
    trunk = config.trunk
    theirs = transformers.GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.context, n_embd=trunk.width, n_layer=config.layers,
        n_head=trunk.num_heads, n_inner=trunk.mlp_ratio * trunk.width, activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
        attn_implementation="sdpa",
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(theirs)


def llama(config: BaselineConfig) -> nn.Module:
    """A Llama of our shape."""
    transformers = _transformers()
    trunk = config.trunk
    theirs = transformers.LlamaConfig(
        vocab_size=config.vocab_size, max_position_embeddings=config.context, hidden_size=trunk.width,
        num_hidden_layers=config.layers, num_attention_heads=trunk.num_heads, num_key_value_heads=trunk.num_heads,
        intermediate_size=gated_width(trunk), attention_dropout=0.0, use_cache=False,
        bos_token_id=0, eos_token_id=0, attn_implementation="sdpa",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(theirs)


def gated_width(trunk: TransformerConfig) -> int:
    """Hidden width of an MLP of three matrices, where ours has two: 2/3 of ours.

    Rounded down to a multiple of 16: no more parameters than ours, and whole vector registers.
    """
    hidden = 2 * trunk.mlp_ratio * trunk.width // 3
    return max(16, hidden - hidden % 16)


def sampler(model: nn.Module, vocab_size: int) -> Callable[[int, int], Tensor]:
    """A function (batch, length) -> tokens [batch, length] that samples from a model of `transformers`.

    A plain loop over its KV cache, leaner than their `generate`. Without a start vector, the first token is uniform.
    """

    @torch.inference_mode()
    def sample(batch: int, length: int) -> Tensor:
        device = next(model.parameters()).device
        drawn = [torch.randint(vocab_size, (batch, 1), device=device)]
        following = stepper(model)
        for _ in range(length - 1):
            drawn.append(torch.multinomial(following(drawn[-1]).softmax(-1), 1))
        return torch.cat(drawn, 1)

    return sample


def stepper(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A function token [B, 1] -> logits [B, V] of what follows it and all tokens before, over an empty KV cache."""
    cache = _transformers().DynamicCache()
    # transformers 5.24 renamed it
    name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
    return lambda token: model(input_ids=token, use_cache=True, **{name: cache}).logits[:, -1]


def _contender(model: nn.Module, run: RunConfig) -> _Contender:
    def loss(tokens: Tensor) -> Tensor:
        if isinstance(model, LanguageModel):
            return model.negative_bound(tokens, model.draw_noise(tokens)).mean() / tokens.shape[1]
        # without a start vector, the first token has nothing to be predicted from
        logits = model(input_ids=tokens).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    return _Contender(model, loss, build_optimizers(run.optim, model), run.optim.grad_clip)


def _update(contender: _Contender) -> None:
    nn.utils.clip_grad_norm_(contender.model.parameters(), contender.grad_clip)
    for optimizer in contender.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _train(contender: _Contender, tokens: Tensor, steps: int) -> float:
    """Seconds per training step."""

    def step() -> None:
        contender.loss(tokens).backward()
        _update(contender)

    return seconds_per_call(step, steps, tokens.device)


def _train_in_parts(contender: _Contender, tokens: Tensor, steps: int) -> tuple[float, ...]:
    """Seconds per training step of each of `PARTS`."""
    totals = [0.0, 0.0, 0.0]
    for _ in range(steps):
        times = [now(tokens.device)]
        loss = contender.loss(tokens)
        times.append(now(tokens.device))
        loss.backward()
        times.append(now(tokens.device))
        _update(contender)
        times.append(now(tokens.device))
        totals = [total + b - a for total, (a, b) in zip(totals, pairwise(times), strict=True)]
    return tuple(total / steps for total in totals)


def peers_table(rows: list[dict[str, Any]]) -> Table:
    """`peers`' rows as a table."""
    columns = ("", "M parameters", *PARTS, "together", "ours over it")
    table = column_table("training step with AdamW beside transformers', milliseconds", columns)
    for row in rows:
        milliseconds = (f"{row[name]:.0f}" for name in (*PARTS, "milliseconds"))
        table.add_row(row["name"], f"{row['parameters'] / 1e6:.2f}", *milliseconds, f"{row['ratio']:.2f}")
    return table
