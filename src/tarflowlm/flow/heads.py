"""What turns features of the past into the parameters of a coupling.

Shape legend: B batch, T positions, D width, G groups of channels, m channels per group, O outputs per group,
N hidden units per group, E features per group. Parameters come group-first, [G, B, T, O] and contiguous: the
elementwise kernels that read them are bound by memory, and the batched product writes that layout for free.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tarflowlm.flow.precision import widen

GroupState = tuple[Tensor, list[Tensor]]
"""Hidden context [G, B, N] of a position, and the features [B, E] of the groups known so far."""


class AutoregressiveHead(nn.Module):
    r"""Masked autoregressive MLP over the G groups of channels of a position (docs/math.md, eq. 10).

        out_g = W_g gelu( A_g features + sum_{j<g} B_{gj} gelu(C_j [z_j, elu(z_j), elu(-z_j)]) ) + bias_g

    Group g sees the Transformer's features (the past positions) and the groups j < g of its own position, nothing
    else. With m = 1 it is the head of the Mix-1 coupling, with m = d the in-patch head of Mix-d.
    Paper: appendix H, after Lippe & Gavves 2021. Differs: C and W are block-diagonal (a channel is embedded on its
    own, and read out from its own hidden units), which costs G times less; the dependence on earlier groups runs
    through B. `outputs` names the O of each output tensor, so that every one of them is contiguous.
    """

    mask: Tensor

    def __init__(
        self, *, width: int, groups: int, channels: int, hidden: int, outputs: tuple[int, ...], features: int
    ) -> None:
        super().__init__()
        self.groups, self.channels, self.hidden, self.features = groups, channels, hidden, features
        self.context = nn.Linear(width, groups * hidden)
        known = max(groups - 1, 0)
        self.embed = nn.Parameter(torch.randn(known, 3 * channels, features) * (3 * channels) ** -0.5)
        self.cross = nn.Parameter(torch.randn(groups, hidden, known, features) * max(known * features, 1) ** -0.5)
        self.weights = nn.ParameterList(torch.randn(groups, hidden, n) * 0.1 * hidden**-0.5 for n in outputs)
        self.biases = nn.ParameterList(torch.zeros(groups, n) for n in outputs)
        nn.init.normal_(self.context.weight, std=width**-0.5)
        nn.init.zeros_(self.context.bias)
        below = torch.ones(groups, known).tril(-1)
        self.register_buffer("mask", below[:, None, :, None], persistent=False)

    def _embed(self, z: Tensor, embed: Tensor) -> Tensor:
        """[j, rows, m] -> [j, rows, E]."""
        return F.gelu(torch.cat((z, F.elu(z), F.elu(-z)), dim=-1) @ embed)

    def _read_out(self, hidden: Tensor, groups: slice) -> list[Tensor]:
        """[g, rows, N] -> one [g, rows, O] for every output, at least float32."""
        active = F.gelu(hidden)
        pairs = zip(self.weights, self.biases, strict=True)
        return [widen(active @ weight[groups]) + bias[groups, None] for weight, bias in pairs]

    def forward(self, features: Float[Tensor, "B T D"], z: Float[Tensor, "B T C"]) -> list[Tensor]:
        """Parameters of every group given the true earlier groups: a list of [G, B, T, O]."""
        B, T, _ = z.shape
        z_GNm = z.reshape(B * T, self.groups, self.channels).transpose(0, 1)
        hidden = self.context(features).reshape(B * T, -1)
        if self.groups > 1:
            known = self._embed(z_GNm[:-1], self.embed).transpose(0, 1).reshape(B * T, -1)
            cross = (self.cross * self.mask).reshape(self.groups * self.hidden, -1)
            hidden = hidden + F.linear(known, cross)
        hidden_GNh = hidden.view(B * T, self.groups, self.hidden).transpose(0, 1)
        return [out.view(self.groups, B, T, -1) for out in self._read_out(hidden_GNh, slice(None))]

    def start(self, features: Float[Tensor, "B D"]) -> GroupState:
        """The state before the first group of a position; `step` and `observe` then walk through the groups."""
        return self.context(features).view(len(features), self.groups, self.hidden).transpose(0, 1), []

    def step(self, state: GroupState) -> list[Tensor]:
        """Parameters [1, B, O] of the first group not yet observed."""
        context, known = state
        g = len(known)
        hidden = context[g]
        if g:
            hidden = hidden + torch.cat(known, -1) @ self.cross[g, :, :g].reshape(self.hidden, -1).T
        return self._read_out(hidden[None], slice(g, g + 1))

    def observe(self, state: GroupState, z: Float[Tensor, "B m"]) -> GroupState:
        """The state after the next group took the value z; the last group needs no embedding."""
        context, known = state
        g = len(known)
        if g == self.groups - 1:
            return state
        return context, [*known, self._embed(z[None], self.embed[g : g + 1])[0]]


class TokenFeatures(nn.Module):
    """Features of each of the P tokens of a patch: [B, T, D] -> [B, T, P, D] (docs/math.md, eq. 16).

    One token: the Transformer's features as they are. Independent: a linear map for each place in the patch.
    In-patch: token j also sees the latents of tokens i < j of its patch, through an autoregressive head.
    """

    def __init__(self, *, width: int, patch: int, latent_dim: int, in_patch: bool) -> None:
        super().__init__()
        self.patch = patch
        self.place = nn.Linear(width, patch * width, bias=False) if patch > 1 else None
        self.head = None
        if self.place is not None:
            nn.init.normal_(self.place.weight, std=width**-0.5)
        if patch > 1 and in_patch:
            self.head = AutoregressiveHead(
                width=width,
                groups=patch,
                channels=latent_dim,
                hidden=2 * width,
                outputs=(width,),
                features=width,
            )

    def forward(self, features: Float[Tensor, "B T D"], z: Float[Tensor, "B T C"]) -> Float[Tensor, "B T P D"]:
        B, T, D = features.shape
        if self.place is None:
            return features[:, :, None]
        places = self.place(features).view(B, T, self.patch, D)
        return places if self.head is None else places + self.head(features, z)[0].permute(1, 2, 0, 3)
