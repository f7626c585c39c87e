"""Tokens per second of trained models by decoder, as a ratio to the first model.

    python benchmarks/generation.py english-mini-ar english-mini       # batches of 1 and 16
    python benchmarks/generation.py runs/mini-ar runs/mini-mixd --peers   # and GPT-2 beside
    python benchmarks/generation.py english-mini --compare 100         # do decoders agree?
    python benchmarks/generation.py --count owt-ar owt-mix1 owt-mixd   # launches and bytes on a GPU

"steps" inverts every block position by position with the KV cache; "auto" takes steps or sweeps in
every block, whichever is cheaper, or draws the last one. With --count nothing is timed: a CPU runs
one position of every block by the operations of an accelerator, at the vocabulary of OpenWebText,
as if each block were the last one.
"""

from argparse import Namespace
from functools import partial
from typing import Any

from timing import Contender, find, parser, run, show


def decoders(model: Any) -> dict[str, str]:
    """Label -> `decoder` of `generate`."""
    return {"steps": "steps"} if model.is_exact else {"steps": "steps", "auto": "auto"}


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


def middle(allocate: Any, context: int) -> Any:
    """A cache as on an accelerator, half full."""
    cache = allocate(context)
    cache.stored.zero_()
    cache.length = context // 2
    return cache


def baseline_position(model: Any, rows: int) -> Any:
    """A call that writes one position of `rows` texts of the baseline."""
    import torch

    from tarflowlm.flow.couplings import inverse_cdf

    cache = middle(partial(model.allocate_cache, rows), model.config.context)
    tokens = torch.zeros(rows, 1, dtype=torch.long)
    uniform = torch.rand(rows, dtype=torch.float64)

    def position() -> None:
        logits = model.place_logits(model.features_at(cache, tokens, rows), tokens, 0)
        inverse_cdf(logits, uniform)

    return position


def block_position(block: Any, context: int, draws: bool, rows: int) -> Any:
    """A call that inverts or draws one position of `rows` texts in a block."""
    import torch

    channels = len(block.order.channels)
    cache = middle(partial(block.allocate_cache, rows, half=draws), context)
    invert = block.coupling.inverter()
    h, u = torch.randn(2, rows, channels)
    uniform = torch.rand(rows, channels, dtype=torch.float64) if draws else None
    return lambda: invert(u, block.features_at(cache, h, rows), None, uniform)


def count(args: Namespace) -> list[dict[str, Any]]:
    """A row for every block and decoder of presets: launches, and bytes of a position in the middle
    of the context, once for all rows and per row; and the ceiling of an H100 with 64 rows.
    """
    from dataclasses import replace

    import torch
    from traffic import BYTES, COMPONENTS, Traffic

    from tarflowlm import flow
    from tarflowlm.model import seeded
    from tarflowlm.presets import preset

    flow.is_eager_cpu = lambda t: False  # type: ignore[assignment]
    rows = []
    for name in args.count:
        config = preset(name).model
        with seeded(0):
            model: Any = replace(config, vocab_size=COMPONENTS).build()
        positions = {}
        if model.is_exact:
            positions["steps"] = partial(baseline_position, model)
        for index in range(0 if model.is_exact else model.num_blocks):
            for way in ("steps", "draw"):
                block = model.prior.block(index)
                position = partial(block_position, block, config.context, way == "draw")
                positions[f"block {index + 1}, {way}"] = position
        for label, build_position in positions.items():
            sizes = []
            for num in (1, 2):
                position = build_position(num)
                with torch.no_grad(), Traffic() as traffic:
                    position()
                sizes.append(sum(traffic.bytes.values()))
            launches, each = sum(traffic.calls.values()), sizes[1] - sizes[0]
            shared = sizes[0] - each
            seconds = max(5e-6 * launches, (shared + 64 * each) / BYTES)
            row = {"": f"{name}, {label}", "launches": launches, "MB shared": shared / 1e6}
            rows.append(row | {"MB of a row": each / 1e6, "tokens/s, 64 rows": 64 / seconds})
    return rows


def main() -> None:
    options = parser(__doc__, rounds=3)
    options.add_argument(
        "models", nargs="*", help="run directories or shipped models, the baseline first"
    )
    options.add_argument(
        "--count", nargs="+", default=[], metavar="PRESET", help="launches and bytes instead"
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
    if args.count:
        show(args, count(args))
        return
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
