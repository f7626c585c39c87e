"""BLiMP (Warstadt et al. 2020): how often a model gives the better sentence more probability.

    git clone https://github.com/alexwarstadt/blimp                        # 67 x 1,000 pairs
    python benchmarks/blimp.py blimp/data stories-ar stories         # two hours
    python benchmarks/blimp.py blimp/data stories --samples 1        # 15 minutes
    python benchmarks/blimp.py blimp/data stories-ar --pairs 10      # of each paradigm

A baseline has one value, which is exact. A flow has several: the exact one of block 1 as
`tarflowlm export --causal-lm` writes it (if the model can be exported, and transformers is there),
and its bound with each of the numbers of `--samples`; all sentences get the same noise. Equal
values count as wrong. "flips" are pairs on which a bound decides otherwise than the exact value.
`--peers FOLDER` adds the GPT-2 and the masked flow of peers.py, in the shape of the first model.

The same by lm-eval's own tasks, from a local copy; it puts a space before each sentence, and counts
equal values as right:

    python benchmarks/blimp.py blimp/data --tasks runs/blimp
    lm-eval --model hf --tasks local_blimp --include_path runs/blimp ...   # docs/harness.md
"""

import argparse
import csv
import json
import lzma
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import shapes  # beside this file
import torch
from torch import Tensor

from tarflowlm.errors import UserError
from tarflowlm.objective import importance_weighted
from tarflowlm.pretrained import Pretrained, load

Score = Callable[[Sequence[str]], list[float]]
"""log p of each of some texts, or a bound on it, in nats."""
ROWS = 64  # texts at once, of one length
ORDERS = 4  # of the tokens, in the bound of the masked flow


class Pair(NamedTuple):
    paradigm: str
    field: str
    good: str
    bad: str


def read_pairs(place: Path, most: int | None) -> list[Pair]:
    """The first pairs of each paradigm, of a folder of .jsonl, or of a table .tsv or .tsv.xz."""
    if place.is_dir():
        files = sorted(place.glob("*.jsonl"))
        lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
        rows = [json.loads(line) for line in lines if line.strip()]
    else:
        opened = lzma.open if place.suffix == ".xz" else open
        with opened(place, "rt", encoding="utf-8", newline="") as text:
            rows = list(csv.DictReader(text, delimiter="\t", quoting=csv.QUOTE_NONE))
    found: dict[str, list[Pair]] = {}
    for row in rows:
        field = row["field"].replace("/", "_")  # syntax_semantics has two spellings
        pair = Pair(row["UID"], field, row["sentence_good"], row["sentence_bad"])
        found.setdefault(pair.paradigm, []).append(pair)
    if not found:
        raise SystemExit(f"{place} holds no pairs: give the folder `data` of BLiMP")
    return [pair for pairs in found.values() for pair in pairs[:most]]


def scores_of(lm: Pretrained, samples: Sequence[int]) -> dict[str, Score]:
    """The ways to score with a model, the exact one first."""
    if lm.model.is_exact:
        return {"exact": bound(lm, 1)}
    found: dict[str, Score] = {}
    if find_spec("transformers") is not None:
        try:
            found["exact, block 1"] = exported(lm)
        except UserError as error:
            print(f"no exact value: {error}")
    return found | {f"bound of {n}": bound(lm, n) for n in samples}


