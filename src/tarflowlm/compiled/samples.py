"""Calls of all compiled functions with small arrays of the right types, which compile them."""

import numpy as np

from tarflowlm.compiled.draw import Limits, draw
from tarflowlm.compiled.head import HeadArrays, embed_group, group_outputs
from tarflowlm.compiled.invert import invert_mixtures, invert_vectors
from tarflowlm.compiled.step import Floats, InputArrays, LayerArrays, affine, layers, map_inputs


def zeros(*shape: int) -> Floats:
    return np.zeros(shape, np.float32)


def call_all() -> None:
    """Call each function that others call, and let it take no other types from then on."""
    weights = LayerArrays(
        taps=zeros(0, 2),
        attention_norm=zeros(1, 2),
        qkv=zeros(1, 2, 6),
        scale=zeros(1, 2, 2),
        out=zeros(1, 2, 2),
        mlp_norm=zeros(1, 2),
        up=zeros(1, 2, 2),
        down=zeros(1, 2, 2),
        norm=zeros(2),
    )
    inputs = InputArrays(
        linear=zeros(1, 2),
        linear_bias=zeros(2),
        lift=zeros(1, 2),
        lift_bias=zeros(2),
        out=zeros(2, 2),
        embedding=zeros(1, 2),
        mean=zeros(1, 1),
        precision=zeros(1),
        log_scale=zeros(1),
    )
    limits = Limits(banned=-1, temperature=1.0, top_k=1, top_p=1.0, min_p=0.0)
    texts = np.zeros(1, np.int64)
    past = zeros(1, 1, 1, 1, 2)
    layers(zeros(1, 2), weights, zeros(1, 1, 2), zeros(1, 0, 2), past, past.copy(), texts, 0)
    affine(zeros(1, 2), zeros(2, 1), zeros(1))
    map_inputs(zeros(1, 1), inputs)
    draw(zeros(1, 1), limits, texts, 0, 0)
    head = HeadArrays(
        context=zeros(1, 1),
        context_bias=zeros(1),
        shared=zeros(1, 1),
        cross=zeros(1, 1, 1),
        embed=zeros(1, 3, 1),
        embed_bias=zeros(1, 1),
        weights=zeros(1, 1, 1),
        biases=zeros(1, 1),
        evidence=zeros(1, 1, 1),
    )
    group_outputs(0, head, zeros(1, 1), zeros(1, 1), zeros(1, 1), zeros(1, 1))
    embed_group(0, head, zeros(1, 1), zeros(1, 1), zeros(1, 1))
    invert_mixtures(zeros(1), zeros(1, 1), zeros(1, 1), zeros(1, 1))
    invert_vectors(zeros(1, 1), zeros(1, 1), zeros(1, 1), zeros(1))
    functions = layers, affine, map_inputs, draw
    for function in (*functions, group_outputs, embed_group, invert_mixtures, invert_vectors):
        function.disable_compile()
