"""The sampler takes exactly the steps it is told, ends at zero noise, converges at its solver's order, and
guides where it is told to.
"""

import pytest
import torch
from prompting import read_prompts
from pydantic import ValidationError
from torch import nn

from repfusion.diffusion.sampler import SamplerConfig, noise_levels, num_evaluations, sample
from repfusion.request import Request

PROMPTS = ["a red circle", "two blue square left of a green circle"]
REQUESTS = [Request(prompt) for prompt in PROMPTS]
UNGUIDED = {"guidance_scale": 1, "precision": "fp32"}


def noise_of(generator, num: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, *generator.latent_shape, generator=torch.Generator().manual_seed(seed))


def watch(generator) -> list[torch.Tensor]:
    """The noise levels at which the denoiser is asked for a velocity, filled as it is."""
    seen: list[torch.Tensor] = []
    generator.denoiser.register_forward_pre_hook(lambda module, args: seen.append(args[1].clone()))
    return seen


@pytest.mark.parametrize("shift", [12.0, 1.0, 0.3, 0.0884])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 30])
def test_levels_run_from_exactly_one_to_exactly_zero(shift, num_steps):
    levels = noise_levels(num_steps, shift)
    assert len(levels) == num_steps + 1
    assert levels[0] == 1 and levels[-1] == 0
    assert bool((levels.diff() < 0).all())


def test_levels_are_even_before_the_shift():
    levels = noise_levels(10, 12.0)
    unshifted = levels / (12 - 11 * levels)
    torch.testing.assert_close(unshifted, torch.linspace(1, 0, 11, dtype=torch.float64))


@pytest.mark.parametrize("num_steps", [1, 5])
@pytest.mark.parametrize(("guidance_scale", "rows"), [(1, 2), (1.5, 4)])
def test_takes_exactly_n_steps(make_generator, num_steps, guidance_scale, rows):
    generator = make_generator()
    seen = watch(generator)
    sample(
        generator,
        REQUESTS,
        noise_of(generator),
        SamplerConfig(num_steps=num_steps, guidance_scale=guidance_scale),
    )
    assert [len(t) for t in seen] == [rows] * num_steps
    expected = noise_levels(num_steps, generator.shift)[:-1].float()
    assert torch.equal(torch.stack([t[0] for t in seen]), expected)
    assert all(bool((t == t[0]).all()) for t in seen)


@pytest.mark.parametrize("num_steps", [1, 3, 30])
def test_is_exact_where_the_flow_is_straight(make_generator, num_steps):
    """A velocity that is the same everywhere leads in a straight line from noise to noise - velocity."""
    generator = make_generator()
    nn.init.zeros_(generator.denoiser.out.weight)
    noise = noise_of(generator)
    config = SamplerConfig(num_steps=num_steps, guidance_scale=2, precision="fp32")
    torch.testing.assert_close(
        sample(generator, REQUESTS, noise, config), noise - generator.denoiser.out.bias, atol=2e-6, rtol=0
    )


def test_a_field_that_points_at_one_image_arrives_there(make_generator):
    """v = z - x has the solution x + (z_1 - x) e^(t - 1); many Euler steps come close to its end."""
    generator = make_generator()
    target = torch.randn(generator.latent_shape, generator=torch.Generator().manual_seed(9))
    generator.denoiser.register_forward_hook(lambda module, args, velocity: args[0] - target)
    noise = noise_of(generator)
    config = SamplerConfig(num_steps=100, **UNGUIDED)
    expected = target + (noise - target) * torch.exp(torch.tensor(-1.0))
    torch.testing.assert_close(sample(generator, REQUESTS, noise, config), expected, atol=3e-2, rtol=0)


MEAN, DEVIATION = 0.7, 0.3


