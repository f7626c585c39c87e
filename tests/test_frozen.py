"""The public names and the fields of every configuration. A new one is a decision: it is added here
on purpose.
"""

from dataclasses import fields
from pathlib import Path

import pytest

import tarflowlm
from tarflowlm import config, model_config

NAMES = """
    BaselineConfig FlowConfig Pretrained RunConfig Scores TarFlowLM TokenLM UserError coupling
    elbo evaluate from_pretrained generate importance_weighted_bound layer load optimizer preset
    resume schedule score tokenizer train
"""
FIELDS = {
    model_config.BaselineConfig: """
        context in_patch layers patch trunk vocab_size
    """,
    model_config.Affine: """
        layers sees_channels sees_tokens
    """,
    model_config.TokenAffine: """
        layers sees_tokens
    """,
    model_config.Mix1: """
        components layers sees_channels sees_tokens
    """,
    model_config.MixD: """
        certainty components in_patch layers
    """,
    config.DataConfig: """
        source tokenizer unwrap
    """,
    model_config.FlowConfig: """
        alternate blocks channel_mix context head head_hidden input_map latent_dim patch
        reads_tokens separation starts trunk vocab_size
    """,
    config.OptimConfig: """
        beta2 codebook_lr_scale decay eps grad_clip lr optimizer schedule warmup weight_decay
    """,
    config.RunConfig: """
        data model name optim parent seed temperature top_p train
    """,
    config.TokenizerConfig: """
        alphabet kind normalize source vocab_size
    """,
    config.TrainConfig: """
        batch_size checkpoint_activations checkpoint_every compile dropout ema
        evaluate_every evaluate_windows keep keep_idle log_every minutes mode parallel patience
        precision stage_steps test_windows tokens_at_once track
    """,
    model_config.TransformerConfig: """
        input_taps layer mlp_ratio num_heads width
    """,
}


def test_the_public_names():
    assert sorted(dir(tarflowlm)) == NAMES.split()
    assert all(hasattr(tarflowlm, name) for name in NAMES.split())


def test_a_star_import_brings_no_names_of_other_packages():
    space: dict[str, object] = {}
    exec("from tarflowlm import *", space)
    own = {path.stem for path in Path(tarflowlm.__file__).parent.iterdir()}
    # the last two belong to Python, and to the checks of shapes in the tests
    assert set(space) <= {*NAMES.split(), *own, "__builtins__", "jaxtyping"}


@pytest.mark.parametrize("cls", FIELDS, ids=lambda cls: cls.__name__)
def test_the_options_of_a_configuration(cls):
    assert sorted(field.name for field in fields(cls)) == FIELDS[cls].split()
