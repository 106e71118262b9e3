"""The recipe of the small foundation: its texts, its tokenizer, and folders that the library loads."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from repfusion.foundation import base
from repfusion.foundation.decoder import train_decoder
from repfusion.foundation.dialogues import (
    DESCRIBE,
    IGNORED,
    encode_captions,
    encode_dialogues,
    train_tokenizer,
    write_dialogue,
)
from repfusion.foundation.fluent import train_fluent
from repfusion.foundation.large import grow, train_large
from repfusion.foundation.measure import measure
from repfusion.foundation.perception import (
    FoundationConfig,
    ScenePool,
    frozen_tower_loss,
    llava_config,
    optimise,
    train_language_twin,
    train_llava,
)
from repfusion.foundation.vae import make_vae, train_vae, vae_loss
from repfusion.latents.load import EncoderConfig, load_decoder
from repfusion.latents.rae_decoder import RAEDecoder
from repfusion.latents.statistics import LatentStatistics
from repfusion.latents.tower import RepresentationEncoder
from repfusion.llm.load import load_language_model
from repfusion.runs.checkpoint import load_checkpoint, save_checkpoint
from repfusion.scenes.captions import NUMBERS, canonical_caption
from repfusion.scenes.world import COLOURS, NEW_COLOUR, NEW_SHAPE, SHAPES, WorldConfig, draw_scene, render

TINY = FoundationConfig(
    vision_width=32,
    vision_layers=2,
    text_width=32,
    text_layers=1,
    num_scenes=24,
    perception_steps=2,
    language_steps=2,
    decoder_steps=3,
    large_width=64,
    large_layers=3,
    large_steps=2,
    large_batch_size=6,
    fluent_align_steps=2,
    fluent_steps=2,
    fluent_batch_size=6,
    vae_steps=3,
    vae_polish_steps=2,
    vae_batch_size=6,
    batch_size=6,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize(
    "word",
    [
        *SHAPES,
        *(f"{shape}{'es' if shape == 'cross' else 's'}" for shape in SHAPES),
        *COLOURS,
        *NUMBERS.values(),
        *(
            "left",
            "right",
            "of",
            "above",
            "below",
            "over",
            "under",
            "beneath",
            "top",
            "and",
            "photo",
            "yes",
            "no",
        ),
    ],
)
def test_words_of_the_world_are_one_token_each(tokenizer, word):
    assert tokenizer.tokenize(f"a {word} and")[1:-1] == [f"\u0120{word}"]
    assert len(tokenizer(f"{word}", add_special_tokens=False).input_ids) == 1  # first in a text as well


@pytest.mark.parametrize("text", ["a red circle", "Zebra, 12 km\u00b2 \u2013 na\u00efve \u732b \U0001f600!"])
def test_any_text_has_tokens_and_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids).strip() == text


def test_special_tokens(tokenizer):
    ids = tokenizer("a red circle").input_ids
    assert ids[0] == tokenizer.bos_token_id == 1
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)
    assert tokenizer("<image>" * 3, add_special_tokens=False).input_ids == [3, 3, 3]


def test_dialogues_learn_answers_alone(tokenizer):
    ids, labels = encode_dialogues(
        tokenizer,
        [("<image> what colour is the circle? answer:", "red"), ("<image> a", "yes")],
        num_image_tokens=4,
    )
    assert ids.shape == labels.shape
    for row, answer in zip(labels, ("red", "yes"), strict=True):
        learned = row[row != IGNORED]
        assert tokenizer.decode(learned[:-1]).strip() == answer
        assert learned[-1] == tokenizer.eos_token_id
    assert (ids == 3).sum(1).tolist() == [4, 4]
    learned = labels != IGNORED
    assert torch.equal(ids[learned], labels[learned])
    assert ids[0, 0] == tokenizer.bos_token_id
    last = int(learned[1].nonzero()[-1])
    assert ids[1, last + 1 :].tolist() == [tokenizer.pad_token_id] * (
        ids.shape[1] - last - 1
    )  # padded on the right


def test_a_learned_answer_has_the_tokens_it_has_within_a_text(tokenizer):
    """Else the model would learn to write words that prompts never contain."""
    ids, labels = encode_dialogues(tokenizer, [("is it", "a red circle")], num_image_tokens=0)
    assert labels[0][labels[0] != IGNORED].tolist()[:-1] == tokenizer(" a red circle").input_ids[1:]
    assert ids[0].tolist()[1:-1] == tokenizer("is it a red circle").input_ids[1:]


def test_captions_are_learned_whole_but_for_the_begin_token(tokenizer):
    ids, labels = encode_captions(tokenizer, ["a red circle", "two blue crosses left"])
    assert labels[0, 0] == IGNORED
    assert (
        tokenizer.decode(labels[1][labels[1] != IGNORED], skip_special_tokens=True).strip()
        == "two blue crosses left"
    )
    assert torch.equal(ids[labels != IGNORED], labels[labels != IGNORED])


def test_dialogues_hold_one_image_and_true_answers():
    rng = np.random.default_rng(0)
    kinds = {"claim": 0, "describe": 0, "question": 0}
    image_first = 0
    for seed in range(600):
        scene = draw_scene(seed)
        question, answer = write_dialogue(scene, rng)
        assert question.count("<image>") == 1
        if DESCRIBE in question:
            kinds["describe"] += 1
            assert answer == canonical_caption(scene)
        elif answer in ("yes", "no"):
            kinds["claim"] += 1
            assert question.endswith(" <image>")  # the order in which RepFusion reads: text, then vision
        else:
            kinds["question"] += 1
        if question.endswith(" answer:"):
            image_first += question.startswith("<image>")
    assert min(kinds.values()) > 120
    assert 120 < image_first < 240


def test_a_pool_holds_training_scenes_and_their_pixels():
    pool = ScenePool(TINY)
    scenes, pixels = pool.batch(10)
    for scene, image in zip(scenes, pixels, strict=True):
        np.testing.assert_allclose(image.numpy(), render(scene), atol=0.5 / 255 + 1e-6)
    assert set(scenes) <= {draw_scene(seed) for seed in range(24)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The whole recipe in a few steps."""
    folder = tmp_path_factory.mktemp("recipe")
    pool, tokenizer = ScenePool(TINY), train_tokenizer(folder / "llava", num_scenes=50)
    train_llava(pool, tokenizer, TINY, folder)
    train_language_twin(pool, tokenizer, TINY, folder / "language")
    train_decoder(pool, TINY, folder)
    train_fluent(pool, tokenizer, TINY, folder)
    train_large(pool, tokenizer, TINY, folder)
    train_vae(pool, TINY, folder)
    before = load_file(str(folder / "vae" / "diffusion_pytorch_model.safetensors"))
    train_vae(pool, TINY, folder, polish=True)
    after = load_file(str(folder / "vae" / "diffusion_pytorch_model.safetensors"))
    assert any(not torch.equal(value, after[name]) for name, value in before.items())
    return folder


