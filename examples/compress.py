"""Compress a text to the number of bits that a model states for it, and back.

    python examples/compress.py compress MODEL TEXT FILE [latents]
    python examples/compress.py decompress MODEL FILE TEXT [latents]
    python examples/compress.py compare MODEL TEXT

A discrete model codes a text into -log2 p(x) bits. A block 1 with a tied Mix-d is a discrete model
if the latents z of a token are its code mu: the limit sigma -> 0. With `latents` z follows q(z|x).
Bits of the stack draw z, and coding z gives them back, so a text takes the bits of the bound
(bits-back; Hinton & van Camp 1993, Townsend et al. 2019). Besides the bits of `model.bound`, either
file has 32 bits for the length, up to 8 to fill a byte, and a loan: 32 bits, and with `latents` the
bits of one window's z. Reading gives the loan back, so it could be another file. Blocks above the
first are left out: they would map the grid of z to another (local bits-back; Ho et al. 2019).

| bits a character | english-mini-ar | english-mini | english-small |
| --- | ---: | ---: | ---: |
| `xz -9e`, `bzip2 -9`, `zstd --ultra -22` | 3.704, 3.234, 3.312 | the same | 4.049, 3.642, 3.691 |
| bound of all blocks | | 1.8380 | 1.2163 |
| codes: stated, file without the loan | 1.840, 1.855 | 1.8376, 1.8519 | 1.2163, 1.2315 |
| latents: stated, file without the loan | | 1.8380, 1.8543 | 1.2163, 1.2307 |
| latents: bits of the loan | | 14,586 | 72,658 |
| latents: file with the loan | | 7.757 | 29.262 |

The bound costs at most 0.0004 bits a character; the price of bits-back is the loan. The text is a
test tale, "The Rowdy of the Woods": 2,471 letters, or 2,592 characters with capitals and signs. It
is in the package:

    python -c "from tarflowlm.data.built_in import Tales
    print(*(x for _, x, _ in Tales().pieces() if x.startswith('The Rowdy of')), end='')" > rowdy.txt
    python examples/compress.py compare english-small rowdy.txt
"""

import math
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt
import torch
from ans import TOTAL, Stack, Table
from torch import Tensor

import tarflowlm
from tarflowlm import Pretrained, TarFlowLM, UserError
from tarflowlm.baseline import TokenLM
from tarflowlm.data.prompts import read
from tarflowlm.flow.cache import KVCache
from tarflowlm.flow.conditioner import Conditioner
from tarflowlm.model import LanguageModel

CELLS, REACH = 4, 8  # cells of the grid in the least sigma; sigmas from a code to its last cell
Cells = npt.NDArray[np.int64]


class Coder:
    """Tokens x by the weights of block 1, each given the latents z of the tokens before it.

    z is a cell of a grid, to which the codes are rounded. With `latents` it follows q(z|x): bits of
    the stack draw z, and coding z gives them back (bits-back), so a window adds
    -log2 p(x|z) p(z) / q(z|x), a sample of the bound of block 1. Without `latents` z is the code of
    x: the limit sigma -> 0. The codes of the baseline are token ids.
    """

    @torch.no_grad()
    def __init__(self, model: LanguageModel, *, latents: bool) -> None:
        self.model = model
        if isinstance(model, TarFlowLM):
            block = model.prior.block(0)
            coupling = block.coupling
            self.conditioner: Conditioner = block
            if model.config.patch > 1 or not getattr(coupling, "uses_encoder_codebook", False):
                raise UserError("block 1: must be a tied Mix-d with one token a position")
            self.head, self.dtype = coupling.weight_head, model.codebook.mean.dtype
            mean = model.codebook.mean.double()
            std = model.codebook.log_std.double().exp()
            self.width = std.min() / CELLS
        else:
            assert isinstance(model, TokenLM)
            if latents:
                raise UserError("latents: a baseline has none, give a flow")
            self.conditioner = model
            self.head, self.dtype = model.head, torch.long
            mean = torch.arange(model.config.vocab_size)[:, None]
            std, self.width = torch.ones(len(mean)), 1
        self.codes = (mean / self.width).round().long().numpy()
        self.std = (std / self.width).numpy()
        self.reach = math.ceil(REACH * self.std.max()) if latents else 0
        edges = (torch.arange(-self.reach, self.reach + 2) - 0.5) / torch.tensor(self.std[:, None])
        self.gaussians = [Table(mass.numpy()) for mass in torch.special.ndtr(edges).diff()]

    def loan(self, length: int) -> int:
        """The stack before a text: bits that both sides know, enough to draw a window's latents."""
        p = self.gaussians[self.std.argmax()].frequency / TOTAL
        channels = min(length, self.model.config.context) * self.codes.shape[1]
        count = TOTAL.bit_length() - 1 + math.ceil(-channels * (p * np.log2(p)).sum())
        return 1 << count | Random(0).getrandbits(count)

    def draw(self, stack: Stack, token: int) -> Cells:
        places = [stack.pop(self.gaussians[token]) for _ in self.codes[token]]
        return self.codes[token] + places - self.reach

    def give_back(self, stack: Stack, token: int, cells: Cells) -> None:
        for place in (cells - self.codes[token] + self.reach)[::-1].tolist():
            stack.push(place, self.gaussians[token])

    def weights(self, cache: KVCache, before: Cells | None) -> Table:
        """p(x_t | x_<t), or with latents p(x_t | z_<t), from the cells of the last position."""
        value = None
        if before is not None:
            value = (torch.tensor(before)[None] * self.width).to(self.dtype)
        logits = self.head(self.conditioner.features_at(cache, value))
        return Table(logits[0].double().softmax(-1).numpy())

    def posteriors(self, cells: Cells, weights: Table) -> tuple[Table, Table]:
        """p(x|z) of the codebook, and p(k|z) for the component k of the mixture with `weights`."""
        offset = cells - self.codes
        log_p = -0.5 * np.square(offset / self.std[:, None]).sum(1)
        log_p -= self.codes.shape[1] * np.log(self.std)
        log_p[(np.abs(offset) > self.reach).any(1)] = -math.inf
        density = np.exp(log_p - log_p.max())
        return Table(density), Table(density * weights.frequency, least=0)

    def push(self, stack: Stack, tokens: list[int]) -> None:
        """Code a window, its first token last."""
        cache = self.conditioner.allocate_cache(1, len(tokens))
        drawn = [self.draw(stack, token) for token in tokens]
        tables = [self.weights(cache, before) for before in (None, *drawn[:-1])]
        for token, cells, weights in reversed(list(zip(tokens, drawn, tables, strict=True))):
            of_token, of_component = self.posteriors(cells, weights)
            stack.push(token, of_token)
            # p(z) is a mixture: its component is one more latent, drawn and given back
            component = stack.pop(of_component)
            self.give_back(stack, component, cells)
            stack.push(component, weights)

    def pop(self, stack: Stack, length: int) -> list[int]:
        """Undo `push`."""
        cache = self.conditioner.allocate_cache(1, length)
        found: list[tuple[int, Cells]] = []
        for _ in range(length):
            weights = self.weights(cache, found[-1][1] if found else None)
            component = stack.pop(weights)
            cells = self.draw(stack, component)
            of_token, of_component = self.posteriors(cells, weights)
            stack.push(component, of_component)
            found.append((stack.pop(of_token), cells))
        for token, cells in reversed(found):
            self.give_back(stack, token, cells)
        return [token for token, _ in found]

    @torch.inference_mode()
    def encode(self, tokens: Tensor) -> bytes:
        """The file of tokens [T]: T, then the stack, on which the first window is on top."""
        stack = Stack(self.loan(len(tokens)))
        for window in reversed(tokens.split(self.model.config.context)):
            self.push(stack, window.tolist())
        size = (stack.state.bit_length() + 7) // 8
        return len(tokens).to_bytes(4, "little") + stack.state.to_bytes(size, "little")

    @torch.inference_mode()
    def decode(self, file: bytes) -> list[int]:
        """The tokens of a file. UserError if anything but the loan is left on the stack."""
        length = int.from_bytes(file[:4], "little")
        stack = Stack(int.from_bytes(file[4:], "little"))
        tokens: list[int] = []
        # an empty stack decodes into anything
        while len(tokens) < length and stack.state >= TOTAL:
            tokens += self.pop(stack, min(self.model.config.context, length - len(tokens)))
        if len(tokens) < length or stack.state != self.loan(length):
            raise UserError("the file is damaged, or was made by another model or machine")
        return tokens


