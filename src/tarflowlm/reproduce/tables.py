"""Tables 2 and 6 of the paper, likelihood and sample quality of the model families; and results on
disk: a CSV, a plot, an HTML page, and Markdown with everything needed to repeat them.
"""

import csv
import io
import platform
import re
import shlex
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tarflowlm.data import cached_corpus, eval_windows, load_tokenizer
from tarflowlm.evaluation.likelihood import Likelihood, evaluate
from tarflowlm.evaluation.quality import (
    PAPER_SAMPLES,
    SamplingConfig,
    TextStatistics,
    measure_quality,
)
from tarflowlm.files import replacing, sha256_of
from tarflowlm.presets import preset
from tarflowlm.reproduce.recipe import (
    Finished,
    Recipe,
    Row,
    Settings,
    Training,
    markdown_table,
    names_of,
    trainings,
)
from tarflowlm.reproduce.states import judge_of, judge_training, plot_models, summary_row
from tarflowlm.runs.checkpoint import CONFIG, WEIGHTS, Checkpoint
from tarflowlm.views.style import Figure, render

FAMILIES = {"AR": "ar", "affine": "affine", "Mix-1": "mix1", "Mix-d": "mixd"}
PLAIN = "Mix-1, plain start as in the paper"
MINI_VARIANTS = {PLAIN: "mix1-plain", "Mix-d with two layers more": "mixd-deep"}
"""Beside the families at mini scale, where Mix-1 starts from the codebook."""
PAPER_LIKELIHOOD = {"text8": {"AR": 1.23, "affine": 1.54, "Mix-1": 1.37, "Mix-d": 1.30}}
PAPER_LIKELIHOOD |= {"owt": {"AR": 17.54, "affine": 148.21, "Mix-1": 27.11, "Mix-d": 22.64}}
"""Bits per character on the test split of TEXT8, perplexity on the validation split of
OpenWebText.
"""
WINDOWS, SAMPLES = 128, 16  # windows and posterior samples of the importance-weighted bound
SECOND_WINDOWS = 1024

JUDGED_FAMILIES = ("AR", "Mix-1", "Mix-d")
MINI_SAMPLES = 500
PAPER_QUALITY: dict[str, dict[str, float]] = {  # on OpenWebText, by GPT-2 Large
    "AR": {"perplexity": 12.1, "MAUVE": 0.76, "entropy": 5.22},
    "Mix-1": {"perplexity": 20.7, "MAUVE": 0.47, "entropy": 5.58},
    "Mix-d": {"perplexity": 14.3, "MAUVE": 0.68, "entropy": 5.13},
    "real text": {"perplexity": 14.7, "MAUVE": 1.0, "entropy": 5.44},
}
OTHER_QUALITY = (
    "MDLM with 1,024 steps, in the paper's table: perplexity 51.3, MAUVE 0.042, entropy 5.46."
)


def plan_table2(settings: Settings) -> list[Training]:
    """Every family; at mini scale also two variants of them, at paper scale on both corpora."""
    if settings.scale == "mini":
        kinds = (FAMILIES | MINI_VARIANTS).items()
        return trainings(settings, {label: preset(f"mini-{kind}") for label, kind in kinds})
    every = [
        (label, kind, corpus) for corpus in PAPER_LIKELIHOOD for label, kind in FAMILIES.items()
    ]
    return trainings(
        settings,
        {f"{label}, {corpus}": preset(f"{corpus}-{kind}") for label, kind, corpus in every},
    )


