"""Write one HTML file in which a model turns noise into text, pass by pass, in the browser.

    python site/passes/build.py [MODEL] --out passes.html

MODEL is a run directory, the name of a shipped model (english-passes by default), or hf:OWNER/NAME.
The file holds the weights and asks for nothing from elsewhere.
"""

import argparse
import base64
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import tarflowlm
from tarflowlm.errors import UserError
from tarflowlm.model_config import FlowConfig
from tarflowlm.pretrained import Pretrained

HERE = Path(__file__).parent
SCRIPTS = ("passes.js", "page.js")
"""Files that the template names between braces, as {MODEL} and {WEIGHTS}."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="english-passes", help="what to show")
    parser.add_argument("--out", type=Path, default=Path("passes.html"), help="file to write")
    arguments = parser.parse_args(argv)
    try:
        page = build(tarflowlm.load(arguments.model), arguments.model)
    except UserError as error:
        print(f"build.py: {error}", file=sys.stderr)
        sys.exit(2)
    arguments.out.write_text(page, encoding="utf-8")
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e6:.1f} MB")


def build(lm: Pretrained, name: str) -> str:
    """The page of a model. UserError for a model of another kind."""
    config = lm.config
    check(lm, name)
    assert isinstance(config, FlowConfig)
    tensors, data = packed(lm.model.state_dict())
    blocks = []
    for index, block in enumerate(config.blocks):
        is_last = index == config.num_blocks - 1
        blocks.append(
            {
                "layers": block.layers,
                # the last block acts on all tokens
                "certainty": 0.0 if is_last else block.certainty,
                "noise": config.fills_below(index),
            }
        )
    assert lm.run.top_p == 1, "the page has no top-p"
    description = {
        "name": Path(name).name,
        "parameters": lm.model.num_parameters,
        "symbols": lm.tokenizer.symbols,
        "normalization": lm.tokenizer.normalization,
        "temperature": lm.run.temperature,
        "context": config.context,
        "channels": config.latent_dim,
        "width": config.trunk.width,
        "heads": config.trunk.num_heads,
        "blocks": blocks,
        "tensors": tensors,
    }
    page = (HERE / "template.html").read_text(encoding="utf-8")
    for file in SCRIPTS:
        page = page.replace(f"{{{file}}}", (HERE / file).read_text(encoding="utf-8"))
    # "<" could end the script in which the description lies
    page = page.replace("{MODEL}", json.dumps(description).replace("<", "\\u003c"))
    return page.replace("{WEIGHTS}", base64.b64encode(data).decode("ascii"))


def check(lm: Pretrained, name: str) -> None:
    """UserError unless the page can run the model: Mix-d blocks that write and fill in letters."""
    config = lm.config
    runs = (
        isinstance(config, FlowConfig)
        and config.patch == 1
        and all(block.components_are_tokens for block in config.blocks)
        and config.fills_in
        and config.continues_exactly
        and not config.mixes_channels
        and lm.tokenizer.kind == "char"
    )
    if not runs:
        kind = "mixd blocks with components 0 from left to right, patch 1, tokenizer char"
        raise UserError(f"{name} is of another kind: give a model like english-passes, with {kind}")


def packed(weights: dict[str, Tensor]) -> tuple[list[dict[str, object]], bytes]:
    """The places of all tensors, and their bytes: bfloat16 where that loses nothing, else float32.

    Those of four bytes come first, so that all are aligned.
    """
    is_half = {name: torch.equal(tensor.bfloat16(), tensor) for name, tensor in weights.items()}
    places: list[dict[str, object]] = []
    data = b""
    for name in sorted(weights, key=is_half.__getitem__):
        tensor = weights[name].float().contiguous()
        half = is_half[name]
        # little-endian, as in all browsers
        numbers = tensor.bfloat16().view(torch.int16) if half else tensor
        places.append({"name": name, "start": len(data), "size": tensor.numel(), "half": half})
        data += numbers.numpy().astype("<i2" if half else "<f4").tobytes()
    return places, data


if __name__ == "__main__":
    main()
