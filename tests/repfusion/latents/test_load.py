"""Every kind of encoder folder gives what its own library computes: vision towers, the models that hold one,
VAEs.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, AutoencoderKL
from einops import rearrange
from safetensors.torch import load_file, save_file
from tiny_training import tiny_model
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from repfusion.conditioning.text_embed import TextEmbedConfig
from repfusion.diffusion.sampler import SamplerConfig
from repfusion.generate import generate
from repfusion.latents.geometry import latent_geometry
from repfusion.latents.load import EncoderConfig, load_decoder
from repfusion.latents.statistics import LatentStatistics
from repfusion.latents.tower import IMAGENET, PIXEL_STATISTICS, RepresentationEncoder, pixel_statistics
from repfusion.latents.vae import VAEDecoder, VAEEncoder
from repfusion.model.build import build_model
from repfusion.request import Request
from repfusion.runs.checkpoint import load_checkpoint, save_checkpoint

SIZE, PATCH, WIDTH, LAYERS = 24, 8, 32, 3
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
VISION = SIZES | {"intermediate_size": 48, "image_size": SIZE, "patch_size": PATCH}
TEXT = {**SIZES, "intermediate_size": 48, "vocab_size": 99}
DINO = SIZES | {"mlp_ratio": 2, "image_size": SIZE, "patch_size": PATCH}
KINDS = ("clip", "siglip", "dinov2", "dinov2_with_registers")
OTHER_TOKENS = {"clip": 1, "siglip": 0, "dinov2": 1, "dinov2_with_registers": 1 + 3}
FIRST = {"clip": 1, "siglip": 0}
"""Where LLaVA's `default` selection of each tower begins."""


def make_tower(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    match kind:
        case "clip":
            tower = CLIPVisionModel(CLIPVisionConfig(**VISION, projection_dim=8))
        case "siglip":
            tower = SiglipVisionModel(SiglipVisionConfig(**VISION))
        case "dinov2":
            tower = Dinov2Model(Dinov2Config(**DINO))
        case _:
            tower = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**DINO, num_register_tokens=3))
    return disturb(tower)


def disturb(model: torch.nn.Module) -> torch.nn.Module:
    """Weights large enough for layers, positions and norms to show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in folders.items():
        make_tower(kind).save_pretrained(folder)
    return folders


def normalised(pixels: torch.Tensor, statistics: tuple) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in statistics)
    return (pixels - mean) / std


def random_pixels(size: int = SIZE) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def last_input_of(module: torch.nn.Module, call) -> torch.Tensor:
    seen = []
    with torch.no_grad(), module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
        call()
    return seen[-1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [-1, -2, -LAYERS])
def test_features_are_the_towers_own_hidden_state_of_its_patches(towers, kind, layer):
    encoder = RepresentationEncoder.from_pretrained(towers[kind], layer)
    statistics = PIXEL_STATISTICS[encoder.tower.config.model_type]
    tower, pixels = make_tower(kind), random_pixels()
    with torch.no_grad():
        states = tower(normalised(pixels, statistics), output_hidden_states=True).hidden_states
    assert len(states) == LAYERS + 1
    expected = states[layer][:, OTHER_TOKENS[kind] :]
    eps = tower.config.layer_norm_eps
    torch.testing.assert_close(encoder(pixels), F.layer_norm(expected, (WIDTH,), eps=eps))
    assert (encoder.image_size, encoder.grid, encoder.feature_dim) == (SIZE, (3, 3), WIDTH)
    assert latent_geometry(towers[kind]) == (SIZE, (3, 3), WIDTH)


@pytest.mark.parametrize("kind", ["siglip", "dinov2", "dinov2_with_registers"])
def test_the_last_layer_is_raes_final_norm_without_its_affine(towers, kind):
    """RAE sets the final norm's weight to ones and bias to zeros and takes last_hidden_state."""
    encoder = RepresentationEncoder.from_pretrained(towers[kind], -1)
    tower, pixels = make_tower(kind), random_pixels()
    norm = tower.post_layernorm if kind == "siglip" else tower.layernorm
    torch.nn.init.ones_(norm.weight)
    torch.nn.init.zeros_(norm.bias)
    statistics = PIXEL_STATISTICS[encoder.tower.config.model_type]
    with torch.no_grad():
        expected = tower(normalised(pixels, statistics)).last_hidden_state[:, OTHER_TOKENS[kind] :]
    torch.testing.assert_close(encoder(pixels), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [16, 40])
