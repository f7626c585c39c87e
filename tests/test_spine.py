"""Whoever has read the spine (docs/tour.md) can do by hand what the package does.

A layer, a coupling, the loss and a drawn token are here in plain PyTorch, to the last digits.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import normal, randomise
from tarflowlm.generation import generate
from tarflowlm.generation.sampling import Gumbel, Noise, row_generators
from tarflowlm.model import TarFlowLM, seeded
from tarflowlm.model_config import FlowConfig, Mix1, MixD, TransformerConfig

V, T, d = 7, 6, 3


def model(*blocks, log_std: float = 0.0) -> TarFlowLM:
    """A model with random weights, whose codes overlap unless `log_std` is small."""
    trunk = TransformerConfig(width=8, num_heads=2, mlp_ratio=2)
    config = FlowConfig(vocab_size=V, context=T, latent_dim=d, trunk=trunk, blocks=blocks)
    with seeded(0):
        flow = randomise(TarFlowLM(config)).double()
        # so small that no probability rounds to 0 or 1
        for parameter in flow.prior.parameters():
            parameter.data.mul_(0.5)
        torch.nn.init.normal_(flow.codebook.mean)
        torch.nn.init.constant_(flow.codebook.log_std, log_std)
    return flow


def log_normal(x: Tensor) -> Tensor:
    return -0.5 * x.square() - 0.5 * math.log(2 * math.pi)


def features_by_hand(block, h: Tensor) -> Tensor:
    """Features [N, D] of the positions of one text h [N, C]: a Transformer of pre-norm layers."""
    x = torch.cat((block.start[None], block.input(h[:-1])))
    N, D, E = len(x), x.shape[1], block.transformer.config.head_width
    # angles are float32 in any model
    turn = torch.arange(N)[:, None] * torch.exp(-math.log(10_000.0) * torch.arange(0, E, 2) / E)
    cos, sin = turn.cos().double(), turn.sin().double()
    for layer in block.transformer.layers:
        attention = layer.attention
        normed = F.layer_norm(x, (D,), layer.attention_norm.weight)
        q, k, v = (
            part.view(N, -1, E).transpose(0, 1) for part in attention.qkv(normed).chunk(3, 1)
        )
        q = F.layer_norm(q, (E,)) * attention.query_scale
        k = F.layer_norm(k, (E,)) * attention.key_scale

        def rotated(part: Tensor) -> Tensor:
            a, b = part.chunk(2, -1)
            return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)

        scores = rotated(q) @ rotated(k).mT / E**0.5
        scores = scores.masked_fill(torch.ones(N, N).triu(1).bool(), -math.inf)
        x = x + attention.out((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
        x = x + layer.down(F.gelu(layer.up(F.layer_norm(x, (D,), layer.mlp_norm.weight))))
    return F.layer_norm(x, (D,), block.transformer.norm.weight)


def mix1_by_hand(coupling, z: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Noise and log-determinants [N, C] of positions z [N, C]: u = Phi^-1(sum_k w_k Phi(a_k))."""
    parameters = (x[:, 0].transpose(0, 1) for x in coupling.head(features[None], z[None]))
    log_w, mean, log_std = parameters
    w, a = log_w.softmax(-1), (z[..., None] - mean) / log_std.exp()
    u = torch.special.ndtri((w * torch.special.ndtr(a)).sum(-1))
    log_p = (w * (log_normal(a) - log_std).exp()).sum(-1).log()
    return u, log_p - log_normal(u)


def test_features_are_those_of_a_plain_transformer():
    block, h = model(MixD(layers=2)).prior.block(0), normal(T, d)
    torch.testing.assert_close(
        features_by_hand(block, h), block.features(h[None])[0], rtol=1e-12, atol=1e-12
    )


def test_a_coupling_is_the_cdf_of_a_mixture():
    block, z = model(Mix1(components=3)).prior.block(0), normal(T, d)
    features = features_by_hand(block, z)
    u, log_det = mix1_by_hand(block.coupling, z, features)
    found, found_log_det = block.coupling(z[None], features[None])
    torch.testing.assert_close(u, found[0], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(log_det.sum(-1), found_log_det[0], rtol=1e-8, atol=1e-8)


def test_the_loss_is_codebook_minus_prior():
    """A Mix-d block, whose density is a mixture; its noise goes through a Mix-1 block."""
    flow = model(MixD(), Mix1(components=2))
    book, (first, second) = flow.codebook, flow.prior.blocks
    tokens, eps = torch.tensor([1, 4, 4, 0, 6, 2]), normal(T, d)
    z = book.mean[tokens] + book.log_std[tokens].exp()[:, None] * eps
    a = (z[:, None] - book.mean) / book.log_std.exp()[:, None]  # [T, V, d]
    log_components = (log_normal(a) - book.log_std[:, None]).sum(-1)
    log_w = first.coupling.weight_head(features_by_hand(first, z)).log_softmax(-1)
    # the Rosenblatt map: channel by channel the CDF of what is left of the mixture
    u, log_v = [], log_w
    for i in range(d):
        p_below = (log_v.softmax(-1) * torch.special.ndtr(a[..., i])).sum(-1)
        u.append(torch.special.ndtri(p_below))
        log_v = log_v + log_normal(a[..., i]) - book.log_std
    h = torch.stack(u, -1)
    log_prior = (log_w + log_components).logsumexp(-1) - log_normal(h).sum(-1)
    # the second block reads the text from right to left, its channels reordered
    ordered = h[:, second.order.channels].flip(0)
    v, log_det = mix1_by_hand(second.coupling, ordered, features_by_hand(second, ordered))
    log_prior = log_prior.sum() + (log_det + log_normal(v)).sum()
    loss = log_components.logsumexp(-1).sum() - log_prior
    found = flow.bound(tokens[None], eps[None])[0]
    torch.testing.assert_close(loss, found, rtol=1e-10, atol=1e-10)


def test_a_token_is_the_largest_sum_of_log_weight_and_gumbel_number():
    """Its latents are its mean and noise, and it is read before the next one is drawn."""
    flow = model(MixD(layers=2), log_std=-5.0)
    book, block = flow.codebook, flow.prior.block(0)
    streams = row_generators([0], torch.Generator().manual_seed(0))
    noise = Noise(flow, streams, 1)
    eps, gumbel = noise.normal(T)[0], noise.draws(T)
    assert isinstance(gumbel, Gumbel)
    z, tokens = torch.zeros(T, d, dtype=torch.float64), []
    with torch.no_grad():
        for n in range(T):
            log_w = block.coupling.weight_head(features_by_hand(block, z))[n]
            tokens.append(int((log_w + gumbel.at(0, n)[0]).argmax()))
            z[n] = book.mean[tokens[n]] + book.log_std[tokens[n]].exp() * eps[n]
    written = generate(flow, num_tokens=T, generator=torch.Generator().manual_seed(0))
    assert written.tokens[0].tolist() == tokens
