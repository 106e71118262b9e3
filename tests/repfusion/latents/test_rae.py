"""Encoder, statistics, decoder: the penultimate hidden state, exact moments, strict loading."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_training import tiny_model
from transformers import CLIPVisionModel, LlavaForConditionalGeneration

from repfusion.diffusion.flow import shift_factor
from repfusion.diffusion.sampler import SamplerConfig
from repfusion.files import weights_digest
from repfusion.generate import generate
from repfusion.latents.geometry import TowerGeometry, tower_geometry
from repfusion.latents.rae_decoder import RAEDecoder, RAEDecoderConfig
from repfusion.latents.statistics import LatentStatistics, TokenScale
from repfusion.latents.tower import RepresentationEncoder
from repfusion.layers import sin_cos_positions
from repfusion.model.build import build_model
from repfusion.request import Request
from repfusion.runs.checkpoint import load_checkpoint, save_checkpoint


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))


def features_of(num: int, seed: int = 0) -> torch.Tensor:
    """Far from zero mean, in places of small variance: a naive sum of squares would lose digits."""
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.01, 2, (1, 6, 5))
    return torch.from_numpy(40 + scale * rng.standard_normal((num, 6, 5)))


@pytest.mark.parametrize("layer", [-1, -2, -4])
def test_features_are_the_towers_hidden_state_layer_normed(clip_tower: Path, pixels, layer):
    encoder = RepresentationEncoder.from_pretrained(clip_tower, layer)
    tower = CLIPVisionModel.from_pretrained(clip_tower).eval()
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
    with torch.no_grad():
        normalised = (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        hidden = tower(pixel_values=normalised, output_hidden_states=True).hidden_states[layer]
    expected = F.layer_norm(hidden[:, 1:], (32,))
    features = encoder(pixels)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features.mean(-1), torch.zeros(3, 9), atol=1e-5, rtol=0)
    torch.testing.assert_close(features.var(-1, unbiased=False), torch.ones(3, 9), atol=1e-3, rtol=0)


def test_layers_differ_and_the_penultimate_is_the_default(clip_tower, pixels):
    default = RepresentationEncoder.from_pretrained(clip_tower)(pixels)
    penultimate, last = (
        RepresentationEncoder.from_pretrained(clip_tower, layer)(pixels) for layer in (-2, -1)
    )
    assert torch.equal(default, penultimate)
    assert (last - penultimate).abs().max() > 0.1


def test_geometry_of_the_encoder(clip_tower):
    encoder = RepresentationEncoder.from_pretrained(clip_tower)
    assert (encoder.image_size, encoder.grid, encoder.num_tokens, encoder.feature_dim) == (24, (3, 3), 9, 32)
    assert not encoder.tower.training
    assert not any(p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize("image_size", [16, 32, 48])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_size_gives_what_transformers_gives_with_interpolated_positions(
    clip_tower, image_size, dtype
):
    encoder = RepresentationEncoder.from_pretrained(clip_tower, dtype=dtype, image_size=image_size)
    side = image_size // 8
    assert (encoder.image_size, encoder.grid, encoder.num_tokens) == (image_size, (side, side), side**2)
    tower = CLIPVisionModel.from_pretrained(clip_tower, dtype=dtype).eval()
    pixels = torch.rand(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    normalised = ((pixels - encoder.mean) / encoder.std).to(dtype)
    with torch.no_grad():
        expected = tower(normalised, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states[
            -2
        ]
    expected = F.layer_norm(expected[:, 1:].float(), (32,))
    # ours interpolates in float32 whatever it then computes in
    tolerance = 0.0 if dtype == torch.float32 else 0.06
    torch.testing.assert_close(encoder(pixels), expected, rtol=0.0, atol=tolerance)


def test_the_towers_own_size_interpolates_nothing(clip_tower, pixels):
    own, asked = (RepresentationEncoder.from_pretrained(clip_tower, image_size=size) for size in (None, 24))
    assert torch.equal(own(pixels), asked(pixels))
    table = CLIPVisionModel.from_pretrained(clip_tower).embeddings.position_embedding.weight
    assert torch.equal(asked.tower.embeddings.position_embedding.weight, table)


def test_a_model_at_another_size_is_saved_loads_and_generates(foundation, tmp_path):
    """Grid, shift and checkpoint follow; a decoder of the tower's own grid is refused by name."""
    config = tiny_model(foundation)
    wide = config.model_copy(update={"encoder": config.encoder.model_copy(update={"image_size": 48})})
    encoder = wide.encoder.load()
    statistics = LatentStatistics.empty(encoder.num_tokens, encoder.feature_dim)
    statistics.update(encoder(torch.rand(4, 3, 48, 48, generator=torch.Generator().manual_seed(0))))
    generator = build_model(wide, statistics)
    assert (generator.grid, generator.latent_shape) == ((3, 3), (9, 16))
    assert generator.shift == shift_factor(9, 16)
    with pytest.raises(ValueError, match=r"\(\(2, 2\), 16\), the model makes \(\(3, 3\), 16\)"):
        generator.load_decoder()
    decoder = RAEDecoderConfig(feature_dim=16, grid=(3, 3), patch_size=16, hidden_size=16, depth=1)
    RAEDecoder(decoder).save_pretrained(tmp_path / "decoder")
    wide = wide.model_copy(update={"decoder": tmp_path / "decoder"})
    generator = build_model(wide, statistics)
    save_checkpoint(tmp_path / "step_00000001", generator, generator.trainable_state())
    loaded = load_checkpoint(tmp_path / "step_00000001")
    assert loaded.config.encoder.image_size == 48
    requests, sampler = [Request("a red circle")], SamplerConfig(num_steps=2)
    images = [generate(g.eval(), g.load_decoder(), requests, 3, sampler) for g in (generator, loaded)]
    assert images[0].shape == (1, 3, 48, 48) and torch.equal(*images)
    with pytest.raises(ValueError, match=r"features \(9, 16\), the encoder .* gives \(4, 16\) at 32 px"):
        build_model(config, statistics)


