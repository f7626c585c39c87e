"""`python -m reproduction quality`: the quality of a model's samples next to real text."""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from tarflowlm.cli.options import OfModel, load_checkpoint
from tarflowlm.config import Decoder
from tarflowlm.errors import UserError, check_package
from tarflowlm.options import Integer, Normalized, Number, Seeded, arg
from tarflowlm.requests import Split

if TYPE_CHECKING:
    from reproduction.quality import Quality

LABELS = {
    "perplexity": "generative perplexity",
    "entropy": "entropy of tokens, nats",
    "word_entropy": "entropy of words, nats",
    "distinct_1": "distinct 1-grams",
    "distinct_2": "distinct 2-grams",
    "distinct_3": "distinct 3-grams",
    "repetition": "repeated 4-grams",
}


@dataclass(frozen=True, kw_only=True)
class Args(OfModel, Seeded, Normalized):
    """Measure samples next to a text: generative perplexity, MAUVE, entropy, distinct n-grams,
    repetition. Needs the extra quality (mauve-text, transformers).
    """

    data: Annotated[str | None, arg("SOURCE")] = None
    """Another text: corpus name, file or prepared directory; the default is the run's own."""
    split: Split = "test"
    """Part of the text; a file is split 90/5/5."""
    judge: Annotated[str, arg("MODEL")] = "gpt2-large"
    """A run or shipped model of the baseline, a directory of transformers, or a hub name."""
    num: int = 5000
    """Number of samples; the paper has 5000."""
    length: Integer = None
    """Tokens per sample; the default is the trained context."""
    decoder: Decoder = "auto"
    """How to invert a block."""
    temperature: Annotated[float, arg("FLOAT")] = 1.0
    """Raise the probabilities of tokens to the power 1 / temperature."""
    top_k: Integer = None
    """Keep the k most probable tokens."""
    top_p: Number = None
    """Keep the smallest set of tokens that holds this probability."""


def run(args: Args) -> None:
    from reproduction.judges import load_judge
    from reproduction.quality import SamplingConfig, measure_quality
    from tarflowlm.data import eval_windows
    from tarflowlm.device import pick_device
    from tarflowlm.evaluation.scores import read_source
    from tarflowlm.terminal.bars import Bars, print_json

    sampling = SamplingConfig(
        num=args.num,
        length=args.length,
        decoder=args.decoder,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )
    checkpoint = load_checkpoint(args.directory, args.device)
    context = checkpoint.model.config.context
    length = context if args.length is None else args.length
    if not 1 <= length <= context:
        raise UserError(
            f"length {length}: must be between 1 and the trained context of {context} tokens"
        )
    # find a missing package or judge before anything that takes time
    check_package("mauve", "quality", "MAUVE")
    judge = load_judge(args.judge, pick_device(args.device))
    tokenizer = checkpoint.tokenizer.with_normalization(args.normalize)
    with Bars() as bars:
        source, _, tokens = read_source(args.data, args.split, checkpoint, tokenizer, bars)
        found = measure_quality(
            checkpoint.model,
            tokenizer,
            judge,
            eval_windows(tokens, length, sampling.num),
            sampling,
            trained_on=checkpoint.run.data.source,
            progress=bars,
        )
    if args.json:
        print_json({"source": source, "split": args.split} | found.to_json())
        return
    _print(found)


def _print(found: "Quality") -> None:
    from tarflowlm.terminal.bars import print_table

    rows = []
    for name, label in LABELS.items():
        values = [getattr(texts, name) for texts in (found.samples, found.text)]
        digits = 3 if name == "perplexity" else 4
        rows.append([label, *("-" if v is None else f"{v:.{digits}f}" for v in values)])
    rows.insert(1, ["MAUVE, scaling 5", f"{found.mauve:.4f}", ""])
    rows.append(["texts", f"{found.samples.texts:,}", f"{found.text.texts:,}"])
    sampling = found.sampling
    settings = [
        f"{sampling.length} tokens each",
        f"decoder {sampling.decoder}",
        found.dtype,
        f"temperature {sampling.temperature}",
    ]
    if sampling.top_k:
        settings.append(f"top-k {sampling.top_k}")
    if sampling.top_p:
        settings.append(f"top-p {sampling.top_p}")
    settings.append(f"seed {sampling.seed}")
    title = f"{', '.join(settings)}; judge {found.judge} ({found.judge_kind})"
    print_table(title, rows, ["", "samples", "real text"])
    for remark in found.remarks:
        sys.stdout.write(f"{remark}\n")
