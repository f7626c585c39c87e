"""nanoGPT's line for a CPU beside our mini models: Tiny Shakespeare, the same time, one core.

    python benchmarks/shakespeare.py tinyshakespeare.txt
    python benchmarks/shakespeare.py any_text.txt --tuned english-small english-small-ar

The text is https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt.
nanoGPT's README trains `config/train_shakespeare_char.py` on a CPU with a context of 64, batches of
12, four layers of width 128 with four heads, 2,000 steps and no dropout, and quotes a validation
loss of 1.88 nats per character. `nanogpt` below is the same recipe with the layers of PyTorch:
pre-norm, no biases, exact GELU, tied output weights, AdamW (0.9, 0.99) with a weight decay of 0.1,
gradients clipped at 1, a warmup of 100 steps to 1e-3 and a cosine to 1e-4. Its README's command
on a clone of nanoGPT gives the figure of the original.

Our models train for as many seconds as its steps took. All train on the first nine tenths of the
text and are measured on all of the last tenth, in windows of their own context; before those of
nanoGPT stands one letter that is not scored. (nanoGPT's own figure is the mean over 240 random
windows.) The flow's figure is a bound. Nothing is chosen by the last tenth but whether a block that
gained nothing there leaves the model.

With --tuned nothing of this is done: trained models are measured on the last tenth, in bits per
character, before and after `--minutes` of tuning on the rest (`tarflowlm train --from`).
"""

import argparse
import math
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tarflowlm.config import DataConfig
from tarflowlm.data import eval_windows, prepare_corpus, read_text, suited
from tarflowlm.data.windows import Array
from tarflowlm.evaluation.likelihood import Likelihood, evaluate, sign_of
from tarflowlm.presets import preset
from tarflowlm.runs.checkpoint import load_checkpoint
from tarflowlm.training.configure import tuning
from tarflowlm.training.train import train

LAYERS, WIDTH, HEADS, CONTEXT, BATCH = 4, 128, 4, 64, 12
STEPS, WARMUP, PEAK, LAST = 2000, 100, 1e-3, 1e-4


class NanoGPT(nn.Module):
    """A GPT of nanoGPT's shape: logits [B, T, V] of the characters after tokens [B, T]."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH,
            HEADS,
            dim_feedforward=4 * WIDTH,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
            bias=False,
        )
        norm = nn.LayerNorm(WIDTH, bias=False)
        self.layers = nn.TransformerEncoder(layer, LAYERS, norm=norm, enable_nested_tensor=False)
        for name, parameter in self.named_parameters():
            is_residual = name.endswith(("out_proj.weight", "linear2.weight"))
            std = 0.02 / math.sqrt(2 * LAYERS) if is_residual else 0.02
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=std)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        inputs = self.tokens(tokens) + self.positions.weight[:length]
        outputs: Tensor = self.layers(inputs, mask=mask, is_causal=True)
        return outputs @ self.tokens.weight.T

    def loss(self, windows: Tensor) -> Tensor:
        """The mean of -log p, in nats, of all but the first of each window [B, T + 1]."""
        logits = self(windows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def rate(step: int) -> float:
    if step < WARMUP:
        return PEAK * step / WARMUP
    progress = (step - WARMUP) / (STEPS - WARMUP)
    return LAST + (PEAK - LAST) * 0.5 * (1 + math.cos(math.pi * progress))


def trained_nanogpt(text: Tensor, vocab_size: int, seed: int) -> tuple[NanoGPT, float]:
    """The model after nanoGPT's recipe, and the seconds that it took."""
    torch.manual_seed(seed)
    model = NanoGPT(vocab_size)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
    places = torch.arange(CONTEXT + 1)
    start = time.perf_counter()
    for step in range(STEPS):
        first = torch.randint(len(text) - CONTEXT, (BATCH, 1))
        loss = model.loss(text[first + places])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
    return model, time.perf_counter() - start


@torch.inference_mode()
def nanogpt_nats(model: NanoGPT, text: Tensor) -> float:
    """The mean of -log p over the text, in windows of the context, in nats."""
    starts = range(0, len(text) - CONTEXT, CONTEXT)
    windows = torch.stack([text[at : at + CONTEXT + 1] for at in starts])
    losses = [model.loss(part) * len(part) for part in windows.split(64)]
    return float(sum(losses)) / len(windows)


def trained_likelihood(
    name: str, data: DataConfig, seconds: float, seed: int, last: Array
) -> Likelihood:
    """The likelihood of the tokens `last` under a mini model trained for these `seconds`."""
    run = preset(name)
    run = replace(
        run,
        seed=seed,
        data=data,
        train=replace(run.train, minutes=seconds / 60, keep="last", precision="float32"),
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        train(run, out, device=torch.device("cpu"))
        checkpoint = load_checkpoint(out)
    windows = eval_windows(last, run.model.context)
    lengths = torch.from_numpy(checkpoint.tokenizer.characters_per_token)
    return evaluate(checkpoint.model, windows, lengths)


def tuned_bits(name: str, source: str, last: str, minutes: float, seed: int) -> list[Likelihood]:
    """The likelihood of the text `last` before and after tuning on the training split."""
    parent = load_checkpoint(name)
    run = tuning(parent, source, minutes=minutes, seed=seed)
    run = replace(run, train=replace(run.train, keep="last"))
    tokens = parent.tokenizer.encode(parent.tokenizer.prepare(last))
    windows = eval_windows(tokens, parent.model.config.context)
    lengths = torch.from_numpy(parent.tokenizer.characters_per_token)
    before = evaluate(parent.model, windows, lengths)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        train(run, out, device=torch.device("cpu"), parent=parent)
        after = evaluate(load_checkpoint(out).model, windows, lengths)
    return [before, after]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", help="Tiny Shakespeare, or another text of few characters")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--ours", nargs="*", default=["mini-ar", "mini-mixd"])
    parser.add_argument("--tuned", nargs="*", help="models to tune, instead of all else")
    parser.add_argument("--minutes", type=float, default=10.0, help="of tuning each")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if args.tuned:
        words = read_text(args.text)
        print("| model | bits per character of the last tenth | after tuning |")
        print("| --- | --- | --- |")
        for name in args.tuned:
            last = words[len(words) * 9 // 10 :]
            found = tuned_bits(name, args.text, last, args.minutes, args.seed)
            cells = [f"{sign_of(one.bound)} {one.bpc:.4f}" for one in found]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
        return
    data = suited(replace(preset("mini-ar").data, source=args.text))
    text = read_text(args.text)
    corpus = prepare_corpus(data)
    if corpus.tokenizer.kind != "char":
        sys.exit(f"{args.text} has more than 256 different characters: give another text")
    tokens = np.asarray(corpus.tokenizer.encode(text), dtype=np.int64)
    end = len(tokens) * 9 // 10
    # the splits of tarflowlm do not cut a paragraph, and may end a little earlier
    assert len(corpus.split("train")) <= end, "the training split reaches into the last tenth"
    first, last = torch.from_numpy(tokens).split([end, len(tokens) - end])
    model, seconds = trained_nanogpt(first, corpus.tokenizer.vocab_size, args.seed)
    print("| model | nats per character of the last tenth | seconds of training |")
    print("| --- | --- | --- |")
    print(f"| nanogpt | {nanogpt_nats(model, last):.4f} | {seconds:.0f} |", flush=True)
    for name in args.ours:
        found = trained_likelihood(name, data, seconds, args.seed, last.numpy())
        nats = f"{sign_of(found.bound)} {found.nats_per_token:.4f}"
        print(f"| {name} | {nats} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
