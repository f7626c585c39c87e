"""Check whether a change of the code changed its numbers: two checkouts do the same work.

    python examples/same_numbers.py OLD NEW [--quick] [--tolerance 1e-5]

Each trains presets at a tiny size on one small text, and runs `eval`, `score`, `sample` and `edit`
on the trained and the shipped models. It uses only the command line, its JSON and metrics.jsonl, so
everything else may have moved. It takes some minutes on the CPU in one thread (--quick: one).
Exit status: 0 if all texts are equal, and all numbers are up to the relative --tolerance.
"""

import argparse
import contextlib
import io
import json
import math
import os
import random
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SIZES = """--model.trunk.width 32 --model.trunk.num-heads 2 --model.context 64 --train.batch-size 4
    --train.log-every 1 --train.evaluate-every 3 --train.evaluate-windows 8
    --train.test-windows 16 --train.keep last --steps 12"""
PRESETS = {
    "mini-mixd": "",
    "mini-mix1": "",
    "quickstart": "--data.tokenizer.vocab-size 280",
    "mini-ar": "--train.precision bfloat16",
    "mini-affine": "--optim.optimizer adamw",
    "mini-mixd-p2": "--optim.optimizer adamw",
    "mini-passes": "",
}
SHIPPED = (
    "english-mini",
    "english-mini-ar",
    "english-passes",
    "english-small",
    "stories",
    "stories-ar",
)
USES = (
    "eval --windows 4 --samples 3",
    "score --text the_people_of_his_waters_and",
    "sample --passes --length 32 --decoder steps",
    "sample --length 48 --decoder sweeps",
    "sample --length 32 --temperature 0.8 --prompt the_people_",
    "sample --length 32 --top-p 0.8 --decoder steps",
    "sample --length 32 --particles 4 --template the_????_of_the_????_in --blank ?",
    "edit --text the_water_of_the_people --strength 0.5 --num 2",
    "edit --text the_water_of_the_people --strength 0.5 --level 1",
    "edit --text the_water_of_the_people --rewrite of --num 2",
    "edit --text the_water_of_the_people --replace of to",
)  # _ stands for a space
WORDS = """the the the the of of to to his and in a is that it was for on are as with they at be
    this from have or by one had not but what all were when we there can an your which their
    people"""
UNEQUAL = ("minutes", "out", "model", "decoders", "data_share", "mfu", "advice")
"""Fields that differ between any two runs, such as times, and wording."""


def jobs(folder: Path, presets: list[str], shipped: list[str]) -> Iterator[tuple[str, list[str]]]:
    """The name and the words of every command."""
    text = str(folder.parent / "text.txt")
    for preset in presets:
        options = f"{SIZES} {PRESETS[preset]}".split()
        where = ["--data", text, "--out", str(folder / preset)]
        yield f"train {preset}", ["train", preset, *where, *options]
    for model in (*presets, *shipped):
        target = model if model in shipped else str(folder / model)
        for use in USES:
            of_latents = use.startswith("edit") or "--passes" in use or "sweeps" in use
            if of_latents and model.endswith("-ar"):
                continue  # the baseline has none
            if "0.8" in use and model in ("mini-mix1", "mini-affine"):
                continue  # only Mix-d has probabilities of tokens
            command, *words = [word.replace("_", " ") for word in use.split()]
            argv = [command, target, *words, "--seed", "1"]
            yield f"{model} {use}", [*argv, "--data", text] if command == "eval" else argv


def work(folder: Path, presets: list[str], shipped: list[str]) -> None:
    """Do everything with the checkout on the path; results.json is name -> result."""
    folder.mkdir()
    results: dict[str, Any] = {}
    for name, argv in jobs(folder, presets, shipped):
        print(f"{folder.name}: {name}", file=sys.stderr, flush=True)
        try:
            said = said_by([*argv, "--device", "cpu", "--json"])
            results[name] = json.loads(said.strip().rpartition("\n")[2])
            if argv[0] == "train":
                lines = (folder / argv[1] / "metrics.jsonl").read_text(encoding="utf-8")
                results[f"{name}, metrics"] = [json.loads(line) for line in lines.splitlines()]
        except Exception as error:
            results[name] = f"failed: {type(error).__name__}: {error}"
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")


def said_by(argv: list[str]) -> str:
    """The output of `python -m tarflowlm ARGV`, in this process, which has loaded PyTorch."""
    sys.argv = ["tarflowlm", *argv]
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            runpy.run_module("tarflowlm", run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            if stop.code:
                raise RuntimeError(errors.getvalue().strip().rpartition("\n")[2]) from None
    return out.getvalue()


def differences(old: Any, new: Any, tolerance: float, where: str = "") -> Iterator[str]:
    """The places where two results differ, except for times and fields that only one has."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old:
            if key in new and "second" not in key and key not in UNEQUAL:
                yield from differences(old[key], new[key], tolerance, f"{where}.{key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from differences(one, other, tolerance, f"{where}[{index}]")
    elif isinstance(old, float) and isinstance(new, float):
        if not math.isclose(old, new, rel_tol=tolerance, abs_tol=tolerance):
            yield f"{where} {old} {new}"
    elif old != new or str(old).startswith("failed"):
        yield f"{where} {old!r:.200} {new!r:.200}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkouts", type=Path, nargs=2, metavar="CHECKOUT", help="OLD, then NEW")
    parser.add_argument("--quick", action="store_true", help="three presets, one shipped model")
    parser.add_argument("--tolerance", type=float, default=1e-12, help="relative difference")
    args = parser.parse_args()
    presets, shipped = (list(PRESETS)[:3], SHIPPED[:1]) if args.quick else (list(PRESETS), SHIPPED)
    results = []
    with tempfile.TemporaryDirectory() as root:
        words = random.Random(0).choices(WORDS.split(), k=70_000)
        Path(root, "text.txt").write_text(" ".join(words), encoding="utf-8")
        for name, checkout in zip(("OLD", "NEW"), args.checkouts, strict=True):
            folder = Path(root, name)
            own = {"PYTHONPATH": str(checkout.resolve() / "src"), "OMP_NUM_THREADS": "1"}
            argv = [sys.executable, __file__, "--work", str(folder), json.dumps([presets, shipped])]
            subprocess.run(argv, env=os.environ | own, check=True, cwd=root)
            results.append(json.loads((folder / "results.json").read_text(encoding="utf-8")))
    differing = 0
    for name, old in results[0].items():
        found = list(differences(old, results[1].get(name), args.tolerance))
        differing += bool(found)
        print(f"{'DIFFERS' if found else 'same   '}  {name}", *found[:3], sep="\n         ")
    print(f"{len(results[0]) - differing} of {len(results[0])} are the same")
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(Path(sys.argv[2]), *json.loads(sys.argv[3]))
    else:
        main()
