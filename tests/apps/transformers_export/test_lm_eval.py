"""An exported model in lm-evaluation-harness, on tasks in local files: nothing is fetched.

`tests/apps/serve` has the other way there, by the server.
"""

import json
import math
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

import tarflowlm
from tarflowlm.data.prompts import read
from tarflowlm_apps.transformers_export.checkpoint import save_causal_lm

pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("lm_eval", "transformers", "accelerate")),
    reason="needs lm_eval with transformers and accelerate",
)

TEXT = " ".join(["the king of the land was in the city and the people of it"] * 5)[:240].strip()
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


@pytest.mark.slow
@torch.no_grad()
def test_the_model_hf_of_lm_eval_needs_no_model_of_ours(tmp_path, local_tasks):
    from lm_eval import simple_evaluate, tasks

    lm = tarflowlm.load("english-mini")
    data = tmp_path / "documents.jsonl"
    data.write_text(json.dumps({"text": TEXT, "start": "The king of"}) + "\n", encoding="utf-8")
    files = json.dumps({"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")})
    for name, task in TASKS.items():
        text = f"task: local_{name}\n{COMMON}dataset_kwargs: {files}\n{task}\n"
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    settings = {
        "pretrained": str(save_causal_lm(lm, tmp_path / "exported")),
        "trust_remote_code": True,
        # `rolling` puts the start before a text itself
        "add_bos_token": False,
    }
    found = simple_evaluate(
        "hf",
        model_args=settings,
        tasks=[f"local_{task}" for task in TASKS],
        # without thousands of other tasks, which take most of the time to read
        task_manager=tasks.TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        batch_size=2,
        bootstrap_iters=0,
    )["results"]
    tokens = read(lm.tokenizer, TEXT).tokens
    block = lm.model.prior.block(0)
    log_w = block.coupling.weight_head(block.features(lm.model.codebook.mean[tokens][None]))[0]
    bits = F.cross_entropy(log_w, tokens, reduction="sum").item() / math.log(2)
    assert found["local_rolling"]["bits_per_byte,none"] == pytest.approx(bits / len(TEXT), abs=1e-5)
    assert found["local_choice"]["acc,none"] == 1.0
    assert "exact_match,none" in found["local_writing"]