def test_the_recipes_folders_load_by_the_code_that_users_run(trained):
    encoder = RepresentationEncoder.from_pretrained(trained / "vision_tower")
    decoder = RAEDecoder.from_pretrained(trained / "decoder")
    pixels = torch.from_numpy(np.stack([render(draw_scene(seed)) for seed in range(3)]))
    assert encoder.mean.flatten().tolist() == encoder.std.flatten().tolist() == [0.5, 0.5, 0.5]
    assert decoder(encoder(pixels)).shape == pixels.shape
    from_llava = RepresentationEncoder.from_pretrained(trained / "llava")
    assert torch.equal(from_llava(pixels), encoder(pixels))

    llava, twin = load_language_model(trained / "llava"), load_language_model(trained / "language")
    assert llava.projector is not None and twin.projector is None
    assert llava.language_model.config.to_dict().keys() == twin.language_model.config.to_dict().keys()
    shapes = [{n: p.shape for n, p in m.language_model.named_parameters()} for m in (llava, twin)]
    assert shapes[0] == shapes[1]
    prompts = ["two red circles", ""]
    ours, theirs = (one.tokenise(prompts) for one in (llava, twin))
    assert torch.equal(ours.ids, theirs.ids) and torch.equal(ours.mask, theirs.mask)
    stored = load_file(str(trained / "llava" / "model.safetensors"))
    assert {v.dtype for v in stored.values() if v.is_floating_point()} == {torch.float16}


