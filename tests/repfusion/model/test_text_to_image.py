"""One model: what trains, what stays frozen, what it learns, and what it refuses."""

import numpy as np
import pytest
import torch
from prompting import asked, read_prompts, seeds_where, training_inputs
from tiny_training import CONTRARY, GRID, METHODS, WIDTH, sparing, tiny_model
from transformers import AutoTokenizer, LlamaForCausalLM, LlavaForConditionalGeneration

from repfusion.diffusion.flow import CAPTIONED, interpolate, shift_factor
from repfusion.diffusion.sampler import SamplerConfig, sample
from repfusion.inputs import Inputs
from repfusion.latents.rae_decoder import RAEDecoder, RAEDecoderConfig
from repfusion.latents.statistics import LatentStatistics
from repfusion.latents.tower import RepresentationEncoder
from repfusion.model.build import assemble, build_model
from repfusion.model.config import ModelConfig
from repfusion.model.dit import DiTConfig
from repfusion.model.text_to_image import TextToImage
from repfusion.request import Request

PROMPTS = ["a red circle", "two blue square", "a green circle left of a blue square", ""]
TRAINED = ["noisy_latents_trained", "transfusion"]
"""Methods that train the language model."""


SEEDS = seeds_where(CAPTIONED, 0.5, [True, False, True, False])


def batch_of(generator: TextToImage) -> Inputs:
    """What training feeds, of fixed seeds."""
    return training_inputs(generator, PROMPTS, SEEDS, shift=1.0)


def objective(generator: TextToImage) -> torch.Tensor:
    """What training minimises, on one batch: the velocity's loss, and the captions' where there is one."""
    losses = generator(batch_of(generator))
    assert list(losses) == ["velocity", "caption"][: 1 + (generator.config.captioning is not None)]
    return sum(loss.mean() for loss in losses.values())


def train_steps(generator: TextToImage, num_steps: int, learning_rate: float = 3e-3) -> list[float]:
    """Plain steps on one batch; the losses before each."""
    optimizer = torch.optim.AdamW(generator.trainable_state().values(), lr=learning_rate, weight_decay=0)
    losses = []
    for _ in range(num_steps):
        loss = objective(generator)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@pytest.mark.parametrize("conditioning", sparing(METHODS))
def test_loss_is_the_velocitys_squared_error_per_sample(make_generator, conditioning):
    generator = make_generator(conditioning)
    inputs = batch_of(generator)
    loss, t, noise = generator(inputs)["velocity"], inputs["t"], inputs["noise"]
    latents = generator.normalise(inputs["features"])
    predicted = generator.velocity(interpolate(latents, noise, t), t, read_prompts(generator, PROMPTS))
    expected = torch.stack([(predicted[i] - (noise[i] - latents[i])).square().mean() for i in range(4)])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("conditioning", sparing(METHODS))
def test_the_first_loss_is_that_of_velocity_zero(make_generator, conditioning):
    generator = make_generator(conditioning, awake=False)
    inputs = batch_of(generator)
    velocity = inputs["noise"] - generator.normalise(inputs["features"])
    torch.testing.assert_close(generator(inputs)["velocity"], velocity.square().mean(dim=(1, 2)))


@pytest.mark.parametrize("conditioning", sparing(METHODS))
def test_training_changes_every_trainable_weight_and_no_frozen_bit(make_generator, conditioning):
    generator = make_generator(conditioning, awake=False)
    trainable = generator.trainable_state().keys()
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    train_steps(generator, 4)
    frozen = [name for name in before if name not in {*trainable, *generator.fixed}]
    assert bool(frozen) == (conditioning not in TRAINED)
    parts = ("language_model.", "head.", "eyes.")
    assert all(name.removeprefix("conditioner.llm.").startswith(parts) for name in frozen)
    after = generator.state_dict()
    unchanged = [*frozen, *generator.fixed_state()]
    assert [name for name in unchanged if not torch.equal(after[name], before[name])] == []
    assert [name for name in trainable if torch.equal(after[name], before[name])] == []
    assert all(p.grad is None for p in generator.conditioner.llm.parameters() if not p.requires_grad)


@pytest.mark.parametrize("conditioning", sparing(METHODS))
def test_gradient_reaches_everything_that_trains(make_generator, conditioning):
    generator = make_generator(conditioning)
    objective(generator).backward()
    trainable = generator.trainable_state()
    assert [name for name, p in trainable.items() if p.grad is None or not p.grad.abs().max() > 0] == []


