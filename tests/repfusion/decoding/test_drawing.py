"""A decoder that draws, trained on image shards: its loss by hand, any split of a batch, exact resuming."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from repfusion.data.order import hash64
from repfusion.decoding.config import (
    AdversarialConfig,
    DecoderTrainingConfig,
    DrawingConfig,
    PerceptualConfig,
)
from repfusion.decoding.measure import HeldOut
from repfusion.decoding.ranks import Ranks
from repfusion.decoding.train import DrawingTraining, state_of, train_decoder
from repfusion.diffusion.flow import draw
from repfusion.foundation.config import LengthConfig
from repfusion.latents.drawing_decoder import DrawingDecoder
from repfusion.latents.load import fitting_decoder
from repfusion.training.engine import NonFiniteError


@pytest.fixture
def drawing(config: DecoderTrainingConfig) -> DecoderTrainingConfig:
    """Four steps with averages."""
    return config.model_copy(
        update={
            "method": DrawingConfig(patch_size=4, num_steps=2, shift=2.0),
            "hidden_size": 48,
            "ema_decay": 0.5,
            "length": LengthConfig(num_steps=4, batch_size=4, lr=1e-3),
        }
    )


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    torch.manual_seed(4)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    ).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def gradients(config: DecoderTrainingConfig) -> tuple[float, list[torch.Tensor]]:
    training = DrawingTraining(config, Ranks())
    with torch.no_grad():
        for weight in training.state.named.values():
            weight.add_(0.05)  # away from zero gates, behind which no gradient goes
    losses = training.gradients.plain(training.draw(0))
    return float(losses["velocity"]), [p.grad for p in training.state.named.values() if p.grad is not None]


def test_the_loss_is_the_velocitys_by_hand_whatever_the_split(drawing):
    training = DrawingTraining(drawing, Ranks())
    decoder = training.drawing
    ((pixels, (features, seeds)),) = training.draw(0)
    assert list(seeds) == [hash64("decoder flow", 0, 0, number) for number in range(4)]
    t, noise = draw(seeds, decoder.config.canvas_shape, 2.0)
    canvas = decoder.paint(pixels)
    z_t = (1 - t)[:, None, None] * canvas + t[:, None, None] * noise
    with torch.no_grad():
        found = decoder.velocity(z_t, t, decoder.read(features))
    by_hand = ((found - (noise - canvas)) ** 2).mean()
    assert float(training.gradients.plain(training.draw(0))["velocity"]) == pytest.approx(
        float(by_hand), rel=2e-2
    )
    loss, whole = gradients(drawing)
    split, parts = gradients(drawing.model_copy(update={"micro_batch_size": 1}))
    assert split == pytest.approx(loss, rel=1e-3) and len(whole) == len(parts) > 10
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(other, one, rtol=2e-2, atol=1e-3 * float(one.abs().max()))


def test_one_that_was_cut_off_goes_on_to_the_same_bits(drawing, tmp_path, monkeypatch):
    found = train_decoder(drawing)
    encoder = drawing.encoder.load()
    written = fitting_decoder(drawing.out, encoder.grid, encoder.feature_dim)
    assert isinstance(written, DrawingDecoder) and written.config.num_steps == 2
    averages = load_file(state_of(drawing.out))
    for name, weight in written.named_parameters():
        assert torch.equal(weight, averages[f"average/{name}"])
    assert found["psnr_db"] > 0 and found["loss_velocity"] > 0
    again = drawing.model_copy(update={"out": tmp_path / "again", "save_every_sec": 1e-9})
    own = DrawingTraining.take_step

    def cut(self: DrawingTraining, step: int) -> dict[str, float]:
        if step == 2:
            raise KeyboardInterrupt
        return own(self, step)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(DrawingTraining, "take_step", cut)
        train_decoder(again)
    assert train_decoder(again) == found
    assert (again.out / "model.safetensors").read_bytes() == (drawing.out / "model.safetensors").read_bytes()


def test_a_loss_that_is_not_finite_stops_before_the_update(drawing):
    training = DrawingTraining(drawing, Ranks())
    before = {name: p.detach().clone() for name, p in training.state.named.items()}
    with torch.no_grad():
        training.decoder.embed.bias.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="step 0: the loss velocity and the gradient of the decoder"):
        training.take_step(0)
    for name, weight in training.state.named.items():
        assert name == "embed.bias" or torch.equal(weight, before[name])


def test_what_does_not_fit_is_refused_by_name(drawing, lpips_folder, dino, tmp_path):
    values = drawing.model_dump()
    adversarial = AdversarialConfig(path=dino, discriminator_from_step=0, gan_from_step=0)
    for judged in ({"perceptual": PerceptualConfig(path=lpips_folder)}, {"adversarial": adversarial}):
        with pytest.raises(ValueError, match=r"method\.kind drawing is trained on velocities"):
            DecoderTrainingConfig.model_validate({**values, **judged})
    DecoderTrainingConfig.model_validate({**values, "perceptual": {"path": lpips_folder, "weight": 0}})
    coarse = DrawingConfig(patch_size=5)
    with pytest.raises(ValueError, match="patch_size 5 does not divide"):
        DrawingTraining(drawing.model_copy(update={"method": coarse}), Ranks())
    DrawingTraining(drawing, Ranks()).decoder.save_pretrained(tmp_path / "first")
    later = {"init_from": tmp_path / "first", "method": drawing.method.model_copy(update={"num_steps": 5})}
    started = DrawingTraining(drawing.model_copy(update=later), Ranks()).decoder
    assert isinstance(started, DrawingDecoder) and started.config.num_steps == 5
    with pytest.raises(ValueError, match="is a decoder of"):
        DrawingTraining(drawing.model_copy(update={**later, "depth": 2}), Ranks())


@pytest.mark.slow
def test_a_vaes_latents_are_drawn_and_its_weights_stay(drawing, vae):
    method = DrawingConfig(patch_size=2, num_steps=2, vae=vae)
    config = drawing.model_copy(update={"method": method, "length": LengthConfig(num_steps=1, batch_size=2)})
    train_decoder(config)
    written = fitting_decoder(config.out, config.encoder.load().grid, config.encoder.load().feature_dim)
    assert isinstance(written, DrawingDecoder) and written.vae is not None
    own = load_file(vae / "diffusion_pytorch_model.safetensors")
    assert torch.equal(written.vae.state_dict()["vae.decoder.conv_in.weight"], own["decoder.conv_in.weight"])
    assert not any(name.startswith("weight/vae") for name in load_file(state_of(config.out)))
    assert json.loads((config.out / "config.json").read_text())["vae"]["_class_name"] == "AutoencoderKL"
    assert float((written.mean - 0.5).abs().max()) > 1e-3


@pytest.mark.slow
def test_it_learns_to_draw_what_it_never_saw(drawing):
    long = drawing.model_copy(
        update={"length": LengthConfig(num_steps=300, batch_size=8, lr=3e-3), "ema_decay": None}
    )
    untrained = DrawingTraining(long, Ranks())
    held_out: HeldOut = untrained.held_out
    before = held_out.measures(held_out.rebuilt(untrained.decoder.eval()), None)
    assert train_decoder(long)["psnr_db"] > before["psnr_db"] + 5
