"""The KV cache of a Transformer whose steps are compiled (`tarflowlm.compiled`)."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tarflowlm.flow.attention import rotations
from tarflowlm.flow.cache import Cache
from tarflowlm.flow.codebook import Codebook, NoisyCodebook
from tarflowlm.flow.inputs import InputMap
from tarflowlm.flow.packing import array, packed
from tarflowlm.flow.transformer import Embedder, PreNormLayer, Transformer

if TYPE_CHECKING:
    from tarflowlm.compiled.step import Floats, InputArrays, LayerArrays

AT_ONCE = 64
"""Rows that go through the layers together, so that their activations stay in the cache."""
OF_A_THREAD = 8
"""The fewest rows for which another thread is worth starting."""


def layer_arrays(transformer: Transformer) -> "LayerArrays":
    from tarflowlm.compiled.step import LayerArrays

    taps = transformer.input_taps
    every = [cast(PreNormLayer, one).weights() for one in transformer.layers]

    def stacked(*names: str) -> "Floats":
        """The weights of all layers, those of several names side by side."""
        parts = [[getattr(w, name) for name in names] for w in every]
        return array(torch.stack([torch.cat([x for x in p if x is not None], -1) for p in parts]))

    return LayerArrays(
        taps=array(transformer.norm.weight[:0, None] if taps is None else taps.flip(0)),
        attention_norm=stacked("attention_norm"),
        qkv=stacked("queries_and_keys", "values"),
        scale=stacked("scale")[:, :, 0].copy(),
        out=stacked("out"),
        mlp_norm=stacked("mlp_norm"),
        up=stacked("gate", "up"),
        down=stacked("down"),
        norm=array(transformer.norm.weight),
    )


def input_arrays(
    source: InputMap, codebook: Codebook | NoisyCodebook | None, embedding: nn.Embedding | None
) -> "InputArrays":
    """The weights of an `InputMap`, and of the embedding of tokens beside it, if there is one."""
    from tarflowlm.compiled.step import InputArrays

    nothing = source.linear.weight[:0]
    mean, log_std = nothing.T, nothing[:, 0]
    if codebook is not None and embedding is not None:
        mean, log_std = codebook.mean, codebook.log_std
    return InputArrays(
        linear=array(source.linear.weight.T),
        linear_bias=array(source.linear.bias),
        lift=array(nothing.T if source.is_linear else source.lift.weight.T),
        lift_bias=array(nothing[:, 0] if source.is_linear else source.lift.bias),
        out=array(nothing if source.is_linear else source.out.weight.T),
        embedding=array(source.linear.weight.T[:0] if embedding is None else embedding.weight),
        mean=array(mean.T),
        precision=array(-0.5 * torch.exp(-2 * log_std)),
        log_scale=array(-mean.shape[1] * log_std),
    )


class CompiledCache(Cache):
    """The keys and values of `batch` rows of `capacity` positions, float32 on the CPU."""

    is_compiled = True

    def __init__(self, transformer: Transformer, batch: int, capacity: int) -> None:
        config = transformer.config
        self.weights = packed(transformer, lambda: layer_arrays(transformer))
        turns = rotations(torch.arange(capacity), config.head_width)[:, 0, 0]
        self.turns = array(torch.view_as_real(turns))
        self.before = max(config.input_taps - 1, 0)
        width = config.width if config.input_taps else 0
        self.inputs = torch.zeros(batch, self.before + capacity, width)
        shape = len(self.weights.out), batch, config.num_heads, capacity, config.head_width
        self.stored = torch.empty(2, *shape)
        self.maps: dict[nn.Linear, tuple["Floats", "Floats"]] = {}
        """The weights of linear maps beside the Transformer, as they are when first used."""
        self.batch = batch
        self.texts = torch.arange(batch)
        """Where the rows are stored."""

    def take(self, source: Cache, rows: Tensor) -> None:
        assert isinstance(source, CompiledCache)
        self.length = source.length
        end, origin = self.length, source.texts[rows]
        self.inputs[self.texts, : self.before + end] = source.inputs[origin, : self.before + end]
        self.stored[:, :, self.texts, :, :end] = source.stored[:, :, origin, :, :end]

    def keep(self, rows: Tensor) -> None:
        self.batch, self.texts = len(rows), self.texts[rows]

    def embedder(
        self,
        source: InputMap,
        codebook: Codebook | NoisyCodebook | None,
        embedding: nn.Embedding | None,
    ) -> Embedder:
        from tarflowlm.compiled.step import map_inputs

        weights = input_arrays(source, codebook, embedding)

        def embed(past: Tensor) -> Tensor:
            rows = array(past.flatten(0, 1))
            return torch.from_numpy(map_inputs(rows, weights)).unflatten(0, past.shape[:2])

        return embed

    def linear(self, of: nn.Linear, x: Tensor) -> Tensor:
        from tarflowlm.compiled.step import affine

        if of not in self.maps:
            bias = torch.zeros(len(of.weight)) if of.bias is None else of.bias
            self.maps[of] = packed(of, lambda: (array(of.weight.T), array(bias)))
        rows, weights = array(x), self.maps[of]
        return self._in_threads(lambda part: affine(rows[part], *weights), len(rows))

    def extend(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        from tarflowlm.compiled.step import layers

        assert self.length + x.shape[1] <= len(self.turns), "the cache is full"
        keys, values = self.stored.numpy()
        inputs, texts = self.inputs.numpy(), self.texts.numpy()
        features: list[Tensor] = []
        for part in x.detach().split(max(1, AT_ONCE // max(1, len(x))), 1):
            rows = part.clone(memory_format=torch.contiguous_format).numpy()

            def run(some: slice, rows: "Floats" = rows) -> "Floats":
                own = rows[some].reshape(-1, rows.shape[2])
                past = inputs, keys, values, texts[some], self.length
                return layers(own, self.weights, self.turns, *past)

            features.append(self._in_threads(run, len(rows)).view(part.shape))
            self.length += part.shape[1]
        return features[0] if len(features) == 1 else torch.cat(features, 1)

    def _in_threads(self, run: Callable[[slice], "Floats"], rows: int) -> Tensor:
        """The results of `run` for all rows, of which every thread takes some."""
        threads = min(torch.get_num_threads(), rows // OF_A_THREAD)
        if threads < 2:
            return torch.from_numpy(run(slice(rows)))
        bounds = [rows * i // threads for i in range(threads + 1)]
        parts = self.pool.map(run, map(slice, bounds[:-1], bounds[1:]))
        return torch.cat([torch.from_numpy(part) for part in parts])

    @cached_property
    def pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(torch.get_num_threads())
