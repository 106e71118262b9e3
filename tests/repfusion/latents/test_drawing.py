"""A decoder that draws: a function of features and seeds, whole in its folder, the same for all."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from repfusion.diffusion.flow import initial_noise, seeds_of
from repfusion.diffusion.sampler import SamplerConfig
from repfusion.export import export
from repfusion.flops.count import decoder_cost
from repfusion.generate import generate
from repfusion.latents.drawing_decoder import DrawingDecoder, DrawingDecoderConfig, interpolation
from repfusion.latents.load import fitting_decoder, load_decoder
from repfusion.latents.vae import VAEDecoder, VAEEncoder
from repfusion.model.meta import meta_decoder
from repfusion.pipeline import RepFusionPipeline
from repfusion.request import Request
from repfusion.runs.checkpoint import save_checkpoint
from repfusion.runs.exported import load_export

FIELDS = {
    "feature_dim": 16,
    "grid": (2, 2),
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 192,
    "depth": 1,
    "num_heads": 2,
    "num_steps": 3,
}


def make(**changes: object) -> DrawingDecoder:
    """A decoder whose zeros are moved, so that everything counts."""
    torch.manual_seed(3)
    decoder = DrawingDecoder(DrawingDecoderConfig.model_validate({**FIELDS, **changes}))
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return decoder.eval()


def features(num: int = 3) -> torch.Tensor:
    return torch.randn(num, 4, 16, generator=torch.Generator().manual_seed(0))


def kl_vae(folder: Path) -> Path:
    """Of factor 2 and 4 channels."""
    torch.manual_seed(4)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    ).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_a_row_follows_from_its_features_and_seed_alone():
    decoder = make()
    whole = decoder(features(), [5, 2**64 - 1, 7])
    torch.testing.assert_close(decoder(features()[1:2], [2**64 - 1]), whole[1:2], atol=1e-4, rtol=0)
    other = decoder(features(), [6, 2**64 - 1, 7])
    assert (other[0] - whole[0]).abs().max() > 0.1 and torch.equal(other[1:], whole[1:])
    assert torch.equal(decoder(features()), decoder(features(), [0, 0, 0]))
    assert (decoder(features() + 1, [5, 6, 7])[0] - whole[0]).abs().max() > 0.01
    with pytest.raises(ValueError, match="2 seeds for 3 images"):
        decoder(features(), [1, 2])


@torch.no_grad()
def test_it_follows_the_flow_it_is_given():
    """With the velocity of the only image in the world, noise - image, one step ends at that image."""
    decoder, image = make(num_steps=1), torch.rand(1, 3, 32, 32)
    canvas = decoder.paint(image)
    decoder.velocity = lambda z, t, condition: (z - canvas) / t[:, None, None]
    torch.testing.assert_close(decoder(features(1), [9]), image, atol=1e-5, rtol=0)
    assert canvas.shape[1:] == decoder.config.canvas_shape and canvas.abs().max() <= 1
    # patch 1 is the one right of the first
    assert torch.equal(canvas[0, 1], ((image[0, :, :8, 8:16] - 0.5) / 0.5).movedim(0, -1).flatten())


def test_tokens_read_the_features_at_their_place():
    weights = interpolation((2, 2), (4, 4))
    torch.testing.assert_close(weights.sum(1), torch.ones(16))
    # by hand: centres of four tokens at -1/4, 1/4, 3/4, 5/4 of two, the outer ones held at the edge
    row = torch.tensor([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    torch.testing.assert_close(weights, torch.kron(row, row))
    assert torch.equal(interpolation((3, 3), (3, 3)), torch.eye(9))


@torch.no_grad()
def test_a_folder_holds_all_of_it_and_is_told_from_others(tmp_path):
    vae = kl_vae(tmp_path / "vae")
    fields = json.loads((vae / "config.json").read_text())
    for name, decoder in {"pixels": make(), "vae": make(vae=fields, patch_size=2)}.items():
        folder = tmp_path / name
        decoder.save_pretrained(folder)
        loaded = fitting_decoder(folder, (2, 2), 16)
        assert isinstance(loaded, DrawingDecoder) and not any(p.requires_grad for p in loaded.parameters())
        assert torch.equal(loaded(features(), [1, 2, 3]), decoder(features(), [1, 2, 3]))
        assert loaded.image_size == 32
        assert load_decoder(folder, on_meta=True).mean.device.type == "meta"
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            loaded(features(1))
        assert decoder_cost(loaded).forward == counter.get_total_flops() > 0
        with pytest.raises(ValueError, match=r"reads \(grid, width\) \(\(2, 2\), 16\), the model makes"):
            fitting_decoder(folder, (2, 2), 12)
    (tmp_path / "pixels" / "config.json").write_text(make(depth=2).config.model_dump_json())
    with pytest.raises(ValueError, match=r"missing: blocks\.1\..*DrawingDecoder\.save_pretrained"):
        load_decoder(tmp_path / "pixels")
    (tmp_path / "pixels" / "config.json").write_text('{"kind": "drawing", "grid": [2, 2]}')
    with pytest.raises(ValueError, match=r"config\.json: feature_dim: Field required"):
        load_decoder(tmp_path / "pixels")


@torch.no_grad()
def test_a_vaes_latents_are_painted_and_shown(tmp_path):
    folder = kl_vae(tmp_path / "vae")
    encoder, plain = VAEEncoder.from_pretrained(folder), VAEDecoder.from_pretrained(folder)
    decoder = make(vae=json.loads((folder / "config.json").read_text()), patch_size=2)
    assert decoder.vae is not None
    decoder.vae.load_state_dict(plain.state_dict())
    seen = encoder(torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    canvas = seen.mT.unflatten(2, (16, 16))
    decoder.measure_canvas(canvas)
    tokens = decoder.paint(canvas)
    channels = tokens.view(5, 64, 2, 2, 4).flatten(0, 3)
    torch.testing.assert_close(channels.mean(0), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(channels.std(0), torch.ones(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(decoder.show(tokens), plain(seen), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"patch_size": 5}, "patch_size 5 does not divide a side of 32"),
        ({"patch_size": 32}, "1 patches a side for features of 2 x 2 tokens"),
        ({"hidden_size": 64}, "hidden_size 64 is below the 192 channels of a patch"),
        ({"num_heads": 5}, "192 over 5 heads"),
        ({"vae": {"_class_name": "Other"}}, "_class_name 'Other'; expected one of AutoencoderKL"),
        (
            {"vae": {"_class_name": "AutoencoderDC"}, "image_size": 48},
            "48: not a multiple of 32",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        DrawingDecoderConfig.model_validate({**FIELDS, **changes})


def test_a_seed_follows_from_every_bit_of_the_noise():
    noise = initial_noise([4, 4, 5], (2, 3))
    first, same, other = seeds_of(noise)
    assert first == same != other and seeds_of(noise[:1].double()) == [first]
    noise[0, 1, 2] = torch.nextafter(noise[0, 1, 2], torch.tensor(9.0))
    assert seeds_of(noise)[0] != first


@pytest.mark.slow
def test_images_of_a_seed_are_the_same_for_all_who_decode(make_generator, tmp_path):
    """In any batch, through the pipeline, and from an export."""
    make().save_pretrained(tmp_path / "decoder")
    model = make_generator(decoder=tmp_path / "decoder")
    decoder = model.load_decoder()
    requests, config = [Request("a red circle")] * 3, SamplerConfig(num_steps=2, precision="fp32")
    images = generate(model, decoder, requests, 3, config)
    torch.testing.assert_close(
        generate(model, decoder, requests, 3, config, batch_size=1), images, atol=1e-3, rtol=0
    )
    assert (images[0] - images[1]).abs().max() > 0.1
    pipe = RepFusionPipeline(model, decoder, precision="fp32")
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4, 5)]
    asked = {"prompt": ["a red circle"] * 3, "num_inference_steps": 2, "output_type": "pt"}
    assert torch.equal(pipe(**asked, generator=generators).images, images)
    noise = initial_noise([3, 4, 5], model.latent_shape)
    assert torch.equal(pipe(**asked, latents=noise).images, images)
    meta = meta_decoder(model.config, model.grid)
    assert meta is not None and decoder_cost(meta) == decoder_cost(decoder)
    save_checkpoint(tmp_path / "step_00000001", model, model.trainable_state(), step=1)
    out = export(tmp_path / "step_00000001", tmp_path / "out")
    index = json.loads((out / "model_index.json").read_text())
    assert index["decoder"] == ["repfusion.latents.drawing_decoder", "DrawingDecoder"]
    exported = load_export(out)
    assert torch.equal(generate(exported, exported.load_decoder(), requests, 3, config), images)
