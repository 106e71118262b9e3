"""FLOPs of training and sampling, parameters and bytes, by part: `python -m repfusion.flops`."""

from repfusion.flops.count import batch_flops, sample_flops, train_flops
from repfusion.flops.peaks import peak_flops

__all__ = ["batch_flops", "peak_flops", "sample_flops", "train_flops"]
