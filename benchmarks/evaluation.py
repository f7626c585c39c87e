"""Time per token of the bound that `tarflowlm eval` computes, as a ratio to the first model.

python benchmarks/evaluation.py english-mini-ar english-mini --data tales
"""

from argparse import Namespace
from functools import partial

from timing import Contender, find, parser, run, show


def build(args: Namespace) -> dict[str, Contender]:
    """A contender for every model."""
    import torch

    from tarflowlm import data
    from tarflowlm.evaluation.likelihood import evaluate

    load, found = find("load_checkpoint", "runs.checkpoint"), {}
    for name in args.models:
        checkpoint = load(name, torch.device(args.device))
        text = data.DataConfig(source=args.data)
        tokens = data.encode_text(text, checkpoint.tokenizer, "test")
        windows = data.eval_windows(tokens, checkpoint.run.model.context, args.windows)
        characters = torch.from_numpy(checkpoint.tokenizer.characters_per_token)
        call = partial(evaluate, checkpoint.model, windows, characters, samples=args.samples)
        result = call()
        info = {"bound": result.bound, "nats per token": result.nats_per_token}
        found[name] = Contender(call, windows.numel(), info)
    return found


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "models", nargs="+", help="run directories or shipped models, the baseline first"
    )
    options.add_argument(
        "--data", default="tales", help="corpus or text file; its test split is read"
    )
    options.add_argument(
        "--windows", type=int, default=32, help="evenly spaced windows of each model's context"
    )
    options.add_argument("--samples", type=int, default=1, help="posterior samples of flows")
    args = options.parse_args()
    found = run(build, args)
    first = next(iter(found.values()))
    rows = []
    for name, c in found.items():
        row = {
            "": name,
            **c.info,
            "us per token": 1e6 / c.rate,
            "time over the first": 1 / c.over(first),
        }
        rows.append(row | {"time over the other checkout": c.over_other_checkout})
    show(args, rows)


if __name__ == "__main__":
    main()
