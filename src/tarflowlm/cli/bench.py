"""`tarflowlm bench NAME`: the benchmarks, each a module with `Args`, `run` and `print_result`."""

from importlib import import_module

from rich.console import Console

from tarflowlm.cli.parsing import parse
from tarflowlm.errors import UserError
from tarflowlm.terminal.bars import stages_bar
from tarflowlm.terminal.tables import print_json, print_table

BENCHMARKS = ("data", "numerics", "train", "sizes", "evaluation", "generation", "infilling")
"""Modules of `tarflowlm.bench`."""


def run_bench(argv: list[str]) -> None:
    name = argv[0] if argv else ""
    if name in ("-h", "--help"):
        modules = {name: import_module(f"tarflowlm.bench.{name}") for name in BENCHMARKS}
        rows = [(name, " ".join(module.Args.__doc__.split())) for name, module in modules.items()]
        print_table(Console(), "tarflowlm bench NAME [--help for its options]", rows)
        return
    if name not in BENCHMARKS:
        raise UserError(f"benchmark {name!r} is unknown: choose one of {', '.join(BENCHMARKS)}")
    benchmark = import_module(f"tarflowlm.bench.{name}")
    args = parse(benchmark.Args, argv[1:], f"tarflowlm bench {name}")
    with stages_bar(Console(stderr=True), is_timing=True) as progress:
        result = benchmark.run(args, progress)
    if args.json:
        print_json(result)
    else:
        benchmark.print_result(result, Console())
