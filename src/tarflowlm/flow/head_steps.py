"""The weights of a head for steps: plain, or for compiled functions (`tarflowlm.compiled`)."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tarflowlm.flow.heads import AutoregressiveHead, HeadWeights, Walk, bounded_log_std
from tarflowlm.flow.packing import array, is_loaded, packed

if TYPE_CHECKING:
    from tarflowlm.compiled.head import HeadArrays


def head_weights(head: AutoregressiveHead, features: Tensor | None = None) -> "Weights":
    """The present weights of a head, for compiled functions where these are loaded.

    With `features` that need gradients they are the plain ones.
    """
    needs_gradient = features is not None and features.requires_grad
    if is_loaded(head.context.weight) and not needs_gradient:
        return CompiledHeadWeights(head)
    return HeadWeights(head)


class CompiledHeadWeights:
    """As `HeadWeights`."""

    def __init__(self, head: AutoregressiveHead) -> None:
        self.head = head
        self.arrays = packed(head, lambda: head_arrays(head))

    def walk(self, features: Tensor) -> Walk:
        """As `HeadWeights.walk`."""
        from tarflowlm.compiled.head import embed_group, group_outputs
        from tarflowlm.compiled.step import affine

        head, weights = self.head, self.arrays
        rows, c = len(features), array(features)
        hidden = affine(c, weights.context, weights.context_bias)
        shared = affine(c, weights.shared, np.zeros(weights.shared.shape[1], np.float32))
        embedded = np.empty((rows, weights.cross.shape[1]), np.float32)
        values = np.empty((rows, head.groups * head.channels), np.float32)
        sizes = [bias.shape[-1] for bias in head.biases]
        for g in range(head.groups):
            found = group_outputs(g, weights, hidden, shared, embedded, values)
            outputs = list(torch.from_numpy(found).split(sizes, -1))
            if head.log_std_last:
                outputs[-1] = bounded_log_std(outputs[-1])
            z = yield outputs
            assert z is not None
            if g < head.num_known:
                embed_group(g, weights, array(z), embedded, values)


Weights = HeadWeights | CompiledHeadWeights


def head_arrays(head: AutoregressiveHead) -> "HeadArrays":
    from tarflowlm.compiled.head import HeadArrays

    cross, evidence = head.masked()
    known, A = head.embed.shape[0], head.embed.shape[2]
    width = head.context.weight.shape[1]
    bias = head.embed_bias
    return HeadArrays(
        context=array(head.context.weight.T),
        context_bias=array(head.context.bias),
        shared=array(torch.empty(width, 0) if head.shared is None else head.shared.weight.T),
        cross=array(cross.flatten(2).mT),
        embed=array(head.embed),
        embed_bias=array(torch.zeros(known, A) if bias is None else bias),
        weights=array(torch.cat([*head.weights], -1)),
        biases=array(torch.cat([*head.biases], -1)),
        evidence=array(
            torch.empty(head.groups, 0, 0) if evidence is None else evidence.flatten(1, 2)
        ),
    )
