"""The control of figure 6: letters of a baseline become noise, and are written back.

    python -m reproduction.written_back

In `english-passes` block 1 fills in the letters that it is sure of (docs/math.md, eq. 9a), which
pass 1 left as noise. Here the same block names such letters in samples of `english-mini-ar`, noise
takes their place, and a second pass writes the letters back. No model refines anything. A third
model, `english-mini`, reads both after every pass: its bits are a bound.
"""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

import tarflowlm
from reproduction.measures import mean_of, share
from reproduction.passes import LENGTH, SAMPLES
from tarflowlm.evaluation.likelihood import bits, log_weights
from tarflowlm.flow.mixd import MixDCoupling
from tarflowlm.generation import generate
from tarflowlm.model import as_flow
from tarflowlm.model_config import MixD


def samples_of(name: str) -> tuple[Sequence[Tensor], Tensor]:
    """The states of a flow's samples after every pass, from the noise on; and the samples."""
    model = tarflowlm.load(name).model
    generator = torch.Generator().manual_seed(0)
    found = generate(model, num_tokens=LENGTH, num=SAMPLES, generator=generator)
    return ([] if model.is_exact else found.passes(as_flow(model))), found.tokens


@torch.no_grad()
def blanked(tokens: Tensor) -> Tensor:
    """The tokens with those of which block 1 of `english-passes` is sure replaced by noise."""
    model = as_flow(tarflowlm.load("english-passes").model)
    first, options = model.prior.block(0), model.config.blocks[0]
    assert isinstance(options, MixD)
    tied = first.coupling
    assert isinstance(tied, MixDCoupling)
    z = model.codebook.mean[tokens]
    features = tied.token_features(first.features(z), z)
    law = tied.weight_head(features).flatten(2).softmax(-1)
    is_sure = law[..., : model.config.vocab_size].amax(-1) > options.certainty
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    return torch.where(is_sure, model.codebook.decode(noise), tokens)


def main() -> None:
    """Prints the bits after every pass, and the share of letters that it edits."""
    judge = tarflowlm.load("english-mini").model
    passes, _ = samples_of("english-passes")
    _, text = samples_of("english-mini-ar")
    # as those of the flow, its texts begin as noise
    noise = passes[0]
    for name, states in (("english-passes", passes), ("control", [noise, blanked(text), text])):
        read = [bits(-log_weights(judge, state, samples=1, seed=0)[0]) / LENGTH for state in states]
        for number, found in enumerate(read):
            mean = mean_of(found)
            line = f"{name}, after pass {number}: {mean.mean:.4f} +- {mean.std:.4f} bits"
            if number:
                fall = mean_of(read[number - 1] - found)
                edits = share(states[number] != states[number - 1])
                line += f", a fall of {fall.mean:.4f} +- {fall.std:.4f}, edits {edits:.4f}"
            sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main()
