"""Plans: a text to write is pieces and gaps, and one function decides how it is written.

    prompt                      [tokens, Gap(n, n)]
    free text                   [empty piece, Gap(n, n)]
    template with `_`           [tokens, Gap(1, 1), tokens]
    template with `[...]`       [tokens, Gap(1 to 8), tokens]

`plan` decides the way for all of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from tarflowlm.data.prompts import BLANK, Gap, Reading
from tarflowlm.errors import UserError, counted
from tarflowlm.generation.rules import Mask, Own, Rule, checked_mask
from tarflowlm.model import LanguageModel
from tarflowlm.requests import ADJUSTMENTS, Adjustment, Sampling
from tarflowlm.schema import Length, checked

PARTICLES = 16
"""Particles by default where given tokens follow a gap, or draws are constrained."""

Allowed = Mask | Callable[[Tensor], Mask]
"""A mask, or a function to it from the tokens [n] so far."""
Way = Literal["inversion", "filter", "gaps"]


@dataclass(frozen=True, eq=False)
class Plan:
    """One text to write, with all decisions about it."""

    template: tuple[Tensor | Gap, ...]
    """Pieces, maybe empty, and gaps in turn; a piece first. A gap at the end continues the text."""
    num_tokens: int
    """Tokens to write, given ones included."""
    particles: int
    most_particles: int
    """Particles are doubled up to this while the choice among them is rough."""
    adjust: Adjustment | None
    """Changes log-weights by temperature, top-k, top-p and bans."""
    within: Adjustment | None
    """Changes the log-weights of the tokens that may be drawn, without a change of their sum."""
    sampling: Sampling
    way: Way
    """inversion: invert noise, after a prompt that is known exactly; filter: complete given tokens
    from left to right, by particles; gaps: try all lengths of gaps.
    """
    prompt: int = 0
    """Tokens of a prompt that is known exactly or fills a window: equal for all rows of a batch."""
    allowed: Tensor | None = None
    """The tokens [V] that may be drawn; None for all."""
    rules: tuple[Rule, ...] = ()
    """What the text keeps, without its lead."""
    end: int | None = None
    """Once a sample draws this token, it repeats it to its end."""
    lead: int = 0
    """Tokens at the start that are hidden context."""
    reading: Reading | None = None
    """The prompt or template, as the tokenizer reads it."""
    begins: Tensor | None = None
    """The tokens [V] that may come first after the last piece; None for all."""

    @property
    def pieces(self) -> list[Tensor]:
        return cast(list[Tensor], list(self.template[::2]))

    @property
    def gaps(self) -> list[Gap]:
        """The gaps before given tokens, or before the end."""
        return cast(list[Gap], list(self.template[1::2]))[: len(self.pieces) - 1]

    @property
    def continues(self) -> bool:
        """Whether the text continues after its last piece."""
        return len(self.template) % 2 == 0

    @property
    def batch_key(self) -> tuple[object, ...]:
        """Equal for plans that can be written in one batch."""
        template = id(self.template) if self.way == "gaps" else 0
        begins = None if self.begins is None else hash(self.begins.numpy().tobytes())
        return template, self.way, self.num_tokens, self.particles, self.prompt, begins

    @property
    def given(self) -> Tensor:
        """The given tokens, and BLANK elsewhere, [T]. The gaps have one length."""
        parts = [torch.full((x.most,), BLANK) if isinstance(x, Gap) else x for x in self.template]
        return torch.cat(parts)


def plan(
    model: LanguageModel,
    template: Sequence[Tensor | Gap],
    sampling: Sampling,
    *,
    num_tokens: int,
    allowed: Allowed | None = None,
    rules: Sequence[Rule] = (),
    top_p: float | None = None,
    most_particles: int = 0,
    banned: int | None = None,
    end: int | None = None,
    lead: int = 0,
    continues: bool = True,
) -> Plan:
    """Decide how `model` writes `num_tokens` tokens of `template`, neighbours joined.

    Unless it `continues`, tokens after the template are free, for they are not shown.
    `banned` is a token that is not drawn where weights may change. `top_p` is that of the model,
    of the tokens that may be drawn. The default number of particles may be doubled up to
    `most_particles`. UserError for what the model cannot do.
    """
    config = model.config
    num_tokens = checked(num_tokens, Length, "length")
    parts = _joined(template)
    pieces = cast(list[Tensor], parts[::2])
    gaps = cast(list[Gap], parts[1::2])
    if allowed is not None and (rules or callable(allowed)):
        rules, allowed = (*rules, Own(allowed, config.vocab_size)), None
    is_open = allowed is not None or bool(rules) or any(map(_is_open, gaps))
    num_given = sum(map(len, pieces))
    # gaps around wanted words share their tokens
    shared = max((gap.most for gap in gaps if gap.once), default=0)
    longest = num_given + shared + sum(gap.most for gap in gaps if not gap.once)
    # given tokens form a prompt, or there are none
    is_prompt = num_given == len(pieces[0])
    particles = sampling.particles or (1 if is_prompt and not is_open else PARTICLES)
    is_whole = num_given == num_tokens and (is_open or particles == 1)
    if longest > num_tokens or is_whole:
        raise no_room(longest - lead, num_tokens - lead)
    if model.is_exact and sampling.decoder not in ("auto", "steps"):
        rule = "a baseline has no blocks to invert"
        raise UserError(f"decoder {sampling.decoder}: {rule}, leave it out")
    if is_open:
        _check_open(model, num_tokens, lead)
    elif num_tokens > config.context and (particles > 1 or not is_prompt):
        what = f"length {num_tokens - lead}, particles {particles}: beyond the trained context of"
        remedy = "take 1 particle, and a prompt without blanks in it"
        raise UserError(f"{what} {config.context} tokens, {remedy}")
    is_long = num_given >= config.context
    # without a block from right to left, the states of a prompt are known before the rest; if it
    # fills a window, its last half is read, in whole patches
    is_exact = config.continues_exactly and is_prompt and num_given > 0 and not is_open
    is_exact &= is_long or num_given % config.patch == 0
    if is_exact and particles > 1:
        rule = "this model continues a prompt exactly"
        raise UserError(f"particles {particles}: {rule}, leave them out")
    if allowed is not None:
        allowed = checked_mask(allowed, config.vocab_size)
        if not allowed.any():
            raise UserError("allowed is False for every token: allow at least one")
    is_free = not model.is_exact and num_given == 0 and particles == 1
    if continues or not is_open:
        shortest = num_given + sum(gap.least for gap in gaps)
        parts.append(Gap(most=num_tokens - shortest, least=num_tokens - longest))
    return Plan(
        template=tuple(parts),
        num_tokens=num_tokens,
        particles=particles,
        most_particles=particles
        if sampling.particles or particles == 1
        else max(particles, most_particles),
        adjust=_adjust(model, sampling, banned),
        within=Sampling(top_p=top_p).adjustment(config.vocab_size) if is_open else None,
        sampling=sampling,
        way="gaps" if is_open else "inversion" if is_exact or is_free else "filter",
        prompt=num_given if is_exact or is_long else 0,
        allowed=allowed,
        rules=tuple(rules),
        end=end,
        lead=lead,
    )


def _joined(template: Sequence[Tensor | Gap]) -> list[Tensor | Gap]:
    """A piece, maybe empty, then gaps and pieces in turn. Neighbours of known length are joined."""
    parts: list[Tensor | Gap] = [torch.zeros(0, dtype=torch.long)]
    for part in template:
        if isinstance(part, Tensor):
            parts[-1] = torch.cat((cast(Tensor, parts[-1]), part.cpu()))
            continue
        before = parts[-2] if len(parts) > 1 and not len(cast(Tensor, parts[-1])) else None
        if isinstance(before, Gap) and not _is_open(before) and not _is_open(part):
            parts[-2] = Gap(most=before.most + part.most, least=before.least + part.least)
        else:
            parts += [part, torch.zeros(0, dtype=torch.long)]
    return parts


def _is_open(gap: Gap) -> bool:
    """Whether the length of a gap is unknown, or its tokens are constrained."""
    return gap.least < gap.most or gap.begins is not None or gap.once


def _check_open(model: LanguageModel, num_tokens: int, lead: int) -> None:
    """UserError where a model takes no open gaps and constraints."""
    config = model.config
    rule = "gaps of unknown length and constraints take"
    if config.patch > 1 or not config.has_token_weights:
        found = f"patch {config.patch}" if config.patch > 1 else config.describe(0)
        needed = "one token per position and weights of tokens in block 1"
        raise UserError(f"{found}: {rule} {needed}; use another model, such as stories")
    if num_tokens > config.context:
        most = f"at most the context of {config.context} tokens"
        raise UserError(f"length {num_tokens - lead}: {rule} {most}; shorten the text or its gaps")


def _adjust(model: LanguageModel, sampling: Sampling, banned: int | None) -> Adjustment | None:
    takes = model.config.takes_temperature
    adjust = sampling.adjustment(model.config.vocab_size, banned if takes else None)
    if adjust is not None and not takes:
        names = sorted(sampling.given() & ADJUSTMENTS)
        asked = ", ".join(f"{name} {getattr(sampling, name)}" for name in names)
        raise UserError(
            f"{asked}: {model.config.describe(0)} has no weights of tokens to change: "
            "leave this out, or use a model whose block 1 is mixd"
        )
    return adjust


def no_room(length: int, num_tokens: int) -> UserError:
    """The error for given tokens that fill the length."""
    return UserError(
        f"the given text has {counted(length, 'token')}, which leaves no room in {num_tokens}: "
        "shorten it, or raise the length"
    )
