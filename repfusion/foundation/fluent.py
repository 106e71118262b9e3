"""The shipped LLaVA -> one that knows the world's texts as well as its language-only twin, over the same
frozen tower.

Controlled comparisons of perception pretraining need it: in the paper both language models have read the
same texts. The shipped LLaVA saw captions alone in every fourth step at a quarter of the weight, the twin in
every step at full weight, and what it says after a prompt tells colours and pairs apart less well
(docs/log.md). Here the twin's loss on captions goes on beside the dialogues about images.
"""

from pathlib import Path

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from repfusion.foundation.perception import (
    PIXEL_MEAN,
    PIXEL_STD,
    FoundationConfig,
    ScenePool,
    optimise,
    save_mllm,
    spoken_loss,
    text_loss,
)


def train_fluent(
    pool: ScenePool, tokenizer: PreTrainedTokenizerFast, config: FoundationConfig, folder: Path
) -> None:
    """Writes `llava_fluent`; the tower is the shipped one's, bit for bit."""
    torch.manual_seed(8)
    llava = LlavaForConditionalGeneration.from_pretrained(folder / "llava", dtype=torch.float32)
    tower = llava.model.vision_tower.eval().requires_grad_(False)

    def loss_of_step(step: int) -> Tensor:
        scenes, pixels = pool.batch(config.fluent_batch_size)
        with torch.no_grad():
            seen = tower(pixel_values=(pixels - PIXEL_MEAN) / PIXEL_STD, output_hidden_states=True)
        said = spoken_loss(llava, seen.hidden_states[-2][:, 1:], tokenizer, scenes, pool.rng)
        return said + text_loss(llava.lm_head, llava.model.language_model, tokenizer, scenes, pool.rng)

    learned = [parameter for parameter in llava.parameters() if parameter.requires_grad]
    config = config.model_copy(update={"learning_rate": config.fluent_learning_rate})
    optimise(learned, config, config.fluent_steps, loss_of_step, "fluent")
    save_mllm(llava, tokenizer, folder / "llava_fluent")
