"""What a preset should give: the shipped curves, what training shows of them, and the table."""

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from helpers import metrics_of
from reproduction.published import (
    CURVES,
    ROOT,
    all_published,
    leaderboard,
    of_run,
    read_measured,
    table,
)
from tarflowlm.errors import UserError
from tarflowlm.presets import preset, with_blocks
from tarflowlm.terminal.bars import ProgressReporter
from tarflowlm.training.log import MetricsLog, published
from tarflowlm.training.resolve import settled


@pytest.fixture(scope="module")
def found():
    return all_published()


def test_the_shipped_curves_are_those_of_records_and_models(found):
    shipped = json.loads(CURVES.read_text(encoding="utf-8"))
    assert {"mini-ar", "mini-mixd", "english-small", "english-small-ar"} <= shipped.keys()
    assert len(CURVES.read_bytes()) < 10_000
    for name, one in found.items():
        # the log of a run may have more points than its record
        assert set(one.curve) <= set(map(tuple, shipped[name])), (
            f"{name}: run python -m reproduction.published"
        )


def test_the_tables_of_the_documents_are_made_of_them(found):
    tables = {"faq": table(found, read_measured()), "leaderboard": leaderboard()}
    for name, lines in tables.items():
        page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
        assert "\n".join(lines) in page, f"{name}.md: python -m reproduction.published prints it"


def test_a_run_of_a_preset_sees_the_published_one_and_a_changed_run_does_not(tmp_path):
    run = settled(preset("mini-ar"))
    run = replace(run, seed=3, model=replace(run.model, vocab_size=27))
    curve = published(run)
    assert curve[1_024_000] == pytest.approx(2.0165)
    for changed in (
        replace(run, model=replace(run.model, layers=5)),
        replace(run, train=replace(run.train, minutes=3.0)),
        replace(run, optim=replace(run.optim, lr=0.1)),
        replace(run, data=replace(run.data, source="/a/text.txt")),
        replace(run, parent="english-mini"),
        replace(run, name="own"),
    ):
        assert published(changed) == {}
    screen = io.StringIO()
    reporter = ProgressReporter(console=Console(file=screen, width=200), clock=lambda: 0.0)
    reporter.stage("stage 1/1", 2600)
    log = MetricsLog(reporter)
    log.open(tmp_path)
    log.track(run, tmp_path, resume_at=0)
    line = {"split": "valid", "step": 500, "tokens": 1_024_000, "bpc": 2.1}
    log.write(line)
    details = reporter.progress.tasks[-1].fields["details"]
    assert details["valid"] == "valid 2.100 (published: 2.02 here)"
    log.write(line | {"step": 600, "tokens": 1_228_800})
    assert reporter.progress.tasks[-1].fields["details"]["valid"] == "valid 2.100"
    log.close()
    assert metrics_of(tmp_path)[0] == line  # the file of the run has only its own numbers


def test_a_finished_run_gives_its_log(runs, tmp_path):
    ((name, one),) = of_run(runs["baseline"]).items()
    assert name == "tiny"
    assert one.curve[-1] == (one.summary["tokens"], round(one.summary["stage_valid_bpc"][-1], 4))
    assert len(one.curve) > 1
    with pytest.raises(UserError, match="not a run"):
        of_run(tmp_path)


def test_runs_of_other_stages_have_no_published_curve():
    """Also a run that a block has left."""
    own = settled(preset("mini-mixd"))
    assert published(own)
    assert published(with_blocks(own, (0, 1))) == {}
    joint = replace(own.train, mode="joint", stage_steps=(7,))
    assert published(replace(own, train=joint, model=replace(own.model, starts="last"))) == {}
