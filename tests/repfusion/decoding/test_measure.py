"""How a decoder is measured: PSNR and SSIM against slow references, at intervals and at the end."""

import json

import mlflow
import numpy as np
import pytest
import torch
from PIL import Image

from repfusion.decoding.config import DecoderTrainingConfig, PerceptualConfig
from repfusion.decoding.measure import SHOWN, HeldOut, psnr, ssim
from repfusion.decoding.train import EXAMPLES, MEASURED, DecoderTraining, pictures_of, train_decoder
from repfusion.foundation.config import LengthConfig
from repfusion.tracking import TrackingConfig


def pair(side: int = 14) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    pixels = torch.rand(2, 3, side, side, generator=generator)
    return (pixels + 0.2 * torch.randn(pixels.shape, generator=generator)).clamp(0, 1), pixels


def slow_ssim(one: np.ndarray, other: np.ndarray) -> float:
    """Equation 13 of Wang et al., window by window, of one channel."""
    places = np.arange(11) - 5
    weights = np.exp(-(places[:, None] ** 2 + places[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    found = []
    for top in range(one.shape[0] - 10):
        for left in range(one.shape[1] - 10):
            x, y = (image[top : top + 11, left : left + 11] for image in (one, other))
            mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
            var_x, var_y = (weights * (x - mean_x) ** 2).sum(), (weights * (y - mean_y) ** 2).sum()
            covariance = (weights * (x - mean_x) * (y - mean_y)).sum()
            above = (2 * mean_x * mean_y + 1e-4) * (2 * covariance + 9e-4)
            found.append(above / ((mean_x**2 + mean_y**2 + 1e-4) * (var_x + var_y + 9e-4)))
    return float(np.mean(found))


def test_ssim_and_psnr_are_what_they_are_defined_as():
    rebuilt, pixels = pair()
    channels = zip(rebuilt.double().flatten(0, 1).numpy(), pixels.double().flatten(0, 1).numpy(), strict=True)
    assert ssim(rebuilt, pixels) == pytest.approx(np.mean([slow_ssim(*two) for two in channels]), abs=1e-4)
    errors = ((rebuilt - pixels) ** 2).double().mean(dim=(1, 2, 3)).numpy()
    assert psnr(rebuilt, pixels) == pytest.approx(np.mean(10 * np.log10(1 / errors)), abs=1e-4)
    assert ssim(pixels, pixels) == pytest.approx(1) and psnr(pixels, pixels) == pytest.approx(100)
    with pytest.raises(ValueError, match="SSIM needs 11 px"):
        ssim(rebuilt[..., :8, :8], pixels[..., :8, :8])


def test_the_picture_shows_images_above_what_was_made_of_them(tmp_path):
    rebuilt, pixels = pair(12)
    HeldOut(pixels, torch.zeros(2, 1, 1)).draw(rebuilt, tmp_path / "some.png")
    shown = np.asarray(Image.open(tmp_path / "some.png"))
    scale = shown.shape[0] // 24
    assert shown.shape == (24 * scale, 24 * scale, 3)
    small = shown[scale // 2 :: scale, scale // 2 :: scale]
    expected = (rebuilt[1] * 255).round().byte().movedim(0, -1).numpy()
    np.testing.assert_array_equal(small[12:, 12:], expected)


def cut_at_step_3(monkeypatch: pytest.MonkeyPatch, config: DecoderTrainingConfig) -> None:
    own = DecoderTraining.take_step

    def take_step(self, step):
        if step == 3:
            raise KeyboardInterrupt
        return own(self, step)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(DecoderTraining, "take_step", take_step)
        train_decoder(config)


@pytest.fixture
def at_intervals(config) -> DecoderTrainingConfig:
    length = LengthConfig(num_steps=5, batch_size=4)
    return config.model_copy(
        update={"measure_every_steps": 2, "length": length, "ema_decay": 0.5, "save_every_sec": 1e-9}
    )


def test_it_is_measured_at_intervals_and_at_the_end(at_intervals, tmp_path, monkeypatch):
    cut_at_step_3(monkeypatch, at_intervals)
    found = train_decoder(at_intervals)
    assert json.loads((at_intervals.out / MEASURED).read_text()) == found
    assert [one["step"] for one in found["history"]] == [2, 4]
    assert all({"psnr_db", "ssim"} <= one.keys() for one in [found, *found["history"]])
    pictures = sorted(pictures_of(at_intervals.out).iterdir())
    assert [path.name for path in pictures] == ["step_00000002.png", "step_00000004.png"]
    assert Image.open(at_intervals.out / EXAMPLES).size[0] % SHOWN == 0
    # looking changes nothing
    unseen = at_intervals.model_copy(update={"out": tmp_path / "unseen", "measure_every_steps": None})
    assert found.items() >= train_decoder(unseen).items()


@pytest.mark.slow
def test_a_run_that_goes_on_has_all_losses_measures_and_pictures(
    at_intervals, lpips_folder, tmp_path, monkeypatch
):
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", system_metrics_sec=None)
    perceptual = PerceptualConfig(path=lpips_folder, weight=0)
    config = at_intervals.model_copy(update={"tracking": tracking, "perceptual": perceptual})
    cut_at_step_3(monkeypatch, config)
    found = train_decoder(config)
    client = mlflow.MlflowClient(tracking.uri)
    experiment = client.get_experiment_by_name("repfusion")
    (run,) = client.search_runs([experiment.experiment_id])
    points = client.get_metric_history(run.info.run_id, "eval/lpips")
    assert [point.step for point in points] == [2, 4, 5] and run.info.status == "FINISHED"
    assert points[-1].value == pytest.approx(found["lpips"])
    assert {"train/pixels", "train/lr", "eval/psnr_db", "eval/ssim"} <= run.data.metrics.keys()
    assert "train/perceptual" not in run.data.metrics
    assert len(client.list_artifacts(run.info.run_id, "images")) >= 3
