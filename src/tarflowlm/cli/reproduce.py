"""`tarflowlm reproduce NAME`: plan, train what is missing, measure, write the results."""

import sys
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from rich.console import Console

from tarflowlm.cli.arguments import ALL, ReproduceArgs
from tarflowlm.cli.signals import stop_on_signals
from tarflowlm.device import pick_device
from tarflowlm.errors import UserError
from tarflowlm.reproduce import RECIPES
from tarflowlm.reproduce.recipe import Planned, Recipe, Settings, check_texts, estimate, finish, state_of
from tarflowlm.reproduce.write import write_results
from tarflowlm.terminal.bars import Stages, stages_bar
from tarflowlm.terminal.tables import print_json, print_table
from tarflowlm.terminal.training import ProgressReporter


def run_reproduce(args: ReproduceArgs) -> None:
    recipes = list(RECIPES.values()) if args.name == ALL else [RECIPES[args.name]]
    settings = Settings(
        scale=args.scale,
        out=args.out,
        data=args.data,
        judge_data=args.judge_data,
        second_text=args.second_text,
        seeds=args.seeds,
        steps=args.steps,
        precision=args.precision,
        device=pick_device(args.device),
    )
    if args.dry_run:
        # what recipes share is trained once
        plan = {training.name: training for recipe in recipes for training in recipe.trainings(settings)}
        check_texts(settings, list(plan.values()))
        title = recipes[0].title if len(recipes) == 1 else "All recipes"
        _print_plan(args, title, estimate(settings, list(plan.values())))
        return
    # before anything that takes hours
    for recipe in recipes:
        _check(recipe, settings)
    results = [_reproduce(recipe, settings, args) for recipe in recipes]
    if args.json:
        print_json(results[0] if args.name != ALL else {"name": ALL, "recipes": results})


def _check(recipe: Recipe, settings: Settings) -> None:
    """UserError for what would stop the recipe later: a missing package, a run of another configuration."""
    plots = (("matplotlib", "plots"),) if recipe.draw is not None else ()
    for module, extra in (*plots, *recipe.needs):
        if find_spec(module) is None:
            raise UserError(f"{recipe.name} needs {module}: pip install 'tarflowlm[{extra}]'")
    plan = recipe.trainings(settings)
    check_texts(settings, plan)
    for training in plan:
        state_of(settings, training)


def _reproduce(recipe: Recipe, settings: Settings, args: ReproduceArgs) -> dict[str, Any]:
    console = Console(stderr=True)
    with ProgressReporter(console) as reporter:
        finished = finish(settings, recipe.trainings(settings), reporter, stop_on_signals)
    with stages_bar(console) as progress:
        finished = [replace(done, progress=Stages(progress)) for done in finished]
        rows = recipe.measure(settings, finished)
        written = write_results(recipe, settings, rows, finished, command=["tarflowlm", *sys.argv[1:]])
    if not args.json:
        print_table(Console(), recipe.title, [(path.suffix[1:], str(path)) for path in written])
    return {"name": recipe.name, "rows": rows, "files": [str(path) for path in written]}


def _print_plan(args: ReproduceArgs, title: str, planned: list[Planned]) -> None:
    missing = sum((p.seconds for p in planned if p.state != "finished"), start=0.0)
    if args.json:
        runs: list[dict[str, Any]] = [
            {"run": p.training.name, "state": p.state, "tokens": p.tokens, "seconds": p.seconds} for p in planned
        ]
        print_json({"name": args.name, "runs": runs, "seconds": missing})
        return
    rows = [(p.training.name, f"{p.state}: {p.tokens:,} tokens, about {_time(p.seconds)}") for p in planned]
    rows.append(("to do", f"about {_time(missing)}, and the measurements"))
    print_table(Console(), f"{title} ({args.scale}), in {args.out}", rows)


def _time(seconds: float) -> str:
    if seconds < 5400:
        return f"{seconds / 60:,.1f} minutes"
    return f"{seconds / 3600:,.1f} hours" if seconds < 72 * 3600 else f"{seconds / 86400:,.0f} days"
