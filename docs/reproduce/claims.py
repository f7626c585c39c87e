"""The table of claims.md from the CSV files beside it.

python docs/reproduce/claims.py            write the table between the markers of claims.md
python docs/reproduce/claims.py --check    only compare: exit status 1 where it is another

A verdict is a rule on numbers, which its function states. Differences below SURE bits per character
of one seed are none. Claims of which no recipe has the numbers are in the second table, which is
written by hand.
"""

import csv
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))  # `reproduction` lies beside the package

from reproduction.geometry import DOWN, UP, directions  # noqa: E402
from reproduction.measures import JUDGED  # noqa: E402

BEGIN, END = "<!-- verdicts -->", "<!-- end of verdicts -->"
PLAIN = "Mix-1, plain start as in the paper"
SURE = 0.01  # bits per character
PAIRS = 3.42  # entropy of a letter of english27 given the one before, in bits
SEEN, NOT_SEEN, NOT_TESTABLE = "**seen**", "**not seen**", "**not testable**"
Rows = list[dict[str, Any]]


class Claim(NamedTuple):
    """A row of the table."""

    claim: str
    here: str
    numbers: str
    differs: str
    tables: tuple[str, ...]


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


def listed(values: list[float], digits: int = 3) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def said(names: list[str]) -> str:
    """Names as a list in words."""
    names = [f'"{name}"' if "," in name else name for name in names]
    return ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else "".join(names)


def where(holds: list[str], fails: list[str]) -> str:
    """A verdict that holds for some models and fails for others."""
    parts = [f"{SEEN} in {said(holds)}"] * bool(holds) + [f"{NOT_SEEN} in {said(fails)}"] * bool(
        fails
    )
    return "; ".join(parts)


def order_of_families() -> Claim:
    """Seen if affine > Mix-1 with a plain start > Mix-d by more than SURE, and affine > Mix-d in
    every seed.
    """
    found = bits("table2")
    affine, plain, mixd = found["affine"], found[PLAIN], found["Mix-d"]
    holds = affine[0] > plain[0] + SURE > mixd[0] + 2 * SURE
    holds &= all(a > d + SURE for a, d in zip(affine, mixd, strict=True))
    numbers = f"seed by seed: affine {listed(affine)}; Mix-1 {listed(plain)}, with a start from the codebook "
    numbers += f"{listed(found['Mix-1'])}; Mix-d {listed(mixd)}"
    differs = (
        "blocks of 4, 1, 1 layers where the paper has 2, 2, 8; K = 2 in the upper blocks of Mix-1"
    )
    claim = "bpc falls from affine to Mix-1 to Mix-d (table 2: 1.54, 1.37, 1.30 on TEXT8)"
    return Claim(claim, SEEN if holds else NOT_SEEN, numbers, differs, ("table2",))


def flows_above_the_baseline() -> Claim:
    """Seen if all families are above the baseline of their seed by more than SURE."""
    found = bits("table2")
    names = ["Mix-d", "Mix-1", PLAIN, "affine", "Mix-d with two layers more"]
    ratios = {
        name: [x / ar for x, ar in zip(found[name], found["AR"], strict=False)] for name in names
    }
    holds = all(
        x > ar + SURE for name in names[:4] for x, ar in zip(found[name], found["AR"], strict=False)
    )
    numbers = "; ".join(f"{name} {listed(values)} times" for name, values in ratios.items())
    claim = "every flow is above the discrete baseline (1.23; Mix-d 1.057 times)"
    differs = "the gap of Mix-d is a fraction of the paper's"
    return Claim(claim, SEEN if holds else NOT_SEEN, numbers, differs, ("table2",))


def additions() -> Claim:
    """An addition is seen if it gains more than SURE in every seed of both."""
    found = bits("fig2")
    names, holds, fails = list(found), list[str](), list[str]()
    for before, after in pairwise(names):
        gains = [b - a for b, a in zip(found[before], found[after], strict=False)]
        (holds if min(gains) > SURE else fails).append(after.removeprefix("+ "))
    numbers = "; ".join(f"{name} {listed(values)}" for name, values in found.items())
    here = f"{SEEN} for {said(holds)}" + (f"; {NOT_SEEN} for {said(fails)}" if fails else "")
    differs = "TEXT8's alphabet where the paper has OpenWebText; Mix-1 starts from the codebook; here channel-wise "
    differs += "affine is no minor gain"
    return Claim("each addition improves the model (figure 2)", here, numbers, differs, ("fig2",))


def progressive_training() -> Claim:
    """Seen if progressive training is at most SURE above joint training of its seed, at equal
    tokens of block 1.
    """
    found = bits("progressive")
    pairs = list(zip(found["progressive"], found["joint"], strict=False))
    holds = all(p <= j + SURE for p, j in pairs)
    numbers = f"progressive {listed(found['progressive'], 4)}; joint {listed(found['joint'], 4)}"
    differs = "upper blocks have one layer and, in progressive training, 300 steps more; the paper gives no schedule"
    claim = "progressive training is at least as good as joint training"
    return Claim(claim, SEEN if holds else NOT_SEEN, numbers, differs, ("progressive",))


