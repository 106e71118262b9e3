"""Whether the folders of a model hold what they say, and fit each other, before anything is computed: from
their config.json and the headers of their weights.
"""

import torch

from repfusion.codes.tokenizer import ImageTokenizer
from repfusion.config import naming
from repfusion.latents.load import fitting_decoder
from repfusion.latents.statistics import LatentStatistics
from repfusion.model.build import assemble, build_code_model, load_llm, load_second_llm
from repfusion.model.config import ModelConfig
from repfusion.model.discrete.illume import IllumeConfig
from repfusion.model.discrete.unidisc import UniDiscConfig
from repfusion.model.text_to_image import TextToImage
from repfusion.model.trainable import Trainable, TrainableConfig


def check_model(config: TrainableConfig, key: str = "model", has_decoder: bool = True) -> Trainable:
    """`check_flow` of a text-to-image model; of one of codes, the model without memory likewise, whose folder
    of the tokenizer has to be there (`has_decoder`).

    Raises: ValueError: what `check_flow` raises; the folders of a model of codes are none.
    """
    match config:
        case ModelConfig():
            return check_flow(config, key, has_decoder)
        case UniDiscConfig() | IllumeConfig():
            with naming(key), torch.device("meta"):
                ImageTokenizer.from_pretrained(config.tokenizer, on_meta=True)
                return build_code_model(config, on_meta=True)
        case _:
            raise AssertionError(f"{type(config).__name__} is no model's configuration")


def check_flow(config: ModelConfig, key: str = "model", has_decoder: bool = True) -> TextToImage:
    """The model without memory (torch's meta device), made by the code that makes the real one. `key` is
    where the configuration stands, for messages. A model that does not have its decoder yet is looked at
    without.

    Raises: ValueError: a folder is missing, lacks weights, or has others than its config.json says; encoder,
        MLLM, decoder, method and denoiser do not fit each other. The message begins with the key.
    """
    with naming(f"{key}.encoder.path"):
        encoder = config.encoder.load_latents(on_meta=True)
    with naming(f"{key}.mllm"):
        llm = load_llm(config, on_meta=True)
    with naming(f"{key}.conditioning"):
        second = load_second_llm(config, on_meta=True)
    if has_decoder:
        with naming(f"{key}.decoder"):
            fitting_decoder(config.decoder, encoder.grid, encoder.feature_dim, on_meta=True)
    with naming(key), torch.device("meta"):
        statistics = LatentStatistics.empty(encoder.num_tokens, encoder.feature_dim)
        return assemble(config, llm, statistics, encoder.grid, second)
