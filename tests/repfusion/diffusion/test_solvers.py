"""Each solver takes the steps of diffusers' scheduler of its kind; what asks for others is refused."""

import math

import diffusers
import pytest
import torch

from repfusion.diffusion.sampler import integrate, noise_levels
from repfusion.diffusion.scheduler import FlowScheduler

SHIFT = 3.0


def velocity(z: torch.Tensor, level: float) -> torch.Tensor:
    """Curved, and smooth in both."""
    return torch.sin(3 * z) + z * level + math.cos(5 * level)


def noise() -> torch.Tensor:
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def by_diffusers(scheduler, levels: torch.Tensor) -> torch.Tensor:
    """Its loop, at these noise levels."""
    scheduler.set_timesteps(len(levels) - 1)
    scheduler.sigmas = levels
    z = noise()
    for index, timestep in enumerate(scheduler.timesteps):
        z = scheduler.step(velocity(z, float(levels[index])), timestep, z).prev_sample
    return z


@pytest.mark.parametrize("num_steps", [1, 2, 8, 20])
def test_euler_is_diffusers_at_the_levels_that_it_makes_itself(num_steps):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(FlowScheduler("euler", SHIFT).config)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / num_steps, num_steps).tolist())
    levels = noise_levels(num_steps, SHIFT)
    torch.testing.assert_close(scheduler.sigmas.double(), levels, atol=1e-6, rtol=0)
    z = noise().float()
    for index, timestep in enumerate(scheduler.timesteps):
        z = scheduler.step(velocity(z, float(levels[index])), timestep, z).prev_sample
    ours = integrate(velocity, noise(), levels.tolist(), "euler")
    torch.testing.assert_close(z.double(), ours, atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_steps", [2, 8, 20])
def test_dpm_is_diffusers_multistep(num_steps):
    """At 1 its logarithm of the signal is infinite, so its loop begins a little below."""
    config = FlowScheduler("dpm", SHIFT).config
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(config)
    levels = noise_levels(num_steps, SHIFT)
    levels[0] = 0.999
    ours = integrate(velocity, noise(), levels.tolist(), "dpm")
    # its coefficients are in float32
    torch.testing.assert_close(by_diffusers(scheduler, levels), ours, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("dpm", 2)])
def test_a_solver_converges_at_its_order(solver, order):
    """From 0.9 to 0.2: the last step to 0 is of first order for all, and so is dpm's first, which from 1 is
    long in what dpm measures steps by.
    """

    def end(num_steps: int) -> torch.Tensor:
        return integrate(velocity, noise(), torch.linspace(0.9, 0.2, num_steps + 1).tolist(), solver)

    exact = integrate(velocity, noise(), torch.linspace(0.9, 0.2, 4001).tolist(), "heun")
    errors = [(end(num_steps) - exact).abs().max().item() for num_steps in (40, 80)]
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.3


def test_the_last_step_ends_at_the_clean_estimate():
    for solver in ("euler", "heun", "dpm"):
        seen: list[tuple[torch.Tensor, float]] = []

        def watched(z, level, seen=seen):
            seen.append((z, level))
            return velocity(z, level)

        end = integrate(watched, noise(), [1.0, 0.6, 0.3, 0.0], solver)
        z, level = seen[-1]
        assert level == 0.3
        torch.testing.assert_close(end, z - level * velocity(z, level))


@pytest.mark.parametrize("solver", ["euler", "heun", "dpm"])
def test_a_step_may_change_the_latents_and_be_the_last(solver):
    steps = []

    def on_step(step, level, z):
        steps.append(step)
        return torch.full_like(z, 7.0), step == 1

    end = integrate(velocity, noise(), [1.0, 0.8, 0.5, 0.2, 0.0], solver, on_step)
    assert steps == [0, 1] and bool((end == 7).all())


@pytest.mark.parametrize(
    ("name", "solver"),
    [
        ("FlowMatchEulerDiscreteScheduler", "euler"),
        ("FlowMatchHeunDiscreteScheduler", "heun"),
        ("DPMSolverMultistepScheduler", "dpm"),
    ],
)
def test_a_scheduler_made_from_our_config_is_followed(name, solver):
    ours = FlowScheduler("euler", 2.5)
    assert ours.follow(getattr(diffusers, name).from_config(ours.config)) == FlowScheduler(solver, 2.5)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0), "shift 1, the model was trained at 3"),
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_karras_sigmas=True), "use_karras_sigmas"),
        (
            diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True),
            "stochastic_sampling",
        ),
        (
            diffusers.DPMSolverMultistepScheduler(flow_shift=3.0),
            "use_flow_sigmas False cannot be followed",
        ),
        (
            diffusers.DDIMScheduler(),
            "a DDIMScheduler as scheduler; expected a FlowScheduler, or of diffusers",
        ),
        (FlowScheduler("heun", 1.0), "shift 1, the model was trained at 3"),
        ("euler", "a str as scheduler"),
    ],
)
def test_a_scheduler_that_asks_for_more_is_refused(scheduler, message):
    with pytest.raises(ValueError, match=message):
        FlowScheduler("euler", SHIFT).follow(scheduler)


def test_a_scheduler_is_changed_from_its_config():
    ours = FlowScheduler("euler", SHIFT)
    assert FlowScheduler.from_config(ours.config, solver="dpm") == FlowScheduler("dpm", SHIFT)
    with pytest.raises(ValueError, match="solver 'ddim': expected one of euler, heun, dpm"):
        FlowScheduler.from_config(ours.config, solver="ddim")
