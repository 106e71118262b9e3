"""What a model is asked for: a prompt and what columns hold of it; and how much of that conditions."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Branch = Literal["full", "none"]
"""What of a request conditions: all of it, or nothing. What `none` reads is the conditioner's choice."""


@dataclass(frozen=True, eq=False)
class Request:
    """One image that is asked for, or one that a training shows."""

    prompt: str = ""
    """What the image shows, in words."""
    computed: Mapping[str, Tensor] = field(default_factory=dict)
    """What columns hold of the request, by the column's name, such as `prompt_features` [m, d]. It saves work
    and is never required.
    """
