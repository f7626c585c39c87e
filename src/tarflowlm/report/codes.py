"""The codes of a model: projected to the plane, their nearest neighbours, figure and table of both."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tarflowlm.data import Tokenizer
from tarflowlm.language_model import LanguageModel
from tarflowlm.report.records import table_html
from tarflowlm.report.style import COLOURS, MUTED, SMALL, Axes, Figure, label_points, literal

Array = npt.NDArray[np.float64]

FEW = 64
"""With at most this many symbols, all are named."""
NAMED = 60
"""With more, this many of the most frequent ones are."""
PAIRS = 32
"""Pairs of nearest neighbours in the figure, the closest ones."""
COMPARED = 8192
"""At most this many codes are compared with all others."""


@dataclass(frozen=True)
class Codes:
    """One vector for every token: mu_k of a codebook, or the input embedding of a baseline."""

    symbols: list[str]
    """[V]."""
    points: Array
    """[V, 2]: coordinates along the two directions of largest variance."""
    explained: tuple[float, float]
    """Shares of the variance along these directions."""
    std: Array | None
    """[V]: sigma_k; None for an embedding."""
    compared: npt.NDArray[np.int64]
    """[M]: the tokens that are compared with all others, most frequent first."""
    nearest: npt.NDArray[np.int64]
    """[M]: the nearest other token of each."""
    distance: Array
    """[M]: the distance to it in units of sigma_k, or of the root mean square norm of an embedding."""
    is_counted: bool
    """`compared` is ordered by frequency in a text, and otherwise by token id."""

    @property
    def unit(self) -> str:
        """The unit of the distances."""
        return "σ" if self.std is not None else "r.m.s. norms"

    @property
    def noun(self) -> str:
        """The name of the vectors."""
        return "codebook" if self.std is not None else "input embedding"


def codes_of(model: LanguageModel, tokenizer: Tokenizer, counts: npt.NDArray[np.int64] | None) -> Codes:
    """The codes of a model; `counts` [V] are the frequencies of the tokens, if known."""
    vectors, log_std = model.token_vectors()
    std = None if log_std is None else log_std.detach().cpu().double().exp().numpy()
    mean = vectors.detach().cpu().double().numpy()
    order = np.arange(len(mean)) if counts is None else np.argsort(-counts, kind="stable")
    compared = order[:COMPARED]
    nearest, distance = nearest_neighbours(mean, compared)
    unit = np.sqrt(np.square(mean).sum(1).mean()) if std is None else std[compared]
    points, explained = project(mean)
    symbols = [symbol.replace(" ", "␣") for symbol in tokenizer.symbols]
    return Codes(symbols, points, explained, std, compared, nearest, distance / unit, counts is not None)


def project(vectors: Array) -> tuple[Array, tuple[float, float]]:
    """Coordinates [V, 2] of vectors [V, d], d >= 1, on their first two principal axes; shares of the variance.

    Signs are fixed: the entry of largest magnitude of each axis is positive. The axes are orthonormal, so a sphere
    of radius sigma becomes a disc of radius sigma.
    """
    centred = vectors - vectors.mean(0)
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    directions = directions[:2]
    signs = np.sign(directions[np.arange(len(directions)), np.abs(directions).argmax(1)])
    points = centred @ (directions * signs[:, None]).T
    shares = np.square(singular) / max(np.square(singular).sum(), 1e-300)
    missing = 2 - points.shape[1]  # d = 1
    shares = np.pad(shares, (0, max(0, missing)))
    return np.pad(points, ((0, 0), (0, missing))), (float(shares[0]), float(shares[1]))


def nearest_neighbours(
    vectors: Array, queries: npt.NDArray[np.int64], chunk: int = 256
) -> tuple[npt.NDArray[np.int64], Array]:
    """The nearest other one of vectors [V, d] to each of the `queries` [M]: indices and Euclidean distances."""
    everything = torch.from_numpy(vectors)
    nearest, distances = [], []
    for start in range(0, len(queries), chunk):
        rows = torch.from_numpy(queries[start : start + chunk])
        # not by matrix products, which lose the precision of small distances
        distance = torch.cdist(everything[rows], everything, compute_mode="donot_use_mm_for_euclid_dist")
        distance[torch.arange(len(rows)), rows] = torch.inf
        least = distance.min(1)
        nearest.append(least.indices.numpy())
        distances.append(least.values.numpy())
    return np.concatenate(nearest), np.concatenate(distances)


PLANE = 4.0
"""Height of the projection in inches."""


def figure_height(codes: Codes) -> float:
    """Height of the figure in inches."""
    return PLANE + 1.2 + 0.16 * min(len(codes.compared), PAIRS)


def draw_codes(figure: Figure, codes: Codes) -> None:
    """The projection, with discs of radius sigma, then the distances of the closest pairs."""
    upper, lower = figure.subplots(2, height_ratios=(PLANE, figure_height(codes) - PLANE - 0.6))
    _draw_plane(upper, codes)
    _draw_neighbours(lower, codes)


def codes_table(codes: Codes) -> str:
    """Distances to the nearest neighbours, and scales."""
    values = {f"distance to the nearest neighbour, {codes.unit}": codes.distance}
    if codes.std is not None:
        values["σ"] = codes.std
    rows = [(name, *(f"{f(x):.4g}" for f in (np.min, np.median, np.max))) for name, x in values.items()]
    return table_html(["", "least", "median", "largest"], rows)


def _draw_plane(axes: Axes, codes: Codes) -> None:
    from matplotlib.collections import EllipseCollection

    few = len(codes.symbols) <= FEW
    shown = codes.compared[: FEW if few else NAMED]
    rest = np.setdiff1d(np.arange(len(codes.points)), shown)
    axes.scatter(*codes.points[rest].T, s=4, color=MUTED, alpha=0.5, linewidths=0, rasterized=True)
    axes.scatter(*codes.points[shown].T, s=9, color=COLOURS[0], linewidths=0, zorder=3)
    if codes.std is not None:
        radius = codes.std[shown]
        circles = EllipseCollection(
            2 * radius, 2 * radius, np.zeros(len(shown)), units="xy", offsets=codes.points[shown],
            offset_transform=axes.transData, color=COLOURS[0], alpha=0.14, linewidths=0.8,
        )  # fmt: skip
        axes.add_collection(circles)
        for side in (-1, 1):
            axes.update_datalim(codes.points[shown] + side * radius[:, None])
    axes.margins(0.04)
    axes.autoscale_view()
    axes.set_aspect("equal", adjustable="datalim")
    first, second = (f"{100 * share:.0f} % of the variance" for share in codes.explained)
    axes.set_xlabel(f"first principal component ({first})")
    axes.set_ylabel(f"second principal component ({second})")
    label_points(axes, codes.points[shown], [codes.symbols[i] for i in shown], size=10.0 if few else SMALL)
    discs = ", discs of one σ" if codes.std is not None else ""
    axes.set_title(f"{codes.noun}, {len(codes.symbols):,} symbols{discs}")


def _draw_neighbours(axes: Axes, codes: Codes) -> None:
    """Symbols with their nearest neighbours, the closest pairs on top."""
    order = np.argsort(codes.distance, kind="stable")[:PAIRS]
    rows = np.arange(len(order))
    axes.hlines(rows, 0, codes.distance[order], color=COLOURS[0], linewidth=1)
    axes.scatter(codes.distance[order], rows, s=12, color=COLOURS[0], zorder=3)
    names = [literal(f"{codes.symbols[codes.compared[i]]} → {codes.symbols[codes.nearest[i]]}") for i in order]
    axes.set_yticks(rows, names)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"distance, {codes.unit}")
    axes.set_title("nearest neighbours" if len(rows) == len(codes.distance) else f"the {len(rows)} closest pairs")
