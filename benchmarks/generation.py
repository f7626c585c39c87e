"""Tokens per second of trained models, by plain and compiled steps, as ratios to the first model.

    python benchmarks/generation.py english-mini-ar english-mini       # batches of 1 and 16
    python benchmarks/generation.py english-mini-ar --peers            # and models of transformers
    tarflowlm train mini-ar --model.layers 1 --model.trunk.width 64 --minutes 2 --out runs/assistant
    python benchmarks/generation.py english-mini-ar --peers --assistant runs/assistant
    python benchmarks/generation.py english-mini --compare 100         # do both write the same?
    python benchmarks/generation.py --count owt-ar owt-mix1 owt-mixd   # launches and bytes on a GPU

Steps are those of `tarflowlm.compiled`, or calls of PyTorch. Both draw by the same numbers, so they
should write the same tokens; --compare counts those that differ, also between a text alone and in a
batch. With --count nothing is timed: a CPU runs one call in every block by the operations of an
accelerator, at the vocabulary of OpenWebText, as if each block were the last one. With --peers the
first model, exported, is also written at batch 1 by `generate` of transformers: plainly, with
prompt look-up, and with a small model that guesses.
"""

import sys
from argparse import Namespace
from contextlib import nullcontext
from functools import partial, wraps
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from typing import Any
from unittest.mock import patch

from timing import Contender, find, parser, run, show

SETTINGS = {"": {}, ", 0.9 and top-p 0.9": {"temperature": 0.9, "top_p": 0.9}}


def build(args: Namespace) -> dict[str, Contender]:
    """A contender for every model, setting, batch and kind of step, and the peers of the first
    model.
    """
    import torch

    from tarflowlm.generation import generate

    load = find("load_checkpoint", "runs.checkpoint")
    device, found = torch.device(args.device), {}
    models = {name: load(name, device).model for name in args.models}
    compiled = compiled_steps()

    def draw(model: Any, num: int, seed: int = 0, *, plain: bool = False, **options: Any) -> Any:
        length, generator = args.length or model.config.context, torch.Generator().manual_seed(seed)
        options |= {"num": num, "decoder": args.decoder, "generator": generator}
        with patch.object(compiled, "is_due", lambda _: False) if plain else nullcontext():
            return generate(model, num_tokens=length, **options).tokens

    # another checkout has no choice
    plain = [False] if compiled is None else [False, True]
    for batch, (name, model), (setting, options), is_plain in product(
        args.batches, models.items(), SETTINGS.items(), plain
    ):
        length = args.length or model.config.context
        label = f"{name}{setting}, batch {batch}{', plain' * is_plain}"
        call = partial(draw, model, batch, plain=is_plain, **options)
        found[label] = Contender(call, batch * length, {"batch": batch})
    for batch in args.batches if args.peers else ():
        found |= peers(args, load(args.models[0], device), batch)
    for name, model in models.items() if args.compare else ():
        info = differences(partial(draw, model), args.compare, args.batches[-1])
        found[f"{name}, batch {args.batches[0]}"].info |= info
    return found


def compiled_steps() -> Any:
    """The module of compiled functions, which are ready then, or None in an older checkout."""
    try:
        compiled = import_module("tarflowlm.compiled")
    except ImportError:
        return None
    compiled.prepare()
    return compiled


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
    """How many tokens of `num` samples differ between a batch, each alone, and plain steps."""
    found = {}
    for setting, options in SETTINGS.items():
        alone = plain = total = 0
        for seed in range(num // batch):
            tokens = draw(batch, seed, **options)
            total += tokens.numel()
            plain += int((tokens != draw(batch, seed, plain=True, **options)).sum())
            # the first row of a batch has the numbers of a sample alone
            alone += int((tokens[:1] != draw(1, seed, **options)).sum())
        found[f"differ alone{setting}"] = f"{alone} of {total // batch}"
        found[f"differ from plain{setting}"] = f"{plain} of {total}"
    return found


def drawn_call(model: Any, index: int, num: int) -> Any:
    """A call that draws a position of `num` texts: of the baseline, or in a block."""
    import torch

    from tarflowlm.data.prompts import BLANK
    from tarflowlm.generation.decoder import Drawing
    from tarflowlm.generation.sampling import Gumbel

    context, is_flow = model.config.context, not model.is_exact
    choices = model.prior.block(index).coupling.choices if is_flow else model.config.vocab_size
    noise = torch.randn(num, context, model.config.latent_dim if is_flow else 0)
    gumbel = Gumbel(torch.arange(num), context, (1, choices))
    rows = Drawing(model, index, noise, gumbel, torch.full((num, context), BLANK), None)
    # as an accelerator, in half precision
    rows.cache = rows.source.allocate_cache(num, rows.values.shape[1], half=is_flow)
    rows.cache.stored.zero_()
    rows.settle(rows.values[:, : context // 2])
    return rows.step


def inverted_call(model: Any, index: int, draws: bool, num: int) -> Any:
    """A call that inverts one position of `num` texts in a block, or draws by an inversion."""
    import torch

    block, context = model.prior.block(index), model.config.context
    channels = len(block.order.channels)
    cache = block.allocate_cache(num, context, half=draws)
    block.features_of(cache, torch.zeros(num, context // 2 - 1, channels))
    weights = block.coupling.present_weights()
    h, u = torch.randn(2, num, channels)
    numbers = None
    if draws:
        numbers = torch.randn(num, channels // block.coupling.group, block.coupling.choices)
    return lambda: block.coupling.invert(u, block.features_at(cache, h), None, numbers, weights)


def calls(model: Any) -> dict[str, Any]:
    """Label -> a function from the number of texts to a call."""
    found: dict[str, Any] = {}
    for index in range(model.num_blocks):
        label = "" if model.is_exact else f"block {index + 1}, "
        if not model.is_exact:
            found[f"{label}steps"] = partial(inverted_call, model, index, False)
        if model.is_exact or model.draws_tokens(index):
            found[f"{label}draw"] = partial(drawn_call, model, index)
        else:
            found[f"{label}draw"] = partial(inverted_call, model, index, True)
    return found


def count(args: Namespace) -> list[dict[str, Any]]:
    """A row for every block and call of presets, in the middle of the context: launches; bytes,
    once for all rows and per row; and the ceiling of an H100 with 64 rows.
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
        for label, build_call in calls(model).items():
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
            row |= {"MB shared": shared / 1e6, "MB of a row": each / 1e6}
            row["tokens/s, 64 rows"] = 64 / seconds
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
        help="count tokens of N samples that differ",
    )
    options.add_argument(
        "--peers", action="store_true", help="beside a GPT-2 and a Llama of the first model's shape"
    )
    options.add_argument("--decoder", default="auto", help="steps, for the steps of a checkout")
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
