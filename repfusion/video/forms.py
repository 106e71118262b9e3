"""The length, rate and quality that clips are brought to, as a configuration says."""

from typing import Literal

from pydantic import Field

from repfusion.config import Config
from repfusion.video.limits import MAX_CLIP_SEC


class ClipForm(Config):
    """The length and rate that clips are brought to."""

    num_frames: int = Field(default=9, ge=2, le=2048)
    """Frames of a clip, its first ones at that rate. A causal video VAE that shortens time by 4 takes
    4k + 1.
    """
    rate: float = Field(default=8.0, gt=0, le=240)
    """Frames a second. A clip of a lower rate is dropped, `rate_too_low`."""
    quality: int | None = Field(default=None, ge=0, le=51)
    """Constant rate factor of H.264 in YUV 4:4:4, lower is better, 18 looks like the original; None is
    lossless RGB.
    """
    max_sec: float = Field(default=600.0, gt=0, le=MAX_CLIP_SEC)
    """Longest clip that is taken in, in seconds, of which `num_frames` / `rate` are kept."""
    variable_rate: Literal["resample", "drop"] = "resample"
    """What becomes of a clip whose frames are not equally far apart in time."""

    @property
    def seconds(self) -> float:
        """How long a clip of that form lasts."""
        return self.num_frames / self.rate
