"""What a model is asked for: a prompt, images, what columns hold of them, and how much of that conditions."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from torch import Tensor

Branch = Literal["full", "images", "none"]
"""What of a request conditions: all of it, its images without its text, nothing. What `none` reads is the
conditioner's choice.
"""


@dataclass(frozen=True, eq=False)
class Request:
    """One image that is asked for, or one that a training shows."""

    prompt: str = ""
    """What the image shows, in words."""
    images: tuple[np.ndarray, ...] = ()
    """Sources and references, each uint8 [h, w, 3], in the order in which the prompt counts them."""
    rewrite: str | Literal[False] | None = None
    """System prompt under which the language model rewrites the prompt; False: the prompt as it is; None: the
    model's own habit.
    """
    computed: Mapping[str, Tensor] = field(default_factory=dict)
    """What columns hold of the request, by the column's name, such as `prompt_features` [m, d]. It saves work
    and is never required.
    """
