"""DeepSpeed around a module: exact accumulation, schedule, precision, and stopping on what is not finite."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from repfusion.devices import placing
from repfusion.training import engine as engine_module
from repfusion.training.engine import (
    Engine,
    EngineConfig,
    NonFiniteError,
    deepspeed_config,
    grad_accum_steps,
    learning_rate,
)

FP32 = {"precision": "fp32", "num_threads": 1, "warmup_steps": 1, "lr": 1e-2}


class Regression(nn.Module):
    """A frozen layer, then trained ones; one loss per sample."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(6, 16).requires_grad_(False)
        self.trained = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"error": (self.trained(self.frozen(x)) - y).square().mean(dim=1)}


def make_data(num: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num, 6, generator=generator), torch.randn(num, 3, generator=generator)


def run(micro: int, steps: int = 3, **changes) -> tuple[Regression, list]:
    module = Regression()
    engine = Engine(
        module,
        EngineConfig(**{**FP32, "micro_batch_size": micro, **changes}),
        global_batch_size=8,
        num_steps=steps,
    )
    x, y = make_data()
    stats = []
    for step in range(steps):
        for start in range(0, 8, micro):
            part = slice(start, start + micro)
            engine.accumulate([f"k{i}" for i in range(8)[part]], x=x[part], y=y[part])
        stats.append(engine.update(step))
    return module, stats


