"""The table of claims.md from the CSV files beside it, and the tables that figures.jsonl holds.

python docs/reproduce/claims.py            write the tables between the markers of their pages
python docs/reproduce/claims.py --check    only compare: exit status 1 where one is another

A verdict is a rule on numbers, which its function states. It is of all seeds and machines on record,
and "not testable" where it depends on which block became the language model. Differences below SURE
bits per character are none. Claims for which no recipe has the numbers are in the second table,
which is written by hand.
"""

import csv
import math
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))  # `reproduction` lies beside the package

from reproduction import bounds, figures  # noqa: E402
from reproduction.directions import ALTERNATING, ONE_WAY  # noqa: E402
from reproduction.geometry import DOWN, UP, directions  # noqa: E402
from reproduction.lengths import RATIO, TOKENS  # noqa: E402
from reproduction.lottery import FIRST_STARTS, SHIPPED, work  # noqa: E402
from reproduction.measures import JUDGED  # noqa: E402
from reproduction.passes import CONTROL  # noqa: E402
from reproduction.text8_start import PAPER  # noqa: E402
from reproduction.worded import STEPS  # noqa: E402

BEGIN, END = "<!-- verdicts -->", "<!-- end of verdicts -->"
SURE = 0.01  # bits per character
WEIGHTED = f"iw-16 {RATIO}"
PAIRS = 3.21
"""Bits of a letter of tales given the one before: what a table of pairs knows."""
OVER_TABLE = "over the table"
"""Part of a column of inputs."""
BY_OTHER = "bits by `english-mini` (<=)"
"""The column of the control of figure 6."""
ELSEWHERE = {"affine": {ALTERNATING: [2.894, 2.945], ONE_WAY: [3.010, 2.949]}}
"""Bits of the trainings of directions on a machine with other rounding (docs/log.md)."""
SEEN, NOT_SEEN, NOT_TESTABLE = "**seen**", "**not seen**", "**not testable**"
Rows = list[dict[str, Any]]


class Claim(NamedTuple):
    """A row of the table."""

    claim: str
    here: str
    numbers: str
    differs: str
    page: str
    """A recipe, or a link in Markdown."""


