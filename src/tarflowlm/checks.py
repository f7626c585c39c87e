"""Checks of the values that callers of the Python interface give. Most need no torch."""

from numbers import Integral, Real
from typing import TYPE_CHECKING, get_args

from tarflowlm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from tarflowlm.language_model import LanguageModel


def check_type(value: object, name: str, kinds: type | tuple[type, ...], wanted: str) -> None:
    """UserError, which asks for what is `wanted`, unless `value` is of one of the `kinds`."""
    if not isinstance(value, kinds):
        raise UserError(f"{name} {_shown(value)}: {wanted}")


def _shown(value: object) -> str:
    return f"{' '.join(repr(value).split()):.40} of type {type(value).__name__}"


def check_model(model: "LanguageModel") -> None:
    """UserError unless `model` is a model in float32 or wider."""
    from torch import float32, float64

    from tarflowlm.language_model import LanguageModel

    check_type(model, "model", LanguageModel, "pass lm.model, where lm = tarflowlm.load(...)")
    dtype = next(model.parameters()).dtype
    if dtype not in (float32, float64):
        raise UserError(f"model in {dtype}: densities need float32 or wider, take model.float()")


def check_generator(generator: object) -> None:
    """UserError unless `generator` is a torch.Generator or None."""
    from torch import Generator

    wanted = "give torch.Generator().manual_seed(0)"
    check_type(generator, "generator", (Generator, type(None)), wanted)


def check_option(value: object, name: str, literal: object) -> None:
    """UserError unless `value` is one of the names of a `Literal` type."""
    names = get_args(literal)
    if value not in names:
        raise UserError(f"{name} {value!r:.40}: choose one of {', '.join(names)}")


def checked_seed(value: object) -> int:
    """`value` as a seed. UserError outside 0 .. 2^62 - 1, where generators keep seeds distinct."""
    seed = as_integer(value, "seed", least=0)
    if seed >= 2**62:
        raise UserError(f"seed {seed}: must be below 2^62")
    return seed


def as_integer(value: object, name: str, least: int | None = None) -> int:
    """`value`, an integer of Python, NumPy or PyTorch, as an int. UserError below `least`."""
    number = _plain(value)
    if not isinstance(number, Integral) or isinstance(number, bool):
        raise UserError(f"{name} {_shown(number)}: must be an integer")
    if least is not None and int(number) < least:
        raise UserError(f"{name} {number}: must be at least {least}")
    return int(number)


def as_number(value: object, name: str) -> float:
    """`value`, a number of Python, NumPy or PyTorch, as a float."""
    number = _plain(value)
    if not isinstance(number, Real) or isinstance(number, bool):
        raise UserError(f"{name} {_shown(number)}: must be a number")
    return float(number)


def _plain(value: object) -> object:
    """A scalar of NumPy or PyTorch as a number of Python; any other value as it is."""
    item = getattr(value, "item", None)
    return item() if item is not None and getattr(value, "ndim", None) == 0 else value


def check_integers(tokens: object, name: str, *shapes: str) -> None:
    """UserError unless `tokens` is a tensor of integers of one of the `shapes`: "[T]", "[B, T]"."""
    from torch import Tensor, int8, int16, int32, int64, uint8

    wanted = f"give a tensor of integers {' or '.join(shapes)}, as of tokenizer.encode(text)"
    check_type(tokens, name, Tensor, wanted)
    assert isinstance(tokens, Tensor)
    dimensions = [shape.count(",") + 1 for shape in shapes]
    if tokens.dtype not in (int64, int32, int16, int8, uint8) or tokens.dim() not in dimensions:
        raise UserError(f"{name} of shape {list(tokens.shape)} and type {tokens.dtype}: {wanted}")


def check_tokens(
    model: "LanguageModel", tokens: "Tensor", *, name: str = "tokens", shape: str = "[B, T]"
) -> None:
    """UserError unless `tokens` are texts of the model: integers below V of this `shape`.

    [B, T] holds at most a context of tokens; one text [T] may have any length. The host would wait
    for values on an accelerator: these are not checked.
    """
    check_model(model)
    check_integers(tokens, name, shape)
    size = f"{name} of shape {list(tokens.shape)}"
    if not tokens.numel():
        raise UserError(f"{size}: give at least one token")
    context = model.config.context
    if shape != "[T]" and tokens.shape[1] > context:
        raise UserError(f"{size} exceed the context of {context}: use tarflowlm.score")
    outside = (tokens < 0) | (tokens >= model.config.vocab_size)
    if tokens.device.type == "cpu" and outside.any():
        last = model.config.vocab_size - 1
        raise UserError(f"{name} hold {tokens[outside][0].item()}: give tokens of 0 to {last}")
