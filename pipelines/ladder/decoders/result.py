"""What a training of a decoder leaves: a line of `results.jsonl`."""

from pipelines.ladder.results import ResultLine


class DecoderResult(ResultLine):
    """One decoder, trained and measured. A failed one has no measures."""

    measures: dict[str, float] = {}
    num_parameters: int = 0
    train_sec: float = 0.0
    """Since the training was last started."""
    picture: str | None = None
    """Images that were held out above what it makes of them, relative to the plan's folder."""
