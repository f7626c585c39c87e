"""Did a change of the code change its numbers? Two checkouts of this repository do the same work,
to the bit.

    python examples/same_numbers.py OLD_CHECKOUT NEW_CHECKOUT [--quick] [--tolerance 1e-5] [--keep
    DIR]

Both train every family of presets at a tiny size on the same small text, and use what they trained:
`eval`, `sample`, `edit`, the bound and its gradients. NEW uses what OLD trained, too: inference is
compared on equal weights even where training differs. Modules and fields may have moved between the
two: only the command line, public names of `import tarflowlm` and files of run directories are
relied on. On the CPU, in one thread, some minutes (--quick: one or two). Exit status: 0 if
everything is the same (with --tolerance, up to that relative difference of numbers), 1 otherwise.
"""

import argparse
import contextlib
import io
import json
import os
import random
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

JOINT = ("mini-ar", "mini-affine", "mini-mix1")
PROGRESSIVE = ("mini-mixd", "mini-mixd-p2", "mini-mixd-p4", "quickstart")
QUICK = ("mini-ar", "mini-mix1", "mini-mixd", "quickstart")
SHIPPED, BASELINES = ("english-mini", "english-mini-ar"), ("mini-ar", "english-mini-ar")
ONE_BLOCK, CUT_FROM = "one block", "mini-mixd"
SIZES = (
    "--model.trunk.width 32 --model.trunk.num-heads 2 --model.context 64 --train.batch-size 4 --train.log-every 1 "
    "--train.evaluate-every 3 --train.evaluate-windows 8 --train.test-windows 16 --steps 12 --train.stage-steps"
)
DEFAULT, HELD, ADAMW = "as the preset says", "options held equal", "--optim.optimizer adamw"
HELD_OPTIONS = {"--optim.muon-precision": "bfloat16", "--optim.muon-qkv": "together"}
"""For a checkout that has these options: their values are those of a checkout without them."""
WAYS = {
    DEFAULT: "",  # its models are used for everything else
    HELD: "",
    "AdamW": ADAMW,
    "AdamW, bfloat16": f"{ADAMW} --train.precision bfloat16 --train.accumulate 2 --train.checkpoint-activations",
}
# _ stands for a space; the decoder `auto` is left out, because that of commit 615369d reads the
# clock
SAMPLES = (
    "--passes --states --length 32 --decoder sequential",
    "--passes --states --length 32 --decoder parallel",
    "--length 32 --decoder sequential --temperature 0.8 --top-k 5",
    "--length 32 --decoder parallel --temperature 0.8 --top-k 5",
    "--length 32 --decoder sequential --top-p 0.9",
    "--length 32 --decoder sequential --prompt the_people_",
    "--passes --states --decoder parallel --particles 4 --template the_????_of_the_????_in --blank ?",
)
EDITS = (
    "--strength 0.5 --num 2",
    "--decoder parallel --strength 0.5 --level 1",
    "--toward the_water_to_his_people",
    "--replace _of _to",
)
WORDS = """the the the the the of of of of to to to to his his his and in a is that it was for on are as with they
 at be this from have or by one had not but what all were when we there can an your which their if do will people"""

Results = dict[tuple[str, str], Any]
"""By item and model. A value {"tensors": PATH} stands for the tensors of a file."""
Job = tuple[str, str, list[str]]
"""Item, model and command line; `python MODEL FILE` asks the public Python names."""


def uses(label: str, target: str, text: Path, folder: Path) -> Iterator[Job]:
    """All uses of a trained model."""
    model = ("--model", target) if target in SHIPPED else (target,)
    evaluate = ["eval", *model, "--data", str(text), "--windows", "8", "--samples", "4"]
    yield "eval", label, evaluate if label in BASELINES else [*evaluate, "--latents"]
    if label in (*BASELINES, ONE_BLOCK):
        yield "eval --stride", label, [*evaluate, "--stride", "16"]
    commands = [("sample", "--num 2", options) for options in SAMPLES]
    if label in BASELINES:  # they have no passes
        commands = [
            (*command, options.replace("--passes --states ", "")) for *command, options in commands
        ]
    if label not in BASELINES:
        commands += [("edit", "--text the_water_of_the_people", options) for options in EDITS]
    for command, always, options in commands:
        if label == "mini-affine" and "--top" in options:
            continue  # an affine block 1 has no probabilities of tokens
        words = [word.replace("_", " ") for word in f"--seed 1 {always} {options}".split()]
        yield f"{command} {options}", label, [command, *model, *words]
    yield "Python", label, ["python", target, str(folder / f"{label}.safetensors")]


