"""`import tarflowlm.hf` makes `AutoConfig` and `AutoModel` of `transformers` find models of this package.

    import tarflowlm.hf
    model = AutoModel.from_pretrained("OWNER/NAME")     # or a folder; no remote code
    nats = model(tokens).bound                          # [B]

Not `AutoModelForCausalLM`: the bound of a stack gives no logits of the next token.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tarflowlm.errors import UserError
from tarflowlm.objective import negative_bound
from tarflowlm.runs.checkpoint import Checkpoint, load_checkpoint
from tarflowlm.runs.config import MODEL_TYPE
from tarflowlm.runs.hub import PREFIX
from tarflowlm.sharing import push_to_hub, save_pretrained

try:
    from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
    from transformers.utils.generic import ModelOutput
except ImportError as error:
    raise ImportError("tarflowlm.hf needs transformers: pip install 'tarflowlm[quality]'") from error


class TarFlowLMConfig(PretrainedConfig):
    """config.json of a run as `transformers` reads it; its keys are those of `RunConfig`."""

    model_type = MODEL_TYPE

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)


@dataclass
class Bound(ModelOutput):
    """What the model returns."""

    bound: Float[Tensor, " B"] | None = None
    """-log p(x) of the baseline, one sample of the negative ELBO of a flow, as `objective.negative_bound`; nats."""


class TarFlowLMModel(PreTrainedModel):
    """A model of this package as a model of `transformers`: `language_model`, its `tokenizer`, and the bound."""

    config_class = TarFlowLMConfig
    base_model_prefix = "language_model"
    main_input_name = "input_ids"

    def __init__(self, config: TarFlowLMConfig, checkpoint: Checkpoint | None = None) -> None:
        super().__init__(config)
        if checkpoint is None:
            raise UserError("a model of transformers comes from a saved one: call from_pretrained(folder or name)")
        self.checkpoint = checkpoint
        self.language_model = checkpoint.model
        self.tokenizer = checkpoint.tokenizer
        self.eval()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        name: str | Path,
        *,
        config: TarFlowLMConfig | None = None,
        revision: str | None = None,
        trust_remote_code: bool | None = None,
        adapter_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> "TarFlowLMModel":
        """The model in a folder, or OWNER/NAME on the hub, by `load_checkpoint`: hashes checked, float32, on the CPU.

        `trust_remote_code` and `adapter_kwargs` have no effect: there is no such code and no adapter. UserError for
        other options, and as in `load_checkpoint`.
        """
        if options:
            raise UserError(f"{', '.join(options)}: from_pretrained takes a revision alone; use .to(...) afterwards")
        place = str(name)
        if not Path(name).is_dir():
            place = f"{PREFIX}{name}" + (f"@{revision}" if revision else "")
        checkpoint = load_checkpoint(place)
        return cls(config or TarFlowLMConfig.from_pretrained(checkpoint.directory), checkpoint)

    def forward(self, input_ids: Int[Tensor, "B T"], generator: torch.Generator | None = None) -> Bound:
        """The bound on -log p(x) of every row, in nats. UserError if P does not divide T."""
        return Bound(bound=negative_bound(self.language_model, input_ids, generator=generator))

    def save_pretrained(self, folder: str | Path, **options: Any) -> Path:  # type: ignore[override]
        """As `sharing.save_pretrained`."""
        return save_pretrained(self.checkpoint, folder, **options)

    def push_to_hub(self, repository: str, **options: Any) -> str:  # type: ignore[override]
        """As `sharing.push_to_hub`."""
        return push_to_hub(self.checkpoint, repository, **options)


AutoConfig.register(MODEL_TYPE, TarFlowLMConfig, exist_ok=True)
AutoModel.register(TarFlowLMConfig, TarFlowLMModel, exist_ok=True)
