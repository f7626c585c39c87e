"""The examples in docstrings print what they show, and those in `examples` do what they say."""

import doctest
import math
from importlib import import_module
from pathlib import Path

import pytest
import torch

from tarflowlm import UserError
from tarflowlm.model import seeded
from tarflowlm.model_config import BaselineConfig, FlowConfig, MixD, TransformerConfig

MODULES = {
    "flow.codebook": "Codebook",
    "flow.mixd": "MixDCoupling",
    "flow.stack": "Prior",
    "model": "TarFlowLM",
    "model_config": "FlowConfig",
    "objective": "elbo",
}


@pytest.mark.parametrize(("module", "name"), MODULES.items())
def test_examples_print_what_they_show(module, name):
    found = import_module(f"tarflowlm.{module}")
    example, *_ = doctest.DocTestFinder(recurse=False).find(getattr(found, name), name, found)
    assert example.examples
    with torch.random.fork_rng():
        torch.manual_seed(0)
        runner = doctest.DocTestRunner()
        runner.run(example)
    assert runner.failures == 0


FOLDER = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("name", [path.stem for path in sorted(FOLDER.glob("*.py"))])
def test_what_a_script_imports_is_there(script, name):
    try:
        script(f"examples/{name}")
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is missing")


def small_model(separation: float | None):
    """A random model of one block whose codes are so many sigmas apart; None: a baseline."""
    trunk = TransformerConfig(width=32, num_heads=2)
    config = BaselineConfig(vocab_size=27, context=64, trunk=trunk, layers=1)
    if separation is not None:
        config = FlowConfig(
            vocab_size=27,
            context=64,
            trunk=trunk,
            latent_dim=4,
            separation=separation,
            blocks=(MixD(),),
        )
    with seeded(0):
        model = config.build().eval()
        head = model.head if separation is None else model.prior.block(0).coupling.weight_head
        torch.nn.init.normal_(head.weight, std=0.3)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(("separation", "latents"), [(None, False), (12.0, False), (3.0, True)])
def test_file_holds_the_text_in_the_bits_of_the_bound(script, separation, latents):
    """For codes that overlap as well, where neither x nor the component is certain given z."""
    compress = script("examples/compress")
    model = small_model(separation)
    tokens = torch.randint(27, (150,), generator=torch.Generator().manual_seed(1))
    coder = compress.Coder(model, latents=latents)
    file = coder.encode(tokens)
    assert coder.decode(file) == tokens.tolist()
    loan = coder.loan(len(tokens)).bit_length() - 1
    num_bits = 8 * (len(file) - 4) - loan
    generator = torch.Generator().manual_seed(0)
    windows = (tokens[:128].view(2, 64).repeat(16, 1), tokens[128:].repeat(16, 1))
    with torch.no_grad():
        first, last = (
            model.bound(part, latents * model.draw_noise(part, generator)).view(16, -1).sum(1)
            for part in windows
        )
    stated = (first + last) / math.log(2)
    assert abs(num_bits - stated.mean()) < 8 + 4 * stated.std()


def test_damaged_file_is_refused(script):
    coder = script("examples/compress").Coder(small_model(12.0), latents=True)
    file = bytearray(coder.encode(torch.arange(9)))
    file[-2] ^= 1
    with pytest.raises(UserError, match="damaged"):
        coder.decode(bytes(file))


@pytest.mark.slow
def test_compressed_tale_is_read_back(script, tmp_path):
    compress = script("examples/compress")
    text = "once upon a time there was a king who had a daughter "
    (tmp_path / "text").write_text(text, encoding="utf-8")
    for latents in ([], ["latents"]):
        paths = [tmp_path / name for name in ("text", "file", "back")]
        compress.main("compress", "english-mini", paths[0], paths[1], *latents)
        compress.main("decompress", "english-mini", paths[1], paths[2], *latents)
        assert paths[2].read_text(encoding="utf-8") == text
    assert paths[1].stat().st_size > 0


def test_series_given_a_vector(script):
    """log p(x | c) = log p(c, x) - log p(c), in the places of x; the gap alone is filled."""
    series = script("examples/series")
    with seeded(0):
        model = series.Series(channels=3, given=4).double()
        x, c = torch.randn(2, 5, 3).double(), torch.randn(2, 4).double()
        whole = model.joined(x, c)
        expected = model.prior.log_prob(whole) - model.prior.log_prob(whole[:, : model.first])
        torch.testing.assert_close(model.by_position(x, c).sum(1), expected)
        filled = model.impute(x[:1], c[:1], slice(2, 4), draws=8)
    assert filled.shape == (2, 3)
    assert filled.isfinite().all()


def test_density_of_the_process_is_the_known_one(script):
    series = script("examples/series")
    with seeded(0):
        x, c = series.process(3)
    step = x[..., 0] - c[:, :1] * torch.nn.functional.pad(x[:, :-1, 0], (1, 0))
    signs = torch.tensor([-1.0, 1.0])
    components = torch.distributions.Normal(c[:, 1, None, None] * signs, series.NOISE)
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(3, 1, 2)), components
    )
    torch.testing.assert_close(series.true_by_position(x, c), mixture.log_prob(step))


@pytest.mark.slow
@pytest.mark.nightly
def test_series_are_fitted_beside_zuko(script, capsys):
    pytest.importorskip("zuko")
    pytest.importorskip("sklearn")
    script("examples/series").main("0.01")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 7