def work(folder: Path) -> None:
    """The jobs of a folder one after another, in a process of their own that imports one
    checkout.
    """
    jobs, results = json.loads((folder / "jobs.json").read_text(encoding="utf-8")), []
    for index, (item, label, argv) in enumerate(jobs):
        if not index or label != jobs[index - 1][1]:
            print(f"  {index + 1:3} of {len(jobs)}: {label}", file=sys.stderr, flush=True)
        try:
            values = measured(*argv[1:]) if argv[0] == "python" else {item: output_of(argv)}
        except Exception as error:
            values = {item: {"failed": f"{type(error).__name__}: {error}"}}
        results += [(part, label, value) for part, value in values.items()]
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")


def output_of(argv: list[str]) -> Any:
    """The JSON of `python -m tarflowlm ARGV`, in this process: others would mostly import
    PyTorch.
    """
    out, said, status = io.StringIO(), io.StringIO(), None
    sys.argv = ["tarflowlm", *argv, "--device", "cpu", "--json"]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
        try:
            runpy.run_module("tarflowlm", run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            status = stop.code
    if status:
        raise RuntimeError(said.getvalue().strip().rpartition("\n")[2])
    return json.loads(out.getvalue().strip().rpartition("\n")[2])


def measured(target: str, file: str) -> dict[str, Any]:
    """Results of the public names for a model, by item; gradients go to a file."""
    import torch

    import tarflowlm

    model, tokenizer = tarflowlm.load(target)
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(model.config.vocab_size, (4, model.config.context), generator=draw)
    bound = tarflowlm.importance_weighted_bound(model, tokens, samples=2, generator=draw)
    bound.mean().backward()
    save_file(
        {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}, file
    )
    found = {"importance_weighted_bound": bound.tolist(), "its gradients": {"tensors": file}}
    characters = torch.from_numpy(tokenizer.characters_per_token)
    found["evaluate"] = tarflowlm.evaluate(model, tokens, characters, samples=2).to_json()
    if isinstance(model, tarflowlm.TarFlowLM):
        terms = tarflowlm.elbo(model, tokens, generator=draw)
        for part in ("nelbo", "reconstruction", "log_q", "base"):
            found[f"elbo, {part}"] = getattr(terms, part).tolist()
        found["elbo, log_dets"] = [log_det.tolist() for log_det in terms.log_dets]
    return {f"Python: {item}": value for item, value in found.items()}


class Checkout:
    """One of the two, with a folder for what it writes."""

    def __init__(self, name: str, path: Path, root: Path) -> None:
        self.name, self.text, self.folder = name, root / "text.txt", root / name
        source = path.resolve() / "src"
        if not (source / "tarflowlm").is_dir():
            sys.exit(f"{path} is no checkout of this repository: src/tarflowlm is missing")
        self.folder.mkdir()
        own = {"PYTHONPATH": str(source), "TARFLOWLM_CACHE": str(self.folder / "cache")}
        self.environment = (
            os.environ | own | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        )

    def run(self, what: str, jobs: list[Job]) -> Results:
        print(f"{self.name} {what}: {len(jobs)} commands", file=sys.stderr, flush=True)
        (self.folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
        subprocess.run(
            [sys.executable, __file__, "--work", str(self.folder)], env=self.environment, check=True
        )
        found = json.loads((self.folder / "results.json").read_text(encoding="utf-8"))
        return {(item, label): value for item, label, value in found}

    def train(self, presets: tuple[str, ...], ways: tuple[str, ...]) -> dict[str, Results]:
        """Every preset in every way, into folder/WAY/PRESET; the results of every way."""
        asked = [sys.executable, "-m", "tarflowlm", "train", "mini-ar", "--help"]
        known = subprocess.run(
            asked, env=self.environment, check=True, capture_output=True, text=True
        ).stdout
        held = " ".join(
            f"{option} {value}" for option, value in HELD_OPTIONS.items() if option in known
        )
        jobs: list[Job] = []
        for way, preset in ((way, preset) for way in ways for preset in presets):
            options = f"{SIZES} {'12' if preset in JOINT else '5 4 3'} {held if way == HELD else WAYS[way]}".split()
            options += ["--data.tokenizer.vocab-size", "96"] if preset == "quickstart" else []
            where = ("--data", str(self.text), "--out", str(self.folder / way / preset))
            jobs.append((way, preset, ["train", preset, *where, *options]))
        found: dict[str, Results] = {way: {} for way in ways}
        for (way, preset), summary in self.run("trains", jobs).items():
            directory = self.folder / way / preset
            found[way]["summary", preset] = summary
            if "failed" not in summary:
                lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
                found[way]["metrics.jsonl", preset] = [json.loads(line) for line in lines]
                found[way]["weights", preset] = {"tensors": str(directory / "model.safetensors")}
        return found

    def use(self, trained: "Checkout", labels: list[str]) -> Results:
        """Results of the models of `trained`, and of the shipped ones, in this checkout."""
        folder = self.folder / f"gradients of {trained.name}"
        folder.mkdir()
        targets = {
            label: label if label in SHIPPED else str(trained.folder / DEFAULT / label)
            for label in labels
        }
        jobs = [
            job
            for label, target in targets.items()
            for job in uses(label, target, self.text, folder)
        ]
        return self.run(f"uses what {trained.name} trained", jobs)


def cut(directory: Path, out: Path) -> None:
    """A run directory with block 1 alone, as a progressive run has it in its first stage."""
    weights = directory / "model.safetensors"
    if not weights.exists():
        return  # training failed, and so will what this is for
    out.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (out / name).write_bytes((directory / name).read_bytes())
    with safe_open(weights, framework="np") as file:
        info = {
            key: value
            for key, value in file.metadata().items()
            if key not in ("manifest", "sha256")
        }
    above = tuple(f"prior.blocks.{index}." for index in range(1, int(info["blocks"])))
    kept = {
        name: tensor for name, tensor in load_file(weights).items() if not name.startswith(above)
    }
    save_file(kept, out / "model.safetensors", metadata=info | {"blocks": "1"})


def leaves(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Tensors, numbers, texts and plain lists of a result with their places, without times and
    names of decoders.
    """
    if isinstance(value, dict) and "tensors" in value:
        yield from load_file(value["tensors"]).items()
    elif isinstance(value, dict):
        for key, part in value.items():
            if "second" not in key and key not in ("minutes", "decoders"):
                yield from leaves(part, f"{where}.{key}".lstrip("."))
    elif isinstance(value, list) and any(isinstance(part, (dict, list)) for part in value):
        for index, part in enumerate(value):
            yield from leaves(part, f"{where}[{index}]")
    else:
        yield where, value


def difference(old: Any, new: Any, tolerance: float) -> str:
    """The difference between two results in words; empty if they are the same. Fields of `new`
    alone do not count.

    For numbers it is the largest one, relative to the larger number, or to the largest one of a
    list or a tensor.
    """
    for name, result in (("OLD", old), ("NEW", new)):
        if result is None or (isinstance(result, dict) and "failed" in result):
            return f"{name} fails: {result['failed'] if result else 'see the items above'}"
    right, numbers, others = dict(leaves(new)), [], []
    for where, value in leaves(old):
        a, b = np.asarray(value), np.asarray(right.get(where, "missing"))
        if (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()):
            continue
        if a.dtype.kind in "if" and b.dtype.kind in "if" and a.shape == b.shape:
            a, b = a.astype(float), b.astype(float)
            absolute, scale = np.abs(a - b).max(), max(np.abs(a).max(), np.abs(b).max()) or 1.0
            relative = np.nan_to_num(absolute / scale, nan=np.inf)
            if relative <= tolerance:
                continue
            numbers.append(
                (relative, f"{relative:.1e} (absolute {absolute:.1e}) {where and 'at '}{where}")
            )
        elif where not in right or value != right[where]:
            others.append(where)
    largest = [max(numbers)[1]] if numbers else []
    if numbers and isinstance(old, list) and max(numbers) != numbers[0]:
        largest.append(f"first {numbers[0][1]}")
    return ", ".join(
        largest + ([f"{len(others)} texts or fields, as {min(others)}"] if others else [])
    )


def compare(title: str, old: Results, new: Results, tolerance: float) -> set[str]:
    """Print a line for every item, and one for every model in which it differs; returns these
    models.
    """
    print(f"\n{title}")
    differing: set[str] = set()
    for item in dict.fromkeys(item for item, _ in old):
        olds = {label: value for (other, label), value in old.items() if other == item}
        news = {
            label: new.get((item, label), new.get((item.split(":")[0], label))) for label in olds
        }
        found = {label: difference(olds[label], news[label], tolerance) for label in olds}
        if same := [label for label in found if not found[label]]:
            print(f"  same     {item[:60]:<60}  {', '.join(same)}")
        for label in (label for label in found if found[label]):
            print(f"  differs  {item[:60]:<60}  {label}: {found[label]}")
        differing |= found.keys() - same
    return differing


def same_numbers(old: Checkout, new: Checkout, *, quick: bool, tolerance: float) -> bool:
    """Train and use with both and print what differs; whether nothing does."""
    old.text.write_text(
        " ".join(random.Random(0).choices(WORDS.split(), k=70_000)), encoding="utf-8"
    )
    presets, ways = (QUICK, (*WAYS,)[:3]) if quick else (JOINT + PROGRESSIVE, (*WAYS,))
    trained = [checkout.train(presets, ways) for checkout in (old, new)]
    for checkout in (old, new):
        cut(checkout.folder / DEFAULT / CUT_FROM, checkout.folder / DEFAULT / ONE_BLOCK)
    models, shipped = [*presets, ONE_BLOCK], SHIPPED[:1] if quick else SHIPPED
    used, crossed = (checkout.use(old, [*models, *shipped]) for checkout in (old, new))
    own = new.use(new, models)
    differing = [
        compare(f"training, {way}", trained[0][way], trained[1][way], tolerance) for way in ways
    ]
    apart = differing[0] | ({ONE_BLOCK} if CUT_FROM in differing[0] else set())
    differing.append(compare("models that OLD trained, and shipped ones", used, crossed, tolerance))
    equal = {key: value for key, value in used.items() if key in own and key[1] not in apart}
    failed: Results = {
        key: {} for key, value in own.items() if "failed" in value
    }  # whatever the weights
    differing.append(
        compare(
            "models that each has trained, where they are the same", equal | failed, own, tolerance
        )
    )
    return not any(differing)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, metavar="OLD_CHECKOUT")
    parser.add_argument("new", type=Path, metavar="NEW_CHECKOUT")
    parser.add_argument(
        "--quick", action="store_true", help="fewer presets, ways to train and shipped models"
    )
    parser.add_argument(
        "--tolerance", type=float, default=0.0, help="largest relative difference of equal numbers"
    )
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="new directory for all that is written"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = (args.keep or Path(temporary) / "runs").resolve()
        root.mkdir(parents=True)
        checkouts = (Checkout("OLD", args.old, root), Checkout("NEW", args.new, root))
        same = same_numbers(*checkouts, quick=args.quick, tolerance=args.tolerance)
    print("\nthe same" if same else "\nnot the same")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    work(Path(sys.argv[2])) if sys.argv[1:2] == ["--work"] else main()
