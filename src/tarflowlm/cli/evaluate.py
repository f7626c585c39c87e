"""`tarflowlm eval`: the likelihood of a text, and on request its latents and quality of samples."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tarflowlm.cli import options
from tarflowlm.cli.options import arg
from tarflowlm.config import Decoder
from tarflowlm.errors import UserError

if TYPE_CHECKING:
    from tarflowlm.data import TokenArray, Tokenizer
    from tarflowlm.evaluation.blocks import StateReport
    from tarflowlm.evaluation.judges import Judge
    from tarflowlm.evaluation.likelihood import Likelihood
    from tarflowlm.evaluation.quality import Quality, SamplingConfig
    from tarflowlm.language_model import LanguageModel
    from tarflowlm.runs.checkpoint import Checkpoint
    from tarflowlm.terminal.bars import Bars

SAMPLING = ("num", "length", "decoder", "temperature", "top_k", "top_p")
"""Fields of `quality.SamplingConfig`."""


@dataclass(frozen=True)
class Args:
    """Measure the likelihood of a text; on request, its latents and the quality of samples."""

    directory: options.Model = None
    # Another text: corpus name, file or prepared directory; the default is the run's own corpus.
    data: Annotated[str | None, arg("SOURCE")] = None
    # Part of the text; a file is split 90/5/5.
    split: Literal["train", "valid", "test", "all"] = "test"
    # Posterior samples: 1 gives the ELBO, more the importance-weighted bound and the ELBO.
    samples: int = 1
    # At most this many windows, evenly spaced; the default is all of them.
    windows: options.Count = None
    # Tokens between window starts (default: the context). Less lets windows overlap: baseline,
    # one-block flows.
    stride: options.Count = None
    # Also the state after every block: norms, cosines, participation ratio, centroid, log-det, KL.
    latents: options.Flag = False
    # Also samples: generative perplexity, MAUVE, entropy, distinct n-grams, repetition, next to
    # those of the text. Needs the extra quality (mauve-text, transformers).
    quality: options.Flag = False
    # With --quality: a run directory or shipped model of the baseline, a directory of transformers,
    # or a hub name (gpt2-large).
    judge: Annotated[str | None, arg("MODEL")] = None
    # With --quality: number of samples; 5000, as in the paper.
    num: options.Count = None
    # With --quality: tokens per sample; the default is the trained context.
    length: options.Count = None
    # With --quality: how to invert a block (auto).
    decoder: Annotated[Decoder | None, arg()] = None
    temperature: Annotated[float | None, arg("FLOAT", f"With --quality: {options.TEMPERATURE}")] = (
        None
    )
    top_k: Annotated[int | None, arg("INT", f"With --quality: {options.TOP_K}")] = None
    top_p: Annotated[float | None, arg("FLOAT", f"With --quality: {options.TOP_P}")] = None
    normalize: options.Normalize = None
    # Seed of the posterior samples, and of the samples of --quality.
    seed: int = 0
    device: options.Device = "auto"
    json: options.PrintJson = False

    def __post_init__(self) -> None:
        needed = dict.fromkeys((*SAMPLING, "judge"), ("quality",))
        options.check(self, ("samples", "windows"), needed=needed)


def run(args: Args) -> None:
    from tarflowlm.checks import checked_seed
    from tarflowlm.data import eval_windows
    from tarflowlm.evaluation.blocks import latent_report
    from tarflowlm.evaluation.quality import measure_quality
    from tarflowlm.model import as_flow
    from tarflowlm.terminal.bars import Bars, print_json

    checked_seed(args.seed)
    checkpoint = options.load_checkpoint(args.directory, args.device)
    directory = args.directory or checkpoint.directory.name
    model = checkpoint.model
    context = model.config.context
    refusal = f"{directory} is the discrete baseline, which has no latents: leave --latents out"
    flow = as_flow(model, refusal) if args.latents else None
    # before anything that takes time, so that a missing judge or package costs none
    judged = _sampling(args, context) if args.quality else None
    tokenizer = checkpoint.tokenizer.with_normalization(args.normalize)
    source = _source(args, checkpoint)
    states = quality = None
    with Bars() as bars:
        tokens = _tokens(args, checkpoint, tokenizer, source, bars)
        likelihood, of_text = _likelihood(args, model, tokenizer, tokens, source, bars)
        found = likelihood.to_json() | of_text
        if flow is not None:
            windows = eval_windows(tokens, context, args.windows)
            bars.stage("latents, windows", len(windows))
            states = latent_report(flow, windows, seed=args.seed, progress=bars)
            found["latents"] = [state.to_json() for state in states]
        if judged is not None:
            judge, sampling = judged
            quality = measure_quality(
                model,
                tokenizer,
                judge,
                eval_windows(tokens, args.length or context, sampling.num),
                sampling,
                trained_on=checkpoint.run.data.source,
                progress=bars,
            )
            found["quality"] = quality.to_json()
    if args.json:
        print_json(found)
        return
    _print_likelihood(f"{directory} on {source}, {args.split}", likelihood, of_text)
    if states is not None:
        _print_latents(states)
    if quality is not None:
        _print_quality(quality)


def _sampling(args: Args, context: int) -> "tuple[Judge, SamplingConfig]":
    from tarflowlm.device import pick_device
    from tarflowlm.evaluation.judges import load_judge
    from tarflowlm.evaluation.quality import SamplingConfig, check_mauve

    given = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    sampling = SamplingConfig(**given, seed=args.seed)
    if args.length is not None and not 1 <= args.length <= context:
        raise UserError(
            f"length {args.length}: must be between 1 and the trained context of {context} tokens"
        )
    judge = load_judge(args.judge or "gpt2-large", pick_device(args.device))
    check_mauve()
    return judge, sampling


def _source(args: Args, checkpoint: "Checkpoint") -> str:
    """The text to measure. UserError for a shipped model's own text, which is elsewhere."""
    from tarflowlm.data import FIELD, SOURCE_NAMES

    if args.data is not None:
        return args.data
    source = checkpoint.run.data.source
    if source not in SOURCE_NAMES and not Path(source.partition(FIELD)[0]).exists():
        remedy = "models are shipped without their data. Pass --data english or --data FILE"
        name = checkpoint.directory.name
        raise UserError(f"cannot find the training text {source} of {name}; {remedy}")
    return source


