"""`tarflowlm eval`: the likelihood of a text; on request the latents after every block and the quality of samples."""

import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from tarflowlm.cli.inspect_arguments import SAMPLING, EvalArgs
from tarflowlm.cli.models import load_checkpoint
from tarflowlm.config import checked_seed
from tarflowlm.data import (
    SOURCE_NAMES,
    TokenArray,
    Tokenizer,
    cached_corpus,
    encode_text_source,
    eval_windows,
    sliding_windows,
)
from tarflowlm.device import pick_device
from tarflowlm.errors import UserError
from tarflowlm.evaluation.blocks import Spread, StateReport, latent_report
from tarflowlm.evaluation.judges import load_judge
from tarflowlm.evaluation.likelihood import Likelihood, evaluate, seconds_per_window
from tarflowlm.evaluation.quality import (
    Quality,
    SamplingConfig,
    TextStatistics,
    mauve_function,
    measure_quality,
)
from tarflowlm.model import as_flow
from tarflowlm.runs.checkpoint import Checkpoint
from tarflowlm.runs.released import choose_directory
from tarflowlm.terminal.bars import bar, stages_bar
from tarflowlm.terminal.progress import minutes
from tarflowlm.terminal.tables import column_table, print_json, print_notice, print_table

DEFAULT_JUDGE = "gpt2-large"
WORTH_SAYING = 90.0
"""Seconds from which on an evaluation says at its start how long it will take."""


def run_eval(args: EvalArgs) -> None:
    console = Console(stderr=True)
    checked_seed(args.seed)
    sampling = _sampling(args)
    device = pick_device(args.device)
    directory = choose_directory(args.directory, args.model)
    checkpoint = load_checkpoint(directory, device)
    if args.latents and checkpoint.model.is_exact:
        raise UserError(f"{directory} is the discrete baseline, which has no latents: leave --latents out")
    context = checkpoint.run.model.context
    length = context if args.length is None else args.length
    if not 1 <= length <= context:
        raise UserError(f"length {length}: must be at least 1 and at most the trained context of {context} tokens")
    judge = None
    if sampling is not None:
        # before anything that takes time, so that a judge or package that is not there costs none
        judge = load_judge(args.judge or DEFAULT_JUDGE, device)
        mauve_function()
    tokenizer = checkpoint.tokenizer.with_normalization(args.normalize)
    source = _source(args, directory, checkpoint)
    tokens = _tokens(args, checkpoint, tokenizer, source)
    result, extra = _likelihood(args, checkpoint, tokenizer, tokens, source, console)
    states, quality = None, None
    if args.latents:
        windows = eval_windows(tokens, context, args.windows)
        with bar(console, "latents", len(windows)) as update:
            states = latent_report(
                as_flow(checkpoint.model), windows, seed=args.seed, progress=lambda done, _total: update(done)
            )
    if sampling is not None and judge is not None:
        text = eval_windows(tokens, length, sampling.num)
        with stages_bar(console, lambda stage: f"quality: {stage}") as progress:
            quality = measure_quality(
                checkpoint.model,
                tokenizer,
                judge,
                text,
                sampling,
                trained_on=checkpoint.run.data.source,
                progress=progress,
            )
    if args.json:
        latents = {"latents": [state.to_json() for state in states]} if states is not None else {}
        print_json(result.to_json() | extra | latents | ({"quality": quality.to_json()} if quality else {}))
        return
    _print_likelihood(Console(), f"{directory} on {source}, {args.split}", result, extra)
    if states is not None:
        _print_latents(Console(), states)
    if quality is not None:
        _print_quality(Console(), quality)


def _source(args: EvalArgs, directory: Path, checkpoint: Checkpoint) -> str:
    """The text to evaluate. UserError where it is to be the run's own, and that is not here."""
    if args.data is not None:
        return args.data
    source = checkpoint.run.data.source
    if source not in SOURCE_NAMES and not Path(source).exists():
        raise UserError(
            f"the text that {directory.name} was trained on, {source}, is not here (no text comes with a model): "
            f"evaluate another one, with --data english or --data FILE"
        )
    return source


def _sampling(args: EvalArgs) -> SamplingConfig | None:
    """How --quality samples; None without it."""
    given = {name: value for name in SAMPLING if (value := getattr(args, name)) is not None}
    return SamplingConfig(**given, seed=args.seed) if args.quality else None


def _tokens(args: EvalArgs, checkpoint: Checkpoint, tokenizer: Tokenizer, source: str) -> TokenArray:
    if args.split != "all" and (source in SOURCE_NAMES or Path(source).is_dir()):
        tokens = cached_corpus(source, tokenizer).split(args.split)
    else:
        tokens = encode_text_source(source, tokenizer, (args.split,))[args.split]
    context = checkpoint.run.model.context
    if args.split == "all" and not args.latents and not args.quality:
        least = checkpoint.model.config.patch
    else:
        least = context
    if len(tokens) < least:
        whole = "" if args.split == "all" else ", --split all"
        raise UserError(
            f"{args.split} of {source} has {len(tokens)} tokens, fewer than {least}: use a longer text{whole}, or "
            f"`tarflowlm score MODEL --file FILE`, which takes any length"
        )
    return tokens


