"""Features of drawn and of real images -> how alike two sets of them are."""

import numpy as np
from jaxtyping import Float

NEIGHBOURS = 5
"""Which neighbour of a real image its neighbourhood reaches to."""


def frechet_distance(ours: Float[np.ndarray, "n d"], theirs: Float[np.ndarray, "m d"]) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of the normal distributions that fit two sets of features
    (FID, arXiv 1706.08500), which is biased upwards where they are small.

    Raises:
        ValueError: a set of fewer than two.
    """
    if min(len(ours), len(theirs)) < 2:
        raise ValueError(f"{len(ours)} and {len(theirs)} images; expected at least 2 of each")
    first, second = (np.atleast_2d(np.cov(one, rowvar=False)) for one in (ours, theirs))
    return normal_distance(ours.mean(0), first, theirs.mean(0), second)


def normal_distance(
    first_mean: Float[np.ndarray, " d"],
    first: Float[np.ndarray, "d d"],
    second_mean: Float[np.ndarray, " d"],
    second: Float[np.ndarray, "d d"],
) -> float:
    """The Frechet distance of two normal distributions, of their means and covariances."""
    root = _root(first)
    cross = np.linalg.eigvalsh(root @ second @ root).clip(0)
    traces = np.trace(first) + np.trace(second) - 2 * np.sqrt(cross).sum()
    return float(np.square(first_mean - second_mean).sum() + max(traces, 0.0))


def _root(matrix: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d d"]:
    """The square root of a covariance, which is symmetric."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def is_covered(ours: Float[np.ndarray, "n d"], real: Float[np.ndarray, "m d"]) -> list[bool]:
    """Whether the neighbourhood of each real image, which reaches to its fifth neighbour among them, holds a
    drawn one: their share is the coverage of arXiv 2002.09797, equation 8.

    Raises:
        ValueError: a single real image, which has no neighbour.
    """
    if len(real) < 2:
        raise ValueError(f"{len(real)} real images; expected at least 2")
    among = np.sort(_distances(real, real), axis=1)[:, min(NEIGHBOURS, len(real) - 1)]
    return (_distances(real, ours).min(1) <= among).tolist()


def _distances(first: Float[np.ndarray, "n d"], second: Float[np.ndarray, "m d"]) -> np.ndarray:
    return np.linalg.norm(first[:, None] - second[None], axis=-1)
