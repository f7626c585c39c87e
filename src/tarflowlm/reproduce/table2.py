"""Table 2: the families against the discrete baseline."""

from collections.abc import Sequence

from tarflowlm.evaluation.likelihood import Likelihood
from tarflowlm.reproduce.measures import dots, likelihood, summary_row
from tarflowlm.reproduce.recipe import Finished, Recipe, Row, Settings, Training, trainings
from tarflowlm.runs.presets import preset

FAMILIES = {"AR": "ar", "affine": "affine", "Mix-1": "mix1", "Mix-d": "mixd"}
PAPER = {
    "text8": {"AR": 1.23, "affine": 1.54, "Mix-1": 1.37, "Mix-d": 1.30},
    "owt": {"AR": 17.54, "affine": 148.21, "Mix-1": 27.11, "Mix-d": 22.64},
}
"""Bits per character on TEXT8's test text, perplexity on OpenWebText's validation text."""
WINDOWS, SAMPLES = 128, 16
SECOND_WINDOWS = 1024


def plan(settings: Settings) -> list[Training]:
    if settings.scale == "mini":
        return trainings(settings, {label: preset(f"mini-{kind}") for label, kind in FAMILIES.items()})
    runs = {f"{label}, {corpus}": preset(f"{corpus}-{kind}") for corpus in PAPER for label, kind in FAMILIES.items()}
    return trainings(settings, runs)


def measure(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    rows = []
    for done in finished:
        row = summary_row(done)
        checkpoint = done.load()
        weighted = likelihood(
            checkpoint,
            done.tokens(checkpoint),
            windows=WINDOWS,
            samples=SAMPLES,
            progress=done.counting(f"windows, {SAMPLES} samples each"),
        )
        row |= {f"{WINDOWS} windows: bpc": _elbo_bpc(weighted), f"iw-{SAMPLES} bpc": weighted.bpc}
        if settings.second_text is not None:
            second = done.tokens(checkpoint, source=settings.second_text)
            row["second text bpc"] = likelihood(
                checkpoint, second, windows=SECOND_WINDOWS, progress=done.counting("windows of the second text")
            ).bpc
        label = done.training.label.split(",")[0]
        corpora = [done.training.run.name.split("-")[0]] if settings.scale == "paper" else list(PAPER)
        row |= {f"paper, {corpus}": PAPER[corpus][label] for corpus in corpora}
        rows.append(row)
    return rows


def _elbo_bpc(result: Likelihood) -> float:
    """Bits per character of the ELBO over the same windows; the exact value of the baseline."""
    elbo = result.nats_per_token if result.elbo is None else result.elbo
    return result.bpc * elbo / result.nats_per_token


RECIPE = Recipe(
    name="table2",
    title="Likelihood of the families",
    claim="The paper: bits per character on TEXT8 (AR 1.23, Mix-d 1.30, Mix-1 1.37, affine 1.54) and perplexity "
    "on OpenWebText (17.54, 22.64, 27.11, 148.21) put the families in the order Mix-d, Mix-1, affine, all "
    "above the baseline.",
    plan=plan,
    measure=measure,
    draw=lambda figure, rows: dots(figure, rows, "test bpc", unit="bits per character (bounds, AR exact)"),
)
