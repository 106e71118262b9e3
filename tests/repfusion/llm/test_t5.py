"""T5's encoder in the place of a language model: what it reads, in which tokens, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from prompting import prepare, read_prompts, training_inputs
from slowly import all_but_one_slow
from tiny_models import save_t5, t5_tokenizer
from tiny_training import METHODS, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from repfusion.conditioning.text_embed import TextEmbedConditioner
from repfusion.diffusion.flow import interpolate
from repfusion.export import export
from repfusion.flops.count import train_costs
from repfusion.llm.load import load_language_model
from repfusion.llm.t5 import T5Encoder
from repfusion.llm.tokenizer import load_tokenizer, plain_ids, prompt_context
from repfusion.model.build import build_model
from repfusion.model.config import ModelConfig
from repfusion.model.meta import meta_model
from repfusion.model.text_to_image import TextToImage
from repfusion.runs.checkpoint import save_checkpoint
from repfusion.runs.exported import load_export
from repfusion.scenes.captions import caption_scene
from repfusion.scenes.world import draw_scene

PROMPTS = ["a red circle", "two blue squares left of a green circle", ""]
CONTROL = ("</s>", "<pad>", "<extra_id_0>")


def captions(number: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [caption_scene(draw_scene(seed), rng) for seed in range(number)]


def scenes_tokenizer() -> PreTrainedTokenizerFast:
    """A Unigram vocabulary learned from captions, as T5's tokenizer holds one."""
    learned = Tokenizer(models.Unigram())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=150, unk_token="<unk>", show_progress=False)
    trainer.special_tokens = ["<unk>"]
    learned.train_from_iterator(captions(200), trainer)
    vocabulary = json.loads(learned.to_str())["model"]["vocab"]
    return t5_tokenizer([(piece, score) for piece, score in vocabulary if piece != "<unk>"])


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole T5 of a few layers, with its decoder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("t5")
    save_t5("T5ForConditionalGeneration", folder, scenes_tokenizer(), num_layers=3)
    return folder


@pytest.fixture
def config(t5, foundation) -> ModelConfig:
    return tiny_model(foundation, "one_layer").model_copy(update={"mllm": t5})


def test_states_are_those_of_transformers_own_encoder(t5):
    llm, own = load_language_model(t5), T5EncoderModel.from_pretrained(t5).eval()
    tokenizer, prefix = AutoTokenizer.from_pretrained(t5), load_language_model(t5).tokenise(PROMPTS)
    assert isinstance(llm, T5Encoder) and len(llm.layers) == 3 and llm.is_frozen
    states = llm.read_layers(prefix, (0, 1, 2, -1))
    for row, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt, return_tensors="pt").input_ids  # its end token behind the prompt
        assert prefix.ids[row][prefix.mask[row]].tolist() == ids[0].tolist()
        expected = own(input_ids=ids, output_hidden_states=True).hidden_states
        for state, layer in zip(states, (0, 1, 2, -1), strict=True):
            torch.testing.assert_close(state[row][prefix.mask[row]], expected[layer][0], rtol=1e-4, atol=1e-5)
    assert torch.equal(llm.read(prefix), states[-1])


@pytest.mark.parametrize("word", CONTROL)
def test_a_control_token_in_a_text_is_characters(t5, word):
    tokenizer, llm = AutoTokenizer.from_pretrained(t5), load_language_model(t5)
    control, text = tokenizer.convert_tokens_to_ids(word), f"a red {word} circle{word}"
    assert control in tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert control not in llm.token_ids([text])[0]


def test_other_texts_have_the_ids_that_they_always_had(t5):
    tokenizer, texts = AutoTokenizer.from_pretrained(t5), [*captions(300), "", "< a>", "naïve café"]
    assert plain_ids(load_tokenizer(t5), texts) == tokenizer(texts, add_special_tokens=False).input_ids


def test_its_context_is_what_it_was_trained_on(t5):
    assert load_language_model(t5).max_text_tokens == prompt_context(t5, 0) == 512


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("noisy_latents", "T5's encoder reads prompts alone, the method has 4 tokens read beside them"),
        ("queries", "reads prompts alone"),
        ("transfusion", "reads prompts alone"),
        ("key_values", "keeps no keys and values, which key_values reads"),
    ],
)
def test_methods_that_ask_for_more_are_refused(config, statistics, method, says):
    with pytest.raises(ValueError, match=says):
        build_model(ModelConfig(**{**config.model_dump(), "conditioning": METHODS[method]}), statistics)


def learned(model: TextToImage, num_steps: int) -> tuple[float, float]:
    """The loss on one batch before and after steps of training."""
    inputs = training_inputs(model, [*PROMPTS, "a cross"], range(4), 1.0)
    optimizer = torch.optim.AdamW(model.trainable_state().values(), lr=5e-3)
    losses = []
    for _ in range(num_steps):
        loss = model(inputs)["velocity"].mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses[0], losses[-1]


@pytest.mark.parametrize(
    "method",
    all_but_one_slow(["text_embed", "one_layer", "hidden_injection", "layer_per_block"], "one_layer"),
)
def test_a_method_of_the_prompt_alone_trains_on_it(config, statistics, method):
    model = build_model(ModelConfig(**{**config.model_dump(), "conditioning": METHODS[method]}), statistics)
    frozen = {name: value.clone() for name, value in model.conditioner.llm.state_dict().items()}
    first, last = learned(model, 20)
    assert last < 0.8 * first
    assert all(torch.equal(value, frozen[name]) for name, value in model.conditioner.llm.state_dict().items())


def test_padding_and_other_prompts_change_nothing(t5):
    conditioner = TextEmbedConditioner(load_language_model(t5))
    (together,) = prepare(conditioner, PROMPTS).static
    for row, prompt in enumerate(PROMPTS):
        (alone,) = prepare(conditioner, [prompt]).static
        torch.testing.assert_close(
            together.tokens[row][together.mask[row]], alone.tokens[0], rtol=1e-4, atol=1e-5
        )


def test_an_export_holds_the_encoder_alone(config, statistics, tmp_path):
    model = build_model(config, statistics)
    save_checkpoint(tmp_path / "step_00000001", model, dict(model.trainable_state()), step=1)
    loaded = load_export(export(tmp_path / "step_00000001", tmp_path / "out", use_ema=False))
    assert loaded.conditioner.llm.state_dict().keys() == model.conditioner.llm.state_dict().keys()
    z, t = torch.randn(3, *model.latent_shape), torch.tensor([0.2, 0.5, 0.9])
    z_t = interpolate(z, torch.randn_like(z), t)
    with torch.no_grad():
        found, expected = (one.velocity(z_t, t, read_prompts(one, PROMPTS)) for one in (loaded, model))
    assert torch.equal(found, expected)


def test_a_geometry_is_counted_without_weights(config):
    """Layers of Flan-T5-XXL's encoder, of which it has 24: 64 heads, gated."""
    sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 3, "num_heads": 64}
    xxl = T5Config(**sizes, feed_forward_proj="gated-gelu")
    model = meta_model(config, xxl, (2, 2), 16)
    llm = model.conditioner.llm
    assert isinstance(llm, T5Encoder) and {one.device.type for one in llm.parameters()} == {"meta"}
    in_a_layer = 4 * 4096**2 + 3 * 4096 * 10240
    costs = train_costs(model, 7)
    # linear layers, and attention's two products, of 7 tokens
    assert costs["language model"].forward == 3 * 7 * (2 * in_a_layer + 4 * 4096 * 7)
    assert costs["language model"].backward == 0
