"""`tarflowlm harness MODEL ...`: the command line of lm-evaluation-harness, with the model filled in."""

import contextlib
import io
import json
import sys
from typing import Any

from tarflowlm.cli.inspect_arguments import HarnessArgs
from tarflowlm.config import checked_seed
from tarflowlm.errors import UserError
from tarflowlm.harness.register import run_lm_eval
from tarflowlm.terminal.tables import print_json

OURS = ("--model", "-M", "--model_args", "-a")
"""Options of lm-eval that say which model: `harness` fills them in."""
KEPT = ("results", "groups", "n-samples", "versions", "config")
"""Of what lm-eval knows at the end; `--output_path` keeps all of it."""


def run_harness(given: tuple[HarnessArgs, list[str]]) -> None:
    args, words = given
    for word in words:
        if word.partition("=")[0] in OURS:
            raise UserError(f"{word} with harness {args.directory}, which names the model: leave it out")
    settings = {
        "pretrained": str(args.directory),
        "posterior_samples": args.posterior_samples,
        "noise_seed": checked_seed(args.noise_seed),
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
    results, tables = split_results(shown.getvalue())
    sys.stdout.write(tables)
    print_json({key: results[key] for key in KEPT if key in results})


def split_results(shown: str) -> tuple[dict[str, Any], str]:
    """The object that lm-eval prints with --show_config, and its tables after it. UserError without one."""
    start = shown.find("{\n")
    if start < 0:
        raise UserError(f"lm-eval evaluated nothing, it says {shown[:200]!r}: leave --json out")
    results, end = json.JSONDecoder().raw_decode(shown, start)
    return results, shown[end:].lstrip()