@torch.inference_mode()
def stated(model: LanguageModel, tokens: Tensor, *, noise: bool, draws: int = 4) -> float:
    """Bits of tokens [T] by `model.bound` in the windows of the file; without `noise` at z = mu."""
    generator = torch.Generator().manual_seed(0)
    nats = 0.0
    for window in tokens.split(model.config.context):
        rows = window.expand(draws, -1)
        nats += model.bound(rows, noise * model.draw_noise(rows, generator)).mean().item()
    return nats / math.log(2)


def compare(lm: Pretrained, text: str) -> None:
    """Print bytes and bits per character of every file, and the bits that the model states."""
    found = read(lm.tokenizer, text)
    raw = found.text.encode()
    flow = lm.model if isinstance(lm.model, TarFlowLM) else None

    def show(label: str, num_bits: float) -> None:
        print(f"| {label} | {num_bits / 8:,.0f} | {num_bits / len(found.text):.4f} |", flush=True)

    for command in ("xz -9e", "bzip2 -9", "zstd --ultra -22"):
        words = command.split()
        if shutil.which(words[0]):
            packed = subprocess.run(words, input=raw, capture_output=True, check=True).stdout
            show(command, 8 * len(packed))
    if flow is not None:
        show("bound, all blocks", stated(flow, found.tokens, noise=True))
        flow.prior.blocks = flow.prior.blocks[:1]
    for latents in (False, True)[: 1 + (flow is not None)]:
        coder = Coder(lm.model, latents=latents)
        file = coder.encode(found.tokens)
        assert coder.decode(file) == found.tokens.tolist()
        loan = coder.loan(len(found.tokens)).bit_length() - 1
        name = "latents" if latents else "codes"
        show(f"{name}, stated", stated(lm.model, found.tokens, noise=latents))
        show(f"{name}, file without the loan", 8 * len(file) - loan)
        show(f"{name}, file", 8 * len(file))


def main(action: str, name: str, source: str, target: str = "", latents: str = "") -> None:
    if action not in ("compare", "compress", "decompress"):
        raise UserError(f"{action!r}: give compress, decompress or compare")
    if action != "compare" and not target:
        raise UserError(f"{action}: add the file to write")
    if latents not in ("", "latents"):
        raise UserError(f"{latents!r}: give latents, or leave it out")
    torch.set_num_threads(1)
    given = Path(source).read_bytes()
    lm = tarflowlm.load(name)
    coder = Coder(lm.model, latents=latents == "latents")
    if action == "compare":
        compare(lm, given.decode())
    elif action == "compress":
        Path(target).write_bytes(coder.encode(lm.encode(given.decode())))
    else:
        Path(target).write_bytes(lm.decode(coder.decode(given)).encode())


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