@pytest.mark.parametrize("image_size, nearest", [(28, 32), (4, 8), (0, 8), (-8, 8)])
def test_a_size_that_patches_do_not_fill_is_refused(clip_tower, image_size, nearest):
    expected = f"encoder.image_size {image_size}: not a multiple of 8, .*; the nearest one is {nearest}"
    with pytest.raises(ValueError, match=expected):
        RepresentationEncoder.from_pretrained(clip_tower, image_size=image_size)


def test_eight_bit_images_give_the_same_bits_as_their_pixels(clip_tower):
    encoder = RepresentationEncoder.from_pretrained(clip_tower)
    images = torch.randint(0, 256, (3, 24, 24, 3), generator=torch.Generator().manual_seed(0)).byte()
    pixels = images.permute(0, 3, 1, 2).float().div(255)
    assert torch.equal(encoder.encode_images(images).features, encoder(pixels))


@pytest.mark.parametrize("kind", ["clip_vision_model", "clip", "llava"])
def test_the_geometry_is_read_without_loading_the_tower(kind, tmp_path):
    vision = {"image_size": 40, "patch_size": 8}
    fields = vision if kind == "clip_vision_model" else {"vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **fields}))
    assert tower_geometry(tmp_path) == TowerGeometry(40, 8)
    assert tower_geometry(tmp_path, 48).grid == (6, 6)


def test_tokens_run_along_rows(clip_tower, pixels):
    """Before attention mixes them (hidden state 0), a patch changes its own token only."""
    encoder = RepresentationEncoder.from_pretrained(clip_tower, layer=-4)
    encoder.tower.encoder.layers = encoder.tower.encoder.layers[:0]
    changed = pixels.clone()
    changed[:, :, 8:16, 16:24] = 1 - changed[:, :, 8:16, 16:24]  # row 1, column 2
    difference = (encoder(pixels) - encoder(changed)).abs().amax(dim=(0, 2))
    assert difference.nonzero().flatten().tolist() == [1 * 3 + 2]


def test_a_llavas_tower_is_read_from_the_llavas_folder(elsewhere):
    encoder = RepresentationEncoder.from_pretrained(elsewhere.encoder.path)
    tower = LlavaForConditionalGeneration.from_pretrained(elsewhere.mllm).model.vision_tower
    weights = tower.state_dict()
    for name, value in encoder.tower.state_dict().items():
        assert torch.equal(value, weights[name])
    unused = {name.split(".")[2] for name in weights.keys() - encoder.tower.state_dict().keys()}
    assert unused == {"3"}, "layers above the penultimate state are not computed"


def test_another_image_size_is_refused(clip_tower, pixels):
    encoder = RepresentationEncoder.from_pretrained(clip_tower)
    with pytest.raises(ValueError, match="pixels are 24 x 16, the encoder takes 24 x 24; resize in 'ingest'"):
        encoder(pixels[..., :16])


@pytest.mark.parametrize("change", [lambda x: x * 255, lambda x: x * 2 - 1, lambda x: x * float("nan")])
def test_pixels_in_another_range_are_refused(clip_tower, pixels, change):
    with pytest.raises(ValueError, match=r"expected \[0, 1\]"):
        RepresentationEncoder.from_pretrained(clip_tower)(change(pixels))


@pytest.mark.parametrize("layer", [0, 1, -5])
def test_a_layer_the_tower_lacks_is_refused(clip_tower, layer):
    with pytest.raises(ValueError, match=f"layer {layer}: the tower has 4 layers"):
        RepresentationEncoder.from_pretrained(clip_tower, layer)


def test_folders_that_hold_no_tower_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        RepresentationEncoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="model_type 'bert'; expected one of clip_vision_model"):
        RepresentationEncoder.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no \*\.safetensors files"):
        weights_digest(tmp_path)