def six_blocks() -> Claim:
    """Seen if Mix-1 is better than affine by 0.1 bits, in the test and in every validation."""
    affine, mix1 = (
        next(row for row in rows_of("fig3") if row["model"] == name) for name in ("affine", "Mix-1")
    )
    valid = [name for name in affine if name.startswith("valid bpc at ")]
    if not valid:
        raise KeyError("curves")
    holds = all(affine[name] > mix1[name] + 0.1 for name in ("test bpc", *valid))
    numbers = f"{mix1['test bpc']:.3f} against {affine['test bpc']:.3f} after 300 steps, both with a plain start"
    claim = "six blocks: Mix-1 far better than affine, in training and validation (figures 3 and 8)"
    return Claim(
        claim,
        SEEN if holds else NOT_SEEN,
        numbers,
        "one layer per block for two; 300 steps",
        ("fig3",),
    )


def components() -> Iterator[Claim]:
    """Not testable above the entropy of pairs. Else K = 1 is far worse by 0.1 bits; all others
    agree within 0.05; and eight are enough if they are at most SURE above 27, as many as there are
    tokens.
    """
    found = {int(row["K"]): row["test bpc"] for row in rows_of("fig4")}
    first, *others = (found[k] for k in sorted(found))
    learns = min(others) < PAIRS
    numbers = "; ".join(f"K = {k}: {found[k]:.3f}" for k in sorted(found))
    differs = f"27 tokens; 2,600 steps, one seed; pairs of neighbours have {PAIRS} bits"
    for claim, holds in (
        ("K = 1 far worse than K above 1 (figure 4)", first > max(others) + 0.1),
        ("all K above 1 work equally well (figure 4)", max(others) - min(others) < 0.05),
        (
            "fewer components than tokens (64 of 50,257) suffice (section 4)",
            found[8] <= found[27] + SURE,
        ),
    ):
        yield Claim(
            claim,
            (SEEN if holds else NOT_SEEN) if learns else NOT_TESTABLE,
            numbers,
            differs,
            ("fig4",),
        )


def two_tokens() -> Claim:
    """A model keeps its quality if the perplexity of its continuations is below twice that of real
    text everywhere, and breaks down if it is above twice that everywhere.
    """
    rows = rows_of("fig5")
    real = {row["prefix"]: row["perplexity"] for row in rows if row["model"] == "real text"}
    if len({*real.values()}) < 2:  # an earlier version judged the prefix as well
        raise KeyError("continuations alone")
    ratios: dict[str, list[float]] = {}
    for row in rows:
        ratios.setdefault(row["model"], []).append(row["perplexity"] / real[row["prefix"]])
    good = [name for name in ratios if max(ratios[name]) < 2 and name != "real text"]
    bad = [name for name in ratios if min(ratios[name]) >= 2]
    flows = [name for name in ratios if name.startswith("Mix")]
    here = where([n for n in flows if n in good], [n for n in flows if n not in good])
    here += f"; the two-token baseline breaks down: {'yes' if 'two-token AR' in bad else 'no'}"
    prefixes = ", ".join(f"{int(n)}" for n in real)
    numbers = f"perplexity of the continuation over real text's, prefix {prefixes}: "
    numbers += "; ".join(
        f"{name} {listed(values, 2)}" for name, values in ratios.items() if name != "real text"
    )
    claim = "patch 2: the flow keeps its quality, the two-token baseline breaks down (figure 5)"
    return Claim(
        claim, here, numbers, "one seed, 32 texts of 256 characters; a judge of our own", ("fig5",)
    )


def refining() -> Claim:
    """Seen where the judge's bits fall after every pass by more than two standard errors of the
    fall.
    """
    texts: dict[str, Rows] = {}
    for row in rows_of("fig6"):
        texts.setdefault(row["model"], []).append(row)
    holds, fails = list[str](), list[str]()
    for model, states in texts.items():
        (holds if all(row["fall"] > 2 * row["fall ±"] for row in states[1:]) else fails).append(
            model
        )
    numbers = "judge's bits in the noise and after every pass: "
    numbers += "; ".join(
        f"{name} {listed([row[JUDGED] for row in rows], 2)}" for name, rows in texts.items()
    )
    claim = (
        "every intermediate state decodes to text that passes refine from coarse to fine (figure 6)"
    )
    differs = "48 samples of 128 characters; K = 27 in every block"
    return Claim(claim, where(holds, fails), numbers, differs, ("fig6",))


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
    return Claim(claim, here, numbers, "the paper does not say which end is layer 0", ("fig7",))


