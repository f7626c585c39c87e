"""Tokens per second of trained models by decoder, over those of the first model.

    python benchmarks/generation.py english-mini-ar english-mini              # batches of 1 and 16
    python benchmarks/generation.py runs/mini-ar runs/mini-mixd --peers       # beside models of
    transformers python benchmarks/generation.py english-mini --compare 100                # do
    decoders give the same tokens?

"steps" inverts every block position by position with the KV cache, "steps below sweeps" only block
1, with sweeps in the blocks above; "auto" takes the cheaper of the two in every block.
"""

from argparse import Namespace
from functools import partial
from importlib.util import find_spec
from typing import Any

from timing import Contender, find, parser, run, show


def decoders(model: Any) -> dict[str, Any]:
    """Label -> `decoder` of `generate`; the blocks are listed from the last one down."""
    steps, sweeps = "steps", "sweeps"
    if find_spec("tarflowlm.config") is None:  # up to commit 615369d
        steps, sweeps = "sequential", "parallel"
    if model.is_exact:
        return {"steps": steps}
    above = [sweeps] * (model.num_blocks - 1)
    return {"steps": steps, "auto": "auto"} | (
        {"steps below sweeps": (*above, steps)} if above else {}
    )


def build(args: Namespace) -> dict[str, Contender]:
    """A contender for every model, decoder and batch, and the peers of the first model."""
    import torch

    from tarflowlm.generation import generate

    load = find("load_checkpoint", "runs.checkpoint")
    device, found = torch.device(args.device), {}
    models = {name: load(name, device).model for name in args.models}

    def draw(model: Any, decoder: Any, num: int, seed: int = 0) -> Any:
        length, generator = args.length or model.config.context, torch.Generator().manual_seed(seed)
        return generate(
            model, num_tokens=length, num=num, decoder=decoder, generator=generator
        ).tokens

    for batch in args.batches:
        for name, model in models.items():
            for way, decoder in decoders(model).items():
                tokens = batch * (args.length or model.config.context)
                call = partial(draw, model, decoder, batch)
                found[f"{name}, {way}, batch {batch}"] = Contender(call, tokens, {"batch": batch})
        if args.peers:
            from peers import samplers

            config = models[args.models[0]].config
            length = args.length or config.context
            for name, sample in samplers(config, device).items():
                call = partial(sample, batch, length)
                found[f"{name}, KV cache, batch {batch}"] = Contender(
                    call, batch * length, {"batch": batch}
                )
    for name, model in models.items() if args.compare else ():
        texts = {
            way: draw(model, decoder, args.compare, seed=1)
            for way, decoder in decoders(model).items()
        }
        for way, tokens in texts.items():
            differing = int((tokens != texts["steps"]).sum())
            found[f"{name}, {way}, batch {args.batches[0]}"].info["differing"] = (
                f"{differing} of {tokens.numel()}"
            )
    return found


def main() -> None:
    options = parser(__doc__, rounds=3)
    options.add_argument(
        "models", nargs="+", help="run directories or shipped models, the baseline first"
    )
    options.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="samples at once")
    options.add_argument(
        "--length", type=int, help="tokens per sample; the default is the trained context"
    )
    options.add_argument(
        "--compare", type=int, default=0, metavar="N", help="count tokens of N samples that differ"
    )
    options.add_argument(
        "--peers", action="store_true", help="beside a GPT-2 and a Llama of the first model's shape"
    )
    args = options.parse_args()
    found = run(build, args)
    rows, first = [], {}
    for name, contender in found.items():
        info, baseline = contender.info, first.setdefault(contender.info["batch"], contender)
        row = {"": name, "tokens/s": contender.rate, "over the first": contender.over(baseline)}
        row["time over the other checkout"] = contender.over_other_checkout
        rows.append(row | {"tokens that differ from steps": info.get("differing")})
    show(args, rows)


if __name__ == "__main__":
    main()
