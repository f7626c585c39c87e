"""The map from latents to the inputs of a Transformer."""

import torch.nn.functional as F
from torch import Tensor, nn


class InputMap(nn.Module):
    """Latents x [..., C] to Transformer inputs [..., D]: linear(x) + out(gelu(lift(x))).

    The linear path alone, `is_linear`, confines the inputs to a C-dimensional subspace
    (docs/log.md).
    """

    def __init__(self, channels: int, width: int, *, is_linear: bool = False) -> None:
        super().__init__()
        self.is_linear = is_linear
        self.linear = nn.Linear(channels, width)
        if not is_linear:
            self.lift = nn.Linear(channels, width)
            self.out = nn.Linear(width, width, bias=False)
        nn.init.normal_(self.linear.weight, std=channels**-0.5)
        nn.init.zeros_(self.linear.bias)
        if not is_linear:
            nn.init.normal_(self.lift.weight, std=2.0 * channels**-0.5)
            nn.init.normal_(self.out.weight, std=width**-0.5)
            nn.init.normal_(self.lift.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_linear:
            return self.linear(x)
        return self.linear(x) + self.out(F.gelu(self.lift(x)))
