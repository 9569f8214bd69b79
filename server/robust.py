"""Rules that bound what a few hostile sites can do; every site has one vote, whatever its size.

Patient counts weigh nothing here: a breakdown point counts sites, and a heavy hostile site
would otherwise have several votes.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from agssd_core.weights import Array
from server.merge_rules import Float64

_FAR = 1e12  # stands for an infinite ratio, which JSON could not hold


def trimmed_mean(arrays: Sequence[Array], *, trim: int) -> Float64:
    """Coordinate-wise mean without the ``trim`` least and greatest values.

    Needs more than 2 * trim arrays. Source: Yin et al. 2018, arXiv:1803.01498, Definition 2.
    """
    ranked = np.sort(np.stack(arrays), axis=0)
    return np.asarray(ranked[trim : len(arrays) - trim].mean(axis=0, dtype=np.float64))


def coordinate_median(arrays: Sequence[Array]) -> Float64:
    """Coordinate-wise median. Source: Yin et al. 2018, arXiv:1803.01498, Definition 1."""
    return trimmed_mean(arrays, trim=(len(arrays) - 1) // 2)


def squared_distances(differences: Sequence[Float64]) -> Float64:
    """(K, K) squared distances between K arrays of one name; sums over names give the model's."""
    flat = np.stack([difference.ravel() for difference in differences])
    gram = flat @ flat.T
    norms = np.diag(gram)
    return np.asarray(np.maximum(norms[:, None] + norms[None, :] - 2 * gram, 0.0))


def krum_scores(distances: Mapping[str, Float64], *, hostile: int) -> Float64:
    """Krum's score of every site: how far its K - f - 2 nearest neighbours are.

    Student, teacher and state are scored apart, each divided by its median over the sites, and
    the worst of the three counts. In one sum the teacher's differences, a hundredth of the
    student's, vanish, and a teacher-only poison would be selected.

    Args:
        distances: per group the (K, K) squared distances between the sites.
        hostile: f; K >= 2 f + 3.

    Returns:
        (K,) scores, dimensionless, about 1 for an honest site.

    Source:
        Blanchard et al. 2017, Krum, Section 4; the division by groups is ours.
    """
    worst = np.zeros(len(next(iter(distances.values()))))
    for matrix in distances.values():
        others = np.sort(matrix, axis=1)[:, 1 : len(matrix) - hostile - 1]  # column 0 is itself
        score = others.sum(axis=1)
        middle = float(np.median(score))
        ratio = np.where(score > 0, _FAR, 0.0) if middle == 0 else score / middle
        worst = np.maximum(worst, np.minimum(ratio, _FAR))
    return np.asarray(worst)


def clip_reference(norms: Sequence[float], history: Sequence[float]) -> tuple[float, list[float]]:
    """The norm to clip to: a running median over up to five rounds of each round's median.

    The lower of the two middle norms counts when the number of sites is even, so that of two
    sites the one with the greater norm never sets the limit.

    Args:
        norms: L2 norms of this round's differences.
        history: this round's predecessors, oldest first.

    Returns:
        The reference norm and the history to keep.
    """
    now = sorted(norms)[(len(norms) - 1) // 2]
    kept = [*history, now][-5:]
    return float(np.median(kept)), kept


def clip_scales(norms: Sequence[float], *, limit: float) -> list[float]:
    """Factors that bring every norm down to ``limit``; 1 for those within it."""
    return [1.0 if norm <= limit else limit / norm for norm in norms]