def measure_table2(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """Test likelihood, importance-weighted bound, the likelihood of a second text, and the paper's
    numbers.
    """
    rows = []
    for done in finished:
        row, checkpoint = summary_row(done), done.load()
        weighted = _likelihood(done, checkpoint, None, WINDOWS, SAMPLES)
        # over the same windows; the exact value of the baseline
        elbo = weighted.nats_per_token if weighted.elbo is None else weighted.elbo
        row[f"{WINDOWS} windows: bpc"] = weighted.bpc * elbo / weighted.nats_per_token
        row[f"iw-{SAMPLES} bpc"] = weighted.bpc
        if settings.second_text is not None:
            row["second text bpc"] = _likelihood(
                done, checkpoint, settings.second_text, SECOND_WINDOWS, 1
            ).bpc
        # the family; a deeper model belongs to none
        label = done.training.label.split(",")[0]
        corpora = (
            [done.training.run.name.split("-")[0]]
            if settings.scale == "paper"
            else list(PAPER_LIKELIHOOD)
        )
        row |= {f"paper, {corpus}": PAPER_LIKELIHOOD[corpus].get(label) for corpus in corpora}
        rows.append(row)
    return rows


def _likelihood(
    done: Finished, checkpoint: Checkpoint, source: str | None, windows: int, samples: int
) -> Likelihood:
    """The bound over evenly spaced windows of the run's test split, or of the text `source`."""
    some = eval_windows(done.tokens(checkpoint, source), checkpoint.run.model.context, windows)
    text, characters = (
        "test split" if source is None else "second text",
        checkpoint.tokenizer.characters_per_token,
    )
    progress = done.stage(f"windows of the {text}", len(some))
    return evaluate(
        checkpoint.model, some, torch.from_numpy(characters), samples=samples, progress=progress
    )


def plan_table6(settings: Settings) -> list[Training]:
    """The three families that the paper judges, and the judge."""
    runs = {label: settings.preset(FAMILIES[label], "owt") for label in JUDGED_FAMILIES}
    return trainings(settings, runs) + judge_training(settings)


def measure_table6(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """Quality of samples of each model and of real text, and the paper's numbers."""
    judge, models = judge_of(settings, finished)
    config = SamplingConfig(num=MINI_SAMPLES if settings.scale == "mini" else PAPER_SAMPLES)
    rows: list[Row] = []
    for done in models:
        checkpoint = done.load()
        text = eval_windows(done.tokens(checkpoint), checkpoint.run.model.context, config.num)
        options: dict[str, Any] = {
            "trained_on": checkpoint.run.data.source,
            "progress": done.progress,
        }
        result = measure_quality(
            checkpoint.model, checkpoint.tokenizer, judge, text, config, **options
        )
        rows.append(
            _quality_row(done.training.label, done.training.run.seed, result.samples, result.mauve)
        )
    rows.append(_quality_row("real text", None, result.text, None))
    how = f"{config.num} samples of {result.length} tokens, decoder auto, {result.dtype}, temperature 1, seed 0"
    return [row | {"judge": judge.name, "samples": how} for row in rows]


def _quality_row(label: str, seed: int | None, s: TextStatistics, mauve: float | None) -> Row:
    row = {
        "model": label,
        "seed": seed,
        "perplexity": s.perplexity,
        "MAUVE": mauve,
        "entropy": s.entropy,
    }
    row |= {
        "word entropy": s.word_entropy,
        "distinct 2-grams": s.distinct_2,
        "repeated 4-grams": s.repetition,
    }
    return row | {f"paper, {name}": value for name, value in PAPER_QUALITY[label].items()}


TABLE2 = Recipe(
    name="table2",
    title="Likelihood of the families",
    claim="The paper: bits per character on TEXT8 (AR 1.23, Mix-d 1.30, Mix-1 1.37, affine 1.54) and perplexity "
    "on OpenWebText (17.54, 22.64, 27.11, 148.21) put the families in the order Mix-d, Mix-1, affine, all above "
    "the baseline. (All models have the same number of Transformer layers, except the one with two more. Our figures "
    "are those of the test part; the paper's perplexities are of the validation split.)",
    plan=plan_table2,
    measure=measure_table2,
    seeds=2,
    clear=(PLAIN,),
    draw=partial(plot_models, label="bits per character (bounds, AR exact)"),
)

TABLE6 = Recipe(
    name="table6",
    title="Sample quality",
    claim="The paper: on OpenWebText, judged by GPT-2 Large, Mix-d comes close to the baseline and to real text in "
    "perplexity, MAUVE and entropy; Mix-1 less so.",
    plan=plan_table6,
    measure=measure_table6,
    hidden=("judge", "samples"),
    needs=(("mauve", "quality"),),
    draw=partial(plot_models, column="perplexity", label="generative perplexity"),
    text=lambda _settings, _finished, rows: (
        f"Judge {rows[0]['judge']}; {rows[0]['samples']}. {OTHER_QUALITY}\n"
    ),
)


def write_results(
    recipe: Recipe,
    settings: Settings,
    rows: Sequence[Row],
    finished: Sequence[Finished],
    *,
    command: Sequence[str],
) -> list[Path]:
    """Write NAME.csv, NAME.md and, if the recipe has them, a plot NAME.png and a page NAME.html;
    returns their paths. `command` is printed as what made them.
    """
    csv_file, plot, page, markdown = (
        settings.out / f"{recipe.name}.{kind}" for kind in ("csv", "png", "html", "md")
    )
    written = [_write(csv_file, _csv(rows))]
    if recipe.draw is not None:
        _plot(plot, recipe, rows)
        written.append(plot)
    if recipe.page is not None:
        written.append(_write(page, recipe.page(rows)))
    parts = [
        f"# {recipe.title}\n",
        f"{recipe.claim}\n",
        markdown_table(recipe.table(rows), recipe.hidden),
        f"![{recipe.title}]({plot.name})\n" if recipe.draw is not None else "",
        f"As a page: [{page.name}]({page.name}).\n" if recipe.page is not None else "",
        recipe.text(settings, finished, rows) if recipe.text is not None else "",
        _provenance(settings, finished, command),
    ]
    return [*written, _write(markdown, "\n".join(part for part in parts if part))]


def _write(path: Path, text: str) -> Path:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _csv(rows: Sequence[Row]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names_of(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _plot(path: Path, recipe: Recipe, rows: Sequence[Row]) -> None:
    def draw(figure: Figure) -> None:
        assert recipe.draw is not None
        recipe.draw(figure, rows)
        figure.suptitle(recipe.title, fontsize=10, x=0.01, ha="left")

    render(draw, path, width=recipe.size[0], height=recipe.size[1])


def _provenance(settings: Settings, finished: Sequence[Finished], command: Sequence[str]) -> str:
    lines = ["## How it was made\n", f"```\n{shlex.join(command)}\n```\n"]
    lines += [
        "| run, -s: seed | steps | seconds | config.json | model.safetensors |",
        f"|{' --- |' * 5}",
    ]
    for done in finished:
        hashes = [sha256_of(done.directory / name)[:12] for name in (CONFIG, WEIGHTS)]
        counts = [f"{done.summary[name]:,.0f}" for name in ("steps", "seconds")]
        lines.append(f"| {' | '.join([done.training.name, *counts, *hashes])} |")
    versions = f"tarflowlm {version('tarflowlm')}, PyTorch {torch.__version__}, Python {platform.python_version()}"
    texts = set()
    for done in finished:
        source = done.summary["source"]
        files = cached_corpus(source, load_tokenizer(done.directory)).meta["files"]
        digests = ", ".join(record["sha256"][:12] for record in files[:3])
        more = f" and {len(files) - 3} more files" if len(files) > 3 else ""
        texts.add(f"{Path(source).name} {digests}{more}")
    lines.append(f"\nHashes are the first 12 digits of sha256. Texts: {'; '.join(sorted(texts))}.")
    lines.append(f"Machine: {_hardware(settings.device)}; {versions}.\n")
    return "\n".join(lines)


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")  # of Linux
    text = cpus.read_text(encoding="utf-8") if cpus.exists() else ""
    found = re.search(r"^model name\s*: *(.*)", text, re.MULTILINE)
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{name}, {(n := torch.get_num_threads())} thread{'s' * (n != 1)}, {device.type}"