def work_of_blocks() -> Iterator[Claim]:
    """A block works if it takes more off the KL divergence than two standard errors and a
    thousandth of a nat. Appendix C holds if no block leaves its output further from the prior than
    its input, by more than these.
    """
    working, idle, normal, away, gains, divergences = ([] for _ in range(6))
    for (model, reading), states in states_of().items():
        if reading == UP:
            errors = [row["kl_gain ±"] / row["sequences"] ** 0.5 for row in states[1:]]
            taken = [
                (row["kl_gain"], 2 * e + 0.001) for row, e in zip(states[1:], errors, strict=True)
            ]
            (working if all(gain > least for gain, least in taken) else idle).append(model)
            kl = [row["kl"] for row in states]
            (normal if all(gain > -least for gain, least in taken) else away).append(model)
            gains.append(f"{model} {listed([gain for gain, _ in taken], 4)}")
            divergences.append(f"{model} {listed(kl, 2)}")
    numbers = f"nats per token that blocks 1, 2, 3 take off the KL divergence: {'; '.join(gains)}"
    claim, differs = "every block does part of the work", "the paper shows no KL per block"
    yield Claim(claim, where(working, idle), numbers, differs, ("fig7",))
    numbers = f"nats per token from the prior before block 1 and after blocks 1, 2, 3: {'; '.join(divergences)}"
    claim = "every layer drives its output towards the prior (appendix C, [eq. 10b](../math.md))"
    differs = "eq. 9 of the paper asks only the last state to be normal"
    yield Claim(claim, where(normal, away), numbers, differs, ("fig7",))


def quality() -> Claim:
    """Close: within 5 % of the baseline's perplexity and 0.05 of its MAUVE. Behind: 2 % above
    Mix-d's perplexity.
    """
    found = {row["model"]: row for row in rows_of("table6")}
    baseline = found["AR"]
    is_close = found["Mix-d"]["perplexity"] < 1.05 * baseline["perplexity"]
    is_close &= found["Mix-d"]["MAUVE"] > baseline["MAUVE"] - 0.05
    is_behind = found["Mix-1"]["perplexity"] > 1.02 * found["Mix-d"]["perplexity"]
    here = f"{SEEN if is_close else NOT_SEEN} for Mix-d; {SEEN if is_behind else NOT_SEEN} that Mix-1 is behind it"
    values = {
        key: [row[key] for row in found.values() if row[key]]
        for key in ("perplexity", "MAUVE", "entropy")
    }
    numbers = f"{', '.join(found)}: " + "; ".join(f"{key} {listed(x)}" for key, x in values.items())
    claim = "sample quality: Mix-d comes close to the baseline and to real text, Mix-1 less so (table 6)"
    differs = "500 samples of 256 characters, one seed; our judge for GPT-2 Large; Mix-1 starts from the codebook"
    return Claim(claim, here, numbers, differs, ("table6",))


def recovering() -> Iterator[Claim]:
    """Blocks recover what tokens apart in block 1 lose if this costs at most SURE without mixing;
    mixing helps if it gains more than SURE there.
    """
    found = {row["model"]: row["test bpc"] for row in rows_of("in-patch")}
    name = "Mix-1, tokens {} in block 1, channels {}"
    plain, mixed = (
        [found[name.format(t, how)] for t in ("together", "apart")]
        for how in ("as they are", "mixed")
    )
    numbers = (
        f"tokens together, apart in block 1: {listed(plain)}, with channels mixed {listed(mixed)}; "
    )
    numbers += (
        f"Mix-d, whose upper blocks can do nothing, apart: {found['Mix-d, tokens apart']:.3f}"
    )
    differs = "patches of two; layers 1, 1, 4; 1,300 steps, one seed"
    for claim, holds in (
        (
            "later blocks recover dependencies inside a patch (figure 1)",
            plain[1] <= plain[0] + SURE,
        ),
        (
            "channel mixing recovers dependencies inside a patch (figure 1)",
            mixed[1] < plain[1] - SURE,
        ),
    ):
        yield Claim(claim, SEEN if holds else NOT_SEEN, numbers, differs, ("in-patch",))


CLAIMS: tuple[Callable[[], Any], ...] = (
    order_of_families,
    flows_above_the_baseline,
    additions,
    progressive_training,
    six_blocks,
    components,
    two_tokens,
    refining,
    geometry,
    work_of_blocks,
    quality,
    recovering,
)


def table() -> str:
    """The table in Markdown."""
    lines = ["| claim | here | numbers | what differs | table |", "| --- | --- | --- | --- | --- |"]
    for function in CLAIMS:
        found = function()
        for claim in [found] if isinstance(found, Claim) else list(found):
            links = ", ".join(f"[{name}]({name}.md)" for name in claim.tables)
            lines.append(f"| {' | '.join([*claim[:4], links])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write or compare the table."""
    path = HERE / "claims.md"
    text = path.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    written = f"{before}{BEGIN}\n\n{table()}\n{END}{after}"
    if "--check" in sys.argv:
        sys.exit(int(written != text))
    path.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
