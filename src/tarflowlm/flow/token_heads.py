"""Heads of tokens: from the features of a position to the log-weights of its tokens."""

from collections.abc import Callable, Generator

from jaxtyping import Float
from torch import Tensor, nn

from tarflowlm.flow import widen
from tarflowlm.flow.head_steps import head_weights
from tarflowlm.flow.heads import AutoregressiveHead, HeadShape

Linear = Callable[[nn.Linear, Tensor], Tensor]
"""A linear map of rows [R, D], in float32 or wider."""


def map_linearly(of: nn.Linear, x: Tensor) -> Tensor:
    """The map `of` rows x; a `Cache` may have a compiled one."""
    return widen(of(x))


def token_head(width: int, choices: int, *, has_bias: bool) -> nn.Linear:
    """The map of features [..., D] to log-weights of tokens [..., choices], at first zero.

    Without a bias its bias is zero for good, and neither trained nor saved.
    """
    head = nn.Linear(width, choices)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    if not has_bias:
        zeros = head.bias.detach()
        del head.bias
        head.register_buffer("bias", zeros, persistent=False)
    return head


class TokenFeatures(nn.Module):
    """Features c_na of every token of a patch: [B, N, D] -> [B, N, P, D] (docs/math.md, eq. 16).

    P = 1: the features c_n of the position. P > 1: a linear map per place a; with `in_patch` plus
    an autoregressive head, through which place a sees the latents of the places before it.
    """

    def __init__(self, *, width: int, patch: int, latent_dim: int, in_patch: bool) -> None:
        super().__init__()
        self.patch = patch
        self.head: AutoregressiveHead | None = None
        self.place: nn.Linear | None = None
        if patch == 1:
            return
        self.place = nn.Linear(width, patch * width, bias=False)
        nn.init.normal_(self.place.weight, std=width**-0.5)
        if in_patch:
            shape = HeadShape(width=width, hidden=2 * width, features=width, linear_paths=False)
            self.head = AutoregressiveHead(
                shape, groups=patch, channels=latent_dim, outputs=(width,)
            )

    def forward(
        self, features: Float[Tensor, "B N D"], z: Float[Tensor, "B N C"]
    ) -> Float[Tensor, "B N P D"]:
        B, N, D = features.shape
        if self.place is None:
            return features[:, :, None]
        places = self.place(features).view(B, N, self.patch, D)
        if self.head is None:
            return places
        return places + self.head(features, z)[0].permute(1, 2, 0, 3)

    def walk(
        self, features: Float[Tensor, "B D"], linear: Linear = map_linearly
    ) -> Generator[Tensor, Tensor | None, None]:
        """Yields the features [B, D] of each token in turn; the caller sends its latents [B, d]."""
        if self.place is None:
            yield features
            return
        inner = None if self.head is None else head_weights(self.head, features).walk(features)
        z = None
        for place in linear(self.place, features).view(len(features), self.patch, -1).unbind(1):
            z = yield place if inner is None else place + inner.send(z)[0]
