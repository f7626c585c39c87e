"""The codebook of a flow, or the input embedding of a baseline, in two dimensions."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tarflowlm.data import Tokenizer
from tarflowlm.language_model import LanguageModel
from tarflowlm.views.records import Series
from tarflowlm.views.style import COLOURS, MUTED, SMALL, Figure, literal

Indices = npt.NDArray[np.int64]

NAMED = 64  # symbols that are named among the codes


@dataclass(frozen=True)
class Codes:
    """One vector for every token: mu_k of a codebook, or the input embedding of a baseline."""

    symbols: list[str]  # [V]
    points: Series  # [V, 2]: coordinates along the two directions of largest variance
    explained: tuple[float, float]  # shares of the variance along these directions
    std: Series | None  # [V]: sigma_k; None for an embedding
    named: Indices  # the tokens that are named, most frequent first, or the first of the vocabulary

    @property
    def noun(self) -> str:
        """What the vectors are."""
        return "codebook" if self.std is not None else "input embedding"


def codes_of(model: LanguageModel, tokenizer: Tokenizer, counts: Indices | None) -> Codes:
    """The codes of a model; `counts` [V] are the frequencies of the tokens, if known."""
    vectors, log_std = model.token_vectors()
    points, explained = project(vectors.detach().cpu().double().numpy())
    order = np.arange(len(points)) if counts is None else np.argsort(-counts, kind="stable")
    return Codes(
        symbols=[symbol.replace(" ", "␣") for symbol in tokenizer.symbols],
        points=points,
        explained=explained,
        std=None if log_std is None else log_std.detach().cpu().double().exp().numpy(),
        named=order[:NAMED],
    )


def project(vectors: Series) -> tuple[Series, tuple[float, float]]:
    """Vectors [V, d] on their first two principal axes: [V, 2], and shares of the variance.

    Signs are fixed: the entry of largest magnitude of each axis is positive. The axes are
    orthonormal, so a sphere becomes a disc of the same radius.
    """
    # a channel of zeros gives d = 1 a second axis
    centred = np.pad(vectors - vectors.mean(0), ((0, 0), (0, 1)))
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    axes = directions[:2]
    axes *= np.sign(axes[[0, 1], np.abs(axes).argmax(1)])[:, None]
    first, second = singular[:2] ** 2 / np.sum(singular**2)
    return centred @ axes.T, (float(first), float(second))


def draw_codes(figure: Figure, codes: Codes) -> None:
    """The projection, with discs of radius sigma around the codes that are named."""
    from matplotlib.patches import Circle

    axes = figure.subplots()
    rest = np.setdiff1d(np.arange(len(codes.points)), codes.named)
    x, y = codes.points.T
    axes.scatter(x[rest], y[rest], s=4, color=MUTED, alpha=0.5, linewidths=0, rasterized=True)
    title = f"{codes.noun}, {len(codes.symbols):,} symbols"
    if codes.std is not None:
        title += ", discs of one σ"
    for code in codes.named[::-1]:  # the most frequent on top
        place = (x[code], y[code])
        if codes.std is not None:
            disc = Circle(place, codes.std[code], color=COLOURS[0], alpha=0.14, linewidth=0.8)
            axes.add_patch(disc)
        axes.text(
            *place,
            literal(codes.symbols[code]),
            fontsize=SMALL - 1 if len(rest) else 11,
            ha="center",
            va="center",
            clip_on=True,
        )
    axes.update_datalim(codes.points)
    axes.margins(0.04)
    axes.autoscale_view()
    axes.set_aspect("equal", adjustable="datalim")
    first, second = (
        f"principal component ({100 * share:.0f} % of the variance)" for share in codes.explained
    )
    axes.set_xlabel(f"first {first}")
    axes.set_ylabel(f"second {second}")
    axes.set_title(title)
