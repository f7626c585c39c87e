"""Heads: from the features of a position to the parameters of its coupling.

Shape legend: B batch, N positions, P tokens per position, d channels per token, C = P d, D width, G
groups of C / G channels, M hidden units per group, A embedding width per group, O outputs per
group. Parameters are group-first and contiguous, [G, B, N, O]: the elementwise kernels that read
them are bound by memory, and the batched product writes that layout at no extra cost.
"""

from collections.abc import Generator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tarflowlm.flow import full_precision, widen


class HeadWeights:
    """The weights of a head as `walk` reads them: [inputs, outputs], group by group, with their
    factors.

    Made once, they serve any number of positions; they keep the values and the graph of that time.
    """

    def __init__(self, head: "AutoregressiveHead") -> None:
        outputs, groups = (
            zip(head.weights, head.biases, head.scale, strict=True),
            range(head.groups),
        )
        if head.is_full:
            # of every group its outputs' ([g M + M, O], [O]), from the hidden units of all groups
            # up to it
            seen = [head.allowed[: g + 1, g, None, None] for g in groups]
            scaled = [
                [((m * w[: g + 1, :, g]).flatten(0, 1) * s, b[g] * s) for g, m in enumerate(seen)]
                for w, b, s in outputs
            ]
            known = enumerate(seen[: head.num_known])
            self.embed = [(m * head.embed[: g + 1, :, g]).flatten(0, 1) for g, m in known]
        else:
            # of every group its outputs' ([M, O], [O])
            scaled = [
                list(zip((w * s).unbind(), (b * s).unbind(), strict=True)) for w, b, s in outputs
            ]
            self.embed = list(head.embed.unbind())
        self.outputs = list(zip(*scaled, strict=True))
        # from earlier groups [g A, M] and [g C/G, O]
        cross = head.cross * head.mask[:, None, :, None]
        self.cross = [cross[g, :, :g].flatten(1).T.contiguous() for g in groups]
        evidence = None if head.evidence is None else head.evidence * head.mask[:, :, None, None]
        self.evidence = [] if evidence is None else [evidence[g, :g].flatten(0, 1) for g in groups]


LARGEST_LOG_STD, ROOM = 8.0, 4.0
"""Up to the first size a log standard deviation is left as it is; beyond, it tends to the sum of
both.
"""


def bounded_log_std(x: Tensor) -> Tensor:
    """x for |x| <= 8, and sign(x) (8 + 4 tanh((|x| - 8) / 4)) beyond, below 12 in size
    (docs/math.md, eq. 10a).

    Without a bound, the chain over the channels of an untrained head can grow to infinity. No
    trained head comes near it: exp(-8) is a hundredth of the scale of a sharp code.
    """
    if x.device.type == "cpu":
        # numbers at once: comparing tensors would take longer than the search
        low, high = map(float, torch.aminmax(x.detach())) if x.numel() else (0.0, 0.0)
        if low >= -LARGEST_LOG_STD and high <= LARGEST_LOG_STD:
            return x
    inside = x.clamp(-LARGEST_LOG_STD, LARGEST_LOG_STD)
    return inside + ROOM * torch.tanh((x - inside) / ROOM)


