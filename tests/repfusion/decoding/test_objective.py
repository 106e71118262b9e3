"""The full objective of a decoder: gradients by hand and of any split of a batch, exact resuming."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from programs import torchrun
from safetensors.torch import load_file

from repfusion.config import to_yaml
from repfusion.decoding import train
from repfusion.decoding.config import AdversarialConfig, DecoderTrainingConfig
from repfusion.decoding.gradients import Gradients, adaptive_weight
from repfusion.decoding.ranks import Ranks
from repfusion.decoding.train import DecoderTraining, state_of, train_decoder
from repfusion.foundation.config import LengthConfig
from repfusion.foundation.optimise import Objective, optimise
from repfusion.training.engine import NonFiniteError


def changed(config: DecoderTrainingConfig, **changes: object) -> DecoderTrainingConfig:
    return config.model_copy(update=changes)


def against_from_the_start(full: DecoderTrainingConfig, num_steps: int = 1) -> DecoderTrainingConfig:
    """All losses from the first step on."""
    assert full.adversarial is not None
    adversarial = AdversarialConfig(path=full.adversarial.path, discriminator_from_step=0, gan_from_step=0)
    length = LengthConfig(num_steps=num_steps, batch_size=4, lr=1e-3)
    return changed(full, adversarial=adversarial, length=length)


def gradients(config: DecoderTrainingConfig) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Losses, and gradients of all that is trained, of a training's first step."""
    training = DecoderTraining(config, Ranks())
    assert isinstance(training.gradients, Gradients)
    losses = training.gradients.adversarial(training.draw(0), is_on=True)
    named = {**training.state.named, **{f"D/{k}": p for k, p in training.state.heads.items()}}
    found = {name: p.grad for name, p in named.items() if p.grad is not None}
    assert len(found) == len(named)
    return losses, found


def test_the_gradients_are_those_of_the_losses_put_together_by_hand(full):
    config = against_from_the_start(full)
    losses, found = gradients(config)
    training = DecoderTraining(config, Ranks())
    judge, network, decoder = training.discriminator, training.perceptual, training.decoder
    assert judge is not None and network is not None
    judge.refresh()
    ((pixels, features),) = training.draw(0)
    rebuilt = decoder(features)
    reconstruction = (rebuilt - pixels).abs().mean() + network(rebuilt, pixels).mean()
    generator = -judge(rebuilt).mean()
    last = decoder.out.weight
    lengths = [
        torch.autograd.grad(one, last, retain_graph=True)[0].square().sum().sqrt()
        for one in (reconstruction, generator)
    ]
    weight = (lengths[0] / (lengths[1] + 1e-6)).clamp(max=1e4)
    torch.testing.assert_close(losses["adaptive_weight"], weight, rtol=1e-4, atol=0)
    torch.testing.assert_close(losses["generator"], generator.detach(), rtol=1e-4, atol=1e-6)
    names = list(training.state.named)
    total = reconstruction + 0.75 * weight.detach() * generator
    expected = torch.autograd.grad(total, list(training.state.named.values()))
    for name, grad in zip(names, expected, strict=True):
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-6, msg=name)
    real, fake = judge(pixels), judge(rebuilt.detach())
    hinge = 0.5 * ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean())
    torch.testing.assert_close(losses["discriminator"], hinge.detach(), rtol=1e-4, atol=1e-6)
    expected = torch.autograd.grad(hinge, list(training.state.heads.values()))
    for name, grad in zip(training.state.heads, expected, strict=True):
        torch.testing.assert_close(found[f"D/{name}"], grad, rtol=1e-3, atol=1e-6, msg=name)


def test_the_adaptive_weight_has_a_bound():
    ones = torch.ones(4)
    assert float(adaptive_weight(ones, 2 * ones)) == pytest.approx(0.5)
    assert float(adaptive_weight(ones, 0 * ones)) == 1e4


def test_two_micro_batches_have_the_gradients_of_one(full):
    config = against_from_the_start(full)
    losses, whole = gradients(config)
    others, parts = gradients(changed(config, micro_batch_size=2))
    for name, value in losses.items():
        torch.testing.assert_close(others[name], value, rtol=1e-4, atol=1e-6, msg=name)
    for name, grad in whole.items():
        torch.testing.assert_close(parts[name], grad, rtol=1e-3, atol=1e-6, msg=name)
    with pytest.raises(ValueError, match="batch_size 4 is not a multiple of 3 images"):
        DecoderTraining(changed(config, micro_batch_size=3), Ranks())
    with pytest.raises(ValueError, match="a pass x 3 ranks"):
        DecoderTraining(config, Ranks(0, 3))


def states(one: Path, other: Path) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    tensors, others = load_file(one), load_file(other)
    assert tensors.keys() == others.keys()
    return [(name, tensors[name], others[name]) for name in tensors]


