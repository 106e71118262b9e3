"""Images <-> codes: the nearest code, gradients through it, ranges that are apart, what is refused."""

import shutil

import pytest
import torch
from tiny_codes import BRANCHES, NUM_PIXEL, NUM_SEMANTIC, tiny_network, write_tokenizer
from transformers import CLIPVisionModel

from repfusion.codes.network import BranchesConfig, Seen
from repfusion.codes.quantise import COMMITMENT, SimVQ
from repfusion.codes.tokenizer import ImageTokenizer, UnknownCode


@pytest.fixture
def tower(foundation):
    return foundation / "vision_tower"


@pytest.fixture
def tokenizer(tower, tmp_path):
    return ImageTokenizer.from_pretrained(write_tokenizer(tmp_path / "codes", tower), with_tower=True)


def pixels(num: int = 3) -> torch.Tensor:
    return torch.rand(num, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def test_vectors_get_their_nearest_code_and_gradients_pass_straight_through(monkeypatch):
    torch.manual_seed(0)
    quantiser = SimVQ(50, 4)
    vectors = torch.randn(2, 7, 4, requires_grad=True)
    found = quantiser(vectors)
    codebook = quantiser.base @ quantiser.map.weight.T + quantiser.map.bias
    distances = torch.cdist(vectors.detach().flatten(0, 1), codebook)
    torch.testing.assert_close(found.ids.flatten(), distances.argmin(dim=1))
    codes = codebook[found.ids]
    torch.testing.assert_close(found.vectors, codes)
    away = (codes - vectors).square().mean()
    torch.testing.assert_close(found.loss, (1 + COMMITMENT) * away)
    (through,) = torch.autograd.grad(found.vectors.sum(), vectors, retain_graph=True)
    torch.testing.assert_close(through, torch.ones_like(vectors))
    pull, of_map = torch.autograd.grad(found.loss, [vectors, quantiser.map.weight])
    torch.testing.assert_close(pull, COMMITMENT * 2 * (vectors - codes).detach() / vectors.numel())
    assert of_map.abs().sum() > 0 and not quantiser.base.requires_grad
    monkeypatch.setattr("repfusion.codes.quantise.DISTANCES_AT_ONCE", 100)
    torch.testing.assert_close(quantiser.nearest(vectors), found.ids)


def test_a_row_has_semantic_codes_then_pixel_codes_of_ranges_that_are_apart(tokenizer):
    codes = tokenizer.encode(pixels())
    assert codes.shape == (3, 4 + 16) and codes.dtype == torch.int64
    assert int(codes[:, :4].max()) < NUM_SEMANTIC <= int(codes[:, 4:].min())
    assert tokenizer.vocabulary == NUM_SEMANTIC + NUM_PIXEL > int(codes.max())
    images = (pixels() * 255).round().byte().movedim(1, -1)
    exact = tokenizer.encode(images.movedim(-1, 1).float() / 255)
    torch.testing.assert_close(tokenizer.encode_images(images), exact)
    torch.testing.assert_close(tokenizer.encode(pixels()[1:]), codes[1:])


def test_what_is_decoded_is_what_training_rebuilds(tokenizer):
    shown, features = pixels(), tokenizer.tower(pixels())
    for kept in (True, False):
        seen = Seen(shown, features, torch.full((3,), kept))
        expected = tokenizer.network.to_pixels(tokenizer.network.hidden(seen)[0])
        codes = tokenizer.encode(shown)
        torch.testing.assert_close(tokenizer.decode(codes if kept else codes[:, :4]), expected)


@pytest.mark.parametrize("left_out", ["semantic", "pixel"])
def test_a_branch_may_be_left_out(tower, tmp_path, left_out):
    branches = BRANCHES.model_copy(update={left_out: None})
    folder = write_tokenizer(tmp_path / "one", tower, branches)
    tokenizer = ImageTokenizer.from_pretrained(folder, with_tower=True)
    codes = tokenizer.encode(pixels())
    assert codes.shape[1] == tokenizer.num_tokens == (16 if left_out == "semantic" else 4)
    assert int(codes.min()) >= 0 and int(codes.max()) < tokenizer.vocabulary
    assert tokenizer.decode(codes).shape == (3, 3, 32, 32)
    assert (tokenizer.tower is None) == (left_out == "semantic")
    with pytest.raises(ValueError, match="both null"):
        BranchesConfig(semantic=None, pixel=None)


def test_codes_outside_the_codebook_are_named(tokenizer):
    codes = tokenizer.encode(pixels())
    for place, code, said in ((2, NUM_SEMANTIC, "semantic codes .* 0 to 23"), (9, 5, "pixel .* 24 to 63")):
        wrong = codes.clone()
        wrong[1, place] = code
        with pytest.raises(UnknownCode, match=f"row 1, place {place}: code {code}; the {said}"):
            tokenizer.decode(wrong)
    with pytest.raises(ValueError, match=r"rows of 7 codes; an image of this tokenizer has 4 or 20"):
        tokenizer.decode(codes[:, :7])
    with pytest.raises(ValueError, match="the tokenizer takes 32 x 32"):
        tokenizer.encode(torch.rand(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"expected \[0, 1\]"):
        tokenizer.encode(2 * pixels())


def test_a_folder_that_is_none_or_has_another_tower_is_refused(tower, tmp_path):
    moved = tmp_path / "tower"
    shutil.copytree(tower, moved)
    folder = write_tokenizer(tmp_path / "codes", moved)
    with pytest.raises(ValueError, match="loaded without its tower"):
        ImageTokenizer.from_pretrained(folder).encode(pixels())
    weights = CLIPVisionModel.from_pretrained(moved)
    next(weights.parameters()).data.add_(1)
    weights.save_pretrained(moved)
    with pytest.raises(ValueError, match="trained on a tower of weights"):
        ImageTokenizer.from_pretrained(folder, with_tower=True)
    with pytest.raises(ValueError, match=r"tokenizer folder .*no config\.json"):
        ImageTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Field required"):
        ImageTokenizer.from_pretrained(tower)
    with pytest.raises(ValueError, match="no multiple of 64"):
        conv = BRANCHES.conv.model_copy(update={"multipliers": (1,) * 7})
        tiny_network(tower, BRANCHES.model_copy(update={"conv": conv}))
