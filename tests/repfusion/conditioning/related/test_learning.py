"""Whole models of each related system: each learns which prompt belongs to which latents, and what else is in
a batch changes nothing.
"""

from collections.abc import Callable

import pytest
import torch
from prompting import asked, read_prompts, training_inputs
from tiny_training import APART, tiny_model, tiny_train
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from whole_models import check_others_change_nothing, check_prompts_are_learned

from repfusion.diffusion.sampler import SamplerConfig, sample
from repfusion.flops.count import sample_flops, train_flops
from repfusion.model.dit import DiTConfig
from repfusion.model.text_to_image import TextToImage
from repfusion.runs.checkpoint import load_checkpoint
from repfusion.runs.folder import checkpoint_folder
from repfusion.train import train
from repfusion.weights import WEIGHTS

SYSTEMS = ["metaquery", "blip3o", "li_dit", *APART]


def speak_up(model: TextToImage) -> None:
    """Lets the random language model's layers say more than it is made with: at the queries, a prompt would
    hardly be heard.
    """
    with torch.no_grad():
        for layer in model.conditioner.llm.layers:
            for parameter in layer.parameters():
                parameter.mul_(5 if parameter.ndim > 1 else 1)


@pytest.mark.slow
@pytest.mark.parametrize("method", SYSTEMS)
def test_learns_which_prompt_belongs_to_which_latents(make_generator, method):
    model = make_generator(method, awake=False, dit=DiTConfig(hidden_size=32, depth=2, num_heads=2))
    speak_up(model)
    check_prompts_are_learned(model, num_steps=80, lr=5e-3)


@pytest.mark.parametrize("method", SYSTEMS)
def test_padding_and_other_prompts_change_nothing(make_generator, method):
    check_others_change_nothing(make_generator(method))


def flops_of(work: Callable[[], object]) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.slow
@pytest.mark.parametrize("method", APART)
def test_flops_of_training_and_of_an_image_are_counted_exactly(make_generator, method):
    model = make_generator(method)
    prompts = ["a red circle", "a green square"]
    inputs = training_inputs(model, prompts, [1, 2], model.shift)
    num_tokens = 4
    got = flops_of(lambda: torch.stack([one.mean() for one in model(inputs).values()]).sum().backward())
    assert got == 2 * train_flops(model, num_tokens)
    config = SamplerConfig(num_steps=2, guidance_scale=3.0, precision="fp32")
    noise = torch.randn(2, *model.latent_shape)
    got = flops_of(lambda: sample(model.requires_grad_(False), asked(prompts)[0], noise, config))
    assert got == 2 * sample_flops(model, num_tokens, config)


@pytest.mark.slow
@pytest.mark.parametrize("method", APART)
def test_what_is_computed_once_changes_nothing(make_generator, method):
    model = make_generator(method)
    prompts = ["a red circle", "two blue square", ""]
    z_t = torch.randn(3, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        kept = read_prompts(model, prompts, reuse=True)
        for t in (torch.tensor([0.9, 0.3, 0.6]), torch.tensor([0.1, 0.2, 0.3])):
            plain = model.velocity(z_t, t, read_prompts(model, prompts))
            torch.testing.assert_close(model.velocity(z_t, t, kept), plain, atol=1e-5, rtol=1e-5)
            fewer = model.velocity(z_t[:2], t[:2], kept.first(2))
            torch.testing.assert_close(fewer, plain[:2], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "conditioning",
    [
        {"method": "metaquery", "num_queries": 3, "connector_depth": 1},
        {"method": "li_dit", "instruction": "a red", "refiner_depth": 1, "second": WEIGHTS / "language"},
        {"method": "gill", "num_queries": 24, "width": 16, "depth": 1, "second": WEIGHTS / "language"},
    ],
    ids=["metaquery", "li_dit", "gill"],
)
def test_trains_under_the_engine_and_its_checkpoint_is_whole(foundation, columns, tmp_path, conditioning):
    """Losses beside the velocity's are reported; what is loaded is what was trained."""
    model = {**tiny_model(foundation).model_dump(), "conditioning": conditioning}
    reports = []
    train(tiny_train(foundation, columns, tmp_path / "run", model=model), on_report=reports.append)
    assert len(reports) == 4 and all(0 < report.loss < 10 for report in reports)
    is_gill = conditioning["method"] == "gill"
    others = {"embedding", "retrieval", "caption", "image_tokens"} if is_gill else set()
    assert set(reports[-1].other_losses) == others
    loaded = load_checkpoint(checkpoint_folder(tmp_path / "run" / "checkpoints", 4))
    read = loaded.conditioner.language_models
    assert len(read) == 1 + ("second" in conditioning) and all(llm.is_frozen for llm in read)
