"""Speed of a training step of presets, as a ratio to the first one.

    python benchmarks/training.py                             # the presets of the mini size
    python benchmarks/training.py mini-ar mini-mixd --against ../other-checkout
    python benchmarks/training.py mini-ar --peers --rounds 9  # beside models of transformers

Progressive presets are timed stage by stage, on random tokens. TFLOP/s count model FLOPs
(`evaluation.flops`).
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from inspect import signature
from typing import Any

from timing import Contender, find, parser, run, show


def training_step(config: Any, stage: int, device: Any, *processes: Any) -> Callable[[Any], Any]:
    """A function tokens [B, T] -> loss that takes an optimiser step of `stage` (0-based), on a new
    model.
    """
    import torch

    from tarflowlm.training import optim, parallel
    from tarflowlm.training.train import accumulate_gradients

    seeded = find("seeded", "model", "language_model")
    find("keep_freed_memory", "cli.environment", "processes")()  # as commands do
    train = find("with_precision", "training.configure", "training.optim")(config.train, device)
    with seeded(config.seed):
        model = config.model_of_stage(stage).build()
    if not processes or not processes[0].shards(train):
        model = model.to(device)
    model.train_only(stage)
    alone = parallel.ALONE
    compiled = parallel.compiles(train, alone, device)
    bound = parallel.parallelise(model, train, *processes, frozen=stage, compiled=compiled)
    # older checkouts have another name for it, and take the optimiser and the model, too
    name = "muon_precision" if hasattr(optim, "muon_precision") else "native_precision"
    native = find(name, "training.optim", "training.configure")
    precision = native(*(config.optim, model, device)[-len(signature(native).parameters) :])
    optimizers = optim.build_optimizers(config.optim, model, precision)
    generator = torch.Generator(device=device).manual_seed(0)

    def step(tokens: Any) -> Any:
        with parallel.compiling(compiled):
            loss = accumulate_gradients(model, bound, tokens, generator, train, *processes)
        trained = {name: p for name, p in model.named_parameters() if p.grad is not None}
        norms = optim.norms({name: p.grad for name, p in trained.items() if p.grad is not None})
        norm = torch.linalg.vector_norm(norms)
        optim.take_step(
            optimizers, trained, norm, lr=config.optim.lr, grad_clip=config.optim.grad_clip
        )
        return loss

    return step


def configuration(name: str, args: Namespace) -> Any:
    """The preset with a size of the vocabulary, which training takes from the tokenizer."""
    config = find("preset", "presets", "runs.presets")(name)
    size = args.vocab_size or (
        config.data.tokenizer.vocab_size if config.data.tokenizer.kind == "bpe" else 27
    )
    precision, batch_size = (
        args.precision or config.train.precision,
        args.batch_size or config.train.batch_size,
    )
    train = replace(config.train, precision=precision, batch_size=batch_size, tokens_at_once=0)
    return replace(config, model=replace(config.model, vocab_size=size), train=train)


def build(args: Namespace) -> dict[str, Contender]:
    """A contender for every stage of every preset, and the peers of the first one."""
    import torch

    from tarflowlm.evaluation.flops import training_flops

    device, found = torch.device(args.device), {}

    def random_tokens(config: Any) -> Any:
        shape = (config.train.batch_size, config.model.context)
        return torch.randint(config.model.vocab_size, shape, device=device)

    for name in args.presets:
        config = configuration(name, args)
        if args.peers:
            config = replace(config, optim=replace(config.optim, optimizer="adamw"))
        for stage in range(config.num_stages):
            tokens, step = random_tokens(config), training_step(config, stage, device)
            flops = len(tokens) * training_flops(config.model_of_stage(stage), frozen=stage)
            label = name if config.num_stages == 1 else f"{name} stage {stage + 1}"
            info = {
                "flops": flops,
                "device": torch.cuda.get_device_name() if args.device == "cuda" else "",
            }
            found[label] = Contender(partial(step, tokens), tokens.numel(), info)
    if args.peers:
        from shapes import training_steps

        config = configuration(args.presets[0], args)
        tokens = random_tokens(config)
        for label, step in training_steps(config, device).items():
            found[label] = Contender(partial(step, tokens), tokens.numel())
    return found


def main() -> None:
    options = parser(__doc__, rounds=7, calls=2)
    options.add_argument(
        "presets", nargs="*", default=["mini-ar", "mini-mixd", "mini-mix1", "mini-affine"]
    )
    options.add_argument("--precision", choices=["float32", "bfloat16"], help="of matrix products")
    options.add_argument("--vocab-size", type=int, help="the default is 27 for characters")
    options.add_argument(
        "--batch-size", type=int, help="sequences per step; the default is the preset's"
    )
    options.add_argument(
        "--peers", action="store_true", help="with AdamW, beside a GPT-2 and a Llama of this shape"
    )
    args = options.parse_args()
    found = run(build, args)  # the working processes, here and in an older checkout, end in here
    from tarflowlm.evaluation.flops import peak_flops

    first, rows = next(iter(found.values())), []
    for name, contender in found.items():
        milliseconds = 1000 * contender.units / contender.rate
        flops = contender.info.get("flops", 0) / 1e9 / milliseconds
        peak = peak_flops(contender.info.get("device", ""))
        row = {"": name, "tokens/s": contender.rate, "ms per step": milliseconds}
        row |= {"tokens/s over the first": contender.over(first), "TFLOP/s": flops or None}
        row["of the peak"] = 1e12 * flops / peak if peak and flops else None
        rows.append(row | {"time over the other checkout": contender.over_other_checkout})
    show(args, rows)


if __name__ == "__main__":
    main()
