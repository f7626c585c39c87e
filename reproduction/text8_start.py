"""The families on the start of the paper's text."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from reproduction import tables
from reproduction.lengths import lengthened, measure_lengths
from reproduction.recipe import RUN_DETAILS, Finished, Recipe, Row, Training, trainings, without
from reproduction.settings import Settings
from tarflowlm.config import DataConfig, TokenizerConfig
from tarflowlm.data.text_files import Text8
from tarflowlm.errors import UserError
from tarflowlm.files import replacing, sources_dir

CHARACTERS = 3_000_000
SHA256 = "3d70b4c8ba7ef3dccce164db77b68be402fbbcff3b1323d2e675007da1ba8a91"
PAPER = "over AR in the paper"


def text_path() -> Path:
    """The file of the text, in the cache."""
    return sources_dir() / "text8-start"


def obtain(settings: Settings) -> None:
    """Cut the text from the start of TEXT8, which is downloaded, unless it is there.

    UserError where neither can be had, or the file holds another text.
    """
    path = text_path()
    if settings.data is not None:
        return  # another text
    if not path.exists():
        text8 = Text8()
        try:
            text8.obtain()
        except UserError as error:
            raise UserError(f"{error}, or its first {CHARACTERS:,} characters as {path}") from None
        with replacing(path) as temporary:
            temporary.write_bytes(text8.path.read_bytes()[:CHARACTERS])
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise UserError(f"{path} is not the start of TEXT8: remove it")


def plan_text8_start(settings: Settings) -> list[Training]:
    """Every family at half of its steps, one pass over the text."""
    runs = {}
    for label, kind in tables.FAMILIES.items():
        run = lengthened(settings.preset(kind, "text8"), "1/2")
        if settings.data is None:
            letters = TokenizerConfig(normalize="none")
            text = DataConfig(source=str(text_path()), tokenizer=letters)
            run = replace(run, name=f"{run.name}-text8-start", data=text)
        runs[label] = run
    return trainings(settings, runs)


def measure_text8_start(settings: Settings, finished: Sequence[Finished]) -> list[Row]:
    """The bounds over the baseline's, and the same in the paper."""
    published = tables.PAPER_LIKELIHOOD["text8"]
    rows = measure_lengths(settings, finished)
    return [row | {PAPER: published[row["model"]] / published["AR"]} for row in rows]


TEXT8_START = Recipe(
    name="text8-start",
    mini_only=True,
    title="On the start of TEXT8",
    claim=(
        "The paper: on TEXT8 Mix-d has 1.057, Mix-1 1.114 and affine 1.252 times the bits of the "
        f"baseline. (Here the text is the first {CHARACTERS:,} characters of TEXT8, 3 % of it, all "
        "inside the usual training part. The first 90 % of these are for training, which sees them "
        "once, the last 5 % for the test. So the ratios compare with the paper's, the bits with no "
        f"published figure. What iw-16 takes off over {tables.WINDOWS} windows is subtracted from "
        "the bound of the test.)"
    ),
    plan=plan_text8_start,
    measure=measure_text8_start,
    table=partial(without, columns=(*RUN_DETAILS, *tables.WINDOWED)),
    seeds=2,
    obtain=obtain,
)
