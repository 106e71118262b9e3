"""FLOPs of training and sampling, parameters and bytes, counted by formula: `python -m repfusion.flops`."""

from repfusion.flops.count import sample_flops, train_flops
from repfusion.flops.peaks import peak_flops

__all__ = ["peak_flops", "sample_flops", "train_flops"]
