"""What a preset should give: the published curves, a run beside them, and the tables."""

import json
from dataclasses import replace

import pytest

from reproduction.beside import beside, published
from reproduction.published import (
    CURVES,
    ROOT,
    all_published,
    leaderboard,
    of_run,
    read_measured,
    table,
)
from tarflowlm.data import build_tokenizer
from tarflowlm.errors import UserError
from tarflowlm.presets import preset, with_blocks
from tarflowlm.runs.checkpoint import write_run
from tarflowlm.training.configure import settled


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


def test_a_run_of_a_preset_sees_the_published_one_and_a_changed_run_does_not():
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


def test_a_run_beside_the_published_one(tmp_path):
    run = settled(preset("mini-ar"))
    write_run(tmp_path, run, build_tokenizer(run.data.tokenizer))
    points = {512_000: 2.2, 1_024_000: 2.1, 2_048_000: 1.95}
    train = {"split": "train", "step": 1, "tokens": 2048, "block": 1, "bpc": 4.0}
    lines = [train | {"tokens_per_second": 1000.0}]
    lines += [
        {"split": "valid", "step": at // 2048, "tokens": at, "bpc": bpc}
        for at, bpc in points.items()
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    assert beside(tmp_path) == [(1_024_000, 2.1, 2.0165), (2_048_000, 1.95, 1.9128)]
    write_run(tmp_path, replace(run, name="own"), build_tokenizer(run.data.tokenizer))
    with pytest.raises(UserError, match="no published run"):
        beside(tmp_path)
