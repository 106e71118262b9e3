"""The networks that judge a decoder's images: LPIPS and the discriminator against slow references, and
folders that hold something else.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_critics import write_dino

from repfusion.decoding.discriminator import (
    BLOCKS,
    Discriminator,
    discriminator_loss,
    generator_loss,
    load_discriminator,
)
from repfusion.decoding.perceptual import LPIPS, unit_length
from repfusion.latents.tower import IMAGENET

TORCHVISION = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
"""Places of the convolutions in torchvision's VGG-16."""
COMPARED = {2: 0, 7: 1, 14: 2, 21: 3, 28: 4}
"""Convolutions whose ReLUs LPIPS compares, and the numbers of the heads; a pooling follows."""


def pair(side: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, 2, 3, side, side, generator=generator).unbind()


def slow_lpips(weights: dict[str, torch.Tensor], one: torch.Tensor, other: torch.Tensor) -> float:
    """LPIPS of two images [3, h, w] as equation 1 says, in float64, location by location."""
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in IMAGENET)
    maps, total = [(image.double() - mean) / std for image in (one, other)], 0.0
    for place in TORCHVISION:
        weight, bias = (weights[f"features.{place}.{part}"].double() for part in ("weight", "bias"))
        maps = [torch.conv2d(x[None], weight, bias, padding=1)[0].clamp(min=0) for x in maps]
        if place in COMPARED:
            head = weights[f"lin{COMPARED[place]}.model.1.weight"].double().flatten()
            _, height, width = maps[0].shape
            for y in range(height):
                for x in range(width):
                    own, others = (one[:, y, x] / (one[:, y, x].norm() + 1e-10) for one in maps)
                    total += float((head * (own - others) ** 2).sum()) / (height * width)
            maps = [torch.max_pool2d(x[None], 2)[0] for x in maps]
    return total


def test_lpips_is_what_equation_1_says(lpips_folder):
    network, weights = LPIPS.from_pretrained(lpips_folder), load_file(lpips_folder / "model.safetensors")
    pixels, others = pair()
    found = network(pixels, others)
    expected = [slow_lpips(weights, *images) for images in zip(pixels, others, strict=True)]
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)
    assert float(network(pixels, pixels).abs().max()) == 0


def test_lpips_has_a_gradient_wherever_it_is_taken(lpips_folder):
    network = LPIPS.from_pretrained(lpips_folder)
    pixels, others = pair()
    network(pixels.requires_grad_(), others).sum().backward()
    assert pixels.grad is not None and pixels.grad.isfinite().all() and float(pixels.grad.abs().max()) > 0
    dead = torch.zeros(1, 4, 2, 2, requires_grad=True)
    unit_length(dead).sum().backward()
    assert dead.grad is not None and dead.grad.isfinite().all()
    with pytest.raises(ValueError, match="16 px a side"):
        network(pixels[..., :8, :8], others[..., :8, :8])


def test_a_folder_that_is_no_lpips_is_refused_by_name(lpips_folder, dino, tmp_path):
    weights = load_file(lpips_folder / "model.safetensors")
    del weights["features.28.bias"]
    weights |= {"classifier.0.weight": torch.zeros(2, 2), "lin1.model.1.weight": torch.ones(1, 64, 1, 1)}
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        LPIPS.from_pretrained(tmp_path)
    for part in (
        "missing: features.28.bias",
        "unexpected: classifier.0.weight",
        "lin1.model.1.weight (1, 64",
    ):
        assert part in str(error.value)
    with pytest.raises(ValueError, match=r"missing: features\.0\.bias"):
        LPIPS.from_pretrained(dino)
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        LPIPS.from_pretrained(tmp_path / "nothing")
    weights = load_file(lpips_folder / "model.safetensors")
    weights["features.7.bias"][3] = torch.nan
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"features\.7\.bias holds values that are not finite"):
        LPIPS.from_pretrained(tmp_path)


