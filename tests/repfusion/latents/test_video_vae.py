"""Clips in and out of a causal video VAE: the real class of diffusers with random weights."""

import json

import pytest
import torch
from tiny_video import tiny_video_vae

from repfusion.latents.vae import load_diffusers
from repfusion.latents.video_vae import VIDEO_VAE, VideoEncoderConfig, VideoVAEDecoder, clip_geometry

SIZE, FRAMES = 32, 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_video_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def clips():
    return torch.rand(2, FRAMES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
def test_tokens_are_the_posteriors_mean_frame_by_frame_row_by_row(folder, clips):
    encoder = VideoEncoderConfig(path=folder, image_size=SIZE, num_frames=FRAMES).load()
    features = encoder(clips)
    assert encoder.geometry.grid == (3, 4, 4) and features.shape == (2, 48, 4) == (2, encoder.num_tokens, 4)
    with torch.no_grad():
        latent = load_diffusers(folder, VIDEO_VAE).encode(clips.movedim(2, 1) * 2 - 1).latent_dist.mean
    for frame, row, column in ((0, 0, 0), (1, 2, 3), (2, 3, 0)):
        token = (frame * 4 + row) * 4 + column
        assert torch.equal(features[:, token], latent[:, :, frame, row, column])
    images = (clips.movedim(2, -1) * 255).round().to(torch.uint8)
    again = encoder(images.movedim(-1, 2).float() / 255)
    torch.testing.assert_close(encoder.encode_images(images).features, again)


@pytest.mark.slow
def test_no_latent_frame_sees_what_comes_later(folder, clips):
    encoder = VideoEncoderConfig(path=folder, image_size=SIZE, num_frames=FRAMES).load()
    changed = clips.clone()
    changed[:, 5:] = 0
    before, after = (encoder(one).unflatten(1, (3, 16)) for one in (clips, changed))
    torch.testing.assert_close(before[:, :2], after[:, :2])
    assert not torch.allclose(before[:, 2], after[:, 2])
    alone = VideoEncoderConfig(path=folder, image_size=SIZE, num_frames=1).load()
    torch.testing.assert_close(alone(clips[:, :1]), before[:, 0])


@pytest.mark.slow
def test_the_decoder_makes_clips_of_tokens(folder, clips):
    encoder = VideoEncoderConfig(path=folder, image_size=SIZE, num_frames=FRAMES).load()
    decoder = VideoVAEDecoder.from_pretrained(folder, SIZE, FRAMES)
    features = encoder(clips)
    with torch.no_grad():
        pixels = decoder(features)
        vae = load_diffusers(folder, VIDEO_VAE)
        rebuilt = vae.decode(vae.encode(clips.movedim(2, 1) * 2 - 1).latent_dist.mean).sample
    assert pixels.shape == clips.shape and 0 <= pixels.min() <= pixels.max() <= 1
    torch.testing.assert_close(pixels, rebuilt.movedim(1, 2) / 2 + 0.5)


@pytest.mark.slow
def test_clips_that_the_encoder_does_not_take_are_refused(folder, clips):
    encoder = VideoEncoderConfig(path=folder, image_size=SIZE, num_frames=FRAMES).load()
    with pytest.raises(ValueError, match=r"ingest.clips.num_frames"):
        encoder(clips[:, :5])
    with pytest.raises(ValueError, match="divide 8-bit values"):
        encoder(clips * 255)


def test_what_does_not_fit_is_refused_with_what_would(tmp_path):
    """All of it is in config.json; what that leaves out is Wan's own."""
    said = {"_class_name": VIDEO_VAE, "z_dim": 4}
    (tmp_path / "config.json").write_text(json.dumps(said))
    assert clip_geometry(tmp_path, 480, 81) == (480, 81, (21, 60, 60), 4)
    with pytest.raises(ValueError, match=r"num_frames 8: .* the nearest one is 9"):
        clip_geometry(tmp_path, SIZE, 8)
    with pytest.raises(ValueError, match=r"image_size 36: .* nearest one is 32"):
        clip_geometry(tmp_path, 36, FRAMES)
    with pytest.raises(ValueError, match=f"expected {VIDEO_VAE}"):
        clip_geometry("repfusion/weights/vae", SIZE, FRAMES)
    for more, grid in {"temperal_downsample": (5, 4, 4), "patch_size": (3, 2, 2)}.items():
        changed = {"temperal_downsample": [False, False, True], "patch_size": 2, "in_channels": 12}
        keys = (more, "in_channels") if more == "patch_size" else (more,)
        (tmp_path / "config.json").write_text(json.dumps(said | {key: changed[key] for key in keys}))
        assert clip_geometry(tmp_path, SIZE, FRAMES).grid == grid
    (tmp_path / "config.json").write_text(json.dumps(said | {"in_channels": 1}))
    with pytest.raises(ValueError, match="reads 1 channels, not RGB"):
        clip_geometry(tmp_path, SIZE, FRAMES)
