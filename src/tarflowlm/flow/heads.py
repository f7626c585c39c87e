"""Heads: from the features of a position to the parameters of its coupling.

Every group has M hidden units, A channels of its embedding, and O outputs.
"""

from collections.abc import Generator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tarflowlm import flow
from tarflowlm.flow import full_precision, widen

Walk = Generator[list[Tensor], Tensor | None, None]
"""Yields the parameters of one group after the other; the caller sends the values of each."""
LARGEST_LOG_STD = 8.0
"""Log-scales up to here are as the head gives them."""
ROOM = 4.0
"""Beyond, they grow by at most this."""


def bounded_log_std(x: Tensor) -> Tensor:
    """x for |x| <= 8, and sign(x) (8 + 4 tanh((|x| - 8) / 4)) beyond (docs/math.md, eq. 10a).

    Without this bound of 12, the chain over the channels of an untrained head can grow to infinity.
    """
    if flow.is_eager_cpu(x):
        # numbers at once: comparing tensors would take longer than the search
        low, high = map(float, torch.aminmax(x.detach())) if x.numel() else (0.0, 0.0)
        if low >= -LARGEST_LOG_STD and high <= LARGEST_LOG_STD:
            return x
    inside = x.clamp(-LARGEST_LOG_STD, LARGEST_LOG_STD)
    return inside + ROOM * torch.tanh((x - inside) / ROOM)


@dataclass(frozen=True, kw_only=True)
class HeadShape:
    """The sizes of a head, and which parts of its position a group sees."""

    width: int
    """Features per position, D."""
    hidden: int
    """Hidden units per group, M."""
    features: int
    """Embedding width per group, A."""
    linear_paths: bool = True
    embed_bias: bool = False
    """Give the embeddings a bias, as in the paper's head, which has no linear paths."""
    autoregressive: bool = True
    """Let a group see the earlier groups of its position; False: only the features."""
    noise: float = 0.1
    """Size of the outputs at the start, next to their biases."""
    tokens: Tensor | None = None
    """The token [G] of every group; with it a group sees only groups of its own token."""