def test_the_digest_follows_the_weights(clip_tower, tmp_path):
    file = clip_tower / "model.safetensors"
    expected = hashlib.sha256(b"model.safetensors" + file.read_bytes()).hexdigest()
    assert RepresentationEncoder.from_pretrained(clip_tower).digest == weights_digest(clip_tower) == expected
    tensors = load_file(str(file))
    tensors[next(iter(tensors))].view(-1)[0] += 1e-3
    save_file(tensors, str(tmp_path / "model.safetensors"), metadata={"format": "pt"})
    assert weights_digest(tmp_path) != expected


@pytest.mark.parametrize("batch_sizes", [[100], [1] * 100, [64, 36], [7, 13, 80]])
def test_statistics_equal_numpys_in_float64(batch_sizes):
    features = features_of(100)
    statistics = LatentStatistics.empty(6, 5)
    for part in features.split(batch_sizes):
        statistics.update(part)
    assert statistics.count == 100
    np.testing.assert_allclose(statistics.mean.numpy(), features.numpy().mean(0), rtol=1e-14)
    np.testing.assert_allclose(statistics.var.numpy(), features.numpy().var(0), rtol=1e-11)


def test_statistics_of_half_precision_features_are_those_of_the_stored_values():
    stored = features_of(50).half()
    statistics = LatentStatistics.empty(6, 5)
    statistics.update(stored)
    np.testing.assert_allclose(statistics.var.numpy(), stored.double().numpy().var(0), rtol=1e-11)


def tokens_of(features: torch.Tensor) -> TokenScale:
    """What a LayerNorm would take of each token."""
    return TokenScale(features.mean(-1), features.std(-1))


def shard_statistics(num_shards: int = 7, has_tokens: bool = True) -> list[LatentStatistics]:
    parts = []
    for features in features_of(7 * 15).chunk(num_shards):
        part = LatentStatistics.empty(6, 5)
        for batch in features.split(4):
            part.update(batch, tokens_of(batch) if has_tokens else None)
        parts.append(part)
    return parts


