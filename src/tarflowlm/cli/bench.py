"""`tarflowlm bench NAME`: the benchmarks, each a module with `run` and `print_result`."""

from importlib import import_module
from typing import Any

from rich.console import Console

from tarflowlm.bench.arguments import BENCHMARKS
from tarflowlm.terminal.bars import stages_bar
from tarflowlm.terminal.tables import print_json


def run_bench(args: Any) -> None:
    """`args`: of a class in BENCHMARKS."""
    name = next(name for name, cls in BENCHMARKS.items() if type(args) is cls)
    benchmark = import_module(f"tarflowlm.bench.{name}")
    with stages_bar(Console(stderr=True), is_timing=True) as progress:
        result = benchmark.run(args, progress)
    if args.json:
        print_json(result)
    else:
        benchmark.print_result(result, Console())