class AutoregressiveHead(nn.Module):
    r"""Masked autoregressive MLP over the G groups of channels of a position.

        output_g = weights_g gelu( context_g c + sum_{j<g} cross_gj e_j ) + biases_g
        e_g      = gelu( embed_g [z_g, elu(z_g), elu(-z_g)] )
        output_g += shared c + sum_{j<g} evidence_gj z_j    (first output, with linear paths)

    This is eq. 10 of docs/math.md. c [D] are the features of the position, z_g [C/G] the value of
    group g. Paper: appendix H, after Lippe & Gavves 2021, without linear paths and with a bias in
    the embeddings. Linear paths start at zero; they help because evidence for a component is
    additive in log-weights, which a small MLP learns slowly.

    `outputs` lists the width O of each output. The first takes the linear paths: log-weights, or
    means in Affine. `log_std_last` bounds the last.
    """

    mask: Tensor

    def __init__(
        self,
        shape: HeadShape,
        *,
        groups: int,
        channels: int,
        outputs: tuple[int, ...],
        log_std_last: bool = False,
    ) -> None:
        """With `groups` G of `channels` C / G each."""
        super().__init__()
        self.groups = groups
        self.channels = channels
        self.hidden = shape.hidden
        self.log_std_last = log_std_last
        self.num_known = known = max(groups - 1, 0) if shape.autoregressive else 0
        self.context = nn.Linear(shape.width, groups * shape.hidden)
        self.embed = nn.Parameter(
            torch.randn(known, 3 * channels, shape.features) * (3 * channels) ** -0.5
        )
        bias = nn.Parameter(torch.zeros(known, shape.features)) if shape.embed_bias else None
        self.embed_bias = bias
        self.cross = nn.Parameter(
            torch.randn(groups, shape.hidden, known, shape.features)
            * max(known * shape.features, 1) ** -0.5
        )
        self.weights = nn.ParameterList(
            torch.randn(groups, shape.hidden, n) * shape.noise * shape.hidden**-0.5 for n in outputs
        )
        self.biases = nn.ParameterList(torch.zeros(groups, n) for n in outputs)
        nn.init.normal_(self.context.weight, std=shape.width**-0.5)
        nn.init.zeros_(self.context.bias)
        self.shared: nn.Linear | None = None
        self.evidence: nn.Parameter | None = None
        if shape.linear_paths:
            self.shared = nn.Linear(shape.width, outputs[0], bias=False)
            self.evidence = nn.Parameter(torch.zeros(groups, known, channels, outputs[0]))
            nn.init.zeros_(self.shared.weight)
        # [to, from] of groups
        token = torch.zeros(groups) if shape.tokens is None else shape.tokens
        sees = torch.ones(groups, groups).tril(-1) * (token[:, None] == token)
        self.register_buffer("mask", sees[:, :known].contiguous(), persistent=False)

    def masked(self) -> tuple[Float[Tensor, "G M known A"], Tensor | None]:
        """`cross` and `evidence` [G, known, C/G, O] without what groups must not see."""
        evidence = None if self.evidence is None else self.evidence * self.mask[:, :, None, None]
        return self.cross * self.mask[:, None, :, None], evidence

    def embedded(self, values: Tensor, embed: Tensor, groups: int | slice) -> Tensor:
        """e = gelu(embed [z, elu(z), elu(-z)] + bias) of these groups, z [..., rows, C/G]."""
        product = torch.cat((values, F.elu(values), F.elu(-values)), dim=-1) @ embed
        bias = self.embed_bias
        return F.gelu(product if bias is None else product + bias[groups, None])

    def forward(self, features: Float[Tensor, "B N D"], z: Float[Tensor, "B N C"]) -> list[Tensor]:
        """Parameters of all groups, each given the earlier groups of z: [G, B, N, O] each."""
        B, N, _ = z.shape
        hidden = self.context(features).flatten(0, 1)
        cross, evidence = self.masked()
        if self.num_known:
            values = z.reshape(B * N, self.groups, self.channels).transpose(0, 1)[:-1]
            embedded = self.embedded(values, self.embed, slice(None))
            cross = cross.reshape(self.groups * self.hidden, -1)
            hidden = torch.addmm(hidden, embedded.transpose(0, 1).flatten(1), cross.T)
        # the outputs of all groups [G, rows, O], in one product
        active = F.gelu(hidden.view(-1, self.groups, self.hidden).transpose(0, 1))
        sizes = [bias.shape[-1] for bias in self.biases]
        parts = (active @ torch.cat([*self.weights], -1)).split(sizes, -1)
        outputs = [
            widen(part) + bias[:, None] for part, bias in zip(parts, self.biases, strict=True)
        ]
        if self.log_std_last:
            outputs[-1] = bounded_log_std(outputs[-1])
        first, *rest = outputs
        if self.shared is not None and evidence is not None:
            first = first + widen(self.shared(features)).flatten(0, 1)
            if self.num_known:
                # sums reach the hundreds where components are narrow: too large for half precision
                with full_precision(z):
                    known = z.flatten(0, 1)[:, : -self.channels]
                    first = first + known @ evidence.flatten(1, 2)
        return [out.unflatten(1, (B, N)) for out in (first, *rest)]


class HeadWeights:
    """The present weights of a head, by group, as [inputs, outputs]."""

    def __init__(self, head: AutoregressiveHead) -> None:
        self.head = head
        outputs = zip(head.weights, head.biases, strict=True)
        # for every group one ([M, O], [O]) per output
        by_group = [zip(w.unbind(), b.unbind(), strict=True) for w, b in outputs]
        self.outputs = list(zip(*by_group, strict=True))
        self.embed = head.embed.unbind()
        # for every group, from the groups before it: [g A, M] and [g C/G, O]
        groups = range(head.groups)
        cross, evidence = head.masked()
        self.cross = [cross[g, :, :g].flatten(1).T.contiguous() for g in groups]
        self.evidence = [] if evidence is None else [evidence[g, :g].flatten(0, 1) for g in groups]

    def walk(self, features: Float[Tensor, "B D"]) -> Walk:
        """Yields the parameters [B, O] of each group in turn; the caller sends z_g [B, C/G]."""
        head = self.head
        shared = None if head.shared is None else head.shared(features)
        values = embedded = features[:, :0]
        for g, hidden in enumerate(head.context(features).split(head.hidden, -1)):
            active = F.gelu(torch.addmm(hidden, embedded, self.cross[g]))
            outputs: list[Tensor] = []
            for weight, bias in self.outputs[g]:
                if shared is not None and not outputs:
                    bias = torch.addmm(bias + shared, values, self.evidence[g])
                outputs.append(torch.addmm(bias, active, weight))
            if head.log_std_last:
                outputs[-1] = bounded_log_std(outputs[-1])
            z = yield outputs
            assert z is not None
            if g < head.num_known:
                values = torch.cat((values, z), -1)
                own = head.embedded(z, self.embed[g], g)
                embedded = torch.cat((embedded, own), -1)