def test_another_size_gives_what_transformers_interpolates(towers, kind, size):
    encoder = RepresentationEncoder.from_pretrained(towers[kind], -1, image_size=size)
    assert latent_geometry(towers[kind], size) == (size, (size // PATCH,) * 2, WIDTH)
    assert encoder.grid == (size // PATCH,) * 2
    pixels, tower = random_pixels(size), make_tower(kind)
    asked = {} if kind.startswith("dinov2") else {"interpolate_pos_encoding": True}
    values = normalised(pixels, PIXEL_STATISTICS[tower.config.model_type])
    with torch.no_grad():
        expected = tower(values, output_hidden_states=True, **asked).hidden_states[-1]
    expected = expected[:, OTHER_TOKENS[kind] :]
    eps = tower.config.layer_norm_eps
    torch.testing.assert_close(encoder(pixels), F.layer_norm(expected, (WIDTH,), eps=eps))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_dual_encoders_and_llavas_hold_the_tower_they_were_made_with(kind, towers, tmp_path):
    """A LLaVA's own selection of features (`vision_feature_layer` -2) is the encoder's, before the norm."""
    if kind == "clip":
        text, vision = CLIPTextConfig(**TEXT), CLIPVisionConfig(**VISION, projection_dim=8)
        dual = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict()))
    else:
        text, vision = SiglipTextConfig(**TEXT), SiglipVisionConfig(**VISION, vision_use_head=False)
        full = SiglipVisionConfig(**VISION)
        dual = SiglipModel(SiglipConfig(text_config=text.to_dict(), vision_config=full.to_dict()))
    tower = make_tower(kind)
    dual.vision_model.load_state_dict(tower.state_dict())
    dual.save_pretrained(tmp_path / "dual")
    language = LlamaConfig(**TEXT, max_position_embeddings=32)
    llava = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=language,
            image_token_index=1,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default" if FIRST[kind] else "full",
        )
    ).eval()
    llava.model.vision_tower.load_state_dict(tower.state_dict(), strict=False)
    llava.save_pretrained(tmp_path / "llava")
    pixels = random_pixels()
    alone, dual_tower, llava_tower = (
        RepresentationEncoder.from_pretrained(folder)
        for folder in (towers[kind], tmp_path / "dual", tmp_path / "llava")
    )
    assert torch.equal(dual_tower(pixels), alone(pixels))
    assert torch.equal(llava_tower(pixels), alone(pixels))
    assert latent_geometry(tmp_path / "dual") == latent_geometry(tmp_path / "llava") == (SIZE, (3, 3), WIDTH)
    values = normalised(pixels, PIXEL_STATISTICS[f"{kind}_vision_model"])
    projector = llava.model.multi_modal_projector
    selected = last_input_of(projector, lambda: llava.get_image_features(pixel_values=values))
    eps = tower.config.layer_norm_eps
    torch.testing.assert_close(alone(pixels), F.layer_norm(selected, (WIDTH,), eps=eps))


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_normalised_as_the_folder_says_or_as_the_family_was_trained(kind, towers, tmp_path):
    def statistics() -> tuple[list[float], list[float]]:
        encoder = RepresentationEncoder.from_pretrained(tmp_path)
        return encoder.mean.flatten().tolist(), encoder.std.flatten().tolist()

    for file in towers[kind].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    family = {"clip": PIXEL_STATISTICS["clip_vision_model"], "siglip": ([0.5] * 3, [0.5] * 3)}
    for values, expected in zip(statistics(), family.get(kind, IMAGENET), strict=True):
        assert values == pytest.approx(list(expected))
    own = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": own}))
    assert statistics() == (pytest.approx(own["image_mean"]), pytest.approx(own["image_std"]))
    other = {"image_mean": [0.7, 0.8, 0.9], "image_std": [0.1, 0.1, 0.1]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(other))
    assert statistics() == (pytest.approx(other["image_mean"]), pytest.approx(other["image_std"]))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"do_normalize": False},
        {"do_rescale": False},
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 0.5},
        {"rescale_factor": 1 / 127.5, "do_normalize": False},
        {"image_mean": None, "image_std": None},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": None},
        {"rescale_factor": None, "image_mean": [0.1, 0.2, 0.3]},
    ],
)
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_pixels_reach_the_tower_as_the_folders_own_image_processor_makes_them(kind, fields, towers, tmp_path):
    """transformers' processor of the family, on 8-bit images of the tower's size."""
    processor = {"clip": CLIPImageProcessor, "siglip": SiglipImageProcessor}[kind]
    shutil.copytree(towers[kind], tmp_path, dirs_exist_ok=True)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    image = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    given = {name: value for name, value in fields.items() if value is not None}  # null is its default
    made = processor(**given)(image, do_resize=False, do_center_crop=False, return_tensors="pt")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in pixel_statistics(tmp_path))
    pixels = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    torch.testing.assert_close((pixels - mean) / std, made["pixel_values"][0].float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"image_mean": [0.5, 0.5]}, r"image_mean \[0\.5, 0\.5\]; expected three numbers"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std .*; expected three numbers above 0"),
        ({"image_std": "half"}, "image_std 'half'"),
        ({"rescale_factor": 0}, "rescale_factor 0; expected 1/255"),
        ([1], "holds a list"),
    ],
)
def test_an_image_processor_that_says_no_normalisation_is_refused(fields, says, towers, tmp_path):
    shutil.copytree(towers["clip"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=rf"encoder folder .*preprocessor_config\.json.*{says}"):
        EncoderConfig(path=tmp_path).load(on_meta=True)


def test_a_tower_that_lacks_weights_is_refused(towers, tmp_path):
    """Transformers would draw them at random."""
    (tmp_path / "config.json").write_bytes((towers["siglip"] / "config.json").read_bytes())
    weights = load_file(str(towers["siglip"] / "model.safetensors"))
    weights.pop(next(name for name in weights if "patch_embedding.weight" in name))
    save_file(weights, str(tmp_path / "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing: .*patch_embedding"):
        RepresentationEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "config, got",
    [
        ({"model_type": "siglip2", "vision_config": {"model_type": "siglip2_vision_model"}}, "'siglip2'"),
        ({"model_type": "llava", "vision_config": {"model_type": "pixtral"}}, "'llava over pixtral'"),
        ({"_class_name": "AutoencoderTiny"}, "None"),
    ],
)
def test_what_is_no_encoder_is_refused_by_name(config, got, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"model_type {got}; expected one of clip_vision_model, .*VAE"):
        EncoderConfig(path=tmp_path).load()


def kl_vae() -> AutoencoderKL:
    torch.manual_seed(1)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        latent_channels=3,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.3,
        shift_factor=0.7,
    )
    return model.eval()


