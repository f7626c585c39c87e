"""`tarflowlm eval`: the likelihood of a text; on request the latents after every block and the
quality of samples.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tarflowlm.cli import options
from tarflowlm.cli.options import arg
from tarflowlm.config import Decoder
from tarflowlm.errors import UserError

SAMPLING = (
    "num",
    "length",
    "decoder",
    "temperature",
    "top_k",
    "top_p",
)  # fields of `quality.SamplingConfig`


@dataclass(frozen=True)
class Args:
    """Measure the likelihood of a text under a model; on request, its latents and the quality of
    samples.
    """

    directory: options.Model = None
    model: options.ModelName = None
    data: Annotated[str | None, arg("SOURCE")] = None
    """Another text: corpus name, file or prepared directory; the default is the run's own
    corpus.
    """
    split: Literal["train", "valid", "test", "all"] = (
        "test"  # Part of the text; a file is split 90/5/5.
    )
    samples: int = (
        1  # Posterior samples: 1 gives the ELBO, more the importance-weighted bound and the ELBO.
    )
    windows: options.Count = (
        None  # At most this many windows, evenly spaced; the default is all of them.
    )
    stride: options.Count = None
    """Tokens between window starts (default: the context). Less lets windows overlap: baseline,
    one-block flows.
    """
    latents: options.Flag = False
    """Also the state after every block: norms, cosines, participation ratio, centroid, log-det,
    KL.
    """
    quality: options.Flag = False
    """Also samples: generative perplexity, MAUVE, entropy, distinct n-grams, repetition, beside
    those of the text. Needs the extra quality (mauve-text, transformers).
    """
    judge: Annotated[str | None, arg("MODEL")] = None
    """With --quality: a run directory or shipped model of the baseline, a directory of
    transformers, or a hub name (gpt2-large).
    """
    num: options.Count = None  # With --quality: number of samples; 5000, as in the paper.
    length: options.Count = (
        None  # With --quality: tokens per sample; the default is the trained context.
    )
    decoder: Annotated[Decoder | None, arg()] = (
        None  # With --quality: how to invert a block (auto).
    )
    temperature: Annotated[float | None, arg("FLOAT", f"With --quality: {options.TEMPERATURE}")] = (
        None
    )
    top_k: Annotated[int | None, arg("INT", f"With --quality: {options.TOP_K}")] = None
    top_p: Annotated[float | None, arg("FLOAT", f"With --quality: {options.TOP_P}")] = None
    normalize: options.Normalize = None
    seed: int = 0  # Seed of the posterior samples, and of the samples of --quality.
    device: options.Device = "auto"
    json: options.PrintJson = False

    def __post_init__(self) -> None:
        options.check(
            self, ("samples", "windows"), needed=dict.fromkeys((*SAMPLING, "judge"), ("quality",))
        )


def run(args: Args) -> None:
    from tarflowlm.checks import checked_seed
    from tarflowlm.data import FIELD, SOURCE_NAMES, cached_corpus, encode_text_source, eval_windows
    from tarflowlm.device import pick_device
    from tarflowlm.evaluation.blocks import latent_report
    from tarflowlm.evaluation.judges import load_judge
    from tarflowlm.evaluation.quality import SamplingConfig, mauve_function, measure_quality
    from tarflowlm.model import as_flow
    from tarflowlm.runs.checkpoint import corpus_digest
    from tarflowlm.runs.hub import choose_directory
    from tarflowlm.terminal.bars import Bars, print_json, print_notice

    checked_seed(args.seed)
    given = {name: value for name in SAMPLING if (value := getattr(args, name)) is not None}
    sampling = SamplingConfig(**given, seed=args.seed) if args.quality else None
    directory = choose_directory(args.directory, args.model)
    checkpoint = options.load_checkpoint(directory, args.device)
    model, context = checkpoint.model, checkpoint.run.model.context
    refusal = f"{directory} is the discrete baseline, which has no latents: leave --latents out"
    flow = as_flow(model, refusal) if args.latents else None
    if args.length is not None and not 1 <= args.length <= context:
        raise UserError(
            f"length {args.length}: must be between 1 and the trained context of {context} tokens"
        )
    judge = None
    if sampling is not None:
        # before anything that takes time, so that a missing judge or package costs none
        judge = load_judge(args.judge or "gpt2-large", pick_device(args.device))
        mauve_function()
    tokenizer = checkpoint.tokenizer.with_normalization(args.normalize)
    source = checkpoint.run.data.source if args.data is None else args.data
    if (
        args.data is None
        and source not in SOURCE_NAMES
        and not Path(source.partition(FIELD)[0]).exists()
    ):
        remedy = "models are shipped without their data. Pass --data english or --data FILE"
        raise UserError(f"cannot find the training text {source} of {directory.name}; {remedy}")
    with Bars() as bars:
        # of the run's own text, tokens as in training
        if args.split != "all" and (
            args.data is None or source in SOURCE_NAMES or Path(source).is_dir()
        ):
            corpus = cached_corpus(source, tokenizer, progress=bars)
            tokens = corpus.split(args.split)
            if args.data is None and corpus_digest(checkpoint.directory) not in (
                None,
                corpus.fingerprint,
            ):
                print_notice(
                    f"{source} has changed since training: its {args.split} split may hold text of that"
                )
        else:
            tokens = encode_text_source(source, tokenizer, (args.split,), progress=bars)[args.split]
        found = _likelihood(args, model, tokenizer, tokens, source, bars)
        if flow is not None:
            windows = eval_windows(tokens, context, args.windows)
            bars.stage("latents, windows", len(windows))
            states = latent_report(flow, windows, seed=args.seed, progress=bars)
            found["latents"] = [state.to_json() for state in states]
        if sampling is not None and judge is not None:
            real, trained_on = (
                eval_windows(tokens, args.length or context, sampling.num),
                checkpoint.run.data.source,
            )
            quality = measure_quality(
                model, tokenizer, judge, real, sampling, trained_on=trained_on, progress=bars
            )
            found["quality"] = quality.to_json()
    if args.json:
        print_json(found)
        return
    _print_likelihood(f"{directory} on {source}, {args.split}", found)
    if "latents" in found:
        _print_latents(found["latents"])
    if "quality" in found:
        _print_quality(found["quality"])


def _likelihood(
    args: Args, model: Any, tokenizer: Any, tokens: Any, source: str, bars: Any
) -> dict[str, Any]:
    """The likelihood of the text, as --json shows it."""
    import time

    import torch

    from tarflowlm.data import sliding_windows
    from tarflowlm.evaluation.likelihood import evaluate
    from tarflowlm.terminal.bars import print_notice

    context, patch = model.config.context, model.config.patch
    if (
        patch <= len(tokens) < context
        and args.split == "all"
        and not (args.latents or args.quality)
    ):
        context = len(tokens) - len(tokens) % patch
        print_notice(f"the text is shorter than the context: one window of {context} tokens")
    stride = context if args.stride is None else args.stride
    windows, given = sliding_windows(tokens, context, stride, args.windows)
    if stride % patch:
        raise UserError(f"stride {stride}: must be a multiple of the patch of {patch} tokens")
    if stride < context and model.num_blocks > 1:
        reason = (
            f"no bound is known for the {model.num_blocks} blocks of this model: leave --stride out"
        )
        raise UserError(
            f"stride {stride}: windows can slide for the baseline and for flows of one block; {reason}"
        )
    start = time.perf_counter()
    draws = 1 if model.is_exact else args.samples
    samples = f", {draws} samples each" if draws > 1 else ""
    print_notice(
        f"evaluating {len(windows):,} windows of {context} tokens{samples}: {source}, {args.split}"
    )
    bars.stage("evaluating, windows", len(windows))
    characters, num_bytes = map(
        torch.from_numpy, (tokenizer.characters_per_token, tokenizer.bytes_per_token)
    )
    how: dict[str, Any] = {
        "given": given,
        "samples": args.samples,
        "seed": args.seed,
        "progress": bars,
    }
    result = evaluate(model, windows, characters, bytes_per_token=num_bytes, **how)
    extra = {
        "source": source,
        "split": args.split,
        "context": context,
        "stride": stride,
        "text_tokens": len(tokens),
    }
    return result.to_json() | extra | {"seconds": time.perf_counter() - start}


def _print_likelihood(title: str, found: dict[str, Any]) -> None:
    from tarflowlm.evaluation.likelihood import sign_of
    from tarflowlm.terminal.bars import print_table

    sign = sign_of(found["bound"])
    spread = f" (standard error {found['stderr']:.4f})" if found["windows"] > 1 else ""
    rows = [
        ("bits per character", f"{sign} {found['bpc']:.4f}"),
        ("bits per byte", f"{sign} {found['bits_per_byte']:.4f}"),
        ("nats per token", f"{sign} {found['nats_per_token']:.4f}{spread}"),
        ("perplexity per token", f"{sign} {found['ppl']:.4f}"),
        ("bound", found["bound"]),
    ]
    if found.get("gap") is not None:
        error = f"standard error {found['elbo_stderr']:.4f}, {found['elbo_sampling_stderr']:.5f} of it from sampling"
        gap = f"{found['gap']:.5f} nats per token (standard error {found['gap_stderr']:.5f})"
        rows += [
            ("ELBO, nats per token", f"<= {found['elbo']:.4f} ({error})"),
            ("gap to the ELBO", gap),
        ]
    context, stride, count = found["context"], found["stride"], found["windows"]
    given = context - stride
    kind, how = ("window", f", {given} tokens of context each") if given else ("fresh context", "")
    text = f"{found['tokens']:,} of {found['text_tokens']:,} tokens, {found['characters']:,} characters; "
    rows.append(("text", f"{text}{count:,} {kind}{'s' * (count != 1)}{how}, stride {stride}"))
    rows.append(("seconds", f"{found['seconds']:.1f}"))
    print_table(title, rows)


def _print_latents(states: list[dict[str, Any]]) -> None:
    """Two rows per state: mean over sequences, and standard deviation."""
    from tarflowlm.terminal.bars import print_table

    geometry = {
        "norm": "L2 norm",
        "cosine": "pairwise cosine",
        "participation_ratio": "part. ratio",
    }
    geometry["centroid_shift"] = "centroid shift"
    shares = {
        "log_det": "log-det",
        "kl": "KL to the prior",
        "kl_gain": "KL taken off",
        "nelbo": "<= -ELBO",
    }
    after = {
        "state after every block": geometry,
        "with a prior that ends after the block, nats per token": shares,
    }
    for title, names in after.items():
        rows = []
        for state in states:
            for label, key in (
                ("z" if state["block"] == 0 else f"block {state['block']}", "mean"),
                ("  ±", "std"),
            ):
                rows.append(
                    [label, *("" if state[n] is None else f"{state[n][key]:.4f}" for n in names)]
                )
        print_table(title, rows, ["", *names.values()])


def _print_quality(quality: dict[str, Any]) -> None:
    from tarflowlm.terminal.bars import print_table

    labels = {
        "perplexity": ("generative perplexity", ".3f"),
        "entropy": ("entropy of tokens, nats", ".4f"),
    }
    labels["word_entropy"] = ("entropy of words, nats", ".4f")
    labels |= {f"distinct_{n}": (f"distinct {n}-grams", ".4f") for n in (1, 2, 3)}
    labels |= {"repetition": ("repeated 4-grams", ".4f"), "texts": ("texts", ",")}
    rows = []
    for name, (label, form) in labels.items():
        values = (quality[texts][name] for texts in ("samples", "text"))
        rows.append([label, *("-" if value is None else f"{value:{form}}" for value in values)])
    rows.insert(1, ["MAUVE, scaling 5", f"{quality['mauve']:.4f}", ""])
    cuts = f", top-k {quality['top_k']}" if quality["top_k"] else ""
    cuts += f", top-p {quality['top_p']}" if quality["top_p"] else ""
    title = f"{quality['length']} tokens each, decoder {quality['decoder']}, {quality['dtype']}, temperature "
    title += f"{quality['temperature']}{cuts}, seed {quality['seed']}; "
    title += f"judge {quality['judge']} ({quality['judge_kind']})"
    print_table(title, rows, ["", "samples", "real text"])
    sys.stdout.write("".join(f"{remark}\n" for remark in quality["remarks"]))