class AutoregressiveHead(nn.Module):
    r"""Masked autoregressive MLP over the G groups of channels of a position (docs/math.md, eq.
    10).

        output_g = scale * ( weights_g gelu( context_g c + sum_{j<g} cross_gj e_j ) + biases_g )
        e_g      = gelu( embed_g [z_g, elu(z_g), elu(-z_g)] )
        output_g += shared c + sum_{j<g} evidence_gj z_j        (first output only, with `skip`)

    c [D] are the features of the position, z_g [C/G] the value of group g. Group g sees c and the
    groups j < g of its own position, nothing else. Groups of one channel serve Affine and Mix-1,
    groups of d channels token-affine and, inside a patch, Mix-d.

    Paper: appendix H, after Lippe & Gavves 2021. Differs: `embed` and `weights` are block-diagonal
    (each group is embedded on its own and read out from its own hidden units), which costs G times
    less; the dependence on earlier groups runs through `cross`. With `full` they are not, and this
    is the paper's head:

        output_g = scale * ( sum_{h<=g} weights_hg gelu( context_h c + sum_{j<h} cross_hj e_j ) +
        biases_g ) e_j      = gelu( sum_{i<=j} embed_ij [z_i, elu(z_i), elu(-z_i)] + embed_bias_j )

    `outputs` lists the width O of each output tensor; each is returned as a contiguous tensor of
    its own. `skip` adds the linear paths `shared` and `evidence` to the first output: log-weights,
    or means in Affine. Evidence for a component is additive in log-weights (with equal scales the
    Bayes update of eq. 9 is linear in z_j), which a small MLP learns slowly. `shared` is the same
    for all groups, like the head of a language model. Both start at zero. The buffer `scale` holds
    one fixed factor per output. `autoregressive=False` leaves out all paths from earlier groups:
    every group depends on the features alone. `tokens`, the token of every group, leaves out those
    from other tokens of the position. `log_std_last` bounds the last output.
    """

    allowed: Tensor
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
        full: bool = False,
        autoregressive: bool = True,
        tokens: Tensor | None = None,
        log_std_last: bool = False,
    ) -> None:
        super().__init__()
        self.groups, self.channels, self.hidden, self.features = groups, channels, hidden, features
        self.is_full, self.log_std_last = full, log_std_last
        self.context = nn.Linear(width, groups * hidden)
        self.num_known = known = max(groups - 1, 0) if autoregressive else 0
        inputs = (known, 3 * channels, known) if full else (known, 3 * channels)
        self.embed = nn.Parameter(torch.randn(*inputs, features) * (3 * channels) ** -0.5)
        self.embed_bias = nn.Parameter(torch.zeros(known, features)) if full else None
        self.cross = nn.Parameter(
            torch.randn(groups, hidden, known, features) * max(known * features, 1) ** -0.5
        )
        units = (groups, hidden, groups) if full else (groups, hidden)
        self.weights = nn.ParameterList(
            torch.randn(*units, n) * 0.1 * hidden**-0.5 for n in outputs
        )
        self.biases = nn.ParameterList(torch.zeros(groups, n) for n in outputs)
        nn.init.normal_(self.context.weight, std=width**-0.5)
        nn.init.zeros_(self.context.bias)
        self.shared = nn.Linear(width, outputs[0], bias=False) if skip else None
        self.evidence = (
            nn.Parameter(torch.zeros(groups, known, channels, outputs[0])) if skip else None
        )
        if self.shared is not None:
            nn.init.zeros_(self.shared.weight)
        self.register_buffer("scale", torch.ones(len(outputs)))
        # [from, to] of groups, themselves included; and [to, from] without them
        token = torch.zeros(groups) if tokens is None else tokens
        allowed = torch.ones(groups, groups).triu() * (token[:, None] == token)
        self.register_buffer("allowed", allowed, persistent=False)
        self.register_buffer("mask", allowed.T.tril(-1)[:, :known].contiguous(), persistent=False)

    @staticmethod
    def _expanded(z: Tensor) -> Tensor:
        return torch.cat((z, F.elu(z), F.elu(-z)), dim=-1)

    def _embed(self, values: Tensor) -> Tensor:
        """Embeddings of the known groups: [known, rows, C/G] -> [rows, known A]."""
        inputs = self._expanded(values)
        if self.embed_bias is None:
            return F.gelu(inputs @ self.embed).transpose(0, 1).flatten(1)
        embed = self.embed * self.allowed[: self.num_known, None, : self.num_known, None]
        product = inputs.transpose(0, 1).flatten(1) @ embed.flatten(2).flatten(0, 1)
        return F.gelu(product + self.embed_bias.flatten())

    def _read_out(self, hidden: Tensor) -> list[Tensor]:
        """Outputs of all groups: [rows, G M] -> one [G, rows, O] per output, at least float32."""
        # one product for all outputs, which reads the hidden units once
        weight = torch.cat(
            [w * scale for w, scale in zip(self.weights, self.scale, strict=True)], -1
        )
        if self.is_full:
            active = F.gelu(hidden).expand(self.groups, -1, -1)
            weight = (weight * self.allowed[:, None, :, None]).flatten(0, 1).transpose(0, 1)
        else:
            active = F.gelu(hidden.view(-1, self.groups, self.hidden).transpose(0, 1))
        parts = (active @ weight).split([w.shape[-1] for w in self.weights], -1)
        biases = zip(parts, self.biases, self.scale, strict=True)
        outputs = [widen(part) + b[:, None] * scale for part, b, scale in biases]
        if self.log_std_last:
            outputs[-1] = bounded_log_std(outputs[-1])
        return outputs

    def forward(self, features: Float[Tensor, "B N D"], z: Float[Tensor, "B N C"]) -> list[Tensor]:
        """Parameters of all groups in parallel, each given the earlier groups of z: a list of [G,
        B, N, O].
        """
        B, N, _ = z.shape
        values = z.reshape(B * N, self.groups, self.channels).transpose(0, 1)
        hidden = self.context(features).reshape(B * N, -1)
        if self.num_known:
            cross = (self.cross * self.mask[:, None, :, None]).reshape(
                self.groups * self.hidden, -1
            )
            hidden = torch.addmm(hidden, self._embed(values[:-1]), cross.T)
        first, *rest = self._read_out(hidden)
        if self.shared is not None and self.evidence is not None:
            first = first + widen(self.shared(features)).view(1, B * N, -1)
            if self.num_known:
                evidence = (self.evidence * self.mask[:, :, None, None]).flatten(1, 2)
                # sums reach the hundreds where components are narrow: too large for half precision
                with full_precision(z):
                    first = first + z.reshape(B * N, -1)[:, : -self.channels] @ evidence
        return [out.view(self.groups, B, N, -1) for out in (first, *rest)]

    def walk(
        self, features: Float[Tensor, "B D"], weights: HeadWeights | None = None
    ) -> Generator[list[Tensor], Tensor | None, None]:
        """Yields the parameters of each group of a position in turn, one [B, O] per output; the
        caller sends back the value z_g [B, C/G].
        """
        weights = HeadWeights(self) if weights is None else weights
        shared = None if self.shared is None else self.shared(features)
        values = inputs = embedded = active = features[:, :0]
        for g, hidden in enumerate(self.context(features).split(self.hidden, -1)):
            own = F.gelu(torch.addmm(hidden, embedded, weights.cross[g]))
            active = torch.cat((active, own), -1) if self.is_full else own
            outputs = list[Tensor]()
            for weight, bias in weights.outputs[g]:
                if shared is not None and not outputs:
                    bias = torch.addmm(bias + shared, values, weights.evidence[g])
                outputs.append(torch.addmm(bias, active, weight))
            if self.log_std_last:
                outputs[-1] = bounded_log_std(outputs[-1])
            z = yield outputs
            assert z is not None
            if g < self.num_known:
                values = torch.cat((values, z), -1)
                inputs = (
                    torch.cat((inputs, self._expanded(z)), -1)
                    if self.is_full
                    else self._expanded(z)
                )
                own = inputs @ weights.embed[g]
                own = F.gelu(own if self.embed_bias is None else own + self.embed_bias[g])
                embedded = torch.cat((embedded, own), -1)


