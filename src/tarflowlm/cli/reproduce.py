"""`tarflowlm reproduce NAME`: plan, train what is missing, measure, write the results."""

import sys
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import tyro

from tarflowlm.cli.options import Count, Device, Flag, PrintJson, arg, check
from tarflowlm.config import RECIPE_NAMES, Precision, Scale
from tarflowlm.errors import UserError, unknown

ALL = "all"
NAMES = (*RECIPE_NAMES, ALL)


@dataclass(frozen=True)
class Args:
    """Reproduce a table or figure of the paper, or an experiment of ours; `all` runs every one of
    them.
    """

    name: Annotated[tyro.conf.Positional[str], arg("NAME", f"One of {', '.join(NAMES)}.")]
    scale: Scale = (
        "mini"  # mini runs on a CPU; paper is the published size, on TEXT8 and OpenWebText.
    )
    out: Annotated[Path, arg("PATH")] = Path("reproduced")
    """Directory of runs and results. Recipes share the runs in it, and finished work is not
    repeated.
    """
    data: Annotated[str | None, arg("SOURCE")] = None
    """Text for mini scale: corpus name or file; the default is the built-in corpus."""
    judge_data: Annotated[str, arg("SOURCE")] = "english"
    """Text on which the judge of samples is trained at mini scale; it should differ from --data."""
    second_text: Annotated[str | None, arg("SOURCE")] = (
        None  # table2: also measure the likelihood of this text.
    )
    seeds: int = 1
    """Train each model this many times, with seeds 0, 1, ...; where differences are small, at least
    twice.
    """
    steps: Count = (
        None  # Optimiser steps of every training in place of the recipe's, for a quick look.
    )
    precision: Annotated[Precision | None, arg()] = None
    """Precision of matrix products in training; densities are in float32 either way. bfloat16 is
    faster on some CPUs.
    """
    # Train nothing: list the trainings with a rough time for each, from a few timed steps.
    dry_run: Flag = False
    device: Device = "auto"
    json: PrintJson = False

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise unknown("recipe", self.name, NAMES)
        check(self, ("seeds",))
        if self.data is not None and self.scale == "paper":
            raise UserError(
                f"--data {self.data} has no effect with --scale paper, which keeps the paper's texts"
            )
        if self.second_text is not None and self.name not in ("table2", ALL):
            raise UserError(
                f"--second-text {self.second_text} has no effect on {self.name}: only table2 measures it"
            )


def run(args: Args) -> None:
    from tarflowlm.cli.main import stop_on_signals
    from tarflowlm.data import check_source
    from tarflowlm.device import pick_device
    from tarflowlm.reproduce import RECIPES
    from tarflowlm.reproduce.recipe import Settings, estimate, finish, state_of
    from tarflowlm.reproduce.tables import write_results
    from tarflowlm.terminal.bars import Bars, ProgressReporter, print_json, print_table

    recipes = list(RECIPES.values()) if args.name == ALL else [RECIPES[args.name]]
    given = {f.name: getattr(args, f.name) for f in fields(Settings)}
    settings = Settings(**given | {"device": pick_device(args.device)})
    plans = {recipe.name: recipe.trainings(settings) for recipe in recipes}
    # recipes share trainings
    plan = list(
        {training.name: training for trainings in plans.values() for training in trainings}.values()
    )
    for source in (*(training.run.data.source for training in plan), settings.second_text):
        if source is not None:
            check_source(source)
    if args.dry_run:
        title = recipes[0].title if len(recipes) == 1 else "All recipes"
        _print_plan(args, title, estimate(settings, plan))
        return
    # before anything that takes hours: missing packages, runs of another configuration
    for recipe in recipes:
        for module, extra in (
            *recipe.needs,
            *([("matplotlib", "plots")] if recipe.draw is not None else []),
        ):
            if find_spec(module) is None:
                raise UserError(f"{recipe.name} needs {module}: pip install 'tarflowlm[{extra}]'")
    for training in plan:
        state_of(settings, training)
    results = []
    for recipe in recipes:
        with (reporter := ProgressReporter()):
            finished = finish(settings, plans[recipe.name], reporter, stop_on_signals)
        with Bars() as bars:
            finished = [replace(done, progress=bars) for done in finished]
            rows = recipe.measure(settings, finished)
            written = write_results(
                recipe, settings, rows, finished, command=["tarflowlm", *sys.argv[1:]]
            )
        if not args.json:
            print_table(recipe.title, [(path.suffix[1:], str(path)) for path in written])
        results.append(
            {"name": recipe.name, "rows": rows, "files": [str(path) for path in written]}
        )
    if args.json:
        print_json(results[0] if args.name != ALL else {"name": ALL, "recipes": results})


def _print_plan(args: Args, title: str, planned: list[Any]) -> None:
    from tarflowlm.terminal.bars import print_result

    missing = sum((p.seconds for p in planned if p.state != "finished"), start=0.0)
    runs = [
        {"run": p.training.name, "state": p.state, "tokens": p.tokens, "seconds": p.seconds}
        for p in planned
    ]
    rows = [
        (p.training.name, f"{p.state}: {p.tokens:,} tokens, about {_time(p.seconds)}")
        for p in planned
    ]
    rows.append(("to do", f"about {_time(missing)}, and the measurements"))
    found = {"name": args.name, "runs": runs, "seconds": missing}
    print_result(args.json, found, f"{title} ({args.scale}), in {args.out}", rows)


def _time(seconds: float) -> str:
    if seconds < 5400:
        return f"{seconds / 60:,.1f} minutes"
    return f"{seconds / 3600:,.1f} hours" if seconds < 72 * 3600 else f"{seconds / 86400:,.0f} days"
