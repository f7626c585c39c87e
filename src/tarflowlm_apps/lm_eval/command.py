"""`tarflowlm harness MODEL ...`: lm-evaluation-harness with the model filled in."""

import contextlib
import io
import json
import sys
from dataclasses import dataclass

from tarflowlm.cli.options import OfNamedModel, parse
from tarflowlm.errors import UserError
from tarflowlm.options import Normalized
from tarflowlm.schema import Million, Seed
from tarflowlm.terminal.bars import print_json

OURS = ("--model", "-M", "--model_args", "-a")
"""Options of lm-eval that name the model: `harness` fills them in."""
PRINTED = ("results", "groups", "n-samples", "versions", "config")
"""The results that --json prints; `--output_path` keeps all."""


@dataclass(frozen=True, kw_only=True)
class Args(OfNamedModel, Normalized):
    """Evaluate a model with lm-evaluation-harness: MODEL --tasks NAMES, and its other options."""

    posterior_samples: Million = 1
    """Posterior samples of a flow: 1 gives the ELBO, more the importance-weighted bound."""
    noise_seed: Seed = 0
    """Seed of these samples, and of continuations."""


def read(argv: list[str]) -> tuple[Args, list[str]]:
    """The arguments, and the words that are for lm-eval."""
    return parse(Args, argv, "tarflowlm harness MODEL --tasks NAMES", return_unknown_args=True)


def run(given: tuple[Args, list[str]]) -> None:
    from tarflowlm_apps.lm_eval.register import run_lm_eval

    args, words = given
    for word in words:
        if word.partition("=")[0] in OURS:
            raise UserError(f"{word}: harness {args.directory} names the model; leave it out")
    settings = {
        "pretrained": str(args.directory),
        "posterior_samples": args.posterior_samples,
        "noise_seed": args.noise_seed,
        "normalize": args.normalize,
    }
    # as JSON: a path may hold commas and equals signs
    words = ["--model", "tarflowlm", "--model_args", json.dumps(settings), *words]
    if not args.json:
        run_lm_eval(words)
        return
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        run_lm_eval([*words, "--show_config"])
    # an object, and tables after it; nothing of that for, say, --tasks list
    text = shown.getvalue()
    start = text.find("{\n")
    results: dict[str, object] = {}
    end = 0
    if start >= 0:
        results, end = json.JSONDecoder().raw_decode(text, start)
    sys.stdout.write(text[end:].lstrip())
    print_json({key: results[key] for key in PRINTED if key in results})