class TokenFeatures(nn.Module):
    """Features c_na of every token of a patch: [B, N, D] -> [B, N, P, D] (docs/math.md, eq. 16).

    P = 1: the features c_n of the position. P > 1: a linear map per place a; with `in_patch`, plus
    an autoregressive head through which place a sees the latents of the earlier places of its
    patch.
    """

    def __init__(self, *, width: int, patch: int, latent_dim: int, in_patch: bool) -> None:
        super().__init__()
        self.patch, self.head = patch, None
        self.place = nn.Linear(width, patch * width, bias=False) if patch > 1 else None
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

    def forward(
        self, features: Float[Tensor, "B N D"], z: Float[Tensor, "B N C"]
    ) -> Float[Tensor, "B N P D"]:
        """Features of all tokens in parallel, from those of the positions and the latents z."""
        B, N, D = features.shape
        if self.place is None:
            return features[:, :, None]
        places = self.place(features).view(B, N, self.patch, D)
        return (
            places if self.head is None else places + self.head(features, z)[0].permute(1, 2, 0, 3)
        )

    def walk(self, features: Float[Tensor, "B D"]) -> Generator[Tensor, Tensor | None, None]:
        """Yields the features [B, D] of each token of a patch in turn; the caller sends back the
        latents [B, d].
        """
        places = (
            features[:, None]
            if self.place is None
            else self.place(features).view(len(features), self.patch, -1)
        )
        inner, z = None if self.head is None else self.head.walk(features), None
        for place in places.unbind(1):
            z = yield place if inner is None else place + inner.send(z)[0]
