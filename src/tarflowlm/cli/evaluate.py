"""`tarflowlm eval`: the likelihood of a text, and on request the latents of every block."""

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from tarflowlm.cli.options import OfModel, load_checkpoint
from tarflowlm.errors import counted
from tarflowlm.options import Flag
from tarflowlm.requests import Evaluation
from tarflowlm.terminal.bars import Bars, print_json, print_notice, print_table

if TYPE_CHECKING:
    from tarflowlm.evaluation.blocks import StateReport
    from tarflowlm.evaluation.likelihood import Likelihood


@dataclass(frozen=True, kw_only=True)
class Args(OfModel, Evaluation):
    """Measure the likelihood of a text; on request, the latents of every block."""

    latents: Flag = False
    """Also the geometry of the state after every block, and its share of the bound."""


def run(args: Args) -> None:
    from tarflowlm.data import eval_windows
    from tarflowlm.evaluation.blocks import latent_report
    from tarflowlm.evaluation.scores import evaluate_text, read_windows
    from tarflowlm.model import as_flow
    from tarflowlm.processes import LONG, launched

    with launched(args.device, LONG) as processes, Bars() as bars:
        with processes.first_alone():  # model and text may have to be downloaded
            lm = load_checkpoint(args.directory, processes.device)
            directory = args.directory or lm.directory.name
            refusal = (
                f"{directory} is the discrete baseline, which has no latents: leave --latents out"
            )
            flow = as_flow(lm.model, refusal) if args.latents else None
            text = read_windows(args, lm, bars)
        is_sampled = args.samples > 1 and not lm.model.is_exact
        samples = f", {args.samples} samples each" if is_sampled else ""
        count, context = text.windows.shape
        what = f"{counted(count, 'window')} of {counted(context, 'token')}{samples}"
        where = f"{text.source}, {text.split}"
        print_notice(f"evaluating {what}: {where}")
        bars.stage("evaluating, windows", count)
        start = time.perf_counter()
        likelihood = evaluate_text(args, lm, text, bars, processes)
        reading: dict[str, object] = {
            "source": text.source,
            "split": text.split,
            "context": context,
            "precision": args.precision,
            "stride": text.stride,
            "text_tokens": len(text.tokens),
            "seconds": time.perf_counter() - start,
        }
        states = None
        if flow is not None and processes.first:
            windows = eval_windows(text.tokens, context, args.windows)
            bars.stage("latents, windows", len(windows))
            states = latent_report(flow, windows, seed=args.seed, progress=bars)
    if args.json:
        latents = {} if states is None else {"latents": [asdict(state) for state in states]}
        print_json(likelihood.to_json() | reading | latents)
        return
    _print_likelihood(f"{directory} on {where}", likelihood, reading)
    if states is not None:
        _print_latents(states)


def _print_likelihood(title: str, found: "Likelihood", reading: dict[str, object]) -> None:
    from tarflowlm.evaluation.likelihood import sign_of

    spread = f" (standard error {found.stderr:.4f})" if found.windows > 1 else ""
    sign = sign_of(found.bound)
    rows = [
        ("nats per token", f"{sign} {found.nats_per_token:.4f}{spread}"),
        ("perplexity per token", f"{sign} {found.ppl:.4f}"),
        ("bound", found.bound),
    ]
    if found.characters:
        rows[:0] = [
            ("bits per character", f"{sign} {found.bpc:.4f}"),
            ("bits per byte", f"{sign} {found.bits_per_byte:.4f}"),
        ]
    if found.gap is not None:
        errors = of_gap = ""
        if found.windows > 1:
            sampling = f"{found.elbo_sampling_stderr:.5f} of it from sampling"
            errors = f" (standard error {found.elbo_stderr:.4f}, {sampling})"
            of_gap = f" (standard error {found.gap_stderr:.5f})"
        rows.append(("ELBO, nats per token", f"<= {found.elbo:.4f}{errors}"))
        rows.append(("gap to the ELBO", f"{found.gap:.5f} nats per token{of_gap}"))
    scored = f"{found.tokens:,} of {reading['text_tokens']:,} tokens"
    kept = f"{found.characters:,} characters" if found.characters else "which keep no characters"
    rows.append(("text", f"{scored}, {kept}"))
    windows = f"{found.windows:,} of {reading['context']} tokens, stride {reading['stride']}"
    rows.append(("windows", windows))
    if reading["precision"] != "float32":
        rows.append(("precision", str(reading["precision"])))
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
