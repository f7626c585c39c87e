"""Muon for parameters that FSDP2 has cut into shards."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


class ShardedMuon(torch.optim.Muon):
    """torch.optim.Muon over DTensors: the update that one process would make, to rounding.

    Orthogonalisation needs whole matrices. Momentum stays cut like the parameters; each matrix is gathered, one
    process (they take turns) orthogonalises it, and the result is cut again. PyTorch's own step on DTensors would
    communicate inside every one of the iterations, and round differently.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            own = {}
            for index, p in enumerate(params):
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                buffer = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
                whole = update.full_tensor()
                if index % p.device_mesh.size() == p.device_mesh.get_rank():
                    own[index] = self._orthogonalised(whole, group)
            for index, p in enumerate(params):
                change = own.pop(index, None)
                change = torch.empty(p.shape, dtype=p.dtype, device=p.device) if change is None else change
                source = index % p.device_mesh.size()
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(distribute_tensor(change, p.device_mesh, p.placements, src_data_rank=source))

    @staticmethod
    def _orthogonalised(update: Tensor, group: dict[str, Any]) -> Tensor:
        """What Muon adds to a whole matrix for this update: its own step from zero, without momentum or decay."""
        change = torch.zeros_like(update)
        change.grad = update
        kept = ("lr", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")
        plain = {name: group[name] for name in kept}
        torch.optim.Muon([change], momentum=0.0, nesterov=False, weight_decay=0.0, **plain).step()
        return change


def muon_optimizer(groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """Muon for whole matrices, or for shards of them."""
    sharded = any(isinstance(p, DTensor) for group in groups for p in group["params"])
    return (ShardedMuon if sharded else torch.optim.Muon)(groups, **options)