def test_a_grown_llava_says_what_the_small_one_says_until_it_is_trained(tokenizer):
    """Widths that are no multiples, layers between the old ones, and weights far from their initial ones."""
    torch.manual_seed(0)
    small = LlavaForConditionalGeneration(llava_config(TINY.model_copy(update={"text_layers": 2}), tokenizer))
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    size = {"text_width": 96, "text_layers": 5}
    large = LlavaForConditionalGeneration(llava_config(TINY.model_copy(update=size), tokenizer))
    ids = torch.tensor([[1, *[3] * TINY.num_tokens, 20, 40, 60], [1, *[3] * TINY.num_tokens, 7, 8, 9]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 32, 32)}
    with torch.no_grad():
        assert (large(**inputs).logits - small(**inputs).logits).abs().max() > 0.1
        grow(small, large)
        torch.testing.assert_close(large(**inputs).logits, small(**inputs).logits, rtol=1e-4, atol=1e-4)
    large(**inputs).logits.square().mean().backward()
    new = large.model.language_model
    for weight in (new.embed_tokens.weight[:, 32:], new.layers[0].self_attn.o_proj.weight[32:]):
        assert not weight.any()
    for layer in new.layers:  # what writes zeros learns
        assert layer.self_attn.o_proj.weight.grad.any() and layer.mlp.down_proj.weight.grad.any()


def test_the_fluent_llava_is_the_twin_that_learned_to_see(trained):
    """Two steps from the twin's language model, far from the first LLaVA's; its projector is new."""
    llavas = [load_file(str(trained / one / "model.safetensors")) for one in ("llava", "llava_fluent")]
    twin = load_file(str(trained / "language" / "model.safetensors"))
    for name in ("layers.0.mlp.up_proj.weight", "embed_tokens.weight"):
        first, fluent = (llava[f"language_model.model.{name}"].float() for llava in llavas)
        moved = (fluent - twin[f"model.{name}"].float()).norm()
        assert 0 < moved < 0.2 * (fluent - first).norm()
    name = "multi_modal_projector.linear_1.weight"
    assert (llavas[0][name].float() - llavas[1][name].float()).norm() > 0.5 * llavas[0][name].float().norm()


def test_the_larger_llava_is_the_fluent_one_grown(trained):
    """After its two steps the old channels of its embedding are still the fluent one's, not the first's."""
    embeddings = []
    for one in ("llava", "llava_fluent", "llava_large"):
        weights = load_file(str(trained / one / "model.safetensors"))
        embeddings.append(weights["language_model.model.embed_tokens.weight"].float())
    first, fluent, large = embeddings
    width = fluent.shape[1]
    moved = (large[:, :width] - fluent).norm()
    assert 0 < moved < 0.2 * (large[:, :width] - first).norm()


@pytest.mark.parametrize("captions", [False, True])
def test_the_loss_over_a_frozen_tower_teaches_everything_else(tokenizer, captions):
    torch.manual_seed(0)
    llava = LlavaForConditionalGeneration(llava_config(TINY, tokenizer))
    losses = [frozen_tower_loss(llava, tokenizer, ScenePool(TINY), 8, x)(0) for x in (False, captions)]
    assert bool(losses[1] > losses[0] + 1) is captions  # an untrained model's, of about log(vocabulary) each
    losses[1].backward()
    learned = {name.split(".")[1] for name, p in llava.named_parameters() if p.grad is not None}
    assert learned == {"language_model", "multi_modal_projector", "weight"}


@pytest.mark.parametrize(("name", "width", "depth"), [("llava_large", 64, 3), ("llava_fluent", 32, 1)])
def test_the_other_llavas_read_the_very_tower_of_the_first(trained, name, width, depth):
    first, other = (load_file(str(trained / one / "model.safetensors")) for one in ("llava", name))
    tower = {part for part in first if "vision" in part}
    assert tower and all(torch.equal(first[part], other[part]) for part in tower)
    assert any(
        first[part].shape != other[part].shape or not torch.equal(first[part], other[part])
        for part in first.keys() - tower
    )
    llms = [load_language_model(trained / one) for one in ("llava", name)]
    assert (llms[1].width, len(llms[1].layers)) == (width, depth)
    assert torch.equal(*(llm.tokenise(["two red circles"]).ids for llm in llms))
    spaces = [RepresentationEncoder.from_pretrained(trained / one) for one in (name, "vision_tower")]
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(*(space(pixels) for space in spaces))


def test_the_vae_is_a_latent_space_of_the_towers_grid(trained):
    space = EncoderConfig(path=trained / "vae", image_size=32).load()
    decoder = load_decoder(trained / "vae", space.grid)
    assert (space.grid, space.feature_dim) == ((4, 4), TINY.vae_channels)
    assert (decoder.grid, decoder.feature_dim) == ((4, 4), TINY.vae_channels)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert decoder(space(pixels)).shape == pixels.shape
    stored = load_file(str(trained / "vae" / "diffusion_pytorch_model.safetensors"))
    assert {v.dtype for v in stored.values()} == {torch.float16}