def dc_ae() -> AutoencoderDC:
    torch.manual_seed(2)
    model = AutoencoderDC(
        latent_channels=5,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(10, 20, 40),
        decoder_block_out_channels=(10, 20, 40),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        scaling_factor=0.4,
    )
    return model.eval()


@pytest.mark.parametrize("make, channels", [(kl_vae, 3), (dc_ae, 5)])
@pytest.mark.parametrize("size", [16, 24])
def test_a_vae_is_diffusers_own_encode_and_decode(make, channels, size, tmp_path):
    make().save_pretrained(tmp_path)
    config, pixels, side = EncoderConfig(path=tmp_path, image_size=size), random_pixels(size), size // 4
    encoder, decoder, vae = config.load(), load_decoder(tmp_path, (side, side)), make()
    assert isinstance(encoder, VAEEncoder) and isinstance(decoder, VAEDecoder)
    assert (encoder.image_size, encoder.grid, encoder.feature_dim) == (size, (side, side), channels)
    assert latent_geometry(tmp_path, size) == (size, (side, side), channels)
    assert (decoder.grid, decoder.feature_dim) == ((side, side), channels)
    assert not any(p.requires_grad for p in (*encoder.parameters(), *decoder.parameters()))
    with torch.no_grad():
        encoded = vae.encode(pixels * 2 - 1)
        latent = encoded.latent_dist.mode() if make is kl_vae else encoded.latent
        rebuilt = vae.decode(latent).sample / 2 + 0.5
    features = encoder(pixels)
    assert torch.equal(features, rearrange(latent, "b d r c -> b (r c) d"))
    torch.testing.assert_close(decoder(features), rebuilt)
    images = (pixels * 255).round().byte().permute(0, 2, 3, 1)
    features, tokens = encoder.encode_images(images)
    assert torch.equal(features, encoder(images.permute(0, 3, 1, 2).float() / 255)) and tokens is None


