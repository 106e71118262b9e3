"""What a model is asked for: a prompt, images and what columns hold; and how much of that conditions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

Branch = Literal["full", "images", "none"]
"""What of a request conditions: all of it, its images without its text, or nothing. What `none` reads is the
conditioner's choice.
"""


@dataclass(frozen=True, eq=False)
class Request:
    """One image that is asked for, or one that a training shows."""

    prompt: str = ""
    """What the image shows, or how it comes of `images`, in words."""
    images: tuple[UInt8[np.ndarray, "_ _ 3"], ...] = ()
    """Sources and references, in the order in which the prompt counts them."""
    rewrite: str | Literal[False] | None = None
    """System prompt under which the language model rewrites the prompt first; False: the prompt as it is;
    None: the model's own habit.
    """
    computed: Mapping[str, Tensor] = field(default_factory=dict)
    """What columns hold of the request, by the column's name, such as `prompt_features` [m, d]. It saves work
    and is never required.
    """


def refuse_images(requests: Sequence[Request], method: str) -> None:
    """Raises ValueError where a request has images, which a conditioning method cannot read."""
    for request in requests:
        if request.images:
            raise ValueError(
                f"the request {request.prompt[:60]!r} has {len(request.images)} image(s), which the method "
                f"{method!r} cannot read; leave them out, or take a checkpoint of a method that reads images"
            )
