"""`python -m reproduction NAME`: plan, train what is missing, measure, write the results.

`python -m reproduction quality MODEL` measures the samples of any model.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import tyro

from reproduction import quality_command
from reproduction.settings import Settings
from tarflowlm.cli.main import main, run_command
from tarflowlm.cli.options import Json
from tarflowlm.errors import UserError, check_package, unknown
from tarflowlm.options import Flag, arg

if TYPE_CHECKING:
    from reproduction.recipe import Recipe
    from reproduction.records import Records
    from reproduction.running import Planned

logger = logging.getLogger("tarflowlm")

ALL = "all"
PROGRAM = "python -m reproduction"


@dataclass(frozen=True, kw_only=True)
class Args(Settings, Json):
    """Reproduce a table or figure of the paper, or an experiment of ours; `all` runs every one."""

    name: Annotated[tyro.conf.Positional[str], arg("NAME")]
    """A table, a figure or an experiment of docs/reproduce.md, say table2; or all."""
    dry_run: Flag = False
    """Train nothing: list the trainings with a rough time for each, from a few timed steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data is not None and self.scale == "paper":
            reason = "with --scale paper, which keeps the paper's texts"
            raise UserError(f"--data {self.data} has no effect {reason}")
        if self.recipe != "muon" and self.scale == "mini":
            reason = "with --scale mini, whose presets keep their optimiser"
            raise UserError(f"--recipe {self.recipe} has no effect {reason}: leave it out")
        if self.second_text is not None and self.name not in ("table2", ALL):
            reason = f"on {self.name}: only table2 measures it"
            raise UserError(f"--second-text {self.second_text} has no effect {reason}")


def run(args: Args) -> None:
    from reproduction.recipes import RECIPES
    from reproduction.records import Records
    from reproduction.results import write_results
    from reproduction.running import estimate, finish, state_of
    from tarflowlm.cli.signals import stop_on_signals
    from tarflowlm.config import DataConfig
    from tarflowlm.data.corpus import is_prepared
    from tarflowlm.data.sources import resolve_source
    from tarflowlm.terminal.bars import Bars, print_json, print_table

    if args.name not in (*RECIPES, ALL):
        raise unknown("recipe", args.name, (*RECIPES, ALL))
    records = Records(args.out)
    recipes = list(RECIPES.values()) if args.name == ALL else [RECIPES[args.name]]
    if args.scale == "paper":
        recipes = [recipe for recipe in recipes if not recipe.mini_only]
        if not recipes:
            raise UserError(f"{args.name} with --scale paper: it has models of mini size alone")
    recipes = _with_texts(args, recipes, records)
    plans = {recipe.name: recipe.trainings(args) for recipe in recipes}
    if args.judge_data != Args.judge_data and not any(
        training.label == "judge" for found in plans.values() for training in found
    ):
        reason = f"on {args.name}, which trains no judge: leave it out"
        raise UserError(f"--judge-data {args.judge_data} has no effect {reason}")
    # recipes share trainings
    plan = list({training.name: training for p in plans.values() for training in p}.values())
    # what is on record needs no text
    sources = [t.run.data.source for t in plan if records.find(t.name, t.run) is None]
    for source in (*sources, args.second_text):
        if source is not None and not is_prepared(source):
            resolve_source(DataConfig(source=source))
    if args.dry_run:
        title = recipes[0].title if len(recipes) == 1 else "All recipes"
        _print_plan(args, title, estimate(args, plan))
        return
    # find missing packages and runs of another configuration before anything that takes hours
    _check_packages(recipes, args)
    for training in plan:
        state_of(args, training, records)
    results = []
    for recipe in recipes:
        with Bars(keep=True) as reporter:
            finished = finish(args, plans[recipe.name], reporter, stop_on_signals)
        with Bars() as bars:
            finished = [replace(done, progress=bars) for done in finished]
            rows = recipe.measure(args, finished)
            command = [*PROGRAM.split(), *sys.argv[1:]]
            written = write_results(recipe, args, rows, finished, command=command)
        if not args.json:
            print_table(recipe.title, [(path.suffix[1:], str(path)) for path in written])
        files = [str(path) for path in written]
        results.append({"name": recipe.name, "rows": rows, "files": files})
    if args.json:
        print_json(results[0] if args.name != ALL else {"name": ALL, "recipes": results})


def _with_texts(args: Args, recipes: "Sequence[Recipe]", records: "Records") -> "list[Recipe]":
    """The recipes whose texts are here now, or whose trainings are all on record.

    UserError where a single recipe was asked for and its text cannot be had.
    """
    found = []
    for recipe in recipes:
        plan = [] if recipe.obtain is None else recipe.trainings(args)
        is_on_record = all(records.find(t.name, t.run) is not None for t in plan)
        try:
            if recipe.obtain is not None and not is_on_record:
                recipe.obtain(args)
            found.append(recipe)
        except UserError as error:
            if len(recipes) == 1:
                raise
            logger.warning("%s is left out: %s", recipe.name, error)
    return found


def _check_packages(recipes: "Sequence[Recipe]", args: Args) -> None:
    """Raise UserError where a recipe needs an optional package that is missing."""
    for recipe in recipes:
        needed = {"mauve": "quality"} if recipe.name in ("table6", "patches") else {}
        if recipe.draw is not None:
            needed["matplotlib"] = "plots"
        if args.scale == "paper":
            mini = recipe.plan(replace(args, scale="mini"))
            if any(training.label == "judge" for training in mini):
                needed["transformers"] = "quality"  # there GPT-2 Large is the judge
        for module, extra in needed.items():
            check_package(module, extra, recipe.name)


def _print_plan(args: Args, title: str, planned: "Sequence[Planned]") -> None:
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


def reproduce(argv: list[str]) -> None:
    """Run a recipe, or measure the quality of samples, with these words."""
    if argv[:1] == ["quality"]:
        run_command(quality_command, argv[1:], f"{PROGRAM} quality")
        return
    try:
        run_command(sys.modules[__name__], argv, PROGRAM)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command continues from the last checkpoint") from None


if __name__ == "__main__":
    main(dispatch=reproduce)
