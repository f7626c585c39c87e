"""The window sampler covers, resumes and shares out its stream exactly; evaluation windows are in
order.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tarflowlm.data import WindowSampler, eval_windows, sliding_windows, windows
from tarflowlm.errors import UserError

TOKENS = np.arange(1003, dtype=np.uint16)


def sampler(**changes) -> WindowSampler:
    arguments = {"tokens": TOKENS, "window": 10, "batch": 4, "seed": 7} | changes
    return WindowSampler(arguments.pop("tokens"), **arguments)


def draw(source: WindowSampler, count: int) -> torch.Tensor:
    return torch.stack([source.next() for _ in range(count)])


def test_batches_are_windows_of_the_text():
    batch = sampler().next()
    assert batch.dtype == torch.int64
    assert batch.shape == (4, 10)
    assert (batch == batch[:, :1] + torch.arange(10)).all()  # TOKENS counts up


def test_an_epoch_sees_no_token_twice_and_all_but_the_ends():
    source = sampler(batch=1)
    seen: dict[int, list[torch.Tensor]] = {}
    while source.epoch < 3:
        batch = source.next()
        seen.setdefault(source.epoch, []).append(batch)
    offsets = set()
    for epoch in range(3):
        tokens = torch.cat(seen[epoch]).flatten()
        assert len(tokens.unique()) == len(tokens)
        assert len(tokens) > len(TOKENS) - 2 * 10
        offsets.add(int(tokens.min()))
        assert int(tokens.min()) < 10
    assert len(offsets) > 1
    assert not torch.equal(torch.cat(seen[0])[:50], torch.cat(seen[1])[:50])


def test_the_stream_depends_on_the_seed_alone():
    first = draw(sampler(), 60)
    assert torch.equal(first, draw(sampler(), 60))
    assert not torch.equal(first, draw(sampler(seed=8), 60))


@pytest.mark.parametrize("steps", [0, 1, 24, 25, 26, 60])
def test_resuming_equals_never_stopping(steps):
    whole = sampler()
    for _ in range(steps):
        whole.next()
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = sampler()
    draw(resumed, 3)
    resumed.load_state_dict(state)
    assert torch.equal(draw(resumed, 40), draw(whole, 40))


def test_ranks_share_out_the_global_batch():
    whole = draw(sampler(batch=8), 30)
    ranks = [draw(sampler(batch=2, rank=r, world=4), 30) for r in range(4)]
    assert torch.equal(torch.cat(ranks, dim=1), whole)
    starts = torch.cat(ranks, dim=1)[:12, :, 0].flatten()  # 96 of about 100 windows
    assert len(starts.unique()) == len(starts)


def test_resuming_with_another_number_of_ranks():
    one = sampler(batch=8)
    draw(one, 20)
    pair = [sampler(batch=4, rank=r, world=2) for r in range(2)]
    for member in pair:
        member.load_state_dict(one.state_dict())
    expected = draw(one, 20)
    assert torch.equal(torch.cat([draw(member, 20) for member in pair], dim=1), expected)
    assert pair[0].state_dict() == pair[1].state_dict() == one.state_dict()


def test_documents_are_shuffled_whole_with_an_end_before_the_first():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 9, 999)
    tokens[rng.choice(999, 40, replace=False)] = 0
    tokens[-1] = 0
    texts = {tuple(text) for text in np.split(tokens, np.flatnonzero(tokens == 0) + 1) if len(text)}
    orders = []
    for epoch in range(2):
        source = sampler(tokens=tokens, window=1, batch=1, end=0)
        source.load_state_dict({**source.state_dict(), "epoch": epoch})
        order = source._order
        read = np.empty(1000, dtype=np.int64)
        read[order] = [int(source.next()) for _ in range(1000)]
        assert read[0] == 0
        found = np.split(read[1:], np.flatnonzero(read[1:] == 0) + 1)
        assert {tuple(text) for text in found if len(text)} == texts
        orders.append(read.tolist())
    assert orders[0] != orders[1]


def test_the_stream_is_the_one_of_published_runs():
    """Those that are trained again must see the same windows."""
    tokens = np.random.default_rng(0).integers(0, 60, 20_000).astype(np.uint16)
    digest = hashlib.sha256()
    for end in (None, 3):
        digest.update(
            draw(sampler(tokens=tokens, window=64, batch=32, end=end), 60).numpy().tobytes()
        )
    assert digest.hexdigest() == "497b70cf647c5365b0edeb8510f0252fccf14a7dbd37bb607fe6e0cf75a49fba"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_mapped_text_is_read_without_pages_around_a_window(tmp_path):
    TOKENS.tofile(tmp_path / "tokens.bin")
    source = sampler(tokens=np.asarray(np.memmap(tmp_path / "tokens.bin", np.uint16, "r")))
    assert torch.equal(draw(source, 30), draw(sampler(), 30))
    mapped = Path("/proc/self/smaps").read_text().split(f"{tmp_path}/tokens.bin\n")[1]
    flags = next(line for line in mapped.splitlines() if line.startswith("VmFlags:"))
    assert "rr" in flags.split()  # random reads


def test_of_a_large_text_some_windows_are_evaluated(monkeypatch, caplog):
    monkeypatch.setattr(windows, "EVALUATED", 500)
    with caplog.at_level("INFO"):
        assert len(eval_windows(TOKENS, 10)) == 50
        assert len(sliding_windows(TOKENS, 10, 5)[0]) == 100
    assert "50 windows" in caplog.text
    assert len(eval_windows(TOKENS, 10, limit=90)) == 90


def test_states_of_another_stream_are_refused():
    for changes in ({"seed": 8}, {"window": 11}, {"tokens": TOKENS[:-1]}):
        with pytest.raises(UserError, match="cannot resume the data stream"):
            sampler(**changes).load_state_dict(sampler().state_dict())


def test_eval_windows_are_consecutive_and_with_a_limit_spread_evenly():
    windows = eval_windows(TOKENS, 10)
    assert windows.dtype == torch.int64
    assert torch.equal(windows.flatten(), torch.arange(1000))
    assert eval_windows(TOKENS, 10, limit=4)[:, 0].tolist() == [0, 250, 500, 750]
    assert len(eval_windows(TOKENS, 10, limit=500)) == 100


@pytest.mark.parametrize("stride", [1, 4, 9, 10])
def test_sliding_windows_cover_the_text_once(stride):
    windows, context = sliding_windows(TOKENS, 10, stride)
    scored = torch.cat([window[head:] for window, head in zip(windows, context, strict=True)])
    assert torch.equal(scored, torch.arange(len(scored)))
    assert len(TOKENS) - stride < len(scored) <= len(TOKENS)
    assert context.tolist() == [0] + [10 - stride] * (len(windows) - 1)


@pytest.mark.parametrize(
    ("window", "stride", "limit"),
    [(10, -1, None), (10, 11, None), (0, 0, None), (10, 10, 0), (2000, 1, None)],
)
def test_impossible_windows_are_refused(window, stride, limit):
    with pytest.raises(
        UserError, match=f"stride {stride}: .* {window} tokens|windows 0|has 1,003 tokens"
    ):
        sliding_windows(TOKENS, window, stride, limit)
