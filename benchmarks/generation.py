"""Tokens per second of trained models by decoder, as a ratio to the steps of the first model.

    python benchmarks/generation.py english-mini-ar english-mini       # batches of 1 and 16
    python benchmarks/generation.py english-mini-ar --peers            # and models of transformers
    tarflowlm train mini-ar --model.layers 1 --model.trunk.width 64 --minutes 2 --out runs/assistant
    python benchmarks/generation.py english-mini-ar --peers --assistant runs/assistant
    python benchmarks/generation.py english-mini --compare 100         # do decoders agree?
    python benchmarks/generation.py --count owt-ar owt-mix1 owt-mixd   # launches and bytes on a GPU

"steps" writes one position a call of a block's Transformer. "auto" writes several where a drafter
guesses the next tokens, and takes sweeps where these cost less. Both draw by the same numbers, so
they should write the same tokens; --compare counts those that differ. With --count nothing is
timed: a CPU runs one call in every block by the operations of an accelerator, at the vocabulary of
OpenWebText, as if each block were the last one. With --peers the first model, exported, is also
written by `generate` of transformers, at batch 1: plainly, with prompt look-up, and with a small
model that guesses.
"""

import sys
from argparse import Namespace
from functools import partial, wraps
from importlib.util import find_spec
from typing import Any

from timing import Contender, find, parser, run, show

DECODERS = ("steps", "auto")
COMPARED = {"1": {}, "0.8, top-p 0.9": {"temperature": 0.8, "top_p": 0.9}}
"""Options of the texts whose tokens are compared, by temperature."""
CALLS = (1, 8)
"""Positions of a call, for --count: all but one are guessed."""


def build(args: Namespace) -> dict[str, Contender]:
    """A contender for every model, decoder and batch, and the peers of the first model."""
    import torch

    from tarflowlm.generation import generate

    load, cache = find("load_checkpoint", "runs.checkpoint"), find("KVCache", "flow.transformer")
    device, found = torch.device(args.device), {}
    models = {name: load(name, device).model for name in args.models}

    def draw(model: Any, decoder: str, num: int, seed: int = 0, **options: Any) -> Any:
        length, generator = args.length or model.config.context, torch.Generator().manual_seed(seed)
        options |= {"num": num, "decoder": decoder, "generator": generator}
        return generate(model, num_tokens=length, **options).tokens

    for batch in args.batches:
        for name, model in models.items():
            for decoder in DECODERS:
                length = args.length or model.config.context
                call = partial(draw, model, decoder, batch)
                info = {"batch": batch, "a call": length / calls_of(call, cache, "extend")}
                found[f"{name}, {decoder}, batch {batch}"] = Contender(call, batch * length, info)
        if args.peers:
            found |= peers(args, load(args.models[0], device), batch)
    for name, model in models.items() if args.compare else ():
        differing = differences(partial(draw, model), args.compare, args.batches[0])
        found[f"{name}, auto, batch {args.batches[0]}"].info |= differing
    return found


def peers(args: Namespace, lm: Any, batch: int) -> dict[str, Contender]:
    """Contenders of transformers with the shape of `lm`, or with its weights."""
    if find_spec("transformers") is None:
        print("no transformers, so no peers", file=sys.stderr)
        return {}
    from shapes import samplers, writers

    device, length, found = lm.model.device, args.length or lm.model.config.context, {}
    for name, sample in samplers(lm.model.config, device).items():
        call = partial(sample, batch, length)
        found[f"{name}, KV cache, batch {batch}"] = Contender(
            call, batch * length, {"batch": batch}
        )
    for name, (model, call) in writers(lm, args.assistant, length).items() if batch == 1 else ():
        info = {"batch": 1, "a call": length / calls_of(call, model, "forward")}
        found[f"{name}, batch 1"] = Contender(call, length, info)
    return found


def calls_of(function: Any, owner: Any, name: str) -> int:
    """How often `function` calls the method `name` of `owner`."""
    method, calls = getattr(owner, name), 0

    @wraps(method)
    def counted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return method(*args, **options)

    setattr(owner, name, counted)
    try:
        function()
    finally:
        setattr(owner, name, method)
    return calls


def differences(draw: Any, num: int, batch: int) -> dict[str, str]:
    """How many tokens of `num` samples, drawn in batches, differ between the decoders."""
    refused = find("UserError", "errors")
    found = {}
    for label, options in COMPARED.items():
        differing = total = 0
        try:
            for start in range(0, num, batch):
                size = min(batch, num - start)
                steps, auto = (draw(way, size, start + 1, **options) for way in DECODERS)
                differing += int((steps != auto).sum())
                total += steps.numel()
        except refused:
            # a model without weights of tokens has no temperature
            continue
        found[f"differ at {label}"] = f"{differing} of {total}"
    return found