def gaussian_velocity(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """E[noise - latents | z_t = z] where each channel of the latents is drawn from N(MEAN, DEVIATION^2):
    z_t is Gaussian, and the expectation linear in z.
    """
    t = t[:, None, None]
    variance = (1 - t) ** 2 * DEVIATION**2 + t**2
    return (t - (1 - t) * DEVIATION**2) / variance * (z - (1 - t) * MEAN) - MEAN


@pytest.mark.parametrize("shift", [0.5, 3.0])
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_converges_at_the_order_of_the_solver(make_generator, monkeypatch, solver, order, shift):
    """The flow of a Gaussian keeps each point's place in it: noise e ends at MEAN + DEVIATION * e. Twice the
    steps divide the error by 2^order.
    """
    generator = make_generator()
    generator.shift = shift
    monkeypatch.setattr(generator, "velocity", lambda z, t, prompts: gaussian_velocity(z, t))
    noise = noise_of(generator)
    errors = []
    for num_steps in (32, 64, 128):
        config = SamplerConfig(num_steps=num_steps, solver=solver, **UNGUIDED)
        made = sample(generator, REQUESTS, noise, config)
        errors.append((made - (MEAN + DEVIATION * noise)).square().mean().sqrt().log2().item())
    slopes = [errors[0] - errors[1], errors[1] - errors[2]]
    assert slopes == pytest.approx([order, order], abs=0.25)
    assert errors[2] < (-6 if solver == "euler" else -10)


def test_heun_is_the_mean_of_both_ends_and_euler_at_the_last_step(make_generator):
    generator = make_generator()
    noise = noise_of(generator)
    a, b, c, end = noise_levels(3, generator.shift).tolist()
    batch = read_prompts(generator, PROMPTS)

    def velocity(z: torch.Tensor, level: float) -> torch.Tensor:
        with torch.no_grad():
            return generator.velocity(z, torch.full((2,), level), batch)

    z = noise
    for level, following in ((a, b), (b, c)):
        first = velocity(z, level)
        second = velocity(z + (following - level) * first, following)
        z = z + (following - level) * (first + second) / 2
    z = z + (end - c) * velocity(z, c)
    made = sample(generator, REQUESTS, noise, SamplerConfig(num_steps=3, solver="heun", **UNGUIDED))
    torch.testing.assert_close(made, z, atol=1e-4, rtol=1e-4)


INTERVALS = [(0.0, 1.0), (0.21, 0.6), (0.31, 1.0), (0.5, 0.5)]


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize("num_steps", [1, 6])
def test_the_number_of_evaluations_is_the_stated_one(make_generator, solver, interval, num_steps):
    generator = make_generator()
    seen = watch(generator)
    config = SamplerConfig(num_steps=num_steps, solver=solver, guidance_interval=interval)
    sample(generator, REQUESTS, noise_of(generator), config)
    guided, unguided = num_evaluations(config, generator.shift)
    assert guided + unguided == (num_steps if solver == "euler" else 2 * num_steps - 1)
    assert sorted(len(t) for t in seen) == [2] * unguided + [4] * guided
    for t in seen:
        assert (len(t) == 4) == (interval[0] < t[0] <= interval[1])


def test_evaluations_where_they_are_known():
    """Without shift the levels of 4 steps are 1, 3/4, 1/2, 1/4; Heun visits those below 1 twice."""

    def count(**changes) -> tuple[int, int]:
        return num_evaluations(SamplerConfig(num_steps=4, **changes), 1.0)

    assert count() == (4, 0)
    assert count(guidance_scale=1) == (0, 4)
    assert count(guidance_interval=(0.5, 1)) == (2, 2)
    assert count(guidance_interval=(0.25, 0.75)) == (2, 2)
    assert count(solver="heun") == (7, 0)
    assert count(solver="heun", guidance_interval=(0.25, 0.75)) == (4, 3)
    assert count(guidance_interval=(0.5, 0.5)) == (0, 4)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_whole_interval_is_guidance_everywhere_and_an_empty_one_is_none(make_generator, solver):
    generator = make_generator()
    noise, common = noise_of(generator), {"num_steps": 5, "solver": solver, "precision": "fp32"}

    def made(**changes) -> torch.Tensor:
        return sample(generator, REQUESTS, noise, SamplerConfig(**common, **changes))

    assert torch.equal(made(guidance_scale=2, guidance_interval=(0.0, 1.0)), made(guidance_scale=2))
    assert torch.equal(made(guidance_scale=2, guidance_interval=(0.4, 0.4)), made(guidance_scale=1))
    part = made(guidance_scale=2, guidance_interval=(0.1, 1.0))
    assert min((part - made(guidance_scale=scale)).abs().max() for scale in (1, 2)) > 1e-3


def test_an_interval_below_every_level_leaves_the_empty_prompt_unread(make_generator):
    generator = make_generator()
    read: list[int] = []
    language_model = generator.conditioner.llm.language_model
    language_model.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: read.append(len(args[0]))
    )
    for interval, rows in (((0.0, 1e-3), 2), ((0.0, 1.0), 4)):
        config = SamplerConfig(num_steps=3, guidance_interval=interval)
        sample(generator, REQUESTS, noise_of(generator), config)
        assert read == [rows]  # the prompts once; the noisy latents enter as embeddings
        read.clear()


