"""The captions of a training's data -> whether each fits into the language model's context, before the first
step.

Most are known to fit by the size of their member in the tar's header and are not read.
"""

from repfusion.data.mixture import Mixture
from repfusion.data.readers import PROMPT_FEATURES
from repfusion.llm.base import PromptTooLong
from repfusion.llm.tokenizer import longest_sure_bytes
from repfusion.model.trainable import Trainable


def check_captions(mixture: Mixture, model: Trainable, rank: int = 0, world_size: int = 1) -> None:
    """Looks at every shard that falls to a rank. A data set with prompt features of its captions was read by
    its language model before.

    Raises:
        ValueError: naming shard, key, tokens, limit and the setting, where a caption does not fit.
    """
    sure = longest_sure_bytes(model.captions.max_text_tokens - 1)
    for dataset in mixture.datasets.values():
        if PROMPT_FEATURES in dataset.columns:
            continue
        for shard in range(rank, len(dataset.names), world_size):
            rows = dataset.rows_above(shard, sure)
            texts = {
                row: [one for same in dataset.read_captions(shard, row).values() for one in same]
                for row in rows
            }
            try:
                model.captions.check_lengths([text for own in texts.values() for text in own])
            except PromptTooLong as error:
                row = next(row for row, own in texts.items() if error.prompt in own)
                raise ValueError(
                    f"{dataset.images.place(shard, row)}: {model.unfit_caption(error)}"
                ) from error