def test_the_size_of_a_vae(tmp_path):
    """A KL VAE names the size it was trained at, a DC-AE does not."""
    kl_vae().save_pretrained(tmp_path / "kl")
    dc_ae().save_pretrained(tmp_path / "dc")
    assert EncoderConfig(path=tmp_path / "kl").load().grid == load_decoder(tmp_path / "kl").grid == (4, 4)
    with pytest.raises(ValueError, match=r"AutoencoderDC has no size of its own; set encoder\.image_size"):
        EncoderConfig(path=tmp_path / "dc").load()
    with pytest.raises(ValueError, match=r"not a multiple of 4, the factor of the VAE .* one is 16"):
        EncoderConfig(path=tmp_path / "dc", image_size=17).load()


def test_a_vaes_pixels_are_checked_as_a_towers(tmp_path):
    kl_vae().save_pretrained(tmp_path)
    encoder = EncoderConfig(path=tmp_path).load()
    with pytest.raises(ValueError, match="pixels are 16 x 12, the encoder takes 16 x 16"):
        encoder(random_pixels(16)[..., :12])
    with pytest.raises(ValueError, match=r"expected \[0, 1\]"):
        encoder(random_pixels(16) * 2 - 1)


def test_a_vae_whose_weights_do_not_fit_is_refused(tmp_path):
    kl_vae().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(str(file))
    kept = {name: value for name, value in weights.items() if name != "decoder.conv_out.bias"}
    save_file(kept, str(file), metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit config\.json.*decoder\.conv_out\.bias"):
        load_decoder(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match=r"no diffusion_pytorch_model\.safetensors"):
        load_decoder(tmp_path)


def test_a_decoder_folder_without_config_says_what_was_expected(tmp_path):
    with pytest.raises(ValueError, match=r"decoder folder .*: no config\.json"):
        load_decoder(tmp_path)


def test_a_model_over_a_vae_is_saved_loads_and_generates(foundation, tmp_path):
    """By the config alone; a decoder of another width is refused."""
    kl_vae().save_pretrained(tmp_path / "vae")
    encoder = EncoderConfig(path=tmp_path / "vae", image_size=24)
    own = {"encoder": encoder, "decoder": tmp_path / "vae", "conditioning": TextEmbedConfig()}
    config = tiny_model(foundation).model_copy(update=own)
    space, statistics = encoder.load(), LatentStatistics.empty(36, 3)
    statistics.update(space(torch.rand(8, 3, 24, 24, generator=torch.Generator().manual_seed(0))))
    generator = build_model(config, statistics)
    assert (generator.grid, generator.latent_shape) == ((6, 6), (36, 3))
    save_checkpoint(tmp_path / "step_00000001", generator, generator.trainable_state())
    loaded = load_checkpoint(tmp_path / "step_00000001")
    requests, sampler = [Request("a red circle")], SamplerConfig(num_steps=2)
    images = [generate(g.eval(), g.load_decoder(), requests, 3, sampler) for g in (generator, loaded)]
    assert images[0].shape == (1, 3, 24, 24) and torch.equal(*images)
    dc_ae().save_pretrained(tmp_path / "other")
    generator.config = config.model_copy(update={"decoder": tmp_path / "other"})
    with pytest.raises(ValueError, match=r"reads \(grid, width\) \(\(6, 6\), 5\), the model makes"):
        generator.load_decoder()
    with pytest.raises(ValueError, match=r"features \(36, 3\), the encoder .* gives \(16, 3\) at 16 px"):
        at_16 = encoder.model_copy(update={"image_size": 16})
        build_model(config.model_copy(update={"encoder": at_16}), statistics)