def _tokens(
    args: Args, checkpoint: "Checkpoint", tokenizer: "Tokenizer", source: str, bars: "Bars"
) -> "TokenArray":
    """The tokens of the split; of a run's own text and of a corpus they are those of training."""
    from tarflowlm.data import SOURCE_NAMES, cached_corpus, encode_text_source
    from tarflowlm.runs.checkpoint import corpus_digest
    from tarflowlm.terminal.bars import print_notice

    is_corpus = args.data is None or source in SOURCE_NAMES or Path(source).is_dir()
    if args.split == "all" or not is_corpus:
        return encode_text_source(source, tokenizer, args.split, progress=bars)
    corpus = cached_corpus(source, tokenizer, progress=bars)
    known = corpus_digest(checkpoint.directory)
    if args.data is None and known not in (None, corpus.fingerprint):
        print_notice(
            f"{source} has changed since training: its {args.split} split may hold text of that"
        )
    return corpus.split(args.split)


def _likelihood(
    args: Args,
    model: "LanguageModel",
    tokenizer: "Tokenizer",
    tokens: "TokenArray",
    source: str,
    bars: "Bars",
) -> "tuple[Likelihood, dict[str, object]]":
    """The likelihood of the text, and what --json says about how it was read."""
    import torch

    from tarflowlm.data import sliding_windows
    from tarflowlm.evaluation.likelihood import evaluate
    from tarflowlm.terminal.bars import print_notice

    context = model.config.context
    patch = model.config.patch
    is_short = patch <= len(tokens) < context
    if is_short and args.split == "all" and not (args.latents or args.quality):
        context = len(tokens) - len(tokens) % patch
        print_notice(f"the text is shorter than the context: one window of {context} tokens")
    stride = context if args.stride is None else args.stride
    windows, given = sliding_windows(tokens, context, stride, args.windows)
    if stride % patch:
        raise UserError(f"stride {stride}: must be a multiple of the patch of {patch} tokens")
    if stride < context and model.num_blocks > 1:
        raise UserError(
            f"stride {stride}: windows can slide for the baseline and for flows of one block; "
            f"no bound is known for the {model.num_blocks} blocks of this model: leave --stride out"
        )
    several = args.samples > 1 and not model.is_exact
    samples = f", {args.samples} samples each" if several else ""
    text = f"{source}, {args.split}"
    print_notice(f"evaluating {len(windows):,} windows of {context} tokens{samples}: {text}")
    bars.stage("evaluating, windows", len(windows))
    start = time.perf_counter()
    found = evaluate(
        model,
        windows,
        torch.from_numpy(tokenizer.characters_per_token),
        bytes_per_token=torch.from_numpy(tokenizer.bytes_per_token),
        given=given,
        samples=args.samples,
        seed=args.seed,
        progress=bars,
    )
    return found, {
        "source": source,
        "split": args.split,
        "context": context,
        "stride": stride,
        "text_tokens": len(tokens),
        "seconds": time.perf_counter() - start,
    }


