r"""A small network that guesses the features of block 1 at the coming positions.

With the features of a position, block 1's own coupling turns its noise into latents. So a draft has only the
Transformer to stand in for, and there it starts from the features of the last position, which hold what block 1 made
of the whole past. Block 1 then checks the guess (`generation/drafted.py`): a poor one costs time and never changes a
text.

Shape legend: k positions read, D width of block 1, E width of the draft, C channels per position.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tarflowlm.flow.cached import by_inputs
from tarflowlm.shapes import DraftConfig as DraftConfig


class DraftSteps:
    """The steps of a draft without gradients, in few operations. It keeps the weights as they are now."""

    def __init__(self, draft: "Draft") -> None:
        self.shape = (draft.config.width,)
        self.norm, self.out_norm = (
            (norm.weight.detach(), norm.bias.detach()) for norm in (draft.norm, draft.out_norm)
        )
        self.up, self.down, self.out = (by_inputs(m.weight) for m in (draft.up, draft.down, draft.out))
        self.up_bias, self.out_bias = draft.up.bias.detach(), draft.out.bias.detach()

    def __call__(self, state: Tensor, features: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """As `Draft.step`, for tensors [rows, ...]."""
        x = torch.cat((F.layer_norm(state, self.shape, *self.norm), z), -1)
        state = torch.addmm(state, F.gelu(torch.addmm(self.up_bias, x, self.up)), self.down)
        change = torch.addmm(self.out_bias, F.layer_norm(state, self.shape, *self.out_norm), self.out)
        return state, change.add_(features)


class Draft(nn.Module):
    r"""Features c of one position after another, from those of the k before and the latents on the way.

        s_0 = W [c_{n-k+1}, ..., c_n]
        s_i = s_{i-1} + down gelu(up [norm(s_{i-1}), z_{n+i-1}]),    c_{n+i} = c_{n+i-1} + out norm(s_i)

    A recurrent network, without attention: a step is seven small operations. Positions before the text count as
    zeros. Paper: none; drafts on a model's own features are those of Li et al. 2024 (EAGLE) and Zhang et al. 2024
    (recurrent drafts).
    """

    def __init__(self, config: DraftConfig, *, features: int, channels: int) -> None:
        """`features`: the width D of block 1; `channels`: C."""
        super().__init__()
        self.config, width = config, config.width
        self.read = nn.Linear(config.past * features, width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width + channels, config.hidden)
        self.down = nn.Linear(config.hidden, width, bias=False)
        self.out_norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, features)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def start(self, features: Float[Tensor, "*rows k D"]) -> Float[Tensor, "*rows E"]:
        """The state after k positions with these features."""
        return self.read(features.flatten(-2))

    def steps(self) -> DraftSteps:
        """`step`, many times without gradients."""
        return DraftSteps(self)

    def step(
        self, state: Float[Tensor, "*rows E"], features: Float[Tensor, "*rows D"], z: Float[Tensor, "*rows C"]
    ) -> tuple[Float[Tensor, "*rows E"], Float[Tensor, "*rows D"]]:
        """The state and the features of the next position, from those of the last one and its latents."""
        x = torch.cat((self.norm(state), z), -1)
        state = state + self.down(F.gelu(self.up(x)))
        return state, features + self.out(self.out_norm(state))
