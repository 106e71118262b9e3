"""A prompt of a relation -> what it scores where its things stand anywhere: the floor of position."""

from itertools import permutations, product

from repfusion.scenes.captions import Prompt
from repfusion.scenes.detector import check
from repfusion.scenes.world import COLOURS, Thing, WorldConfig


def chance_of(prompt: Prompt, cells: int, is_strict: bool = False) -> float:
    """Share of the arrangements that satisfy a prompt among all that put its things into distinct cells of a
    square grid, each in the middle of its cell at middle size: all is right but the places, which are chance.

    On 2 cells a side, a relation of two things holds in 1 of 3 arrangements by GenEval's rule, which takes
    diagonals, and in 1 of 6 by the strict one.
    """
    size = sum(WorldConfig(cells=cells).sizes) / 2 / cells
    looks = [
        (want.shape, want.colour or next(iter(COLOURS))) for want in prompt.wanted for _ in range(want.number)
    ]
    grid = list(product(range(cells), repeat=2))
    right = [
        check(
            [
                Thing(*look, (col + 0.5) / cells, (row + 0.5) / cells, size)
                for look, (row, col) in zip(looks, places, strict=True)
            ],
            prompt,
            is_strict,
        ).correct
        for places in permutations(grid, len(looks))
    ]
    return sum(right) / len(right)