def same_bits(one: LatentStatistics, other: LatentStatistics) -> bool:
    pairs = [(one.mean, other.mean), (one.m2, other.m2)]
    pairs += zip(one.tokens or (), other.tokens or (), strict=True)
    return one.count == other.count and all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("num_actors", [1, 2, 3, 7])
def test_merging_shards_in_order_gives_the_same_bits_whoever_computed_them(num_actors, tmp_path):
    reference = LatentStatistics.empty(6, 5)
    for part in shard_statistics():
        reference.merge(part)
    # Each actor takes every num_actors-th shard, the last one first; what they wrote is merged by name.
    for actor in range(num_actors):
        for index in reversed(range(actor, 7, num_actors)):
            shard_statistics()[index].save(tmp_path / f"{index:05d}.safetensors")
    merged = LatentStatistics.empty(6, 5)
    for path in sorted(tmp_path.iterdir()):
        merged.merge(LatentStatistics.load(path))
    assert merged.count == 105 and same_bits(merged, reference)
    for made, expected in zip(merged.tokens, tokens_of(features_of(105)), strict=True):
        np.testing.assert_allclose(made.numpy(), expected.numpy().mean(0), rtol=1e-13)
    np.testing.assert_allclose(merged.var.numpy(), features_of(105).numpy().var(0), rtol=1e-11)


def test_merging_with_nothing_changes_nothing():
    part, start = shard_statistics()[0], LatentStatistics.empty(6, 5)
    part.merge(LatentStatistics.empty(6, 5))
    start.merge(part)
    assert part.count == 15 and same_bits(part, shard_statistics()[0]) and same_bits(start, part)
    empty = LatentStatistics.empty(6, 5)
    empty.merge(LatentStatistics.empty(6, 5))
    assert empty.count == 0
    with pytest.raises(ValueError, match="statistics of no images"):
        _ = empty.var


def test_statistics_with_and_without_the_scales_of_tokens_do_not_merge():
    part = shard_statistics()[0]
    with pytest.raises(ValueError, match="of some images have token_mean and token_std, of others not"):
        part.merge(shard_statistics(has_tokens=False)[1])
    assert same_bits(part, shard_statistics()[0])