def rows_of(name: str) -> Rows:
    """The rows of a CSV; numbers as float, empty cells as None."""

    def value(text: str) -> Any:
        try:
            return float(text) if text else None
        except ValueError:
            return text

    with (HERE / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return [{key: value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def bits(name: str) -> dict[str, list[float]]:
    """Model -> test bits per character, seed by seed."""
    found: dict[str, list[float]] = {}
    for row in rows_of(name):
        found.setdefault(row["model"], []).append(row["test bpc"])
    return found


def families() -> dict[str, list[float]]:
    """`bits` of table2, and of bounds, which has the seed after its seeds."""
    found = bits("table2")
    for model, values in bits("bounds").items():
        found[model] += values
    return found


class Stack(NamedTuple):
    """A model of cipher alone, or with a block above it."""

    model: str
    block_2: str | None = None
    reads: str | None = None

    def bits(self) -> list[float]:
        """Per character, seed by seed."""
        columns = ("model", "block 2", "reads")
        rows = [row for row in rows_of("cipher") if tuple(row[name] for name in columns) == self]
        return [row["bits per character"] for row in rows]

    def saves(self, other: "Stack") -> list[float]:
        """The bits by which it has fewer than the other, seed by seed."""
        return [more - less for less, more in zip(self.bits(), other.bits(), strict=True)]


def listed(values: list[float], digits: int = 3) -> str:
    # without "-0.000"
    return ", ".join(f"{round(value, digits) + 0.0:.{digits}f}" for value in values)


def said(names: list[str]) -> str:
    """Names as a list in words."""
    names = [f'"{name}"' if "," in name else name for name in names]
    return ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else "".join(names)


def verdict(holds: bool) -> str:
    return SEEN if holds else NOT_SEEN


def where(holds: list[str], fails: list[str], open_: list[str] | None = None) -> str:
    """A verdict that holds for some models, fails for others, and cannot be had for the rest."""
    parts = {SEEN: holds, NOT_SEEN: fails, NOT_TESTABLE: open_ or []}
    return "; ".join(f"{verdict} in {said(names)}" for verdict, names in parts.items() if names)


def nats_of(row: dict[str, Any]) -> list[float]:
    """The nats that each block takes off the KL divergence."""
    found = [row.get(f"KL taken off by block {number}") for number in (1, 2, 3)]
    return [nats for nats in found if nats is not None]


def shares_of(row: dict[str, Any]) -> list[float]:
    """`work` of every block: the bits that it adds below the frequencies of the letters."""
    return work(row["test bpc"], nats_of(row))


def writer(row: dict[str, Any]) -> int:
    """The block that is the language model: it does most of the work."""
    shares = shares_of(row)
    return shares.index(max(shares)) + 1


def depends_on_the_start() -> list[str]:
    """The model of lottery, if all of its blocks do some work in some trainings and not in others,
    which differ by the start and the seed.
    """
    all_work = {min(shares_of(row)) > 0 for row in rows_of("lottery")}
    return [SHIPPED] if len(all_work) > 1 else []


def of_all_seeds() -> Rows:
    """The rows of the length of training that has several seeds."""
    rows = rows_of("lengths")
    shared = {row[TOKENS] for row in rows if row["seed"]}
    return [row for row in rows if row[TOKENS] in shared]


def beside_its_twin() -> Claim:
    """Level on their own text within SURE; worse on another text if the bound is above the exact
    value by more than a thousandth of it.
    """
    [own, *others] = figures.rows("other-english")
    [text, flow, twin] = own
    off = figures.number(own[flow]) - figures.number(own[twin])
    ratios = [figures.number(cells[flow]) / figures.number(cells[twin]) for cells in others]
    worse = sum(ratio > 1.001 for ratio in ratios)
    [paired, *_] = figures.rows("paired")
    here = f"{'level' if abs(off) < SURE else 'not level'} on their own text; worse in {worse} of {len(ratios)} measurements on other texts"
    numbers = f"bits on their own text {own[flow]} and {own[twin]}, difference {[*paired.values()][-1]}, paired over windows; "
    numbers += "times the bits of the twin: " + "; ".join(
        f"{cells[text]} {ratio:.3f}" for cells, ratio in zip(others, ratios, strict=True)
    )
    claim = "a flow is level with its discrete twin after equal steps (question of our own; `english-small`, 2,048 word pieces)"
    differs = "one seed each; the error is of windows, not of seeds; the flow's figures are bounds, which four samples tighten by less than 0.1 % on WikiText-2"
    page = "[comparison](../comparison.md#by-the-rulers-of-other-fields)"
    return Claim(claim, here, numbers, differs, page)


def order_of_families() -> Claim:
    """Seen if the best seed of a family is behind the worst of the next by more than SURE."""
    found = families()
    names = ("affine", "Mix-1", "Mix-d")
    holds = all(min(found[a]) > max(found[b]) + SURE for a, b in pairwise(names))
    numbers = "seed by seed: " + "; ".join(f"{name} {listed(found[name])}" for name in names)
    claim = "bpc falls from affine to Mix-1 to Mix-d (table 2: 1.54, 1.37, 1.30 on TEXT8)"
    differs = "size, text and [more](../reproduce.md#mini-models-on-tales)"
    return Claim(claim, f"{verdict(holds)}, by bounds", numbers, differs, "table2")


def flows_above_the_baseline() -> Claim:
    """Seen if every seed of a family is above the worst of the baseline by more than SURE, and the
    gap of its bound is known: the limit of bounds is as far above. An open bound above an exact
    value decides nothing (docs/evaluation.md).
    """
    found = families()
    baseline = found.pop("AR")
    limits = {row["model"]: row[bounds.NORMAL] for row in rows_of("bounds")}
    names = ("Mix-d", "Mix-1", "affine")
    open_ = [name for name in names if limits[name] is None]
    above = {
        name: min(*found[name], limits[name] or math.inf) > max(baseline) + SURE for name in names
    }
    holds = [name for name in names if above[name] and name not in open_]
    fails = [name for name in names if not above[name] and name not in open_]
    of_seeds = {
        name: [x / ar for x, ar in zip(found[name], baseline, strict=True)] for name in names
    }
    parts = [f"{name} {listed(ratios)}" for name, ratios in of_seeds.items()]
    weighted = [row[WEIGHTED] for row in of_all_seeds() if row["model"] == "affine"]
    numbers = f"times the baseline: {'; '.join(parts)} (iw-16 {listed(weighted)})"
    claim = "flows have more bits than a baseline of as many layers (Mix-d 1.057, Mix-1 1.114, affine 1.252)"
    differs = "Mix-d reads decoded tokens, and is level with the baseline if its block 1 alone has as many layers; "
    differs += "the gap of affine's bound is open (next row)"
    here = where(holds, fails) + f"; not decided in {said(open_)}" * bool(open_)
    return Claim(claim, here, numbers, differs, "table2")


def gaps_of_bounds() -> Claim:
    """The share of a family's distance to the baseline that importance weights take off its bound.
    It is "at least" that share unless there is a limit, and it is within SURE.
    """
    rows = {row["model"]: row for row in rows_of("bounds")}
    baseline = rows.pop("AR")["test bpc"]
    here, numbers, series = list[str](), list[str](), list[str]()
    for model, row in rows.items():
        size, best = bounds.curve(row)[-1]
        limit = row[bounds.NORMAL]
        share = (row["test bpc"] - best) / (row["test bpc"] - baseline)
        least = "at least " * (limit is None or best > limit + SURE)
        here.append(f"{model} {least}{share:.0%}")
        ratios = f"{model} {row['test bpc'] / baseline:.3f}, {best / baseline:.3f} (iw-{size:,})"
        numbers.append(ratios + (f", {limit / baseline:.3f}" if limit else ""))
        series.append(f"{model} {listed([row[name] for name in bounds.TERMS], 1)}")
    claim = "how much of a flow's distance to the baseline is the gap of its bound? (question of our own)"
    differs = f"seed {rows['affine']['seed']:.0f}, 64 windows; half of the variance of log w and the terms of its skewness and "
    differs += f"kurtosis, in nats: {'; '.join(series)}"
    joined = f"times the baseline by the bound, by the most samples, and in the limit where these samples tell it: {'; '.join(numbers)}"
    return Claim(claim, "; ".join(here), joined, differs, "bounds")


def above_the_next(page: str) -> tuple[bool, str]:
    """Whether every seed of every family is above every seed of the next better one by SURE; and
    the ratios to the baseline.
    """
    found = bits(page)
    rows = rows_of(page)
    names = ("affine", "Mix-1", "Mix-d", "AR")
    holds = all(min(found[a]) > max(found[b]) + SURE for a, b in pairwise(names))
    parts = list[str]()
    for name in names[:-1]:
        own = [row for row in rows if row["model"] == name]
        ratios, weighted = ([row[column] for row in own] for column in (RATIO, WEIGHTED))
        parts.append(
            f"{name} {listed(ratios)}, iw-16 {listed(weighted)} (paper {own[0][PAPER]:.3f})"
        )
    return holds, f"times the baseline: {'; '.join(parts)}"


def on_its_text() -> Claim:
    """Seen where `above_the_next` holds."""
    holds, numbers = above_the_next("text8-start")
    claim = "the order and the ratios on TEXT8 itself (table 2)"
    differs = "the first 3 % of the text, 2.7 million characters seen; rates chosen on tales; size"
    return Claim(claim, f"order {verdict(holds)}, by bounds", numbers, differs, "text8-start")


def as_worded() -> Iterator[Claim]:
    """The order is seen where `above_the_next` holds. Whether blocks above Mix-d add something is not
    testable so far: the claim is of a block 1 that has converged, and its stage ended by its steps.
    Four times the steps take 0.2 bits off such a block (inputs).
    """
    holds, numbers = above_the_next("paper-mini")
    claim = "the order with models without our architectural additions (table 2)"
    differs = "tales, 1.3 million characters seen; initialisation, optimiser, positions, normalisation and the shares of layers in Mix-d are ours"
    yield Claim(claim, f"order {verdict(holds)}, by bounds", numbers, differs, "paper-mini")
    gains: dict[str, list[float]] = {}
    for row in rows_of("paper-mini"):
        if row["model"].startswith("Mix-d"):
            stages = [row[f"valid bpc after block {number}"] for number in (1, 2, 3)]
            gains.setdefault(row["model"], []).append(stages[0] - min(stages))
    parts = [f"{name} {listed(off, 4)}" for name, off in gains.items()]
    numbers = f"bits that blocks 2 and 3 take off the validation of block 1: {'; '.join(parts)}"
    claim = "blocks above Mix-d add to it, if a stage ends once the bound stalls (section 3.3)"
    most = max(off for each in by_noise() for off in each)
    differs = f"the stage of block 1 ended after {STEPS} steps, before its bound stalled; five layers above a block 1 of one layer "
    differs += f"and 1,300 steps took off at most {most:.4f} in [cipher](cipher.md)"
    yield Claim(claim, f"{NOT_TESTABLE} so far", numbers, differs, "paper-mini")


def inputs() -> Claim:
    """An input costs bits over a baseline if block 1 has more than SURE above it in every training,
    and none if it has in none. Otherwise it is not decided. The baselines are the one with an
    embedding table, as the paper's, and the best one.
    """
    rows = [row for row in rows_of("inputs") if row["is"] == "block 1"]
    here = list[str]()
    for over, name in ((OVER_TABLE, "the table"), (RATIO, "the best input")):
        extra: dict[str, list[float]] = {}
        for row in rows:
            off = row["test bpc"] * (1 - 1 / row[f"test bpc {over}"])
            extra.setdefault(row["reads"], []).append(off)
        costs = [reads for reads, off in extra.items() if min(off) > SURE]
        free = [reads for reads, off in extra.items() if max(off) <= SURE]
        open_ = [reads for reads in extra if reads not in costs + free]
        found = [where(costs, free)] * bool(costs + free)
        found += [f"not decided in {said(open_)}"] * bool(open_)
        here.append(f"over {name} {'; '.join(found)}")
    ratios: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        convolution = ", with convolution" * (row["convolution"] == "yes")
        length = f"{row['steps']:,.0f} steps{convolution}"
        both = " / ".join(f"{row[f'test bpc {over}']:.3f}" for over in (OVER_TABLE, RATIO))
        ratios.setdefault(row["reads"], {}).setdefault(length, []).append(both)
    parts = [
        f"{name}: " + "; ".join(f"{', '.join(found)} ({length})" for length, found in each.items())
        for name, each in ratios.items()
    ]
    numbers = "times the baseline with a table / with the best input, four layers, no convolution unless said: "
    numbers += ". ".join(parts)
    claim = (
        "latents as the input cost block 1 bits, at the depth of the baseline (question of our own)"
    )
    differs = "block 1 alone; seeds 0 and 1, after 2,600 steps and with convolution seed 0; the paper does not say how latents enter, "
    differs += "and its 5.7 % are over a table"
    return Claim(
        claim, ". ".join(part[0].upper() + part[1:] for part in here), numbers, differs, "inputs"
    )


def ratios_over_length() -> Claim:
    """They are if doubling the training to the greatest length of a family changes its ratio by
    less than 0.005, for the bound and for the weighted bound, and not if it changes by more than
    that and the difference between seeds, which one length has. Otherwise it is not decided.
    """
    curves: dict[str, dict[str, list[float]]] = {}
    of_seeds: dict[str, list[float]] = {}
    for row in of_all_seeds():
        of_seeds.setdefault(row["model"], []).append(row[RATIO])
        shared = row[TOKENS]
    rows = sorted(rows_of("lengths"), key=lambda row: row[TOKENS])
    for row in rows:
        if row["model"] != "AR" and not row["seed"]:
            of_model = curves.setdefault(row["model"], {RATIO: [], WEIGHTED: []})
            for column, ratios in of_model.items():
                ratios.append(row[column])
    holds, fails, open_ = list[str](), list[str](), list[str]()
    for model, columns in curves.items():
        changes = [abs(ratios[-1] - ratios[-2]) for ratios in columns.values()]
        least = 0.005 + max(of_seeds[model]) - min(of_seeds[model])
        moves = all(change > least for change in changes)
        (holds if max(changes) < 0.005 else fails if moves else open_).append(model)
    parts = [f"{model} {listed(columns[RATIO])}" for model, columns in sorted(curves.items())]
    lengths = listed(sorted({row[TOKENS] / 1e6 for row in rows}), 1)
    numbers = f"times the baseline after {lengths} million characters, as far as trained: {'; '.join(parts)}"
    claim = "are these ratios those of longer training? (question of our own)"
    here = f"within 0.005: {said(holds) or 'none'}; not yet: {said(fails) or 'none'}"
    here += f"; not decided: {said(open_)}" * bool(open_)
    differs = f"the other lengths have seed 0 alone; at {shared / 1e6:.1f} seed 1 has {', '.join(f'{m} {of_seeds[m][-1]:.3f}' for m in sorted(curves))}"
    return Claim(claim, here, numbers, differs, "lengths")


def additions() -> Claim:
    """An addition is seen if its worst seed is ahead of the best one before by more than SURE; not
    testable in Mix-d, which is another model in more than its coupling. Channel-wise is minor if it
    gains less than half of what Mix-1 gains.
    """
    found = bits("fig2") | {"+ channel-wise": bits("table2")["affine"]}
    found.pop("+ progressive")
    holds, fails, gains = list[str](), list[str](), dict[str, tuple[float, float]]()
    for before, after in pairwise(found):
        name = after.removeprefix("+ ")
        gains[name] = (
            min(found[before]) - max(found[after]),
            max(found[before]) - min(found[after]),
        )
        if name != "Mix-d":
            (holds if gains[name][0] > SURE else fails).append(name)
    numbers = f"{'; '.join(f'{name} {listed(values)}' for name, values in found.items())}; gains "
    numbers += "; ".join(
        f"{name} {least:.3f} to {most:.3f}" for name, (least, most) in gains.items()
    )
    single = [name.removeprefix("+ ") for name, values in found.items() if len(values) == 1]
    differs = "27 letters where the paper has OpenWebText; "
    differs += f"one seed of {said(single)}; " * bool(single)
    differs += "Mix-1 starts with its last block as the language model; "
    differs += "Mix-d also reads tokens, has its layers in block 1 and half the rate"
    claim = "each addition improves the model, channel-wise a little and Mix-1 greatly (figure 2; progressive "
    claim += "training is the next row)"
    is_minor = gains["channel-wise"][1] < gains["Mix-1"][0] / 2
    here = f"{where(holds, fails, ['Mix-d'])}; {verdict(is_minor)} that channel-wise gains little"
    return Claim(claim, here, numbers, differs, "fig2")


def progressive_training() -> Claim:
    """Best if it is ahead of joint training by more than SURE in every seed, level if it is within
    SURE in every seed. Block 1 sees as many tokens in both.
    """
    found = bits("progressive")
    pairs = list(zip(found["progressive"], found["joint"], strict=False))
    if all(p < j - SURE for p, j in pairs):
        here = SEEN
    else:
        here = f"{NOT_SEEN}: {'level' if all(abs(p - j) < SURE for p, j in pairs) else 'mixed'}"
    numbers = f"progressive {listed(found['progressive'], 4)}; joint {listed(found['joint'], 4)}"
    differs = "one seed of joint; " * (len(found["joint"]) == 1)
    differs += "upper blocks of one layer, in progressive training 300 steps each; "
    differs += "the paper gives no schedule"
    claim = "progressive training is best (figure 2)"
    return Claim(claim, here, numbers, differs, "progressive")


def mix1_against_affine() -> Claim:
    """Not testable unless the better one knows more than pairs. Seen if Mix-1 is better by 0.1
    bits, in the test and in every validation after the first.
    """
    [affine, *_] = rows_of("fig3")
    seeds = [row for row in rows_of("fig2") if row["model"] == "+ Mix-1"]
    valid = [name for name in affine if name.startswith("valid bpc at ") and name[-2:] != " 0"]
    holds = all(affine[name] > row[name] + 0.1 for row in seeds for name in ("test bpc", *valid))
    learns = max(row["test bpc"] for row in seeds) < PAIRS
    ahead = [affine[name] - row[name] for row in seeds for name in valid]
    numbers = (
        f"test {listed([row['test bpc'] for row in seeds])} against {affine['test bpc']:.3f}; in "
    )
    numbers += f"validation after {valid[0].split()[-1]} steps and later {min(ahead):.2f} to {max(ahead):.2f} bits ahead"
    claim = "Mix-1 far better than affine, in training and validation (figures 3 and 8)"
    differs = "two seeds of Mix-1, which starts with its last block as the language model, one of affine; three "
    differs += "blocks of 1, 1, 4 layers for six of two"
    return Claim(claim, verdict(holds) if learns else NOT_TESTABLE, numbers, differs, "fig3")


def components() -> Iterator[Claim]:
    """Not testable above the entropy of pairs, nor where the differences are not greater than those
    between the seeds of this start. Else K = 1 is far worse by 0.1 bits, and all others agree
    within 0.05. Every K has one seed, and the seeds are of another set-up.
    """
    found = {int(row["K"]): row["test bpc"] for row in rows_of("fig4")}
    first, *others = (found[k] for k in sorted(found))
    numbers = "; ".join(f"K = {k}: {found[k]:.3f}" for k in sorted(found))
    seeds = [row["test bpc"] for row in rows_of("lottery") if row["model"] == FIRST_STARTS]
    spread = max(seeds) - min(seeds)
    differs = f"27 tokens; block 1 starts, by which seeds of another set-up differ by up to {spread:.2f} bits "
    worse, apart = first - max(others), max(others) - min(others)
    differs += f"([lottery](lottery.md)), where K = 1 is {worse:.2f} behind; pairs of neighbours have {PAIRS} bits, so K = 1 knows "
    differs += "no more than pairs"
    for claim, gap, holds in (
        ("K = 1 far worse than K above 1 (figure 4)", worse, worse > 0.1),
        ("all K above 1 work equally well (figure 4)", apart, apart < 0.05),
    ):
        is_tested = min(others) < PAIRS and gap > spread
        here = f"{verdict(holds)}, one seed" if is_tested else NOT_TESTABLE
        yield Claim(claim, here, numbers, differs, "fig4")
        numbers = differs = "as above"
    claim = "a thousandth of the tokens suffices as K (64 of 50,257, section 4)"
    yield Claim(claim, NOT_TESTABLE, numbers, "8 of 27 is a third of the tokens", "fig4")


def two_tokens() -> Claim:
    """A model of two tokens keeps its quality if the perplexity of its continuations, over its own
    family's with one token and in the mean over the prefixes, is below 1.1 by two standard errors,
    and not if it is as much above; it breaks down if the smallest ratio is above 2. Mix-1 of
    alternating directions is judged without a prefix, which the blocks above block 1 do not see.
    The prefixes are of the same texts, so the error of the mean is the mean of their errors.
    """
    of_model: dict[str, list[float]] = {}
    errors: dict[str, list[float]] = {}
    for row in rows_of("fig5"):
        of_model.setdefault(row["model"], []).append(row["perplexity"])
        errors.setdefault(row["model"], []).append(row["perplexity ±"] / row["perplexity"])
    of_model.pop("real text")
    families = {
        name: name.removeprefix("two-token ").rpartition(", ")[0] or "AR"
        for name in of_model
        if name not in ("AR", "Mix-1", "Mix-1, left to right", "Mix-d")
    }
    ratios = {
        name: [x / one for x, one in zip(of_model[name], of_model[family], strict=True)]
        for name, family in families.items()
    }
    holds, fails, open_, means = list[str](), list[str](), list[str](), list[str]()
    for name, all_values in ratios.items():
        # prefix 0 is the first
        shown = slice(1 if families[name] == "Mix-1" else None)
        values = all_values[shown]
        both = zip(values, errors[name][shown], errors[families[name]][shown], strict=True)
        error = sum(x * (a**2 + b**2) ** 0.5 for x, a, b in both) / len(values)
        mean = sum(values) / len(values)
        means.append(f"{name} {mean:.2f} ± {error:.2f}")
        if families[name] == "AR":
            continue
        if mean + 2 * error < 1.1:
            holds.append(name)
        elif mean - 2 * error > 1.1:
            fails.append(name)
        else:
            open_.append(name)
    here = where(holds, fails) + f"; not decided in {said(open_)}" * bool(open_)
    breaks_down = min(ratios["two-token AR"]) > 2
    here += f"; {verdict(breaks_down)} that the two-token baseline breaks down"
    numbers = (
        "perplexity of the continuation over the same family's with one token, in the mean of the "
    )
    numbers += f"prefixes, of alternating Mix-1 without one: {'; '.join(means)}"
    claim = "patch 2: the flow keeps its quality, the two-token baseline breaks down (figure 5)"
    differs = "one seed, 32 texts of 256 characters, the same for all prefixes; a judge of our own; in alternating Mix-1 the blocks above "
    differs += "block 1, one of them its language model, do not see the prefix"
    return Claim(claim, here, numbers, differs, "fig5")


def refining() -> Claim:
    """The rule holds where the judge's bits fall after every pass by more than two standard errors
    of the fall, and every pass edits fewer tokens than the one before. It is met by a control, in
    which no model refines anything, too. So a model that meets it is not seen to refine, but not
    refuted either; one that does not meet it is. Not testable where the work of the blocks depends
    on the start.
    """
    open_ = depends_on_the_start()
    texts: dict[str, Rows] = {}
    for row in rows_of("fig6"):
        texts.setdefault(row["model"], []).append(row)
    meets, halves, fails, numbers = list[str](), list[str](), list[str](), list[str]()
    for model, states in texts.items():
        passes = states[1:]
        edits = [row["tokens edited"] for row in passes]
        falls = all(row["fall"] > 2 * row["fall ±"] for row in passes)
        narrows = all(after < before for before, after in pairwise(edits))
        if model not in open_:
            (fails if not falls else meets if narrows else halves).append(model)
        shares = ", ".join(f"{share:.1%}" for share in edits)
        numbers.append(f"{model} {listed([row[JUDGED] for row in states], 2)}, edits {shares}")
    controls: dict[str, list[figures.Cells]] = {}
    for cells in figures.rows(CONTROL):
        controls.setdefault(cells["text"], []).append(cells)
    met = dict[str, bool]()
    for text, rows in controls.items():
        judged = [figures.number(cells[BY_OTHER]) for cells in rows]
        shares = [figures.number(cells["letters edited"]) for cells in rows[1:]]
        met[text] = judged == sorted(judged, reverse=True) and shares == sorted(
            shares, reverse=True
        )
        shown = ", ".join(f"{share:.1%}" for share in shares)
        numbers.append(f"{text}, by another judge, {listed(judged, 2)}, edits {shown}")
    here = where([] if all(met.values()) else meets, fails, open_)
    if all(met.values()):
        here = f"by construction in {said(meets)}: pass 2 fills the gaps that [eq. 9a](../math.md#3-couplings) makes, "
        here += f"and a control that refines nothing meets the same rule; {where([], fails, open_)}"
    here += f"; in {said(halves)} every pass improves the text, but edits do not get fewer"
    joined = "judge's bits in the noise and after every pass: " + "; ".join(numbers)
    claim = "passes refine the text from coarse to fine (figure 6)"
    differs = "48 samples of 128 characters, seed 0; the other start of Mix-1 had passes after which the bits fall "
    differs += "([below](#where-results-differ-from-the-paper-and-why))"
    return Claim(claim, here, joined, differs, "fig6")


def bidirectional() -> Claim:
    """Seen in a model if the worst training with alternating directions, of all seeds and machines,
    is ahead of the best one without by more than SURE. Not testable where the language model is not
    one block in all of them, or is a block whose direction stays.
    """
    found = bits("directions")
    writers: dict[str, set[int]] = {}
    for row in rows_of("directions"):
        writers.setdefault(row["model"].rpartition(", ")[0], set()).add(writer(row))
    holds, fails, open_, numbers = list[str](), list[str](), list[str](), list[str]()
    for name, both in found.items():
        label, _, kind = name.rpartition(", ")
        if kind == ALTERNATING:
            more = ELSEWHERE.get(label, {ALTERNATING: [], ONE_WAY: []})
            all_ways, one_way = (
                both + more[ALTERNATING],
                found[f"{label}, {ONE_WAY}"] + more[ONE_WAY],
            )
            is_tested = writers[label] == {2}
            is_ahead = max(all_ways) < min(one_way) - SURE
            (open_ if not is_tested else holds if is_ahead else fails).append(label)
            off = [one - two for one, two in zip(one_way, all_ways, strict=True)]
            numbers.append(f"{label} {listed(off)}")
    claim = "alternating directions give context from both sides (section 3.3): they fit better"
    differs = "a quarter of the steps for affine and Mix-1; affine with seeds 0, 1 on one machine, then on another "
    differs += "([log](../log.md#2026-11-29-both-directions))"
    differs += "; in Mix-1 the language model, block 3, runs left to right either way; in affine blocks that all run "
    differs += "left to right the seed decides which one it is"
    joined = f"bits that alternating directions take off: {'; '.join(numbers)}"
    return Claim(claim, where(holds, fails, open_), joined, differs, "directions")


def recovered() -> Iterator[Claim]:
    """By blocks if, in every seed, tokens apart in the deep block alone cost less than half of what
    they cost in all blocks; by mixed channels if every seed gains more than SURE by them. Not
    testable where the language model moves to another block.
    """
    found = bits("in-patch")
    writers: dict[str, list[int]] = {}
    for row in rows_of("in-patch"):
        if nats_of(row):
            writers.setdefault(row["model"], []).append(writer(row))
    names = ("together", "apart in block 3", "apart in all blocks", "in groups of mixed channels")
    together, deep, apart, mixed = (found[f"Mix-1, {name}"] for name in names)
    seeds = list(zip(together, deep, apart, mixed, strict=True))
    numbers = "; ".join(f"{name} {listed(found[f'Mix-1, {name}'])}" for name in names)
    differs = "Mix-1 of 1, 1 and 4 layers, whose block 3 writes first; a quarter of the steps"
    claim = "later blocks recover what binds the tokens of a patch (figure 1)"
    here = verdict(all(d - t < (a - t) / 2 for t, d, a, _ in seeds))
    blocks = {name: writers[f"Mix-1, {name}"] for name in names}
    if any(block != 3 for block in blocks[names[1]]):
        here = f"{NOT_TESTABLE}: block 1, which sees the patch, becomes the language model"
    at = "; ".join(f"{name} {', '.join(map(str, of_seeds))}" for name, of_seeds in blocks.items())
    numbers += f"; the language model is block: {at}"
    yield Claim(claim, here, numbers, differs, "in-patch")
    claim = "mixed channels recover it (figure 1)"
    by_mixing = [a - m for _, _, a, m in seeds]
    shares = [(a - m) / (a - t) for t, _, a, m in seeds]
    numbers = f"bits that mixing takes off the model with tokens apart in all blocks: {listed(by_mixing)}; "
    numbers += f"as shares of what that costs: {listed(shares, 2)}"
    holds = all(gain > SURE for gain in by_mixing)
    here = verdict(holds) + ", in part" * holds
    moved = [a != m for a, m in zip(blocks[names[2]], blocks[names[3]], strict=True)]
    if any(moved):
        here = f"{NOT_TESTABLE}: the language model moves in {sum(moved)} of {len(moved)} seeds"
    yield Claim(claim, here, numbers, differs, "in-patch")


def by_noise() -> list[list[float]]:
    """The bits that a map of the noise takes off block 1 at each rate, seed by seed."""
    block_1 = Stack("Mix-d, 1 layer")
    rates = ("1.5e-3", "6e-3")
    return [Stack(block_1.model, f"Mix-1, rate {lr}", "noise").saves(block_1) for lr in rates]


def upper_blocks() -> Claim:
    """Seen if every seed saves more than SURE: over block 1; by reading the text alone over a new
    baseline of block 2's five layers; by a map of the noise, at either rate, over block 1.
    """

    def sure(values: list[float]) -> bool:
        return all(value > SURE for value in values)

    block_1, head = Stack("Mix-d, 1 layer"), "w' = its head"
    over_block_1 = [
        Stack(one.model, head, "text, features").saves(one)
        for one in (block_1, Stack("AR, 1 layer"))
    ]
    alone = Stack(block_1.model, head, "text")
    over_new = [alone.saves(Stack(f"{family}, 5 layers")) for family in ("AR", "Mix-d")]
    by_text = Stack(block_1.model, "Mix-1, rate 1.5e-3", "text").saves(block_1)
    by_rate = by_noise()
    here = f"{verdict(all(map(sure, over_block_1)))} if it reads the text; "
    here += f"{verdict(sure(over_new[0]))} that this is more than a new baseline of as many layers has; "
    here += f"{verdict(any(map(sure, by_rate)))} if it reads the noise"
    numbers = f"bits off block 1, by the head of a block that reads the text: Mix-d {listed(over_block_1[0])}, "
    numbers += f"AR {listed(over_block_1[1])}; by one that reads the text alone, off new models of five layers: "
    numbers += f"AR {listed(over_new[0])}, Mix-d {listed(over_new[1])}; by Mix-1 that reads the noise, at two rates, {listed(by_rate[0])}, "
    numbers += f"{listed(by_rate[1])}; by Mix-1 that reads the text {listed(by_text)}"
    claim = "a block above a frozen block 1 of tied Mix-d adds to it (question of our own)"
    differs = "block 1 of one layer, block 2 of five, left to right, 1,300 steps each"
    return Claim(claim, here, numbers, differs, "cipher")


def states_of() -> dict[tuple[str, str], Rows]:
    """(Model, reading) -> the states of seed 0 in figure 7."""
    found: dict[tuple[str, str], Rows] = {}
    for row in rows_of("fig7"):
        if row.get("layer 0") and not row["seed"]:
            row["sequences"], row["block"] = row["sequences"], row["block"] and int(row["block"])
            found.setdefault((row["model"], row["layer 0"]), []).append(row)
    return found


def geometry() -> Claim:
    """Seen as a whole if all four directions hold in some reading of some model."""
    found = {key: directions(states) for key, states in states_of().items()}
    counts = {key: sum(value == "yes" for value in each.values()) for key, each in found.items()}
    names = dict.fromkeys(model for model, _ in counts)
    numbers = "directions that hold, from latents and from noise: "
    numbers += "; ".join(
        f"{model} {counts[model, UP]}, {counts[model, DOWN]} of 4" for model in names
    )
    claim = "latents (figure 7): the mean norm decreases, the cosine increases, the movement of the centroid "
    claim += "diminishes, the participation ratio drops at the right-to-left block and then rises"
    here = SEEN if max(counts.values()) == 4 else f"{NOT_SEEN} as a whole"
    differs = "seed 0; the paper does not say which end is layer 0"
    return Claim(claim, here, numbers, differs, "fig7")


def work_of_blocks() -> Iterator[Claim]:
    """A block works if it takes more off the KL divergence than two standard errors and a
    thousandth of a nat. Appendix C holds of a block that works, fails of one that leaves its output
    further from the prior than its input, by more than these, and is idle in between. Not testable
    where the work of the blocks depends on the start.
    """
    working, idle, normal, gains, divergences = ([] for _ in range(5))
    open_ = depends_on_the_start()
    for (model, reading), states in states_of().items():
        if reading == UP:
            errors = [row["kl_gain ±"] / row["sequences"] ** 0.5 for row in states[1:]]
            taken = [
                (row["kl_gain"], 2 * e + 0.001) for row, e in zip(states[1:], errors, strict=True)
            ]
            if model not in open_:
                (working if all(gain > least for gain, least in taken) else idle).append(model)
            kl = [row["kl"] for row in states]
            if model not in open_:
                signs = [(gain > least) - (gain < -least) for gain, least in taken]
                parts = [
                    f"{verdict} in block{'s' * (len(at) > 1)} {' and '.join(str(n + 1) for n in at)}"
                    for sign, verdict in ((1, SEEN), (-1, NOT_SEEN), (0, "idle"))
                    if (at := [n for n, other in enumerate(signs) if other == sign])
                ]
                normal.append(f"{model}: {', '.join(parts)}")
            gains.append(f"{model} {listed([gain for gain, _ in taken], 4)}")
            divergences.append(f"{model} {listed(kl, 2)}")
    numbers = f"nats per token that blocks 1, 2, 3 take off the KL divergence: {'; '.join(gains)}"
    differs = "seed 0; the gain of one block of a joint stack may be negative although it helps those above; "
    others = [min(shares_of(row)) > 0 for row in rows_of("lottery") if row["model"] == FIRST_STARTS]
    differs += f"with the other start every block of Mix-1 adds to what the stack knows of the language in {sum(others)} of "
    differs += f"{len(others)} seeds ([lottery](lottery.md))"
    claim = "every block does part of the work"
    differs += "; the paper shows no KL per block"
    yield Claim(claim, where(working, idle, open_), numbers, differs, "fig7")
    numbers = f"nats per token from the prior before block 1 and after blocks 1, 2, 3: {'; '.join(divergences)}"
    claim = "every layer drives its output towards the prior (appendix C, [eq. 10b](../math.md))"
    differs = "as in the row before; an idle block moves its output neither way; eq. 9 of the paper asks only the last state to be normal"
    here = "; ".join([*normal, where([], [], open_)] if open_ else normal)
    yield Claim(claim, here, numbers, differs, "fig7")


def operations() -> Claim:
    """Seen at a size if patches of two and four tokens need at most 0.6 and 0.4 of the baseline's."""
    ratios: dict[str, dict[str, list[float]]] = {"operations": {}, "with three heads": {}}
    for row in rows_of("fig7"):
        if row.get("size"):
            for column, of_size in ratios.items():
                of_size.setdefault(row["size"], []).append(row[column] / row["of the LM"])
    one, three = (
        where(
            [size for size, found in of_size.items() if found[1] < 0.6 and found[2] < 0.4],
            [size for size, found in of_size.items() if found[1] >= 0.6 or found[2] >= 0.4],
        )
        for of_size in ratios.values()
    )
    here = f"by counting, with one head as in the paper: {one}; with the heads of three blocks: {three}"
    shown = [
        "; ".join(f"{size} {listed(found, 2)}" for size, found in of_size.items())
        for of_size in ratios.values()
    ]
    numbers = (
        f"of the baseline's at P = 1, 2, 4: {shown[0]}; with three heads {shown[1]}; stage 1 of "
    )
    numbers += "Mix-d at P = 2, 4 is [1.58 and 2.09 times](../reproduce.md#training-speed-and-scaling) as fast as the baseline"
    claim = "patches save operations (figure 7, right)"
    return Claim(claim, here, numbers, "speeds of a CPU", "fig7")


def quality() -> Iterator[Claim]:
    """Close: within 5 % of the perplexity of the baseline, or of real text, and 0.05 of the MAUVE of
    the baseline. Behind: by more than two standard errors of the difference in perplexity; by more
    than 0.05 in MAUVE.
    """
    found = {row["model"]: row for row in rows_of("table6")}
    ar, mixd, mix1 = found["AR"], found["Mix-d"], found["Mix-1"]
    is_like_ar = mixd["perplexity"] < 1.05 * ar["perplexity"]
    is_like_ar &= mixd["MAUVE"] > ar["MAUVE"] - 0.05
    is_like_text = mixd["perplexity"] < 1.05 * found["real text"]["perplexity"]
    error = sum((row.get("perplexity ±") or 0.0) ** 2 for row in (mixd, mix1)) ** 0.5
    by_perplexity = mix1["perplexity"] > mixd["perplexity"] + 2 * error
    by_mauve = mix1["MAUVE"] < mixd["MAUVE"] - 0.05
    values = {
        key: [row[key] for row in found.values() if row[key]]
        for key in ("perplexity", "MAUVE", "entropy")
    }
    numbers = f"{', '.join(found)}: " + "; ".join(f"{key} {listed(x)}" for key, x in values.items())
    differs = "500 samples of 256 characters, seed 0; a judge of the baseline's family in place of GPT-2 Large, for Mix-1 one trained on another machine"
    claim = "sample quality: Mix-d comes close to the baseline and to real text (table 6)"
    here = f"to the baseline {verdict(is_like_ar)}; to real text {verdict(is_like_text)}"
    yield Claim(claim, here, numbers, differs, "table6")
    here = f"by perplexity {verdict(by_perplexity)}; by MAUVE {verdict(by_mauve)}"
    yield Claim(
        "samples of Mix-1 are worse than those of Mix-d (table 6)",
        here,
        *["as above"] * 2,
        "table6",
    )


CLAIMS: tuple[Callable[[], Any], ...] = (
    order_of_families,
    flows_above_the_baseline,
    gaps_of_bounds,
    on_its_text,
    as_worded,
    inputs,
    ratios_over_length,
    beside_its_twin,
    additions,
    progressive_training,
    mix1_against_affine,
    components,
    two_tokens,
    recovered,
    refining,
    bidirectional,
    upper_blocks,
    geometry,
    work_of_blocks,
    operations,
    quality,
)


def table() -> str:
    """The table in Markdown."""
    lines = ["| claim | here | numbers | what differs | table |", "| --- | --- | --- | --- | --- |"]
    for function in CLAIMS:
        found = function()
        for claim in [found] if isinstance(found, Claim) else list(found):
            page = claim.page if "(" in claim.page else f"[{claim.page}]({claim.page}.md)"
            cells = [*claim[:4], page]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(words: list[str]) -> None:
    """Write or compare the table, and the tables of `figures.PAGES`."""
    path = HERE / "claims.md"
    texts = {page: page.read_text(encoding="utf-8") for page in (path, *figures.PAGES)}
    before, rest = texts[path].split(BEGIN)
    after = rest.split(END)[1]
    written = {page: figures.written(texts[page]) for page in figures.PAGES}
    written[path] = f"{before}{BEGIN}\n\n{table()}\n{END}{after}"
    if "--check" in words:
        sys.exit(int(written != texts))
    for page, text in written.items():
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
