"""The baseline: a discrete autoregressive language model on the same Transformer."""

from collections.abc import Generator as Generates

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from tarflowlm.errors import UserError
from tarflowlm.flow import numerics, widen
from tarflowlm.flow.cache import Cache
from tarflowlm.flow.conditioner import Conditioner
from tarflowlm.flow.numerics.nearby import FEWEST
from tarflowlm.flow.token_heads import Linear, TokenFeatures, map_linearly, token_head
from tarflowlm.flow.transformer import Embedder, Transformer
from tarflowlm.model import LanguageModel, check_tokens
from tarflowlm.model_config import BaselineConfig
from tarflowlm.schema import check_type

IN_PATCH_CHANNELS = 32
"""Embedding width of a token in the in-patch head."""


class TokenLM(LanguageModel, Conditioner):
    """p(x) = prod_t p(x_t | x_<t) on N = T / P positions of P tokens, after a learned start vector.

    With P > 1 and `in_patch` = independent, tokens of one patch are independent given the earlier
    patches.
    """

    is_exact = True
    config: BaselineConfig
    maps: numerics.Maps = numerics.REFERENCE
    """The maps of the loss where the model is on an accelerator."""

    def __init__(self, config: BaselineConfig) -> None:
        check_type(config, "config", BaselineConfig, "give a BaselineConfig")
        super().__init__(config)
        width = config.trunk.width
        P = config.patch
        in_patch = config.in_patch == "autoregressive"
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.join = nn.Linear(P * width, width) if P > 1 else nn.Identity()
        self.start = nn.Parameter(torch.randn(width))
        self.transformer = Transformer(config.trunk, config.layers)
        self.token_features = TokenFeatures(
            width=width, patch=P, latent_dim=IN_PATCH_CHANNELS, in_patch=in_patch
        )
        self.in_patch_embedding: nn.Embedding | None = None
        if P > 1 and in_patch:
            self.in_patch_embedding = nn.Embedding(config.vocab_size, IN_PATCH_CHANNELS)
        self.head = token_head(width, config.vocab_size, has_bias=not config.trunk.is_gated)

    def embedder(self, cache: Cache | None = None) -> Embedder:
        def embed(past: Tensor) -> Tensor:
            patches = past.flatten(1).unflatten(1, (-1, self.config.patch))
            x = self.embedding(patches).flatten(2)
            if cache is None or not isinstance(self.join, nn.Linear):
                return widen(self.join(x))
            return cache.linear(self.join, x.flatten(0, 1)).unflatten(0, x.shape[:2])

        return embed

    def _in_patch(self, tokens: Tensor) -> Tensor:
        """Token embeddings for the in-patch head, [B, N, 32 P]; [B, N, 0] without one."""
        patches = tokens.unflatten(1, (-1, self.config.patch))
        if self.in_patch_embedding is None:
            return self.head.weight.new_empty(*patches.shape[:2], 0)
        return self.in_patch_embedding(patches).flatten(2)

    def logits(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Unnormalised log p(x_t | x_<t) of every token."""
        inputs = self.token_features(self._features(tokens), self._in_patch(tokens))
        return widen(self.head(inputs)).flatten(1, 2)

    def _features(self, tokens: Tensor) -> Tensor:
        patch = self.config.patch
        if tokens.shape[1] % patch:
            raise UserError(f"patch {patch} does not divide the {tokens.shape[1]} tokens")
        return self.features_of_all(tokens[:, :-patch])

    def log_weights(
        self, features: Float[Tensor, "B D"], linear: Linear = map_linearly
    ) -> Generates[Float[Tensor, "B V"], Tensor | None, None]:
        """Yields the logits of each token of a position; the caller sends the token [B, 1]."""
        walk = self.token_features.walk(features, linear)
        z: Tensor | None = None
        for _ in range(self.config.patch):
            token = yield linear(self.head, walk.send(z))
            if token is not None and self.in_patch_embedding is not None:
                z = self.in_patch_embedding(token[:, 0])

    def log_prob(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, " B"]:
        """Exact log p(x) per sequence, in nats."""
        check_tokens(self, tokens)
        return self.token_log_prob(tokens).sum(-1)

    def token_log_prob(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """Exact log p(x_t | x_<t) of every token, in nats. UserError if P does not divide T."""
        return self.log_prob_of(self._features(tokens), tokens)

    def log_prob_of(
        self, features: Float[Tensor, "B N D"], tokens: Int[Tensor, "B T"]
    ) -> Float[Tensor, "B T"]:
        """log p(x_t | x_<t) of every token, in nats, from the features of the positions."""
        inputs = self.token_features(features, self._in_patch(tokens)).flatten(0, 2)
        targets = tokens.flatten().long()
        if self.config.vocab_size < FEWEST:
            logits = widen(self.head(inputs))
            return -F.cross_entropy(logits, targets, reduction="none").view(tokens.shape)
        rows = torch.arange(len(targets), device=targets.device)
        head = self.head.weight, self.head.bias
        total, chosen = numerics.head_sums(inputs, *head, rows, targets, maps=self.maps)
        return (chosen - total).view(tokens.shape)

    def draw_noise(
        self, tokens: Int[Tensor, "B T"], generator: Generator | None = None
    ) -> Float[Tensor, "B T d"]:
        return torch.empty(*tokens.shape, 0, device=tokens.device)

    def bound(
        self,
        tokens: Int[Tensor, "B T"],
        noise: Float[Tensor, "B T d"],
        *,
        per_token: bool = False,
        frozen: int = 0,
    ) -> Float[Tensor, "B ..."]:
        nats = -self.token_log_prob(tokens)
        return nats if per_token else nats.sum(-1)
