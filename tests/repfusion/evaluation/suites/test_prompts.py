"""Prompts of one's own: what is asked for, what is held out, and how like real images the drawn ones are."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from tiny_shards import write_shards
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from repfusion.data.order import is_held_out
from repfusion.evaluation.suites.captions import read_captioned
from repfusion.evaluation.suites.likeness import frechet_distance, is_covered
from repfusion.evaluation.suites.prompts import PromptsSuite, PromptsSuiteConfig
from repfusion.images.square import square


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Noise, with captions about dogs."""
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (24, 28, 3), np.uint8) for _ in range(60)]
    return write_shards(tmp_path_factory.mktemp("photos") / "curate", pictures, 2)


def test_the_frechet_distance_is_that_of_the_matrix_square_root():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(50, 6)), 0.5 + 1.5 * rng.normal(size=(40, 6))
    first, second = np.cov(ours, rowvar=False), np.cov(theirs, rowvar=False)
    root = scipy.linalg.sqrtm(first @ second).real
    expected = np.square(ours.mean(0) - theirs.mean(0)).sum() + np.trace(first + second - 2 * root)
    assert frechet_distance(ours, theirs) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(ours, ours) == pytest.approx(0, abs=1e-6)
    few = rng.normal(size=(3, 200))  # covariances without full rank
    assert 0 <= frechet_distance(few, few) < 1e-6
    with pytest.raises(ValueError, match="1 and 40 images; expected at least 2 of each"):
        frechet_distance(ours[:1], theirs)


def test_a_real_image_is_covered_where_its_neighbourhood_holds_a_drawn_one():
    real = np.array([[0.0], [1.0], [2.0], [3.0], [4.0], [5.0], [100.0]])
    assert is_covered(np.array([[2.5]]), real) == [True] * 7  # the last reaches as far as 100
    assert is_covered(np.array([[-30.0]]), real) == [False] * 7
    with pytest.raises(ValueError, match="1 real images"):
        is_covered(real, real[:1])


def test_captions_are_those_that_training_leaves_out(images):
    found = read_captioned(images, 0.3, 50)
    assert 8 <= len(found) <= 28 and all(is_held_out(one.key, 0.3) for one in found)
    assert all(one.caption == f"dog {one.key}" for one in found)
    assert {one.key[:5] for one in found} == {"00000", "00001"}
    more = {one.key for one in read_captioned(images, 0.5, 60)}
    assert {one.key for one in found} < more  # a larger share brings none back
    assert len(read_captioned(images, 0.0, 7)) == 7
    with pytest.raises(ValueError, match="none of its samples is held out by held_out_share 1e-09"):
        read_captioned(images, 1e-9, 7)


def test_held_out_samples_are_not_drawn(images):
    """By the data set that training reads, for the same keys."""
    from repfusion.data.dataset import ColumnDataset

    everything = ColumnDataset(images, {}, {})
    without = ColumnDataset(images, {}, {}, held_out_share=0.4)
    keys = [everything[i].key for i in range(len(everything))]
    drawn = [without[i].key for i in range(len(without))]
    assert drawn == [key for key in keys if not is_held_out(key, 0.4)]
    assert 0 < len(drawn) < len(keys) == 60
    everything.close()
    without.close()


def suite_of(**fields) -> PromptsSuite:
    return PromptsSuite(PromptsSuiteConfig(**fields), seed=0)


def test_a_suite_of_captions_scores_real_images_best(images, foundation):
    suite = suite_of(images=images, held_out_share=0.5, encoder=foundation / "vision_tower", num_prompts=20)
    items = suite.items()
    assert [value.name for value in suite.values] == ["coverage", "frechet_distance"]
    assert all(item.request.prompt == f"dog {item.key}" for item in items) and len(items) == 20
    judge, side = suite.judge("cpu"), 16
    real = [[square(np.asarray(_image(one.image)), side)] for one in suite._captioned()]
    flat = [[np.full((side, side, 3), 7, np.uint8)] for _ in items]
    best, worst = (suite.score(items, judge(items, drawn)) for drawn in (real, flat))
    assert best.headline == "coverage" and best.by_item == {}
    assert best.values["coverage"] > worst.values["coverage"]
    assert best.values["frechet_distance"] < worst.values["frechet_distance"]
    assert "shape" not in suite.about and "detector" not in suite.about


def _image(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def test_a_suite_of_a_file_alone_draws_and_grades_nothing(tmp_path):
    (tmp_path / "p.txt").write_text("a dog\n\na cat on a mat\n")
    suite = suite_of(file=tmp_path / "p.txt")
    items = suite.items()
    assert [item.request.prompt for item in items] == ["a dog", "a cat on a mat"]
    image = np.zeros((8, 8, 3), np.uint8)
    scores = suite.score(items, suite.judge("cpu")(items, [[image], [image]]))
    assert (scores.headline, scores.values, scores.by_item) == ("drawn", {"drawn": 1.0}, {})
    assert list(suite.gallery(items)[""]) == [0, 1]
    with pytest.raises(ValueError, match="neither file nor images"):
        PromptsSuiteConfig()


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A tiny CLIP with a tokenizer and a processor of its own."""
    from tiny_training import make_foundation
    from transformers import AutoTokenizer, CLIPImageProcessor

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = AutoTokenizer.from_pretrained(make_foundation(tmp_path_factory.mktemp("words")) / "llava")
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(folder)
    return folder


def test_clip_score_is_transformers_cosine(clip, tmp_path):
    from transformers import AutoTokenizer, CLIPImageProcessor

    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a red circle"}) + '\n{"prompt": "two"}\n')
    suite = suite_of(file=tmp_path / "p.jsonl", clip=clip)
    items = suite.items()
    image = np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)
    answers = suite.judge("cpu")(items, [[image], [255 - image]])
    model = CLIPModel.from_pretrained(clip)
    pixels = CLIPImageProcessor.from_pretrained(clip)(Image.fromarray(image), return_tensors="pt")
    tokenizer = AutoTokenizer.from_pretrained(clip)
    ids = tokenizer("a red circle", add_special_tokens=False)["input_ids"]
    text = torch.tensor([[tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]])
    with torch.no_grad():
        cosine = model(input_ids=text, **pixels).logits_per_image / model.logit_scale.exp()
    assert answers[0]["clip"] == pytest.approx(float(cosine), abs=1e-4)
    scores = suite.score(items, answers)
    assert scores.headline == "clip_score"
    assert scores.values["clip_score"] == pytest.approx(np.mean([max(one["clip"], 0) for one in answers]))
