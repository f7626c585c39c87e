"""Time contenders in turn, round after round, with a process for each checkout; ratios and tables.

A slow moment of the machine affects all contenders of a round. Numbers are medians over rounds, and
a ratio is the median of the rounds' own ratios.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

WORKER = "TARFLOWLM_BENCHMARK_WORKER"  # set in the environment of the processes that do the work


@dataclass
class Contender:
    """A call to be timed; the parent process holds its times."""

    call: Callable[[], object] | None
    units: int = 1  # tokens or elements per call
    info: dict[str, Any] = field(default_factory=dict)  # for the table
    seconds: list[float] = field(default_factory=list)
    """Seconds per call in every round; below, the seconds of the other checkout, if it has this
    contender.
    """
    against: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Units per second."""
        return self.units / statistics.median(self.seconds)

    def over(self, other: "Contender") -> float:
        """This contender's units per second over the other's."""
        return median_ratio(other.seconds, self.seconds) * self.units / other.units

    @property
    def over_other_checkout(self) -> float | None:
        """This checkout's time over the other's."""
        return median_ratio(self.seconds, self.against) if self.against else None


def median_ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """The median over rounds of times[i] / others[i]."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def parser(description: str | None, *, rounds: int = 5, calls: int = 1) -> ArgumentParser:
    """A parser with the options of all benchmarks."""
    found = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    found.add_argument(
        "--rounds", type=int, default=rounds, help="rounds, after one that does not count"
    )
    found.add_argument("--calls", type=int, default=calls, help="calls per timing")
    found.add_argument("--threads", type=int, default=1, help="CPU threads")
    found.add_argument("--device", default="cpu", help="cpu, cuda or mps")
    found.add_argument(
        "--against", type=Path, metavar="CHECKOUT", help="another checkout to time in turn"
    )
    found.add_argument("--json", action="store_true", help="print one JSON object")
    return found


def run(
    build: Callable[[Namespace], dict[str, Contender]], args: Namespace
) -> dict[str, Contender]:
    """Time the contenders of `build(args)` in turn, here and in the checkout --against."""
    if WORKER in os.environ:
        _serve(build, args)
        sys.exit()
    workers = [_Worker(Path(__file__).parents[1], args)]
    if args.against is not None:
        workers.append(_Worker(args.against, args))
    found = {name: Contender(None, **kept) for name, kept in workers[0].contenders.items()}
    for index in range(args.rounds + 1):
        print(f"round {index} of {args.rounds}", file=sys.stderr, flush=True)
        for name, contender in found.items():
            times = [worker.seconds(name) for worker in workers if name in worker.contenders]
            if index:  # the first round warms up
                contender.seconds.append(times[0])
                contender.against += times[1:]
    for worker in workers:
        worker.process.communicate()
    return found


class _Worker:
    """A process that imports tarflowlm from one checkout and times its contenders on request."""

    def __init__(self, checkout: Path, args: Namespace) -> None:
        source = checkout.resolve() / "src"
        if not (source / "tarflowlm").is_dir():
            sys.exit(f"{checkout} is no checkout of this repository: src/tarflowlm is missing")
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(args.threads))
        environment = os.environ | threads | {WORKER: "1", "PYTHONPATH": str(source)}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, *sys.argv], env=environment, **pipes)
        self.contenders: dict[str, dict[str, Any]] = self._answer()

    def seconds(self, name: str) -> float:
        print(name, file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        if not (line := self.process.stdout.readline()):
            # if it could print its error, that is above
            sys.exit(f"a process of the benchmark ended with status {self.process.wait()}")
        return json.loads(line)


def _serve(build: Callable[[Namespace], dict[str, Contender]], args: Namespace) -> None:
    """Answer the requests of `_Worker`: list the contenders, then time each that stdin names."""
    import torch

    answers, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(args.threads)
    find("keep_freed_memory", "cli.environment", "processes")()  # as commands do
    contenders = build(args)
    kept = {name: {"units": c.units, "info": c.info} for name, c in contenders.items()}
    print(json.dumps(kept), file=answers, flush=True)
    for line in sys.stdin:
        call = contenders[line.rstrip("\n")].call
        wait = torch.cuda.synchronize if args.device == "cuda" else bool
        wait()
        start = time.perf_counter()
        for _ in range(args.calls):
            call()
        wait()
        print((time.perf_counter() - start) / args.calls, file=answers, flush=True)


def find(name: str, *modules: str) -> Any:
    """The first `name` found in these modules of tarflowlm, since it may be elsewhere in another
    checkout.
    """
    for module in modules:
        try:
            return getattr(import_module(f"tarflowlm.{module}"), name)
        except (ImportError, AttributeError):
            pass
    raise ImportError(f"no {name} in {', '.join(modules)}")


def show(args: Namespace, rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table, or as one JSON object with --json. Columns without a value are
    left out.
    """
    rows = [
        {name: row.get(name) for name in dict.fromkeys(n for r in rows for n in r)} for row in rows
    ]
    if args.json:
        options = {name: str(value) for name, value in vars(args).items() if value is not None}
        print(json.dumps({"options": options, "rows": rows}))
        return

    def cell(value: Any) -> str:
        if not isinstance(value, float):
            return "" if value is None else str(value)
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"

    names = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    table = [names, *([cell(row[name]) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print(
            "  ".join(part.ljust(width) for part, width in zip(line, widths, strict=True)).rstrip()
        )
