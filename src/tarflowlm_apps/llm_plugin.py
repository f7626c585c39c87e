"""The models for the command line `llm` (llm.datasette.io): `llm -m tarflowlm 'Once'`.

The entry point in pyproject.toml names this module, which `llm` imports whenever it starts: nothing
heavy at the top.
"""

import secrets
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import llm
from pydantic import Field

if TYPE_CHECKING:
    from tarflowlm.model import LanguageModel
    from tarflowlm.pretrained import Pretrained


@llm.hookimpl  # type: ignore[untyped-decorator]
def register_models(register: Any) -> None:
    """Tell `llm` of the model."""
    register(TextWriter())


class TextWriter(llm.Model):  # type: ignore[misc]
    """Writes a text that begins with the prompt, or fills in a template."""

    model_id = "tarflowlm"
    can_stream = True
    supports_conversation = False

    class Options(llm.Options):  # type: ignore[misc]
        """The model, and options of `tarflowlm sample`, which checks them."""

        model: str | None = Field(
            None, description="A shipped model, run directory or hf:OWNER/NAME"
        )
        template: str | None = Field(None, description="Text with gaps, [...], to be filled in")
        contains: str | None = Field(None, description="Words that must appear after the prompt")
        without: str = Field("", description="Letters that no drawn token has")
        temperature: float | None = Field(None, description="Below 1: likely tokens more often")
        top_k: int | None = Field(None, description="Number of likeliest tokens to draw from")
        top_p: float | None = Field(None, description="Share of the likeliest tokens to draw from")
        length: int | None = Field(None, description="Tokens of the text, with the prompt")
        seed: int | None = Field(None, description="The same seed gives the same text")

    def execute(
        self, prompt: Any, stream: bool, response: Any, conversation: object
    ) -> Iterator[str]:
        """The text piece by piece. Without a seed it is random, and `llm logs --json` has it."""
        from tarflowlm.errors import UserError
        from tarflowlm.runs.hub import DEFAULT

        if prompt.system:
            raise UserError("system prompt: the model follows no instructions, leave it out")
        options = prompt.options.model_dump(exclude_none=True)
        name = options.pop("model", DEFAULT)
        seed = options.setdefault("seed", secrets.randbelow(2**32))
        response.response_json = {"seed": seed}
        return loaded(name).stream(prompt.prompt or None, **options)


@cache
def loaded(name: str) -> "Pretrained[LanguageModel]":
    """The model of that name."""
    from tarflowlm.pretrained import load

    return load(name)