@pytest.mark.parametrize("zero_stage", [0, 3])
@pytest.mark.parametrize("micro", [4, 2])
def test_micro_batches_equal_one_full_batch(micro: int, zero_stage: int):
    whole, whole_stats = run(8, zero_stage=zero_stage)
    parts, parts_stats = run(micro, zero_stage=zero_stage)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(whole_stats, parts_stats, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-6)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-5)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_step_is_that_of_plain_adamw(zero_stage: int):
    module, stats = run(8, zero_stage=zero_stage, grad_clip=0.1)
    plain = Regression()
    trained = [p for p in plain.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    x, y = make_data()
    for step in range(3):
        optimizer.zero_grad()
        plain(x, y)["error"].mean().backward()
        norm = nn.utils.clip_grad_norm_(trained, 0.1)
        assert stats[step].grad_norm == pytest.approx(float(norm), rel=1e-5)
        for group in optimizer.param_groups:
            group["lr"] = stats[step].lr
        optimizer.step()
    for a, b in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class TwoLosses(nn.Module):
    """The second loss is of some samples, 0 for the others."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trained = nn.Linear(6, 3)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        made = self.trained(x)
        sparse = torch.where(x[:, 0] > 0, made.abs().mean(dim=1), 0.0)
        return {"error": (made - y).square().mean(dim=1), "size": sparse}


@pytest.mark.parametrize("micro", [8, 2])
def test_losses_are_minimised_together_and_reported_apart(micro: int):
    module, (x, y) = TwoLosses(), make_data()
    expected = {name: values.mean().item() for name, values in module(x, y).items()}
    sum(values.mean() for values in module(x, y).values()).backward()
    norm = float(torch.cat([p.grad.flatten() for p in module.parameters()]).norm())
    module.zero_grad()
    engine = Engine(module, EngineConfig(**FP32, micro_batch_size=micro), global_batch_size=8, num_steps=1)
    for start in range(0, 8, micro):
        part = slice(start, start + micro)
        first = engine.accumulate([f"k{i}" for i in range(8)[part]], x=x[part], y=y[part])
        torch.testing.assert_close(first, (module.trained(x[part]) - y[part]).square().mean(dim=1))
    stats = engine.update(0)
    assert stats.losses == pytest.approx(expected, rel=1e-6)
    assert list(stats.losses) == ["error", "size"] and stats.loss == stats.losses["error"]
    assert stats.grad_norm == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_a_later_loss_that_is_not_finite_stops_too(zero_stage: int):
    module, (x, y) = TwoLosses(), make_data(4)
    x[2] = torch.tensor([math.inf, 0, 0, 0, 0, 0])
    config = EngineConfig(**FP32, micro_batch_size=4, zero_stage=zero_stage)
    engine = Engine(module, config, global_batch_size=4, num_steps=1)
    engine.accumulate(["a", "b", "c", "d"], x=x, y=y)
    with pytest.raises(NonFiniteError, match=r"the loss is not finite.*Samples: c\."):
        engine.update(0)


def test_frozen_weights_neither_change_nor_have_gradients():
    module, _ = run(8)
    fresh = Regression()
    assert torch.equal(module.frozen.weight, fresh.frozen.weight)
    assert module.frozen.weight.grad is None
    assert not torch.equal(module.trained[0].weight, fresh.trained[0].weight)


def test_bf16_is_autocast_over_float32_weights():
    module, stats = run(8, precision="bf16")
    _, exact = run(8)
    assert all(p.dtype == torch.float32 for p in module.parameters())
    assert stats[-1].loss != exact[-1].loss
    assert stats[-1].loss == pytest.approx(exact[-1].loss, rel=0.02)


@pytest.mark.parametrize(("has", "precision"), [(True, "bf16"), (False, "fp32")])
def test_auto_follows_what_the_device_multiplies_in(monkeypatch, caplog, has, precision):
    monkeypatch.setattr(placing, "multiplies_bf16", lambda _: has)
    auto, found = run(8, precision="auto")
    assert not caplog.records
    named, expected = run(8, precision=precision)
    assert [one.loss for one in found] == [one.loss for one in expected]
    assert all(torch.equal(a, b) for a, b in zip(auto.parameters(), named.parameters(), strict=True))


def test_bf16_where_it_is_slow_is_taken_with_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(engine_module, "multiplies_bf16", lambda _: False)
    run(8, steps=1, precision="bf16")
    (record,) = caplog.records
    assert record.getMessage() == (
        "engine.precision bf16: this CPU has no products in bfloat16 and is many times slower; set fp32"
    )


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_a_loss_that_is_not_finite_stops_before_the_update(zero_stage: int):
    module = Regression()
    config = EngineConfig(**FP32, micro_batch_size=4, zero_stage=zero_stage)
    engine = Engine(module, config, global_batch_size=8, num_steps=9)
    x, y = make_data()
    y[5, 1] = math.nan
    before = [p.detach().clone() for p in module.parameters()]
    for start in (0, 4):
        part = slice(start, start + 4)
        engine.accumulate([f"k{i}" for i in range(8)[part]], x=x[part], y=y[part])
    with pytest.raises(NonFiniteError, match=r"step 7: the loss is not finite.*Samples: k5\."):
        engine.update(7)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


class SquareRoot(nn.Module):
    """At w = 0 the loss is finite and its gradient is not."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"root": self.weight.abs().sqrt().sum() + x}


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_a_gradient_that_is_not_finite_stops_before_the_update(zero_stage: int):
    module = SquareRoot()
    module.weight.register_hook(lambda grad: grad + math.inf)
    config = EngineConfig(**FP32, micro_batch_size=2, zero_stage=zero_stage)
    engine = Engine(module, config, global_batch_size=2, num_steps=9)
    engine.accumulate(["a", "b"], x=torch.ones(2))
    with pytest.raises(NonFiniteError, match=r"step 3: the gradient is not finite.*Samples: a, b\."):
        engine.update(3)
    assert torch.equal(module.weight, torch.zeros(4))


def test_sizes_that_do_not_divide_are_refused_with_numbers():
    assert grad_accum_steps(64, 8, 2) == 4
    with pytest.raises(ValueError, match=r"64 is not a multiple of micro_batch_size 24 x 2 ranks = 48"):
        grad_accum_steps(64, 24, 2)


def test_the_learning_rate_warms_up_and_decays():
    config = EngineConfig(lr=1.0, warmup_steps=10, min_lr_ratio=0.1)
    rates = [learning_rate(config, step, 110) for step in range(111)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0)
    assert rates[10] == pytest.approx(1.0) and rates[60] == pytest.approx(0.55)
    assert rates[110] == pytest.approx(0.1)
    constant = EngineConfig(lr=1.0, warmup_steps=10, schedule="constant")
    assert learning_rate(constant, 1000, 110) == 1.0


def test_buckets_are_no_larger_than_the_model():
    settings = deepspeed_config(EngineConfig(micro_batch_size=4), 2, 16, 2, num_trainable=999)
    assert settings["gradient_accumulation_steps"] == 2
    assert settings["zero_optimization"]["reduce_bucket_size"] == 1000


def test_a_module_without_anything_to_train_is_refused():
    with pytest.raises(ValueError, match="no parameter"):
        Engine(Regression().requires_grad_(False), EngineConfig(**FP32, micro_batch_size=8), 8, 1)


@pytest.mark.slow
def test_no_compiler_is_needed(tmp_path: Path):
    """DeepSpeed's operators are not built: the engine works with an empty PATH and writes no extension."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\nimport test_engine\n"
        "module, stats = test_engine.run(8, steps=1)\nprint(stats[0].loss)"
    )
    environment = {**os.environ, "PATH": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    found = subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).parent)],
        env=environment, capture_output=True, text=True, timeout=400, check=True,
    )  # fmt: skip
    assert math.isfinite(float(found.stdout.splitlines()[-1]))
    assert not (tmp_path / "extensions").exists()