@pytest.mark.slow
def test_two_ranks_train_as_one_does(full, tmp_path):
    train_decoder(full)
    shared = changed(full, out=tmp_path / "shared", micro_batch_size=1)
    path = tmp_path / "decoder.yaml"
    path.write_text(to_yaml(shared))
    torchrun(2, "-m", "repfusion.decoding", path)
    compared = 0
    for name, own, other in states(state_of(full.out), state_of(shared.out)):
        if "exp_avg/" in name or "vector" in name:
            # the first moments are sums of all steps' gradients
            torch.testing.assert_close(other, own, rtol=2e-3, atol=1e-6 * float(own.abs().max()), msg=name)
            compared += name.startswith("discriminator/exp_avg")
        elif not name.startswith(("loss", "measured", "exp_avg_sq", "discriminator/exp_avg_sq")):
            torch.testing.assert_close(other, own, rtol=0, atol=2e-5, msg=name)
    assert compared > 20


def test_without_the_new_losses_it_is_what_it_was(config):
    short = changed(config, length=LengthConfig(num_steps=5, batch_size=4))
    training = DecoderTraining(short, Ranks())
    decoder = training.decoder

    def draw(step):
        ((pixels, features),) = training.draw(step)
        return pixels, features

    def loss(pixels, features):
        return {"pixels": F.l1_loss(decoder(features).float(), pixels)}

    shown = optimise(decoder, short.length, Objective(draw, loss), short.out.with_name("old.state"), short)
    found = train_decoder(short)
    assert found["loss_pixels"] == shown["pixels"]
    for name, own, old in states(state_of(short.out), short.out.with_name("old.state")):
        assert torch.equal(own, old), name


def cut_after(monkeypatch: pytest.MonkeyPatch, config: DecoderTrainingConfig, num_steps: int) -> None:
    """A training that is interrupted in its next step after so many."""
    own = DecoderTraining.take_step

    def take_step(self, step):
        if step == num_steps:
            raise KeyboardInterrupt
        return own(self, step)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(DecoderTraining, "take_step", take_step)
        train_decoder(config)


@pytest.mark.slow
def test_interrupted_twice_it_ends_with_the_same_bits(full, tmp_path, monkeypatch):
    found = train_decoder(full)
    again = changed(full, out=tmp_path / "again", save_every_sec=1e-9)
    cut_after(monkeypatch, again, 1)  # before the discriminator's first step
    cut_after(monkeypatch, again, 3)
    assert train_decoder(again) == found
    for name, own, other in states(state_of(full.out), state_of(again.out)):
        assert torch.equal(own, other), name
    weights = [(one.out / "model.safetensors").read_bytes() for one in (full, again)]
    assert weights[0] == weights[1]


def test_what_is_written_are_the_averages(full):
    train_decoder(changed(full, adversarial=None, length=LengthConfig(num_steps=3, batch_size=4)))
    state, written = load_file(state_of(full.out)), load_file(full.out / "model.safetensors")
    for name, weight in written.items():
        assert torch.equal(weight, state[f"average/{name}"])
    assert any(not torch.equal(weight, state[f"weight/{name}"]) for name, weight in written.items())


def test_each_part_begins_at_its_step(full, monkeypatch):
    seen: list[dict[str, float]] = []
    heads: list[torch.Tensor] = []
    own = DecoderTraining.take_step

    def take_step(self, step):
        heads.append(next(iter(self.state.heads.values())).detach().clone())
        seen.append(own(self, step))
        return seen[-1]

    monkeypatch.setattr(DecoderTraining, "take_step", take_step)
    train_decoder(full)
    assert "perceptual" in seen[0] and "discriminator" not in seen[0]
    assert seen[1]["discriminator"] > 0 and seen[1]["adaptive_weight"] == 0
    assert all(one["adaptive_weight"] > 0 for one in seen[2:])
    moved = [not torch.equal(one, other) for one, other in pairwise(heads)]
    assert moved == [False, True, True]


def test_the_learning_rate_falls_to_its_last(full, monkeypatch):
    rates: list[float] = []
    own = train.rate

    def rate(step, num_steps, final):
        rates.append(own(step, num_steps, final))
        return rates[-1]

    monkeypatch.setattr(train, "rate", rate)
    train_decoder(changed(full, adversarial=None))
    assert len(rates) == 4 and own(10_000, 10_000, 0.1) == pytest.approx(0.1)
    assert own(5_000, 10_000, 0.1) == pytest.approx(0.55)


def test_a_discriminator_that_is_not_finite_stops_before_the_update(full, monkeypatch):
    config = against_from_the_start(full, num_steps=2)
    training = DecoderTraining(config, Ranks())
    weights = [p.detach().clone() for p in (*training.state.named.values(), *training.state.heads.values())]
    assert training.discriminator is not None
    bias = training.discriminator.heads[1].out.bias
    with torch.no_grad():
        bias.fill_(torch.nan)
    with pytest.raises(
        NonFiniteError, match=r"step 0: the loss generator and the loss discriminator .*decoder"
    ) as error:
        training.take_step(0)
    assert "Samples: 0" in str(error.value)
    for old, new in zip(
        weights, (*training.state.named.values(), *training.state.heads.values()), strict=True
    ):
        assert torch.equal(old, new.detach()) or new is bias


def test_a_state_of_another_objective_is_refused(full):
    train_decoder(changed(full, adversarial=None, ema_decay=None))
    with pytest.raises(ValueError, match="state of another training"):
        train_decoder(full)


def test_a_discriminator_is_trained_before_it_is_followed():
    with pytest.raises(ValueError, match="gan_from_step is 1, discriminator_from_step is 2"):
        AdversarialConfig(path=Path("x"), discriminator_from_step=2, gan_from_step=1)
