"""One optimiser step."""

import torch
from jaxtyping import Int
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from tarflowlm.training.guards import Guard
from tarflowlm.training.parallel import Engine


def optimizer_step(
    engine: Engine,
    optimizers: list[torch.optim.Optimizer],
    tokens: Int[Tensor, "b T"],
    *,
    generator: torch.Generator,
    guard: Guard | None = None,
) -> tuple[Tensor, Tensor]:
    """One step on a global batch, of which `tokens` are this process's rows.

    Loss in nats per token and gradient norm, of the whole batch, both left on the device. Where `guard` does not
    allow it, parameters and optimisers stay as they are; it decides by these two, so that all processes agree. A
    deferred guard decides on the device (fused AdamW knows `found_inf` from torch.amp, ours does as well).
    """
    loss = engine.backward(tokens, generator)
    trained = [p for p in engine.model.parameters() if p.grad is not None]
    gradients = [p.grad for p in trained if p.grad is not None]
    norm = get_total_norm(gradients)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if guard is None or guard.allows(engine.model, loss, norm):
        clip_grads_with_norm_(trained, engine.run.optim.grad_clip, norm)
        for optimizer in optimizers:
            optimizer.found_inf = None if guard is None else guard.found_inf  # type: ignore[attr-defined]
            optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    return loss, norm