def slow_logits(judge: Discriminator, pixels: torch.Tensor) -> torch.Tensor:
    """The logits by hooks on the blocks, with weights divided by the largest singular values."""
    kept: list[torch.Tensor] = []
    tower = judge.tower
    layers = tower.layers if tower.config.model_type == "vit" else tower.encoder.layer
    hooks = [
        layers[block].register_forward_hook(
            lambda module, inputs, output: kept.append(output[0] if isinstance(output, tuple) else output)
        )
        for block in BLOCKS
    ]
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in IMAGENET)
    tower(pixel_values=(pixels - mean) / std)
    for hook in hooks:
        hook.remove()
    found = []
    for head, states in zip(judge.heads, kept, strict=True):

        def conv(layer, x, padding=0):
            weight = layer.parametrizations.weight.original
            weight = weight / torch.linalg.matrix_norm(weight.flatten(1), ord=2)
            return torch.conv2d(x, weight, layer.bias, padding=padding)

        def squashed(norm, x):
            return torch.nn.functional.leaky_relu(norm(x), 0.2)

        side = judge.rows
        x = states[:, 1:].transpose(1, 2).reshape(len(pixels), -1, side, side)
        x = squashed(head.mix_norm, conv(head.mix, x))
        x = x + squashed(head.look_norm, conv(head.look, x, 1))
        found.append(conv(head.out, x).reshape(len(pixels), -1))
    return torch.cat(found, 1)


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_the_discriminator_reads_four_blocks_through_normalised_heads(kind, tmp_path):
    judge = load_discriminator(write_dino(tmp_path / "dino", kind), None, seed=3)
    for _ in range(60):
        judge.refresh()
    pixels, _ = pair()
    torch.testing.assert_close(judge(pixels), slow_logits(judge, pixels), rtol=1e-3, atol=1e-4)
    assert judge(pixels).shape == (2, 4 * 16)
    again = load_discriminator(tmp_path / "dino", None, seed=3)
    other = load_discriminator(tmp_path / "dino", None, seed=4)
    own = judge.heads[0].mix.parametrizations.weight.original
    assert torch.equal(own, again.heads[0].mix.parametrizations.weight.original)
    assert not torch.equal(own, other.heads[0].mix.parametrizations.weight.original)


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_an_images_logits_depend_on_no_other_image_and_on_its_size_little(kind, tmp_path):
    judge = load_discriminator(write_dino(tmp_path / "dino", kind), 48, seed=3)
    pixels, _ = pair()
    assert judge(pixels).shape == (2, 4 * 36)
    torch.testing.assert_close(judge(pixels)[:1], judge(pixels[:1]), rtol=1e-4, atol=1e-5)
    pixels.requires_grad_()
    judge(pixels).sum().backward()
    assert pixels.grad is not None and float(pixels.grad.abs().max()) > 0
    assert all(p.grad is None for p in judge.tower.parameters())


def test_passes_leave_the_singular_vectors_as_they_are(dino):
    judge = load_discriminator(dino, None, seed=0)
    pixels, others = pair()
    before = {name: one.clone() for name, one in judge.heads.named_buffers()}
    first = judge(pixels)
    judge(others)
    assert torch.equal(first, judge(pixels))
    assert all(torch.equal(one, before[name]) for name, one in judge.heads.named_buffers())
    judge.refresh()
    assert any(not torch.equal(one, before[name]) for name, one in judge.heads.named_buffers())


def test_the_hinge_losses_by_hand():
    real, rebuilt = torch.tensor([[2.0, 0.5]]), torch.tensor([[-3.0, 0.25]])
    assert float(discriminator_loss(real, rebuilt)) == 0.5 * ((0 + 0.5) / 2 + (0 + 1.25) / 2)
    assert float(generator_loss(rebuilt)) == (3.0 - 0.25) / 2


def test_a_folder_that_is_no_dino_is_refused(foundation, lpips_folder, tmp_path):
    with pytest.raises(ValueError, match="model_type 'clip_vision_model'; expected a DINO"):
        load_discriminator(foundation / "vision_tower", None, 0)
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_discriminator(lpips_folder, None, 0)
    with pytest.raises(ValueError, match="4 blocks of width 16; expected at least 12"):
        load_discriminator(write_dino(tmp_path / "short", num_hidden_layers=4), None, 0)
    whole = write_dino(tmp_path / "whole")
    with pytest.raises(ValueError, match="30 px are no multiple of its patches of 8"):
        load_discriminator(whole, 30, 0)
    weights = load_file(whole / "model.safetensors")
    name = next(iter(weights))
    save_file({k: v for k, v in weights.items() if k != name}, whole / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="missing: "):
        load_discriminator(whole, None, 0)
