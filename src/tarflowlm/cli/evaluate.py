"""`tarflowlm eval`: the likelihood of a text, and on request the latents of every block."""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tarflowlm import schema
from tarflowlm.cli.options import OfModel, load_checkpoint
from tarflowlm.errors import Progress, UserError, counted
from tarflowlm.options import Count, Flag, Normalized, Seeded, arg
from tarflowlm.terminal.bars import Bars, print_json, print_notice, print_table

if TYPE_CHECKING:
    from torch import Tensor

    from tarflowlm.data import Tokenizer
    from tarflowlm.data.windows import Array
    from tarflowlm.evaluation.blocks import StateReport
    from tarflowlm.evaluation.likelihood import Likelihood
    from tarflowlm.model import LanguageModel
    from tarflowlm.runs.checkpoint import Checkpoint

Split = Literal["train", "valid", "test", "all"]


@dataclass(frozen=True, kw_only=True)
class Args(OfModel, Seeded, Normalized):
    """Measure the likelihood of a text; on request, the latents of every block."""

    data: Annotated[str | None, arg("SOURCE")] = None
    """Another text than the run's own: corpus name, file or prepared directory."""
    split: Annotated[Split | None, arg()] = None
    """Part of the text, split 90/5/5. The default is test, or all of a --data file that the model
    was not trained on.
    """
    samples: schema.Count = 1
    """Posterior samples: 1 gives the ELBO, more the importance-weighted bound and the ELBO."""
    windows: Count = None
    """At most this many windows, evenly spaced; the default is all of them."""
    stride: Count = None
    """Tokens between window starts (default: the context). A smaller number lets windows overlap,
    for the baseline and one-block flows.
    """
    latents: Flag = False
    """Also the geometry of the state after every block, and its share of the bound."""


def run(args: Args) -> None:
    import torch

    from tarflowlm.data import eval_windows
    from tarflowlm.evaluation.blocks import latent_report
    from tarflowlm.evaluation.likelihood import evaluate
    from tarflowlm.model import as_flow
    from tarflowlm.processes import LONG, launched

    with launched(args.device, LONG) as processes, Bars() as bars:
        with processes.first_alone():  # model and text may have to be downloaded
            checkpoint = load_checkpoint(args.directory, processes.device)
            directory = args.directory or checkpoint.directory.name
            model = checkpoint.model
            refusal = (
                f"{directory} is the discrete baseline, which has no latents: leave --latents out"
            )
            flow = as_flow(model, refusal) if args.latents else None
            tokenizer = checkpoint.tokenizer.with_normalization(args.normalize)
            split = args.split or usual_split(checkpoint, args.data)
            source, tokens = read_text(checkpoint, tokenizer, args.data, split, bars)
        windows, given, reading = _windows(args, model, tokens, split)
        samples = (
            f", {args.samples} samples each" if args.samples > 1 and not model.is_exact else ""
        )
        what = f"{counted(len(windows), 'window')} of {counted(windows.shape[1], 'token')}{samples}"
        print_notice(f"evaluating {what}: {source}, {split}")
        bars.stage("evaluating, windows", len(windows))
        start = time.perf_counter()
        likelihood = evaluate(
            model,
            windows,
            torch.from_numpy(tokenizer.characters_per_token),
            bytes_per_token=torch.from_numpy(tokenizer.bytes_per_token),
            given=given,
            samples=args.samples,
            seed=args.seed,
            progress=bars,
            processes=processes,
        )
        reading = {"source": source, "split": split} | reading
        reading["seconds"] = time.perf_counter() - start
        states = None
        if flow is not None and processes.first:
            windows = eval_windows(tokens, model.config.context, args.windows)
            bars.stage("latents, windows", len(windows))
            states = latent_report(flow, windows, seed=args.seed, progress=bars)
    if args.json:
        latents = {} if states is None else {"latents": [asdict(state) for state in states]}
        print_json(likelihood.to_json() | reading | latents)
        return
    _print_likelihood(f"{directory} on {source}, {split}", likelihood, reading)
    if states is not None:
        _print_latents(states)


def usual_split(checkpoint: "Checkpoint", data: str | None) -> Split:
    """The default of `split`: all for a file that the model was not trained on, else test."""
    from tarflowlm.data import SOURCE_NAMES

    if data is None or data in SOURCE_NAMES:
        return "test"
    file = _source_of(data)
    return "all" if file.is_file() and file != _source_of(checkpoint.run.data.source) else "test"


def _source_of(source: str) -> Path:
    from tarflowlm.data.sources import split_field

    return Path(split_field(source)[0]).resolve()


