"""A model of documents: it learns that they end, begins at a beginning, and stops at an end."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tarflowlm
from helpers import stack
from tarflowlm.config import DataConfig, OptimConfig, RunConfig, TrainConfig
from tarflowlm.data import CharTokenizer
from tarflowlm.errors import Progress
from tarflowlm.generation.requested import plans
from tarflowlm.generation.texts import Samples, write_texts
from tarflowlm.model_config import BaselineConfig, FlowConfig, TransformerConfig
from tarflowlm.requests import Writing

STORIES = ("The cat sat.", "A dog ran off!", "We sang.")
TRUNK = TransformerConfig(width=32, num_heads=2)
CONTEXT = 32


@pytest.fixture(scope="module", params=["baseline", "flow"])
def lm(request, tmp_path_factory) -> tarflowlm.Pretrained:
    """A model that has learnt the STORIES, from the lines of a file."""
    folder = tmp_path_factory.mktemp("stories")
    rows = [json.dumps({"text": f"{STORIES[n % 3]}{'?' * (n // 3 % 2)}"}) for n in range(300)]
    (folder / "stories.jsonl").write_text("\n".join(rows))
    model = BaselineConfig(context=CONTEXT, trunk=TRUNK, layers=2)
    if request.param == "flow":
        blocks = stack(("mixd", "mix1"), (2, 1), (0, 2))
        model = FlowConfig(
            context=CONTEXT, latent_dim=8, trunk=TRUNK, blocks=blocks, reads_tokens=True
        )
    run = RunConfig(
        name="stories",
        model=model,
        data=DataConfig(source=str(folder / "stories.jsonl")),
        optim=OptimConfig(lr=1e-2, codebook_lr_scale=0.5),
        train=TrainConfig(
            stage_steps=(120,) if request.param == "baseline" else (150, 2),
            batch_size=16,
            evaluate_windows=2,
            precision="float32",
        ),
    )
    return tarflowlm.train(run, folder / "run")


ENDED = {f"{story}{more}" for story in STORIES for more in ("", "?")}


@pytest.mark.slow
def test_samples_begin_and_end_as_documents_do(lm):
    assert lm.tokenizer.end == lm.config.vocab_size - 1
    texts = lm.write(num=30, temperature=0.5)
    assert sum(text in ENDED for text in texts) > 24
    assert lm.write(num=4, temperature=0.5) == texts[:4]
    assert "".join(lm.stream(temperature=0.5)) == texts[0]
    written = next(Samples(Writing(num=8, temperature=0.5), lm).batches())
    assert written.texts == texts[:8]
    assert [stream.has_ended for stream in written.streams] == [
        len(text) < 31 for text in texts[:8]
    ]
    # a prompt is continued to the end of its document
    assert lm.write("A dog r", temperature=0.3) in {"A dog ran off!", "A dog ran off!?"}
    assert lm.write(num=5, temperature=0.5, stop=" ")[0] in {"The", "A", "We"}


@pytest.mark.slow
def test_without_stopping_the_next_document_follows(lm):
    for length in (CONTEXT - 1, CONTEXT, 3 * CONTEXT):
        request = Writing(length=length, stop_at_end=False, temperature=0.5)
        written = next(Samples(request, lm).batches())
        assert written.generation.tokens.shape == (1, length)
        (text,) = written.texts
        first, *others = text.split("\n\n")
        assert others
        assert lm.write(length=length, temperature=0.5) == first


class Counting(Progress):
    """Counts tokens."""

    def __init__(self) -> None:
        self.done = 0

    def advance(self, count=1):
        self.done += count


@pytest.mark.slow
def test_no_time_is_spent_behind_the_last_end(lm):
    counts = {}
    for stop_at_end in (True, False):
        progress = Counting()
        request = Writing(length=200, stop_at_end=stop_at_end, temperature=0.5, num=3)
        write_texts(request, lm, progress)
        counts[stop_at_end] = progress.done
    assert 3 * counts[True] < counts[False]


@pytest.mark.slow
def test_blanks_are_no_ends(lm):
    samples = Samples(Writing(template="The cat sat._" * 2, num=20), lm)
    for written in samples.batches():
        assert not (written.generation.tokens == lm.tokenizer.end).any()


@pytest.mark.slow
def test_passes_stop_at_the_end(lm, run_json):
    if lm.model.is_exact:
        pytest.skip("no passes")
    found = run_json("sample", lm.directory, "--num", 3, "--temperature", 0.5, "--passes")
    for sample in found["samples"]:
        assert sample["ended"] == (len(sample["text"]) < CONTEXT - 1)
        assert sample["passes"][-1] == sample["text"]
    shown = run_json("sample", lm.directory, "--temperature", 0.5, "--no-stop", "--length", 60)
    assert "\n\n" in shown["samples"][0]["text"]
    assert not shown["samples"][0]["ended"]


@pytest.mark.slow
def test_ends_count_bits_and_no_characters(lm, run_json):
    found = run_json("eval", lm.directory, "--split", "all", "--windows", 4)
    assert found["characters"] < found["tokens"]
    total = found["nats_per_token"] * found["tokens"] / torch.log(torch.tensor(2.0)).item()
    assert found["bpc"] == pytest.approx(total / found["characters"])


def test_a_model_without_ends_begins_anywhere(trained: Path):
    lm = tarflowlm.load(trained)
    (plan,) = plans(Writing(), lm)
    assert (plan.lead, plan.end, plan.num_tokens) == (0, None, lm.config.context)
    ended = replace(lm, tokenizer=CharTokenizer(lm.tokenizer.alphabet[:-1], "none", has_end=True))
    (plan,) = plans(Writing(), ended)
    assert plan.pieces[0].tolist() == [plan.end] == [26]
    assert (plan.lead, plan.num_tokens) == (1, lm.config.context)
