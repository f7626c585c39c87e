"""The baseline with another input: codes of tokens through the input map of a flow."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from tarflowlm.baseline import TokenLM
from tarflowlm.flow import widen
from tarflowlm.flow.cache import Cache
from tarflowlm.flow.codebook import Codebook
from tarflowlm.flow.inputs import InputMap
from tarflowlm.flow.transformer import Embedder
from tarflowlm.model_config import BaselineConfig
from tarflowlm.schema import NotNegative, Whole


@dataclass(frozen=True, kw_only=True)
class CodedConfig(BaselineConfig):
    """Shape of a baseline whose Transformer reads table * E[x_t] + input(code of x_t)."""

    family: ClassVar[str] = "ar-coded"
    model: ClassVar[str] = "reproduction.coded:CodedLM"
    table: NotNegative = 1.0
    """Factor of the embedding table E, and so also of its rate; 0: no table."""
    code_dim: Whole = 0
    """Channels d of a code, a mean of a flow's codebook that does not move; 0: no codes."""


class CodedInput(nn.Module):
    """Tokens [B, T] to Transformer inputs [B, T, D]."""

    def __init__(self, config: CodedConfig, table: nn.Embedding) -> None:
        super().__init__()
        self.factor = config.table
        self.table = table if config.table else None
        self.codebook: Codebook | None = None
        if config.code_dim:
            self.codebook = Codebook(config.vocab_size, config.code_dim)
            self.codebook.requires_grad_(False)
            self.map = InputMap(config.code_dim, config.trunk.width)

    def forward(self, tokens: Tensor) -> Tensor:
        parts = []
        if self.table is not None:
            parts.append(self.factor * self.table(tokens))
        if self.codebook is not None:
            parts.append(self.map(self.codebook.mean[tokens]))
        return sum(parts[1:], start=parts[0])


class CodedLM(TokenLM):
    """`TokenLM` of single tokens with a `CodedInput` instead of its embedding table.

    Everything else, and a table, has the initial weights of the baseline of the same seed.
    """

    config: CodedConfig

    def __init__(self, config: CodedConfig) -> None:
        super().__init__(config)
        self.input = CodedInput(config, self.embedding)
        del self.embedding

    def embedder(self, cache: Cache | None = None) -> Embedder:
        return lambda past: widen(self.input(past.flatten(1)))