def read_text(
    checkpoint: "Checkpoint",
    tokenizer: "Tokenizer",
    data: str | None,
    split: Split,
    progress: Progress,
) -> "tuple[str, Array]":
    """The text to measure, `data` or the run's own, and the tokens of its split.

    A corpus keeps the split of training. UserError for the text of a shipped model.
    """
    from tarflowlm.data import SOURCE_NAMES, encode_text, look, prepare_corpus
    from tarflowlm.data.sources import HUB
    from tarflowlm.runs.checkpoint import corpus_digest

    ours = checkpoint.run.data
    source = ours.source if data is None else data
    unwrap = ours.unwrap and _source_of(source) == _source_of(ours.source)
    text = replace(ours, source=source, unwrap=unwrap)
    is_named = source in SOURCE_NAMES or source.startswith(HUB)
    if data is None and not is_named and not _source_of(source).exists():
        what = f"cannot find the training text {source} of {checkpoint.directory.name}"
        raise UserError(f"{what}: pass --data tales or --data FILE")
    is_corpus = data is None or is_named or Path(source).is_dir()
    if split == "all" or not is_corpus:
        tokens = encode_text(text, tokenizer, split, progress=progress)
        # before the work, so that an unreadable text costs one line
        seen = look(text)
        problem = seen.misfit(tokenizer)
        if problem is not None:
            print_notice(problem)
        elif tokenizer.normalization == "text8":
            seen.tell("text8", "english-small")
        return source, tokens
    corpus = prepare_corpus(text, tokenizer, progress=progress)
    if data is None and corpus_digest(checkpoint.directory) not in (None, corpus.fingerprint):
        print_notice(
            f"{source} has changed since training: its {split} split may hold text of that"
        )
    return source, corpus.split(split)


def _windows(
    args: Args, model: "LanguageModel", tokens: "Array", split: Split
) -> "tuple[Tensor, Tensor, dict[str, object]]":
    """The windows [W, T] of a text, the number of context tokens [W] in each, and their entries in
    --json.
    """
    from tarflowlm.data import sliding_windows

    context = model.config.context
    patch = model.config.patch
    is_short = patch <= len(tokens) < context
    if is_short and split == "all" and not args.latents:
        context = len(tokens) - len(tokens) % patch
        print_notice(
            f"the text is shorter than the context: one window of {counted(context, 'token')}"
        )
    stride = context if args.stride is None else args.stride
    windows, given = sliding_windows(tokens, context, stride, args.windows)
    if stride % patch:
        raise UserError(f"stride {stride}: must be a multiple of the patch of {patch} tokens")
    if stride < context and model.num_blocks > 1:
        rule = f"windows slide for one block, and this model has {model.num_blocks} blocks"
        raise UserError(f"stride {stride}: {rule}; leave --stride out")
    return windows, given, {"context": context, "stride": stride, "text_tokens": len(tokens)}


def _print_likelihood(title: str, found: "Likelihood", reading: dict[str, object]) -> None:
    from tarflowlm.evaluation.likelihood import sign_of

    spread = f" (standard error {found.stderr:.4f})" if found.windows > 1 else ""
    sign = sign_of(found.bound)
    rows = [
        ("bits per character", f"{sign} {found.bpc:.4f}"),
        ("bits per byte", f"{sign} {found.bits_per_byte:.4f}"),
        ("nats per token", f"{sign} {found.nats_per_token:.4f}{spread}"),
        ("perplexity per token", f"{sign} {found.ppl:.4f}"),
        ("bound", found.bound),
    ]
    if found.gap is not None:
        errors = f"{found.elbo_stderr:.4f}, {found.elbo_sampling_stderr:.5f} of it from sampling"
        rows.append(("ELBO, nats per token", f"<= {found.elbo:.4f} (standard error {errors})"))
        gap = f"{found.gap:.5f} nats per token (standard error {found.gap_stderr:.5f})"
        rows.append(("gap to the ELBO", gap))
    scored = f"{found.tokens:,} of {reading['text_tokens']:,} tokens"
    rows.append(("text", f"{scored}, {found.characters:,} characters"))
    windows = f"{found.windows:,} of {reading['context']} tokens, stride {reading['stride']}"
    rows.append(("windows", windows))
    rows.append(("seconds", f"{reading['seconds']:.1f}"))
    print_table(title, rows)


def _print_latents(states: "list[StateReport]") -> None:
    """Two rows per state: mean over sequences, and standard deviation."""
    geometry = ("norm", "cosine", "participation_ratio", "centroid_shift")
    shares = ("log_det", "kl", "kl_gain", "nelbo")
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
        print_table(title, rows, ["", *(name.replace("_", " ") for name in names)])
