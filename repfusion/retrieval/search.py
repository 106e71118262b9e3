"""Queries and embeddings, a part at a time -> the nearest ones of each query, exactly."""

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

ROWS_AT_ONCE = 65_536
"""Embeddings whose scores are in memory at a time."""


def nearest(
    queries: Float[Tensor, "q r"], parts: Iterable[Float[Tensor, "_ r"]], num: int
) -> tuple[Float[Tensor, "q k"], Int[Tensor, "q k"]]:
    """Scores (inner products) and places of the `num` embeddings nearest to each query, best first, and of
    equal ones the first; fewer where there are fewer. Places count through all parts. Every embedding is
    compared; what is in memory is a part, and scores of `ROWS_AT_ONCE` of it.
    """
    scores, places = queries.new_empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.long)
    seen = 0
    for part in parts:
        for rows in part.split(ROWS_AT_ONCE):
            own = torch.arange(seen, seen + len(rows)).expand(len(queries), -1)
            scores, places = best(
                torch.cat([scores, queries @ rows.T], dim=1), torch.cat([places, own], dim=1), num
            )
            seen += len(rows)
    return scores, places


def best(
    scores: Float[Tensor, "q n"], places: Int[Tensor, "q n"], num: int
) -> tuple[Float[Tensor, "q k"], Int[Tensor, "q k"]]:
    """The `num` highest scores of each query, best first, and their places."""
    order = scores.sort(dim=1, descending=True, stable=True)
    return order.values[:, :num], places.gather(1, order.indices[:, :num])


def rivals(
    queries: Float[Tensor, "n r"], own: Float[Tensor, "n r"], at_once: int = 1024
) -> Int[Tensor, " n"]:
    """How many of the others score at least as well for each query as its own does: 0 is found first, and a
    tie counts against it.
    """
    found = []
    for start in range(0, len(queries), at_once):
        scores = queries[start : start + at_once] @ own.T
        rows = torch.arange(len(scores))
        found.append((scores >= scores[rows, start + rows][:, None]).sum(1) - 1)
    return torch.cat(found)