def test_the_vae_learns_to_rebuild_one_batch():
    """The loss falls: encoder and decoder are both trained, through the noise."""
    config = TINY.model_copy(update={"num_scenes": 6, "learning_rate": 3e-3})
    vae = make_vae(config, seed=5)
    loss = vae_loss(vae, ScenePool(config), 6, noise=0.1)
    before = loss(0).item()
    optimise(list(vae.parameters()), config, 20, loss, "vae")
    assert loss(0).item() < 0.6 * before


def test_measuring_covers_both_llavas_and_both_latent_spaces(trained):
    found = measure(trained, TINY, num_scenes=3)
    said, drawn = ("caption_exact_match", "answer_accuracy"), ("reconstruction_psnr", "detector_agreement")
    expected = {prefix + name for prefix in ("", "fluent_", "large_") for name in said}
    expected |= {prefix + name for prefix in ("", "vae_") for name in drawn}
    assert found.keys() == expected | {"held_out_scenes"}
    assert 0 < found["vae_reconstruction_psnr"] < 20
    assert found["vae_reconstruction_psnr"] != found["reconstruction_psnr"]


def test_the_saved_llava_speaks_about_images(trained):
    """Through transformers' own generate: the processor-free path that `measure` uses."""
    tokenizer = AutoTokenizer.from_pretrained(trained / "llava")
    llava = LlavaForConditionalGeneration.from_pretrained(trained / "llava", dtype=torch.float32).eval()
    batch = tokenizer(["<image>" * TINY.num_tokens + " describe the image answer:"], return_tensors="pt")
    batch.pop("token_type_ids", None)
    out = llava.generate(**batch, pixel_values=torch.zeros(1, 3, 32, 32), max_new_tokens=3, do_sample=False)
    assert out.shape[1] > batch["input_ids"].shape[1]


def members(path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_the_bases_columns_hold_captions_and_features_of_known_things_alone(
    foundation, tmp_path, monkeypatch
):
    monkeypatch.setattr(base, "WEIGHTS", foundation)
    monkeypatch.setattr(base, "SHARD_SAMPLES", 10)
    base.prepare(tmp_path, 25)
    texts, rows = [], []
    for name in ("00000.tar", "00001.tar", "00002.tar"):
        captions, latents = members(tmp_path / "captions" / name), members(tmp_path / "image_features" / name)
        keys = sorted({key.split(".")[0] for key in captions})
        assert keys == sorted(key.split(".")[0] for key in latents)
        for key in keys:
            alternatives = json.loads(captions[f"{key}.json"])["captions"]
            assert len(alternatives) == base.CAPTIONS_PER_SCENE
            assert captions[f"{key}.txt"].decode() == alternatives[0]
            texts += alternatives
            rows.append(np.load(io.BytesIO(latents[f"{key}.image_features.npy"])))
    assert len(rows) == 25
    assert not any(NEW_SHAPE in text or NEW_COLOUR in text for text in texts)
    statistics = LatentStatistics.load(tmp_path / "image_features" / "statistics.safetensors")
    assert statistics.count == 25
    np.testing.assert_allclose(statistics.mean.numpy(), np.stack(rows).astype(np.float64).mean(0), atol=1e-12)
    world = WorldConfig(shapes=base.BASE_SHAPES, colours=base.BASE_COLOURS)
    pixels = torch.from_numpy(render(draw_scene(base.FIRST_SEED + 13, world), world))[None]
    expected = RepresentationEncoder.from_pretrained(foundation / "vision_tower")(pixels)[0].half().numpy()
    np.testing.assert_allclose(rows[13].astype(np.float32), expected.astype(np.float32), atol=4e-3)


def test_a_released_base_is_the_last_checkpoints_average_in_half_precision(make_generator, tmp_path):
    generator = make_generator()
    ema = {name: p.detach() + 0.1 for name, p in generator.trainable_state().items()}
    save_checkpoint(
        tmp_path / "checkpoints" / "step_00000003", generator, generator.trainable_state(), step=3
    )
    save_checkpoint(tmp_path / "checkpoints" / "step_00000020", generator, ema, step=20)
    base.release(tmp_path / "checkpoints", tmp_path / "base")
    released = load_checkpoint(tmp_path / "base")
    for name, parameter in released.trainable_state().items():
        assert torch.equal(parameter, ema[name].half().float())
    assert json.loads((tmp_path / "base" / "complete.json").read_text())["step"] == 20
    assert torch.equal(released.statistics.mean, generator.statistics.mean)
    with pytest.raises(ValueError, match="no complete checkpoint; train first"):
        base.release(tmp_path / "empty", tmp_path / "other")
