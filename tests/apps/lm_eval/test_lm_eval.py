"""lm-evaluation-harness itself, on tasks of its own in local files: nothing is fetched.

Importing it takes longer than a fast test may.
"""

import json
import math
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

import tarflowlm
from helpers import tiny_ar, tiny_flow
from tarflowlm.data.prompts import read
from tarflowlm.errors import UserError
from tarflowlm_apps.lm_eval.register import how_to_continue, meaning, register
from tarflowlm_apps.transformers_export.checkpoint import save_causal_lm

pytestmark = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm_eval")

TEXT = " ".join(["", *["the king of the land was in the city and the people of it"] * 12])[:512]
COMMON = "dataset_path: json\ntest_split: test\n"
TASKS = {
    "rolling": r"""
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
    "choice": r"""
output_type: multiple_choice
doc_to_text: "{{start}}"
doc_to_choice: ["the land", "qzx"]
doc_to_target: 0
metric_list: [{metric: acc}]
""",
    "writing": r"""
output_type: generate_until
doc_to_text: "{{start}}"
doc_to_target: "x"
generation_kwargs: {until: ["\n"], max_gen_toks: 4}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture
def folder(tmp_path, monkeypatch, local_tasks):
    """A folder with the tasks and their documents."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # which lm-eval sets as well
    data = tmp_path / "documents.jsonl"
    data.write_text(json.dumps({"text": TEXT, "start": "The king of"}) + "\n", encoding="utf-8")
    files = json.dumps({"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")})
    for name, task in TASKS.items():
        text = f"task: local_{name}\n{COMMON}dataset_kwargs: {files}\n{task}\n"
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    return tmp_path


@pytest.mark.slow
def test_tasks_run_offline_and_agree_with_eval(run, run_json, folder):
    tasks = ",".join(f"local_{task}" for task in TASKS)
    done = run(
        "harness",
        "english-mini",
        "--tasks",
        tasks,
        "--include_path",
        folder,
        "--batch_size",
        "8",
        "--json",
    )
    assert done.status == 0, done.err
    found = json.loads(done.out.splitlines()[-1])
    results, config = found["results"], found["config"]
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    expected = run_json("eval", "english-mini", "--data", folder / "text.txt", "--split", "all")
    assert expected["tokens"] == len(TEXT)
    assert results["local_rolling"]["bits_per_byte,none"] == pytest.approx(
        expected["bits_per_byte"], abs=1e-6
    )
    assert results["local_choice"]["acc,none"] == 1.0
    assert (config["normalization"], config["log_likelihoods"]["rolling"]) == (
        "text8",
        "lower bound: ELBO",
    )
    assert "exact_match" in done.out
    # what the numbers mean, and what has no effect, is said once
    for said in (
        "rolling log-likelihoods: lower bound: ELBO",
        "of the prediction from the encoded context",
        "(text8)",
    ):
        assert done.err.count(said) == 1, said


@pytest.mark.slow
@torch.no_grad()
def test_an_exported_model_needs_no_model_of_ours(folder):
    pytest.importorskip("accelerate", reason="which the model hf of lm-eval needs")
    from lm_eval import simple_evaluate, tasks

    lm = tarflowlm.load("english-mini")
    text = TEXT[:240].strip()
    data = folder / "documents.jsonl"
    data.write_text(json.dumps({"text": text, "start": "The king of"}) + "\n", encoding="utf-8")
    settings = {
        "pretrained": str(save_causal_lm(lm, folder / "exported")),
        "trust_remote_code": True,
        # `rolling` puts the start before a text itself
        "add_bos_token": False,
    }
    found = simple_evaluate(
        "hf",
        model_args=settings,
        tasks=[f"local_{task}" for task in TASKS],
        task_manager=tasks.TaskManager(include_path=str(folder), include_defaults=False),
        device="cpu",
        batch_size=2,
        bootstrap_iters=0,
    )["results"]
    tokens = read(lm.tokenizer, text).tokens
    block = lm.model.prior.block(0)
    log_w = block.coupling.weight_head(block.features(lm.model.codebook.mean[tokens][None]))[0]
    bits = F.cross_entropy(log_w, tokens, reduction="sum").item() / math.log(2)
    assert found["local_rolling"]["bits_per_byte,none"] == pytest.approx(bits / len(text), abs=1e-5)
    assert found["local_choice"]["acc,none"] == 1.0
    assert "exact_match,none" in found["local_writing"]


@pytest.mark.slow
def test_error_of_lm_eval_is_one_line(run, folder):
    done = run("harness", "english-mini", "--tasks", "no_such_task")
    assert done.status == 2
    assert done.err.startswith(
        "tarflowlm: lm-eval stopped: Tasks not found: no_such_task (ValueError)"
    )
    assert done.err.count("\n") == 1


@pytest.mark.slow
def test_model_refuses_unknown_arguments():
    register()
    from lm_eval.api.registry import MODEL_REGISTRY

    model = MODEL_REGISTRY["tarflowlm"]
    with pytest.raises(UserError, match="no-such-run"):
        model("no-such-run")
    with pytest.raises(TypeError, match="pretrained"):
        model()
    with pytest.raises(TypeError, match="dtype"):
        model("english-mini-ar", dtype="auto")
    # the device that lm-eval passes on by default
    baseline = model("english-mini-ar", device="cuda:0", batch_size="1")
    with pytest.raises(UserError, match="chat template"):
        baseline.chat_template(True)
    assert baseline.get_model_info()["log_likelihoods"] == {
        "rolling": "exact",
        "conditional": "exact",
    }


def test_bounds_are_called_bounds():
    assert set(meaning(tiny_ar(), 1).values()) == {"exact"}
    assert all(
        text.startswith("lower bound")
        for text in meaning(tiny_flow(couplings=("mixd",)), 4).values()
    )
    assert "no bound" in meaning(tiny_flow(), 1)["conditional"]


def test_generation_options_are_read():
    assert how_to_continue({"until": "x", "temperature": 0.0, "do_sample": True}).top_k == 1
    assert how_to_continue({"temperature": 0.7, "do_sample": False}).top_k == 1
    how = how_to_continue({"temperature": 0.7, "max_new_tokens": 5, "min_p": 0.1})
    assert (how.temperature, how.top_k, how.max_new_tokens, how.min_p) == (0.7, None, 5, 0.1)
    options = {
        "until": ["a", "", "b"],
        "do_sample": True,
        "temperature": 0.5,
        "top_p": 0.9,
        "max_gen_toks": 3,
    }
    how = how_to_continue(options)
    assert (how.stop, how.temperature, how.max_new_tokens) == (("a", "b"), 0.5, 3)
    assert (how.top_k, how.top_p) == (None, 0.9)
