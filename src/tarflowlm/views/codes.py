"""The codebook of a flow in two dimensions."""

from collections.abc import Sequence

import numpy as np

from tarflowlm.flow.codebook import Codebook
from tarflowlm.views.records import Series
from tarflowlm.views.style import COLOURS, MUTED, SMALL, Figure, literal


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


def draw_codebook(
    figure: Figure, codebook: Codebook, symbols: Sequence[str], named: Sequence[int]
) -> None:
    """The projection of mu, with discs of radius sigma around the codes that are `named`."""
    from matplotlib.patches import Circle

    points, explained = project(codebook.mean.detach().cpu().double().numpy())
    std = codebook.log_std.detach().cpu().exp().tolist()
    axes = figure.subplots()
    rest = np.setdiff1d(np.arange(len(points)), named)
    x, y = points.T
    axes.scatter(x[rest], y[rest], s=4, color=MUTED, alpha=0.5, linewidths=0, rasterized=True)
    for code in named[::-1]:  # the first of them on top
        place = (x[code], y[code])
        axes.add_patch(Circle(place, std[code], color=COLOURS[0], alpha=0.14, linewidth=0.8))
        axes.text(
            *place,
            literal(symbols[code].replace(" ", "␣")),
            fontsize=SMALL - 1 if len(rest) else 11,
            ha="center",
            va="center",
            clip_on=True,
        )
    axes.update_datalim(points)
    axes.margins(0.04)
    axes.autoscale_view()
    axes.set_aspect("equal", adjustable="datalim")
    first, second = (f"component ({100 * share:.0f} % of the variance)" for share in explained)
    axes.set_xlabel(f"first principal {first}")
    axes.set_ylabel(f"second principal {second}")
    axes.set_title(f"codebook, {len(symbols):,} symbols, discs of one σ")
