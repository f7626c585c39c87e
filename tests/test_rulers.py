"""The rulers of other fields: BLiMP and BrierLM."""

import json
import lzma
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tarflowlm.pretrained import load

PAIRS = [
    ("agreement", "morphology", "The old king was at home.", "The old king were at home."),
    ("agreement", "morphology", "The boys were at home.", "The boys was at home."),
    ("case", "syntax", "He saw the King.", "he saw the king"),
]


@pytest.fixture
def table(tmp_path) -> Path:
    lines = ["UID\tfield\tsentence_good\tsentence_bad", *("\t".join(pair) for pair in PAIRS)]
    path = tmp_path / "pairs.tsv.xz"
    path.write_bytes(lzma.compress("\n".join(lines).encode()))
    return path


def test_pairs_are_read_and_equal_values_are_wrong(script, table, tmp_path):
    blimp = script("benchmarks/blimp")
    pairs = blimp.read_pairs(table, None)
    assert [tuple(pair) for pair in pairs] == PAIRS
    assert len(blimp.read_pairs(table, 1)) == 2
    folder = tmp_path / "data"
    folder.mkdir()
    names = ("UID", "field", "sentence_good", "sentence_bad")
    rows = [json.dumps(dict(zip(names, pair, strict=True))) for pair in PAIRS]
    (folder / "all.jsonl").write_text("\n".join(rows), encoding="utf-8")
    assert blimp.read_pairs(folder, None) == pairs
    # a model of 27 letters reads both sentences of the last pair as the same text
    (score,) = blimp.scores_of(load("english-mini-ar"), [1]).values()
    assert blimp.verdicts(pairs, score)[-1] is False
    (score,) = blimp.scores_of(load("stories-ar"), [1]).values()
    assert blimp.verdicts(pairs[:2], score) == [True, True]


@pytest.mark.slow
def test_a_flow_has_an_exact_value_and_bounds(script, table):
    pytest.importorskip("transformers")
    blimp = script("benchmarks/blimp")
    pairs = blimp.read_pairs(table, None)
    texts = [text for pair in pairs for text in (pair.good, pair.bad)]
    exact, one, many = blimp.scores_of(load("stories"), [1, 4]).values()
    values = torch.tensor([exact(texts), one(texts), many(texts)])
    assert (values[2] >= values[1] - 0.5).all()
    # block 1 with sharp codes is a language model: its bound is nearly tight
    assert (values[0] - values[2]).abs().max() < 1.0
    one_by_one = [exact([text])[0] for text in texts]
    assert values[0].tolist() == pytest.approx(one_by_one, abs=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm_eval")
def test_the_tasks_of_lm_eval_read_local_pairs(script, table, tmp_path, monkeypatch, local_tasks):
    from lm_eval import simple_evaluate, tasks

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    blimp = script("benchmarks/blimp")
    blimp.write_tasks(blimp.read_pairs(table, None), tmp_path / "tasks")
    manager = tasks.TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    found = simple_evaluate("dummy", tasks=["local_blimp"], task_manager=manager)
    assert found["n-samples"]["local_blimp_agreement"]["effective"] == 2
    assert "acc,none" in found["results"]["local_blimp"]


def test_two_samples_estimate_the_brier_score_without_bias(script):
    brier = script("benchmarks/brier")
    law = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    x, other = torch.multinomial(law, 80_000, replacement=True, generator=generator).view(2, -1, 2)
    y = torch.zeros_like(x)
    y[:, 1] = 1
    found = brier.brier(x, other, y)
    assert found[:, 0].mean() == pytest.approx(2 * 0.5 - law.square().sum().item(), abs=0.02)
    both = 2 * 0.5 * 0.3 - law.square().sum().item() ** 2
    assert found[:, 1].mean() == pytest.approx(both, abs=0.02)
    # a model that always says the right words has 100, one that never does has 0
    assert brier.brier_lm(brier.brier(y, y, y)).item() == pytest.approx(100)
    assert brier.brier_lm(brier.brier(y + 1, y + 1, y)).item() == 0


@pytest.mark.nightly
@pytest.mark.slow
def test_brier_lm_of_shipped_models(script, capsys):
    brier = script("benchmarks/brier")
    brier.main(["english-mini-ar", "english-mini", "--contexts", "32"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| `english-mini-ar`",
        "| `english-mini`",
    ]
    assert "<=" in lines[-1]
    assert float(lines[-1].split(" | ")[-1].split(" ±")[0]) > 20


@pytest.mark.slow
def test_the_models_of_peers_are_measured_beside_ours(script, table, tmp_path, capsys):
    pytest.importorskip("transformers")
    peers, blimp, brier = (script(f"benchmarks/{name}") for name in ("peers", "blimp", "brier"))
    config = load("english-mini-ar").config
    with pytest.raises(SystemExit, match="no weights of peers"):
        peers.load_peers(tmp_path, config)
    for name in ("gpt2", "masked") if find_spec("flow_matching") else ("gpt2",):
        torch.manual_seed(0)
        torch.save(peers.PEERS[name](config).model.state_dict(), tmp_path / f"{name}.pt")
    found = peers.load_peers(tmp_path, config)
    given = torch.randint(27, (3, 5))
    for peer in found.values():
        after = peer.go_on(given, 4)
        assert after.shape == (3, 4)
        assert after.max() < 27
    if masked := found.get("masked"):
        bound, same = masked.nats_in_order(given, 8).mean(), masked.nats(given, 64).mean()
        assert bound.item() == pytest.approx(same.item(), rel=0.3)
    pairs = blimp.read_pairs(table, None)[:2]
    (score,) = blimp.scores_of_peers(tmp_path, load("english-mini-ar"))["gpt2"].values()
    texts = [pair.good for pair in pairs]
    assert score(texts) == pytest.approx([score([text])[0] for text in texts], abs=1e-3)
    brier.main(["english-mini-ar", "--peers", str(tmp_path), "--contexts", "2"])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == ["english-mini-ar", *found]