def test_what_a_towers_layer_norm_took_gives_the_hidden_state_back(clip_tower, pixels):
    encoder = RepresentationEncoder.from_pretrained(clip_tower)
    features, tokens = encoder.encode(pixels)
    assert torch.equal(features, encoder(pixels)) and tokens.std.shape == (len(pixels), 9)
    tower = CLIPVisionModel.from_pretrained(clip_tower).eval()
    with torch.no_grad():
        values = (pixels - encoder.mean) / encoder.std
        hidden = tower(values, output_hidden_states=True).hidden_states[-2][:, 1:]
    restored = tokens.std[..., None] * features + tokens.mean[..., None]
    torch.testing.assert_close(restored, hidden, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("has_tokens", [True, False])
def test_latents_and_statistics_give_the_hidden_state_of_the_mean_scale(has_tokens):
    statistics, features = LatentStatistics.empty(6, 5), features_of(40)
    statistics.update(features, tokens_of(features) if has_tokens else None)
    scale, shift = statistics.hidden_state()
    made = scale * statistics.normalise(features) + shift
    mean, std = (one.mean(0)[:, None] for one in tokens_of(features))
    torch.testing.assert_close(made, std * features + mean if has_tokens else features, rtol=1e-5, atol=1e-5)


def test_normalised_features_have_mean_zero_and_variance_one():
    features = features_of(400)
    statistics = LatentStatistics.empty(6, 5)
    statistics.update(features)
    latents = statistics.normalise(features).double()
    assert statistics.normalise(features).dtype == torch.float32
    torch.testing.assert_close(latents.mean(0), torch.zeros(6, 5).double(), atol=2e-3, rtol=0)
    expected = statistics.var / (statistics.var + 1e-5)
    torch.testing.assert_close(latents.var(0, unbiased=False), expected, atol=5e-3, rtol=0)
    torch.testing.assert_close(
        statistics.denormalise(statistics.normalise(features)), features.float(), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("has_tokens", [True, False])
def test_statistics_files(tmp_path, has_tokens):
    part = shard_statistics(has_tokens=has_tokens)[0]
    part.save(tmp_path / "statistics.safetensors")
    loaded = LatentStatistics.load(tmp_path / "statistics.safetensors")
    assert isinstance(loaded.count, int) and same_bits(loaded, part)
    assert (loaded.tokens is not None) == has_tokens
    with pytest.raises(ValueError, match="no such file; run the latents stage first"):
        LatentStatistics.load(tmp_path / "missing.safetensors")
    save_file({"mean": part.mean}, str(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match=r"holds \['mean'\], expected count, m2, mean"):
        LatentStatistics.load(tmp_path / "other.safetensors")
    half = load_file(tmp_path / "statistics.safetensors") | {"token_mean": part.mean[:, 0].contiguous()}
    save_file({name: half[name] for name in half if name != "token_std"}, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match="with token_mean and token_std or without"):
        LatentStatistics.load(tmp_path / "half.safetensors")


CONFIG = RAEDecoderConfig(feature_dim=6, grid=(2, 3), patch_size=4, hidden_size=16, depth=2, num_heads=2)


def make_decoder() -> RAEDecoder:
    torch.manual_seed(0)
    return RAEDecoder(CONFIG)


def test_decoder_round_trip(tmp_path):
    decoder, features = make_decoder(), torch.randn(2, 6, 6)
    decoder.save_pretrained(tmp_path)
    loaded = RAEDecoder.from_pretrained(tmp_path)
    assert loaded.config == CONFIG
    assert torch.equal(loaded(features), decoder(features))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_a_decoder_saved_in_half_precision_loads_in_float32(tmp_path):
    decoder, features = make_decoder(), torch.randn(2, 6, 6)
    decoder.save_pretrained(tmp_path, dtype=torch.float16)
    assert {v.dtype for v in load_file(str(tmp_path / "model.safetensors")).values()} == {torch.float16}
    loaded = RAEDecoder.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(loaded(features), decoder(features), atol=5e-3, rtol=0)


def test_each_token_decodes_to_its_own_patch_without_attention():
    decoder = make_decoder()
    for block in decoder.blocks:
        torch.nn.init.zeros_(block.attention.out.weight)
    features = torch.randn(1, 6, 6)
    changed = features.clone()
    changed[:, 1 * 3 + 2] += 1  # row 1, column 2
    images, others = decoder(features), decoder(changed)
    assert images.shape == (1, 3, 8, 12)
    differs = (images - others).abs().amax(dim=(0, 1)) > 1e-6
    assert bool(differs[4:8, 8:12].all())
    assert int(differs.sum()) == 16


def test_decoder_tells_tokens_apart_by_position():
    positions = sin_cos_positions((2, 3), 16)
    assert torch.cdist(positions, positions).add(torch.eye(6)).min() > 0.1
    images = make_decoder()(torch.ones(1, 6, 6))
    assert (images[..., :4, :4] - images[..., 4:, 8:]).abs().max() > 1e-3


def test_decoder_overfits_one_image():
    decoder = make_decoder()
    features, image = torch.randn(1, 6, 6), torch.rand(1, 3, 8, 12)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-2)
    losses = []
    for _ in range(80):
        loss = F.mse_loss(decoder(features), image)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 20


def test_decoder_folders_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json; expected a folder written by RAEDecoder"):
        RAEDecoder.from_pretrained(tmp_path)
    make_decoder().save_pretrained(tmp_path)
    wider = {**json.loads((tmp_path / "config.json").read_text()), "feature_dim": 7}
    (tmp_path / "config.json").write_text(json.dumps(wider))
    with pytest.raises(ValueError, match=r"(?s)do not fit config\.json.*embed\.weight"):
        RAEDecoder.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        RAEDecoder.from_pretrained(tmp_path)