def bound(lm: Pretrained, samples: int) -> Score:
    """A bound on log p by that many posterior samples, with the same noise for all texts.

    Of a baseline it is the exact value.
    """
    model = lm.model
    window = torch.zeros(1, model.config.context, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    noise = [model.draw_noise(window, generator) for _ in range(samples)]

    def nats(rows: Tensor) -> Tensor:
        given = [eps[:, : rows.shape[1]].expand(len(rows), -1, -1) for eps in noise]
        log_w = torch.stack([-model.bound(rows, eps) for eps in given])
        return importance_weighted(log_w)[:, None]

    return by_length(lm, nats)


def exported(lm: Pretrained) -> Score:
    """Exact log p of block 1, as transformers computes it of the exported model."""
    model = shapes.exported(lm)

    def nats(rows: Tensor) -> Tensor:
        before = torch.full((len(rows), 1), model.config.bos_token_id)
        logits = model(torch.cat((before, rows[:, :-1]), 1)).logits
        return -logits.log_softmax(-1).gather(-1, rows[..., None])[..., 0]

    return by_length(lm, nats)


def by_length(lm: Pretrained, nats: Callable[[Tensor], Tensor]) -> Score:
    """Scores by the `nats` of texts of one length, [B, T] -> [B, T], or [B, 1] of whole texts."""

    @torch.no_grad()
    def score(texts: Sequence[str]) -> list[float]:
        found = [0.0] * len(texts)
        tokens = lm.encode(texts)
        order = sorted(range(len(texts)), key=lambda at: len(tokens[at]))
        torch.manual_seed(0)  # of the masked flow
        while order:
            length = len(tokens[order[0]])
            same = [at for at in order[:ROWS] if len(tokens[at]) == length]
            order = order[len(same) :]
            rows = torch.stack([tokens[at] for at in same])
            for at, value in zip(same, nats(rows).double().sum(1).tolist(), strict=True):
                found[at] = -value
        return found

    return score


def scores_of_peers(folder: Path, lm: Pretrained) -> dict[str, dict[str, Score]]:
    """The ways to score with the peers in `folder`, which have the tokens of the baseline `lm`."""
    from peers import Masked, load_peers  # beside this file

    found = {}
    for name, peer in load_peers(folder, lm.config).items():
        if isinstance(peer, Masked):
            bound = by_length(lm, partial(peer.nats_in_order, orders=ORDERS))
            found[name] = {f"bound of {ORDERS} orders": bound}
        else:
            found[name] = {"exact": by_length(lm, peer.nats)}
    return found


def contenders(
    names: Sequence[str], samples: Sequence[int], peers: Path | None
) -> Iterator[tuple[str, dict[str, Score]]]:
    """Each model with its scores, one after the other, and then the peers of the first."""
    # before hours of work, so that what they lack is known at once
    others = {} if peers is None else scores_of_peers(peers, load(names[0]))
    for name in names:
        yield name, scores_of(load(name), samples)
    yield from others.items()


def verdicts(pairs: Sequence[Pair], score: Score) -> list[bool]:
    """Whether the better sentence of each pair has more probability; equal values are wrong."""
    values = score([text for pair in pairs for text in (pair.good, pair.bad)])
    return [good > bad for good, bad in zip(values[::2], values[1::2], strict=True)]


def write_tasks(pairs: Sequence[Pair], folder: Path) -> None:
    """lm-eval's tasks of BLiMP by its own template, with the pairs in local files."""
    import lm_eval.tasks

    template = Path(lm_eval.tasks.__file__).parent / "blimp" / "_template_yaml"
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for paradigm in dict.fromkeys(pair.paradigm for pair in pairs):
        own = [pair for pair in pairs if pair.paradigm == paradigm]
        rows = [{"sentence_good": pair.good, "sentence_bad": pair.bad} for pair in own]
        data = folder.resolve() / f"{paradigm}.jsonl"
        data.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        name = f"local_blimp_{paradigm}"
        files = json.dumps({"data_files": {"train": str(data)}})
        own_lines = f"include: {template}\ntask: {name}\ndataset_path: json\n"
        text = f"{own_lines}dataset_name: null\ndataset_kwargs: {files}\n"
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
        names.append(name)
    mean = "aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: false}]"
    group = f"group: local_blimp\ntask: {json.dumps(names)}\n{mean}\n"
    (folder / "local_blimp.yaml").write_text(group, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs_at", type=Path, metavar="PAIRS", help="folder or .tsv.xz of BLiMP")
    parser.add_argument("models", nargs="*", help="run directories or shipped models")
    parser.add_argument("--pairs", type=int, help="only the first of each paradigm")
    parser.add_argument("--samples", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--peers", type=Path, help="weights of peers.py")
    parser.add_argument("--tasks", type=Path, help="write tasks of lm-eval to this folder instead")
    args = parser.parse_args()
    if args.peers is not None and not args.models:
        parser.error("--peers: name the baseline first whose tokens and shape they have")
    if args.pairs is not None and args.pairs < 1:
        parser.error(f"--pairs {args.pairs}: give at least 1")
    pairs = read_pairs(args.pairs_at, args.pairs)
    if args.tasks is not None:
        write_tasks(pairs, args.tasks)
        return
    fields = sorted({pair.field for pair in pairs})
    print(f"{len(pairs):,} pairs; accuracy")
    print(f"| model | value | all | {' | '.join(fields)} | flips |")
    print(f"| --- | --- |{' --- |' * (len(fields) + 2)}")
    for name, scores in contenders(args.models, args.samples, args.peers):
        first: list[bool] = []
        for kind, score in scores.items():
            right = verdicts(pairs, score)
            cells = [f"`{name}`", kind, f"{sum(right) / len(right):.4f}"]
            for field in fields:
                some = [one for pair, one in zip(pairs, right, strict=True) if pair.field == field]
                cells.append(f"{sum(some) / len(some):.4f}")
            flips = [one != other for one, other in zip(first, right, strict=False)]
            cells.append(f"{sum(flips):,} ({sum(flips) / len(flips):.2%})" if flips else "")
            first = first or (right if kind.startswith("exact") else [])
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    main()
