"""A flow, its first block, and the language model that `export --causal-lm` makes of that block.

    python examples/sharp_codes.py english-small tales
    python examples/sharp_codes.py english-mini tales 256

This prints their nats per token and bits per character on the test split of a text: two bounds, and
the exact value of the exported model, which `transformers` runs. A last argument limits the number
of windows, which are evenly spaced.
"""

import math
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import tarflowlm
from tarflowlm.evaluation.likelihood import evaluate
from tarflowlm.evaluation.scores import read_windows
from tarflowlm.model import as_flow
from tarflowlm.requests import Evaluation
from tarflowlm_apps.transformers_export.checkpoint import save_causal_lm


@torch.no_grad()
def exact_nats(folder: Path, windows: torch.Tensor, start: int) -> float:
    """-log p of all windows under an exported model, each from the token `start` on."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    total = 0.0
    for x in windows.split(16):
        begun = torch.cat((torch.full((len(x), 1), start), x[:, :-1]), dim=1)
        log_p = model(begun).logits.log_softmax(-1)
        total -= log_p.gather(-1, x[..., None]).double().sum().item()
    return total


def main(name: str, data: str, limit: str = "0") -> None:
    """Prints the three values for the model `name` on the text `data`."""
    lm = tarflowlm.load(name)
    as_flow(lm.model)  # UserError for a baseline, which has no bounds
    windows = read_windows(Evaluation(data, windows=int(limit) or None), lm).windows
    per_token = torch.from_numpy(lm.tokenizer.characters_per_token)
    characters = per_token[windows].sum().item()
    with tempfile.TemporaryDirectory() as place:
        folder = save_causal_lm(lm, Path(place) / "exported")
        nats = {"exported, exact": exact_nats(folder, windows, lm.config.vocab_size)}
    first = lm.config.first_blocks(1).build().eval()
    weights = lm.model.state_dict()
    first.load_state_dict({key: weights[key] for key in first.state_dict()})
    for what, model in {"block 1, <=": first, "whole stack, <=": lm.model}.items():
        nats[what] = evaluate(model, windows, per_token).nats_per_token * windows.numel()
    print(f"{name} on {data}, {len(windows)} windows, {characters:,} characters")
    for what, total in nats.items():
        bits = total / math.log(2) / characters
        print(f"{what:16} {total / windows.numel():.4f} nats per token, {bits:.4f} bpc")


if __name__ == "__main__":
    main(*sys.argv[1:])