def _print_likelihood(title: str, found: "Likelihood", of_text: dict[str, object]) -> None:
    from tarflowlm.terminal.bars import print_table

    spread = f" (standard error {found.stderr:.4f})" if found.windows > 1 else ""
    rows = [
        ("bits per character", f"{found.sign} {found.bpc:.4f}"),
        ("bits per byte", f"{found.sign} {found.bits_per_byte:.4f}"),
        ("nats per token", f"{found.sign} {found.nats_per_token:.4f}{spread}"),
        ("perplexity per token", f"{found.sign} {found.ppl:.4f}"),
        ("bound", found.bound),
    ]
    if found.gap is not None:
        errors = (
            f"standard error {found.elbo_stderr:.4f}, "
            f"{found.elbo_sampling_stderr:.5f} of it from sampling"
        )
        gap = f"{found.gap:.5f} nats per token (standard error {found.gap_stderr:.5f})"
        rows.append(("ELBO, nats per token", f"<= {found.elbo:.4f} ({errors})"))
        rows.append(("gap to the ELBO", gap))
    scored = f"{found.tokens:,} of {of_text['text_tokens']:,} tokens"
    rows.append(("text", f"{scored}, {found.characters:,} characters"))
    given = "fresh contexts"
    if of_text["stride"] != of_text["context"]:
        given = "windows with tokens of the one before as context"
    rows.append(("windows", f"{found.windows:,} {given}, stride {of_text['stride']}"))
    rows.append(("seconds", f"{of_text['seconds']:.1f}"))
    print_table(title, rows)


def _print_latents(states: "list[StateReport]") -> None:
    """Two rows per state: mean over sequences, and standard deviation."""
    from tarflowlm.terminal.bars import print_table

    geometry = {
        "norm": "L2 norm",
        "cosine": "pairwise cosine",
        "participation_ratio": "part. ratio",
        "centroid_shift": "centroid shift",
    }
    shares = {
        "log_det": "log-det",
        "kl": "KL to the prior",
        "kl_gain": "KL taken off",
        "nelbo": "<= -ELBO",
    }
    for title, names in (
        ("state after every block", geometry),
        ("with a prior that ends after the block, nats per token", shares),
    ):
        rows = []
        for state in states:
            spreads = [getattr(state, name) for name in names]
            label = f"block {state.block}" if state.block else "z"
            rows.append([label, *("" if s is None else f"{s.mean:.4f}" for s in spreads)])
            rows.append(["  ±", *("" if s is None else f"{s.std:.4f}" for s in spreads)])
        print_table(title, rows, ["", *names.values()])


def _print_quality(found: "Quality") -> None:
    from tarflowlm.terminal.bars import print_table

    labels = {
        "perplexity": "generative perplexity",
        "entropy": "entropy of tokens, nats",
        "word_entropy": "entropy of words, nats",
        "distinct_1": "distinct 1-grams",
        "distinct_2": "distinct 2-grams",
        "distinct_3": "distinct 3-grams",
        "repetition": "repeated 4-grams",
    }
    rows = []
    for name, label in labels.items():
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