def test_guidance_moves_from_the_empty_prompt_through_the_prompt(make_generator):
    generator = make_generator()
    noise = noise_of(generator)
    t = torch.ones(2)
    with torch.no_grad():
        prompted = generator.velocity(noise, t, read_prompts(generator, PROMPTS))
        empty = generator.velocity(noise, t, read_prompts(generator, ["", ""]))
    assert (prompted - empty).abs().max() > 1e-3
    for scale in (1.0, 1.5, 4.0):
        config = SamplerConfig(num_steps=1, guidance_scale=scale, precision="fp32")
        expected = noise - (empty + scale * (prompted - empty))
        torch.testing.assert_close(sample(generator, REQUESTS, noise, config), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("conditioning", ["noisy_latents", "text_embed"])
def test_equals_euler_written_out_without_a_cache(make_generator, conditioning):
    generator = make_generator(conditioning)
    noise = noise_of(generator)
    config = SamplerConfig(num_steps=6, **UNGUIDED)
    batch, levels, z = read_prompts(generator, PROMPTS), noise_levels(6, generator.shift), noise
    with torch.no_grad():
        for i in range(6):
            velocity = generator.velocity(z, levels[i].float().expand(2), batch)
            z = z + (levels[i + 1] - levels[i]).item() * velocity
    torch.testing.assert_close(sample(generator, REQUESTS, noise, config), z, atol=1e-4, rtol=1e-4)


def test_an_image_does_not_depend_on_its_neighbours(make_generator):
    generator = make_generator()
    noise = noise_of(generator)
    config = SamplerConfig(num_steps=4, guidance_scale=2, precision="fp32")
    together = sample(generator, REQUESTS, noise, config)
    for row, prompt in enumerate(PROMPTS):
        alone = sample(generator, [Request(prompt)], noise[row : row + 1], config)
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-4, rtol=1e-4)


def test_bfloat16_integrates_in_float32_and_stays_near(make_generator):
    generator = make_generator()
    noise = noise_of(generator)
    low, high = (
        sample(
            generator, REQUESTS, noise, SamplerConfig(num_steps=8, guidance_scale=1.5, precision=precision)
        )
        for precision in ("bf16", "fp32")
    )
    assert low.dtype == torch.float32 and not low.requires_grad
    assert 0 < (low - high).norm() / high.norm() < 0.1


def test_noise_of_another_shape_is_refused(make_generator):
    generator = make_generator()
    with pytest.raises(ValueError, match=r"noise is \(3, 4, 16\), expected \(2, 4, 16\) for 2 requests"):
        sample(generator, REQUESTS, noise_of(generator, num=3), SamplerConfig())
    with pytest.raises(ValueError, match=r"noise is \(2, 4, 15\)"):
        sample(generator, REQUESTS, noise_of(generator)[..., :15], SamplerConfig())


@pytest.mark.parametrize(
    "field",
    [
        {"num_steps": 0},
        {"guidance_scale": 0.5},
        {"steps": 3},
        {"solver": "ddim"},
        {"guidance_interval": (0.6, 0.5)},
        {"guidance_interval": (-0.1, 0.5)},
        {"guidance_interval": (0, 1.5)},
        {"guidance_interval": (0.5,)},
    ],
)
def test_settings_that_cannot_work_are_refused(field):
    with pytest.raises(ValidationError, match=next(iter(field))):
        SamplerConfig(**field)