def _likelihood(
    args: EvalArgs, checkpoint: Checkpoint, tokenizer: Tokenizer, tokens: TokenArray, source: str, console: Console
) -> tuple[Likelihood, dict[str, Any]]:
    """The likelihood, and what else belongs beside it in the JSON object."""
    model, context = checkpoint.model, checkpoint.run.model.context
    if len(tokens) < context:
        context = len(tokens) - len(tokens) % model.config.patch
        print_notice(console, f"the text is shorter than the context: one window of {context} tokens")
    stride = context if args.stride is None else args.stride
    windows, given = sliding_windows(tokens, context, stride, args.windows)
    if stride % model.config.patch:
        raise UserError(f"stride {stride}: must be a multiple of the patch of {model.config.patch} tokens")
    if stride < context and model.num_blocks > 1:
        raise UserError(
            f"stride {stride}: windows can slide for the baseline and for flows of one block; no bound is known for "
            f"the {model.num_blocks} blocks of this model: leave --stride out"
        )
    start = time.perf_counter()
    draws = 1 if model.is_exact else args.samples
    samples = f", {draws} samples each" if draws > 1 else ""
    print_notice(console, f"evaluating {len(windows):,} windows of {context} tokens{samples}: {source}, {args.split}")
    # those that slide are evaluated twice, with and without their context
    passes = draws * len(windows) * (1 if stride == context or model.is_exact else 2)
    seconds = passes * seconds_per_window(model, windows)
    if seconds >= WORTH_SAYING:
        fewer = max(1, round(60 * len(windows) / seconds))
        print_notice(console, f"about {minutes(seconds)} minutes; --windows {fewer} takes about one")
    with bar(console, "evaluating", len(windows)) as update:
        update(0)
        result = evaluate(
            model,
            windows,
            torch.from_numpy(tokenizer.characters_per_token),
            bytes_per_token=torch.from_numpy(tokenizer.bytes_per_token),
            given=given,
            samples=args.samples,
            seed=args.seed,
            progress=lambda done, _total: update(done),
        )
    extra = {
        "source": source,
        "split": args.split,
        "context": context,
        "stride": stride,
        "text_tokens": len(tokens),
        "seconds": time.perf_counter() - start,
    }
    return result, extra


def _print_likelihood(console: Console, title: str, result: Likelihood, extra: dict[str, Any]) -> None:
    sign = result.sign
    spread = f" (standard error {result.stderr:.4f})" if result.windows > 1 else ""
    rows = [
        ("bits per character", f"{sign} {result.bpc:.4f}"),
        ("bits per byte", f"{sign} {result.bits_per_byte:.4f}"),
        ("nats per token", f"{sign} {result.nats_per_token:.4f}{spread}"),
        ("perplexity per token", f"{sign} {result.ppl:.4f}"),
        ("bound", result.bound),
    ]
    if result.gap is not None:
        sampling = f", {result.elbo_sampling_stderr:.5f} of it from sampling"
        rows += [
            ("ELBO, nats per token", f"<= {result.elbo:.4f} (standard error {result.elbo_stderr:.4f}{sampling})"),
            ("gap to the ELBO", f"{result.gap:.5f} nats per token (standard error {result.gap_stderr:.5f})"),
        ]
    fresh = extra["stride"] == extra["context"]
    how = "fresh contexts" if fresh else f"windows, {extra['context'] - extra['stride']} tokens of context each"
    rows += [
        (
            "text",
            f"{result.tokens:,} of {extra['text_tokens']:,} tokens, {result.characters:,} characters; "
            f"{result.windows:,} {how}, stride {extra['stride']}",
        ),
        ("seconds", f"{extra['seconds']:.1f}"),
    ]
    print_table(console, title, rows)


def _print_latents(console: Console, states: list[StateReport]) -> None:
    """Two rows per state: mean over sequences, and standard deviation."""
    geometry = {
        "norm": "L2 norm",
        "cosine": "pairwise cosine",
        "participation_ratio": "part. ratio",
        "centroid_shift": "centroid shift",
    }
    shares = {"log_det": "log-det", "kl": "KL to the prior", "kl_gain": "KL taken off", "nelbo": "<= -ELBO"}
    for title, names in (
        ("state after every block", geometry),
        ("with a prior that ends after the block, nats per token", shares),
    ):
        rows = []
        for state in states:
            spreads: list[Spread | None] = [getattr(state, name) for name in names]
            label = "z" if state.block == 0 else f"block {state.block}"
            rows.append([label, *("" if s is None else f"{s.mean:.4f}" for s in spreads)])
            rows.append(["  ±", *("" if s is None else f"{s.std:.4f}" for s in spreads)])
        console.print(column_table(title, ["", *names.values()], rows))


def _print_quality(console: Console, quality: Quality) -> None:
    def column(s: TextStatistics) -> list[str]:
        shares = (s.distinct_1, s.distinct_2, s.distinct_3, s.repetition)
        return [
            f"{s.perplexity:.3f}",
            f"{s.entropy:.4f}",
            f"{s.word_entropy:.4f}",
            *("-" if share is None else f"{share:.4f}" for share in shares),
            f"{s.texts:,}",
        ]

    labels = ["generative perplexity", "entropy of tokens, nats", "entropy of words, nats"]
    labels += ["distinct 1-grams", "distinct 2-grams", "distinct 3-grams", "repeated 4-grams", "texts"]
    rows = [list(row) for row in zip(labels, column(quality.samples), column(quality.text), strict=True)]
    rows.insert(1, ["MAUVE, scaling 5", f"{quality.mauve:.4f}", ""])
    cuts = f", top-k {quality.top_k}" if quality.top_k else ""
    cuts += f", top-p {quality.top_p}" if quality.top_p else ""
    title = (
        f"{quality.length} tokens each, decoder {quality.decoder}, {quality.dtype}, temperature "
        f"{quality.temperature}{cuts}, seed {quality.seed}; judge {quality.judge} ({quality.judge_kind})"
    )
    console.print(column_table(title, ["", "samples", "real text"], rows))
    for remark in quality.remarks:
        console.print(Text(remark, style="dim"))
