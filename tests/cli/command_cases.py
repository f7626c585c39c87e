"""Options of a tiny run, and an untrained model as a run directory."""

from pathlib import Path

from tarflowlm.config import DataConfig, RunConfig, TrainConfig
from tarflowlm.data import TEXT8_ALPHABET, CharTokenizer, Tokenizer
from tarflowlm.language_model import LanguageModel
from tarflowlm.runs.checkpoint import save_weights, write_run

TINY = [
    "--model.context", "32", "--model.trunk.width", "32", "--train.batch-size", "4", "--train.evaluate-windows", "4",
    "--device", "cpu", *(word for block in "012" for word in (f"--model.blocks.{block}.layers", "1")),
]  # fmt: skip
TINY_AR = [*TINY[:10], "--model.layers", "1"]
CHECKPOINT = {"config.json", "model.safetensors", "tokenizer.json"}


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def save_untrained(folder: Path, model: LanguageModel, source: Path, tokenizer: Tokenizer | None = None) -> Path:
    folder.mkdir()
    train = TrainConfig(mode="joint", stage_steps=(1,))
    run = RunConfig(name=folder.name, model=model.config, train=train, data=DataConfig(source=str(source)))
    write_run(folder, run, tokenizer or CharTokenizer(TEXT8_ALPHABET))
    blocks = getattr(model, "num_blocks", 0)
    save_weights(folder, model.float().state_dict(), {"blocks": str(blocks)})
    return folder