def test_what_trains_is_projector_time_embedding_and_dit(make_generator):
    groups = {".".join(name.split(".")[:2]) for name in make_generator().trainable_state()}
    assert {g for g in groups if not g.startswith("denoiser.")} == {
        "conditioner.projector",
        "conditioner.time",
    }
    groups = {".".join(name.split(".")[:2]) for name in make_generator("text_embed").trainable_state()}
    assert {g for g in groups if not g.startswith("denoiser.")} == {"conditioner.norm"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "conditioning",
    [
        "noisy_latents",
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("text_embed", "queries", "transfusion")),
    ],
)
def test_overfits_one_batch(make_generator, conditioning):
    generator = make_generator(conditioning, awake=False, dit=DiTConfig(hidden_size=64, depth=2, num_heads=2))
    losses = train_steps(generator, 150, learning_rate=5e-3)
    if generator.config.captioning is None:
        assert losses[0] == pytest.approx(2, rel=0.2)
    assert losses[-1] < losses[0] / 20


def test_learns_which_prompt_belongs_to_which_latents(make_generator):
    """All samples start from the same pure noise, so that only the prompt can tell them apart."""
    generator = make_generator(awake=False, dit=DiTConfig(hidden_size=64, depth=2, num_heads=2))
    inputs = batch_of(generator)
    inputs |= {"noise": inputs["noise"][:1].expand(4, -1, -1), "t": torch.ones(4)}
    exchanged = {**inputs, "request": generator.conditioner.collate(*asked(PROMPTS[::-1]))}
    optimizer = torch.optim.AdamW(generator.trainable_state().values(), lr=5e-3, weight_decay=0)
    for _ in range(100):
        loss = generator(inputs)["velocity"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right, wrong = (generator(one)["velocity"].mean() for one in (inputs, exchanged))
    assert right < 0.2 < 1 < wrong


@pytest.mark.parametrize("conditioning", sparing(METHODS, CONTRARY))
def test_a_llava_made_elsewhere_trains_and_samples(elsewhere, conditioning):
    """Other widths, depth, patch size and tokenizer through the same configuration."""
    config = ModelConfig(**{**elsewhere.model_dump(), "conditioning": METHODS[conditioning]})
    encoder = RepresentationEncoder.from_pretrained(config.encoder.path, config.encoder.layer)
    pixels = torch.rand(4, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    statistics = LatentStatistics.empty(encoder.num_tokens, encoder.feature_dim)
    statistics.update(encoder(pixels))
    generator = build_model(config, statistics)
    frozen = {n: v.clone() for n, v in generator.conditioner.llm.state_dict().items()}
    inputs = training_inputs(generator, PROMPTS, range(100, 104), generator.shift)
    inputs["features"] = encoder(pixels)
    optimizer = torch.optim.AdamW(generator.trainable_state().values(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = generator(inputs)["velocity"].mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.95 * losses[0]
    if conditioning not in TRAINED:
        assert all(torch.equal(v, frozen[n]) for n, v in generator.conditioner.llm.state_dict().items())
    made = sample(generator, asked(PROMPTS)[0], inputs["noise"], SamplerConfig(num_steps=2))
    images = generator.load_decoder()(generator.denormalise(made))
    assert images.shape == (4, 3, 48, 48) and bool(images.isfinite().all())


def test_the_language_only_twin_gets_a_fresh_projector_and_trains(foundation, statistics, tmp_path):
    llava = LlavaForConditionalGeneration.from_pretrained(foundation / "llava")
    LlamaForCausalLM(llava.config.text_config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(foundation / "llava").save_pretrained(tmp_path)
    generator = build_model(tiny_model(foundation).model_copy(update={"mllm": tmp_path}), statistics)
    projector = generator.conditioner.projector
    assert (projector.linear_1.in_features, projector.linear_2.out_features) == (WIDTH, 32)
    pretrained = llava.model.multi_modal_projector.linear_1.weight
    assert not torch.equal(projector.linear_1.weight, pretrained)
    losses = train_steps(generator, 8)
    assert losses[-1] < losses[0]


def test_the_mllms_own_projector_starts_by_making_of_latents_what_it_made_of_features(foundation):
    """With statistics that differ at each place, and e_t at 0."""
    gen = torch.Generator().manual_seed(3)
    mean = torch.randn(GRID**2, WIDTH, generator=gen).double()
    var = (0.3 + torch.rand(GRID**2, WIDTH, generator=gen)).double()
    statistics = LatentStatistics(10, mean, 10 * var)
    generator = build_model(tiny_model(foundation), statistics)
    features = torch.randn(2, GRID**2, WIDTH, generator=gen)
    own = LlavaForConditionalGeneration.from_pretrained(foundation / "llava").model.multi_modal_projector
    with torch.no_grad():
        latents, expected = generator.normalise(features), own(features)
        project = generator.conditioner.project
        made, other = (project(tokens, torch.zeros(2)) for tokens in (latents, features))
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert (other - expected).norm() > 0.1 * expected.norm()
    assert generator.conditioner.llm.projector is None  # held once


def test_frozen_weights_in_bfloat16_train_a_float32_model(make_generator):
    low, high = (
        make_generator(awake=False, mllm_dtype=dtype, dit=DiTConfig(hidden_size=32, depth=1, num_heads=2))
        for dtype in ("bfloat16", "float32")
    )
    assert {p.dtype for p in low.trainable_state().values()} == {torch.float32}
    assert train_steps(low, 8) == pytest.approx(train_steps(high, 8), rel=0.02)


def test_latents_are_normalised_with_the_models_statistics(make_generator, statistics):
    generator = make_generator()
    features = torch.randn(5, GRID**2, WIDTH) * 0.5 + 2
    latents = generator.normalise(features)
    expected = (features.double() - statistics.mean) / (statistics.var + 1e-5).sqrt()
    torch.testing.assert_close(latents.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(generator.denormalise(latents), features, atol=1e-5, rtol=1e-5)


def test_the_shift_follows_the_size_of_the_latents(make_generator):
    generator = make_generator()
    assert generator.latent_shape == (4, 16)
    assert generator.shift == shift_factor(4, 16) == 64**0.5 / 64


def test_weights_travel_from_one_model_to_another(make_generator):
    source, target = make_generator(), make_generator(awake=False)
    target.load_trainable_state({name: p.detach().clone() for name, p in source.trainable_state().items()})
    inputs = batch_of(source)
    assert torch.equal(source(inputs)["velocity"], target(inputs)["velocity"])


def test_weights_of_another_geometry_name_the_tensors(make_generator):
    generator = make_generator()
    before = {name: p.clone() for name, p in generator.trainable_state().items()}
    wider = make_generator(dit=DiTConfig(hidden_size=32, depth=2, num_heads=2)).trainable_state()
    with pytest.raises(
        ValueError, match=r"denoiser\.blocks\.0\.attention\.key_norm\.weight: \(16,\), expected \(12,\)"
    ):
        generator.load_trainable_state(wider)
    missing = {name: p for name, p in before.items() if name != "denoiser.out.bias"}
    with pytest.raises(ValueError, match=r"denoiser\.out\.bias: missing \(1 in all\)"):
        generator.load_trainable_state(missing)
    with pytest.raises(ValueError, match=r"denoiser\.extra: unknown \(1 in all\)"):
        generator.load_trainable_state({**before, "denoiser.extra": torch.zeros(1)})
    assert all(torch.equal(p, before[name]) for name, p in generator.trainable_state().items())


def test_parts_that_do_not_fit_are_refused(foundation, statistics, elsewhere):
    config = tiny_model(foundation)
    wide = LatentStatistics(1, torch.zeros(4, 20).double(), torch.ones(4, 20).double())
    with pytest.raises(
        ValueError,
        match=r"features \(4, 20\), the encoder .* gives \(4, 16\) at 32 px; re-run 'image_features'",
    ):
        build_model(config, wide)
    with pytest.raises(ValueError, match="hidden_size 12 is below the latent width 16"):
        build_model(config.model_copy(update={"dit": DiTConfig(hidden_size=12, num_heads=1)}), statistics)
    with pytest.raises(ValueError, match=r"its projector takes width \d+, the latents have 16"):
        build_model(config.model_copy(update={"mllm": elsewhere.mllm}), statistics)


def test_a_decoder_of_other_features_is_refused(make_generator, tmp_path):
    decoder = RAEDecoderConfig(feature_dim=WIDTH, grid=(2, 3), patch_size=8, hidden_size=16, depth=1)
    RAEDecoder(decoder).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"reads \(grid, width\) \(\(2, 3\), 16\), the model makes \(\(2, 2\), 16\)"
    ):
        make_generator(decoder=tmp_path).load_decoder()


def test_statistics_of_another_grid_are_refused(make_generator):
    generator = make_generator()
    other = LatentStatistics(1, torch.zeros(6, 16).double(), torch.ones(6, 16).double())
    with pytest.raises(ValueError, match=r"statistics have 6 tokens, the encoder's grid is 2 x 2"):
        assemble(generator.config, generator.conditioner.llm, other, (2, 2))


@pytest.mark.parametrize(
    "conditioning", sparing(name for name in METHODS if not name.startswith("unifusion"))
)
def test_a_method_that_reads_no_images_refuses_a_request_with_any(make_generator, conditioning):
    generator = make_generator(conditioning)
    noise = torch.zeros(1, *generator.latent_shape)
    request = Request("make it blue", images=(np.zeros((8, 8, 3), np.uint8),))
    with pytest.raises(ValueError, match=r"'make it blue' has 1 image\(s\), which the method '\w+' cannot"):
        sample(generator, [Request("make it blue"), request], noise.repeat(2, 1, 1), SamplerConfig())