def drawn_call(model: Any, index: int, count: int, num: int) -> Any:
    """A call that draws `count` positions of `num` texts: of the baseline, or in a block."""
    import torch

    from tarflowlm.data.prompts import BLANK
    from tarflowlm.generation.rows import Drawn
    from tarflowlm.generation.sampling import Gumbel

    context, is_flow = model.config.context, not model.is_exact
    choices = model.prior.block(index).coupling.choices if is_flow else model.config.vocab_size
    noise = torch.randn(num, context, model.config.latent_dim if is_flow else 0)
    gumbel = Gumbel(torch.arange(num), context, (1, choices))
    rows = Drawn(model, index, noise, gumbel, torch.full((num, context), BLANK), None)
    rows.guesser = Zeros(count - 1) if count > 1 else None
    # as an accelerator: in half precision, and without the decision of near ties
    rows.decides = False
    rows.cache = rows.source.allocate_cache(num, rows.values.shape[1], half=is_flow)
    rows.cache.stored.zero_()
    rows.settle(rows.values[:, : context // 2])
    return rows.step


class Zeros:
    """Guesses token 0: what is computed does not depend on who is right."""

    length = 1

    def __init__(self, most: int) -> None:
        self.most = most

    def guess(self, past: Any, numbers: Any) -> Any:
        return numbers.argmax(-1) * 0


def inverted_call(model: Any, index: int, draws: bool, num: int) -> Any:
    """A call that inverts one position of `num` texts in a block, or draws by an inversion."""
    import torch

    block, context = model.prior.block(index), model.config.context
    channels = len(block.order.channels)
    cache = block.allocate_cache(num, context, half=draws)
    block.features_of(cache, torch.zeros(num, context // 2 - 1, channels))
    invert = block.coupling.inverter()
    h, u = torch.randn(2, num, channels)
    numbers = None
    if draws:
        numbers = torch.randn(num, channels // block.coupling.group, block.coupling.choices)
    return lambda: invert(u, block.features_at(cache, h), None, numbers)


def calls(model: Any) -> dict[str, tuple[int, Any]]:
    """Label -> the positions of a call, and a function from the number of texts to the call."""
    found: dict[str, tuple[int, Any]] = {}
    for index in range(model.num_blocks):
        label = "" if model.is_exact else f"block {index + 1}, "
        if not model.is_exact:
            found[f"{label}steps"] = 1, partial(inverted_call, model, index, False)
        if model.is_exact or model.draws_tokens(index):
            for count in CALLS:
                call = partial(drawn_call, model, index, count)
                found[f"{label}draw, call of {count}"] = count, call
        else:
            found[f"{label}draw, call of 1"] = 1, partial(inverted_call, model, index, True)
    return found


def count(args: Namespace) -> list[dict[str, Any]]:
    """A row for every block and call of presets, in the middle of the context: launches, for each
    token if all guesses are right; bytes, once for all rows and per row; and the ceiling of an H100
    with 64 rows.
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
        with seeded(0):
            model: Any = replace(preset(name).model, vocab_size=COMPONENTS).build()
        for label, (positions, build_call) in calls(model).items():
            sizes = []
            for num in (1, 2):
                with torch.no_grad():
                    call = build_call(num)
                    with Traffic() as traffic:
                        call()
                sizes.append(sum(traffic.bytes.values()))
            launches, each = sum(traffic.calls.values()), sizes[1] - sizes[0]
            shared = sizes[0] - each
            seconds = max(5e-6 * launches, (shared + 64 * each) / BYTES)
            row = {"": f"{name}, {label}", "launches": launches}
            row |= {"launches a token": launches / positions, "MB shared": shared / 1e6}
            row |= {"MB of a row": each / 1e6, "tokens/s, 64 rows": 64 * positions / seconds}
            rows.append(row)
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
        "--compare",
        type=int,
        default=0,
        metavar="N",
        help="count tokens of N samples that differ from steps",
    )
    options.add_argument(
        "--peers", action="store_true", help="beside a GPT-2 and a Llama of the first model's shape"
    )
    options.add_argument("--assistant", help="a run that guesses for the first model, exported")
    args = options.parse_args()
    if args.count:
        show(args, count(args))
        return
    found = run(build, args)
    rows, first = [], {}
    for name, contender in found.items():
        info, baseline = contender.info, first.setdefault(contender.info["batch"], contender)
        row = {"": name, "tokens/s": contender.rate, "tokens a call": info.get("a call")}
        row["over the first"] = contender.over(baseline)
        row["time over the other checkout"] = contender.over_other_checkout
        row |= {name: value for name, value in info.items() if name.startswith("differ")}
        rows.append(row)
    show(args, rows)


if __name__ == "__main__":
    main()
