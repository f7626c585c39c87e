"""What turns features of the past into the parameters of a coupling.

Shape legend: B batch, T positions, D width, G groups of channels, m channels per group, O outputs per group,
N hidden units per group, E features per group. Parameters come group-first, [G, B, T, O] and contiguous: the
elementwise kernels that read them are bound by memory, and the batched product writes that layout for free.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tarflowlm.flow.precision import full_precision, widen


@dataclass(frozen=True)
class GroupState:
    """What is known inside one position: of the past, and of its first groups."""

    context: Tensor
    """Hidden context [G, B, N]."""
    shared: Tensor | None
    """The skip from the features into the first output, [B, O]."""
    values: tuple[Tensor, ...] = ()
    """Values [B, m] of the groups known so far."""
    embedded: tuple[Tensor, ...] = ()
    """Their features [B, E]."""


class AutoregressiveHead(nn.Module):
    r"""Masked autoregressive MLP over the G groups of channels of a position (docs/math.md, eq. 10).

        out_g = W_g gelu( A_g features + sum_{j<g} B_{gj} gelu(C_j [z_j, elu(z_j), elu(-z_j)]) ) + bias_g
        out_g^(1) += S features + sum_{j<g} L_{gj} z_j                                              (with `skip`)

    Group g sees the Transformer's features (the past positions) and the groups j < g of its own position, nothing
    else. With m = 1 it is the head of the Mix-1 coupling, with m = d the in-patch head of Mix-d.
    Paper: appendix H, after Lippe & Gavves 2021. Differs: C and W are block-diagonal (a channel is embedded on its
    own, and read out from its own hidden units), which costs G times less; the dependence on earlier groups runs
    through B. `outputs` names the O of each output tensor, so that every one of them is contiguous.

    `skip` adds linear paths into the first output, the mixture's log-weights. Evidence about a component adds up in
    log-weights (the Bayes update of eq. 9 is linear in z_j), which an MLP of few hidden units learns slowly.
    S is shared by the groups, like the head of a language model. Both start at zero.
    The buffer `scale` [outputs] is the unit of each output: W_g and bias_g are multiplied by it.
    """

    mask: Tensor
    scale: Tensor

    def __init__(
        self,
        *,
        width: int,
        groups: int,
        channels: int,
        hidden: int,
        outputs: tuple[int, ...],
        features: int,
        skip: bool = False,
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
        self.shared = nn.Linear(width, outputs[0], bias=False) if skip else None
        self.evidence = nn.Parameter(torch.zeros(groups, known, channels, outputs[0])) if skip else None
        if self.shared is not None:
            nn.init.zeros_(self.shared.weight)
        self.register_buffer("scale", torch.ones(len(outputs)))
        self.register_buffer("mask", torch.ones(groups, known).tril(-1), persistent=False)

    def _embed(self, z: Tensor, embed: Tensor) -> Tensor:
        """[j, rows, m] -> [j, rows, E]."""
        return F.gelu(torch.cat((z, F.elu(z), F.elu(-z)), dim=-1) @ embed)

    def _read_out(self, hidden: Tensor, groups: slice) -> list[Tensor]:
        """[g, rows, N] -> one [g, rows, O] for every output, at least float32."""
        active = F.gelu(hidden)
        parts = zip(self.weights, self.biases, self.scale, strict=True)
        return [
            widen(active @ (weight[groups] * scale)) + bias[groups, None] * scale for weight, bias, scale in parts
        ]

    def forward(self, features: Float[Tensor, "B T D"], z: Float[Tensor, "B T C"]) -> list[Tensor]:
        """Parameters of every group given the true earlier groups: a list of [G, B, T, O]."""
        B, T, _ = z.shape
        z_GNm = z.reshape(B * T, self.groups, self.channels).transpose(0, 1)
        hidden = self.context(features).reshape(B * T, -1)
        if self.groups > 1:
            known = self._embed(z_GNm[:-1], self.embed).transpose(0, 1).reshape(B * T, -1)
            cross = (self.cross * self.mask[:, None, :, None]).reshape(self.groups * self.hidden, -1)
            hidden = hidden + F.linear(known, cross)
        hidden_GNh = hidden.view(B * T, self.groups, self.hidden).transpose(0, 1)
        first, *rest = self._read_out(hidden_GNh, slice(None))
        if self.shared is not None and self.evidence is not None:
            first = first + widen(self.shared(features)).view(1, B * T, -1)
            if self.groups > 1:
                evidence = (self.evidence * self.mask[:, :, None, None]).flatten(1, 2)
                # its sums reach hundreds where components are narrow: not for half precision
                with full_precision(z):
                    first = first + z.reshape(B * T, -1)[:, : -self.channels] @ evidence
        return [out.view(self.groups, B, T, -1) for out in (first, *rest)]

    def start(self, features: Float[Tensor, "B D"]) -> GroupState:
        """The state before the first group of a position; `step` and `observe` then walk through the groups."""
        context = self.context(features).view(len(features), self.groups, self.hidden).transpose(0, 1)
        return GroupState(context, None if self.shared is None else self.shared(features))

    def step(self, state: GroupState) -> list[Tensor]:
        """Parameters [1, B, O] of the first group not yet observed."""
        g = len(state.values)
        hidden = state.context[g]
        if g:
            hidden = hidden + torch.cat(state.embedded, -1) @ self.cross[g, :, :g].reshape(self.hidden, -1).T
        outputs = self._read_out(hidden[None], slice(g, g + 1))
        if state.shared is not None and self.evidence is not None:
            outputs[0] = outputs[0] + widen(state.shared)
            if g:
                with full_precision(state.context):
                    outputs[0] = outputs[0] + torch.cat(state.values, -1) @ self.evidence[g, :g].flatten(0, 1)
        return outputs

    def observe(self, state: GroupState, z: Float[Tensor, "B m"]) -> GroupState:
        """The state after the next group took the value z; the last group needs no embedding."""
        g = len(state.values)
        if g == self.groups - 1:
            return state
        embedded = self._embed(z[None], self.embed[g : g + 1])[0]
        return replace(state, values=(*state.values, z), embedded=(*state.embedded, embedded))


@dataclass(frozen=True)
class PatchState:
    """What is known inside one patch: the features [B, P, D] of its places, and the walk through its tokens."""

    places: Tensor
    walk: GroupState | None
    num_tokens: int = 0
    """Tokens known so far."""


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

    def start(self, features: Float[Tensor, "B D"]) -> PatchState:
        """The state before the first token of a patch; `step` and `observe` then walk through its tokens."""
        if self.place is None:
            return PatchState(features[:, None], None)
        places = self.place(features).view(len(features), self.patch, -1)
        return PatchState(places, None if self.head is None else self.head.start(features))

    def step(self, state: PatchState) -> Float[Tensor, "B D"]:
        """Features of the first token not yet observed."""
        x = state.places[:, state.num_tokens]
        if self.head is None or state.walk is None:
            return x
        return x + self.head.step(state.walk)[0][0]

    def observe(self, state: PatchState, z: Float[Tensor, "B d"]) -> PatchState:
        """The state after the next token took the value z."""
        walk = state.walk
        if self.head is not None and walk is not None:
            walk = self.head.observe(walk, z)
        return PatchState(state.places, walk, state.num_tokens + 1)
