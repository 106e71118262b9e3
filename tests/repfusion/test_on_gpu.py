"""What a GPU computes against the CPU, within stated tolerances: features, loss, gradient, samples; compiled,
as graphs, and out of memory.
"""

import logging
import os

import pytest
import torch
from prompting import training_inputs

from repfusion.devices.compiling import Compilation
from repfusion.devices.placing import BatchRoom, find_device
from repfusion.diffusion.sampler import SamplerConfig, sample
from repfusion.inputs import to_device
from repfusion.latents.load import EncoderConfig
from repfusion.model.text_to_image import TextToImage
from repfusion.request import Request

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
PROMPTS = ["a red circle", "", "two blue square left of a green circle and a red square"]
FEATURES = {"float32": (0.99999, 2e-3), "bfloat16": (0.9995, 0.02), "float16": (0.9999, 5e-3)}
"""Cosine at least and mean absolute error at most, of features of unit variance against the CPU's float32."""
LOSS, GRADIENT, SAMPLES = 1e-4, 1e-3, 1e-3
"""Relative distances of float32 on the two devices."""


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 is float32, and not TF32."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one.cpu().float() - other.cpu().float()).norm() / other.cpu().float().norm()).item()


@pytest.mark.parametrize("name", list(FEATURES))
def test_features_are_those_of_the_cpu(name):
    cosine, error = FEATURES[name]
    size = EncoderConfig().load(on_meta=True).image_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, size, size, 3), dtype=torch.uint8, generator=generator)
    expected = EncoderConfig().load().encode_images(images).features
    encoder = EncoderConfig().load(dtype=getattr(torch, name)).to(DEVICE)
    found = encoder.encode_images(images.to(DEVICE)).features.cpu()
    assert torch.cosine_similarity(found, expected, dim=-1).min() > cosine
    assert (found - expected).abs().mean() < error


def loss_and_gradient(model: TextToImage) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = training_inputs(model, PROMPTS, [1, 2, 3], model.shift)
    losses = model(to_device(inputs, model.device))
    loss = torch.stack([one.mean() for one in losses.values()]).sum()
    parameters = [one for one in model.parameters() if one.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss.detach(), torch.cat([one.flatten().cpu() for one in found if one is not None])


@pytest.mark.parametrize("method", ["noisy_latents", "noisy_latents_trained", "text_embed", "lap", "queries"])
@pytest.mark.parametrize("apart", [False, True])
def test_losses_and_gradients_are_those_of_the_cpu(make_generator, method, apart):
    expected = loss_and_gradient(make_generator(method))
    model = make_generator(method).to(DEVICE)
    model.conditioner.llm.reads_apart = apart
    loss, gradient = loss_and_gradient(model)
    assert distance(loss, expected[0]) < LOSS and distance(gradient, expected[1]) < GRADIENT


@pytest.mark.parametrize("method", ["noisy_latents", "text_embed", "unifusion"])
def test_samples_are_those_of_the_cpu(make_generator, method):
    config = SamplerConfig(num_steps=8, precision="fp32", guidance_scale=2.0)
    model = make_generator(method)
    requests = [Request(one) for one in PROMPTS]
    noise = torch.randn(3, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    expected = sample(model, requests, noise, config)
    assert distance(sample(model.to(DEVICE), requests, noise, config), expected) < SAMPLES


@pytest.mark.parametrize("method", ["noisy_latents", "text_embed", "queries", "unifusion"])
def test_graphs_draw_what_kernels_one_by_one_draw(make_generator, method, caplog):
    config = SamplerConfig(num_steps=6, guidance_scale=2.0, guidance_interval=(0.1, 1.0))
    model = make_generator(method).to(DEVICE)
    noise = torch.randn(3, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    model.conditioner.llm.bucket = 32
    batches = [[Request(one) for one in order] for order in (PROMPTS, PROMPTS[::-1], PROMPTS)]
    expected = [sample(model, batch, noise, config) for batch in batches]
    model.speed_up_sampling(compiles=False)
    for batch, plain in zip(batches, expected, strict=True):
        assert distance(sample(model, batch, noise, config), plain) < 1e-5
    assert model.graphs is not None and not model.graphs.is_plain
    assert all(one.graph is not None for one in model.graphs.captured.values())
    assert "cannot be captured" not in caplog.text


def test_what_does_not_fit_is_done_in_halves(caplog):
    """For real: each item takes a third of what the GPU has left."""
    each = torch.cuda.mem_get_info()[0] // 3

    def work(items: list[int]) -> int:
        held = torch.empty(len(items) * each, dtype=torch.uint8, device=DEVICE)
        return int(held[:1].fill_(len(items)).item())

    with caplog.at_level(logging.WARNING):
        assert sum(BatchRoom(4, DEVICE, "columns.a.batch_size")(work, list(range(4)))) == 4
    assert "set columns.a.batch_size=2" in caplog.text


def test_the_worker_finds_its_gpu():
    assert find_device(True, "bfloat16", "columns.a.encoder_dtype").type == "cuda"


@pytest.mark.skipif(not os.environ.get("JAXTYPING_DISABLE"), reason="checks of shapes are not compiled")
@pytest.mark.parametrize("which", ["none", "selective", "full"])
def test_compiled_trains_as_eager_does(make_generator, which):
    expected = loss_and_gradient(make_generator().to(DEVICE))
    model, compilation = make_generator().to(DEVICE), Compilation("the layers", "")
    if which != "none":
        model.checkpoint_activations(which)
    model.compile_blocks(compilation)
    for _ in range(2):
        loss, gradient = loss_and_gradient(model)
        assert distance(loss, expected[0]) < LOSS and distance(gradient, expected[1]) < GRADIENT
    assert compilation.failure is None and 0 < compilation.num_graphs <= 3
