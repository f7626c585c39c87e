"""No argument, text or configuration brings a traceback: random ones, from hypothesis."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

from command_cases import ONE_LAYER, TINY, put_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tarflowlm.data import TEXT8_ALPHABET

few = settings(
    max_examples=25, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
# an argument of a process holds neither NUL nor, from a terminal, anything that is not the encoding's
words = st.text(st.characters(exclude_characters="\0"), max_size=60)


def assert_no_traceback(result: SimpleNamespace) -> None:
    assert result.status in (0, 2), result.err
    if result.status == 2:
        assert result.err.count("\n") == 1, result.err


@few
@given(prompt=words, normalize=st.booleans(), length=st.integers(-2, 40))
def test_no_prompt_breaks_sampling(run, models, prompt, normalize, length):
    more = ["--normalize", "text8"] if normalize else []
    assert_no_traceback(
        run("sample", models["mini-mixd-p2"], f"--prompt={prompt}", "--length", length, *more, "--json")
    )


@few
@given(prompt=st.text(TEXT8_ALPHABET, max_size=34), temperature=st.floats(), top_k=st.integers(), top_p=st.floats())
def test_no_sampler_setting_breaks_sampling(run, model, prompt, temperature, top_k, top_p):
    argv = [f"--prompt={prompt}", f"--temperature={temperature}", f"--top-k={top_k}", f"--top-p={top_p}"]
    assert_no_traceback(run("sample", model, "--length", 6, *argv))


FIELDS = [
    "seed", "steps", "checkpoint-every", "name", "data", "device", "model.context", "model.patch",
    "model.latent-dim", "model.head-hidden", "model.blocks", "model.blocks.0.coupling", "model.blocks.0.layers",
    "model.blocks.1.components", "model.in-patch", "model.vocab-size", "model.family", "model.trunk.width",
    "model.trunk.num-heads", "model.trunk.mlp-ratio", "model.trunk.rotary-base", "optim.optimizer", "optim.lr",
    "optim.beta1", "optim.beta2", "optim.weight-decay", "optim.grad-clip", "optim.warmup", "optim.decay",
    "optim.schedule", "optim.codebook-lr-scale", "train.stage-steps", "train.mode", "train.advance",
    "train.batch-size", "train.precision", "train.stall-tolerance", "data.tokenizer.kind",
    "data.tokenizer.alphabet", "data.tokenizer.vocab-size", "data.tokenizer.source", "data.tokenizer.normalize",
    "",
]  # fmt: skip
values = st.one_of(
    st.sampled_from(
        ["", "-", "--", "0", "-1", "1", "2", "3", "nan", "inf", "-inf", "1e400", "1e-9", "None", "True", "[]"]
    ),
    st.sampled_from(["mixd", "mix1", "affine", "joint", "bpe", "byte", "cpu", "auto", "9" * 25, "0x10", "1_0", "①"]),
    words,
)


@settings(few, max_examples=120)
@given(field=st.sampled_from(FIELDS), value=values)
def test_no_field_value_breaks_training(run, text_file, tmp_path, field, value):
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    argv = ["--data", text_file, "--steps", 3, "--train.evaluate-windows", 1, *TINY, *ONE_LAYER]
    result = run("train", "mini-mixd", "--out", tmp_path / "run", *argv, f"--{field}", value)
    assert_no_traceback(result)


@few
@given(
    argv=st.lists(
        st.one_of(words, st.sampled_from(["train", "mini-ar", "--out", "--resume", "eval", "--json"])), max_size=5
    )
)
def test_no_command_line_breaks(run, model, tmp_path, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    # the released one is evaluated on a whole corpus
    monkeypatch.setattr("tarflowlm.runs.released.DEFAULT", str(model))
    assert_no_traceback(run("train", *argv))
    assert_no_traceback(run("eval", *argv))
    assert not list(tmp_path.iterdir())


@few
@given(content=st.one_of(st.binary(max_size=200), words.map(lambda s: s.encode("utf-8", "surrogatepass"))))
def test_no_text_breaks_evaluation(run, model, tmp_path, content):
    (tmp_path / "text.txt").write_bytes(content)
    assert_no_traceback(run("eval", model, "--data", tmp_path / "text.txt", "--split", "all"))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
paths = [("seed",), ("name",), ("model",), ("model", "context"), ("model", "patch"), ("model", "blocks"),
         ("model", "trunk", "width"), ("model", "trunk", "num_heads"), ("model", "couplings"), ("model", "family"),
         ("optim", "lr"), ("train", "stage_steps"), ("data", "source"), ("data", "tokenizer")]  # fmt: skip


@few
@given(path=st.sampled_from(paths), value=json_values)
def test_no_config_breaks_sampling(run, models, path, value, tmp_path_factory):
    broken = Path(shutil.copytree(models["mini-mixd"], tmp_path_factory.mktemp("broken") / "run"))
    config = json.loads((broken / "config.json").read_text(encoding="utf-8"))
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    put_config(broken, json.dumps(config))
    assert_no_traceback(run("sample", broken, "--length", 4))
