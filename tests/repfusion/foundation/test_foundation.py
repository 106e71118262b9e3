"""The recipe of the small foundation: its scenes, its parts, and folders that the library loads."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from repfusion.files import write_json
from repfusion.foundation import __main__ as recipe
from repfusion.foundation.config import FoundationConfig, LengthConfig
from repfusion.foundation.deadline import OutOfTime
from repfusion.foundation.dialogues import (
    train_tokenizer,
)
from repfusion.foundation.large import grow
from repfusion.foundation.measure import measure
from repfusion.foundation.optimise import Objective, optimise
from repfusion.foundation.perception import Seeing, llava_config, new_decoder, perception_objective
from repfusion.foundation.pool import SceneBatch, ScenePool
from repfusion.foundation.vae import make_vae, vae_objective
from repfusion.foundation.variants import SeenPool, sight_objective, without_images
from repfusion.latents.load import EncoderConfig, load_decoder
from repfusion.latents.rae_decoder import RAEDecoder
from repfusion.latents.tower import RepresentationEncoder
from repfusion.llm.load import load_language_model
from repfusion.llm.tokenizer import load_tokenizer
from repfusion.scenes.claims import KINDS
from repfusion.scenes.world import WorldConfig, draw_scene, render

SHORT = LengthConfig(num_steps=3, batch_size=6)
TINY = FoundationConfig(
    num_scenes=24,
    texts_per_scene=3,
    image_size=32,
    patch_size=8,
    vision_width=32,
    vision_layers=2,
    vision_heads=1,
    text_width=32,
    text_layers=1,
    text_heads=1,
    decoder_width=32,
    decoder_depth=1,
    decoder_heads=1,
    large_width=64,
    large_layers=3,
    large_heads=2,
    perception=SHORT,
    judgement=SHORT,
    polish=SHORT,
    noise_taught=SHORT,
    language=SHORT,
    large=SHORT,
    vae=SHORT,
)


@pytest.fixture(scope="module")
def pool(trained) -> ScenePool:
    return ScenePool(TINY, trained / "llava", num_processes=1)


@pytest.mark.parametrize("course", ["dialogues", "judgements"])
def test_a_pool_holds_training_scenes_and_what_is_said_of_them(course, pool, trained):
    tokenizer, world = load_tokenizer(trained / "llava"), TINY.world
    assert world.relation_share == 0.6
    batch = pool.batch(10, pool.generator(0, 3), getattr(pool, course))
    for place, row in enumerate(batch.rows.tolist()):
        expected = render(draw_scene(row, world), world)
        np.testing.assert_allclose(batch.pixels[place].numpy(), expected, atol=0.5 / 255 + 1e-6)
        ids, learned = batch.dialogues[place], batch.is_answer[place]
        assert (ids == pool.image_id).sum() == TINY.num_tokens
        end = int(learned.nonzero()[-1])
        assert ids[end] == tokenizer.eos_token_id and (ids[end + 1 :] == pool.pad_id).all()
        first = int(learned.nonzero()[0])
        assert learned[first : end + 1].all() and not learned[:first].any()
        caption = tokenizer.decode(batch.captions[place][batch.is_caption[place]], skip_special_tokens=True)
        assert caption.strip()


def test_what_a_step_sees_follows_from_its_number(pool):
    def batch(seed: int, step: int, *captions: int) -> SceneBatch:
        return pool.batch(5, pool.generator(seed, step), pool.dialogues, *captions)

    first, again, other = (batch(0, step) for step in (7, 7, 8))
    assert torch.equal(first.dialogues, again.dialogues) and torch.equal(first.pixels, again.pixels)
    assert not torch.equal(first.rows, other.rows)
    assert not torch.equal(first.rows, batch(1, 7).rows)
    fewer = batch(0, 7, 2)
    assert torch.equal(fewer.captions, first.captions[:2]) and torch.equal(fewer.dialogues, first.dialogues)


@pytest.mark.slow
def test_a_pool_is_the_same_from_several_processes(pool, trained, monkeypatch):
    monkeypatch.setattr("repfusion.foundation.pool.CHUNK", 10)
    other = ScenePool(TINY, trained / "llava", num_processes=2)
    assert torch.equal(other.pixels, pool.pixels)
    assert torch.equal(other.dialogues.ids, pool.dialogues.ids)
    assert torch.equal(other.captions.starts, pool.captions.starts)


def test_dialogues_without_their_images_are_whole(pool):
    batch = pool.batch(8, pool.generator(0, 0), pool.judgements)
    ids, is_answer = without_images(batch, pool)
    for before, after, said, kept in zip(batch.dialogues, ids, batch.is_answer, is_answer, strict=True):
        assert torch.equal(before[before != pool.image_id], after)
        assert torch.equal(before[said], after[kept])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The whole recipe in a few steps."""
    folder = tmp_path_factory.mktemp("recipe")
    train_tokenizer(folder / "llava", num_scenes=300)
    parts = tuple(part for part in recipe.PARTS if part != "measure")
    recipe.bring_up_to_date(recipe.Foundation(TINY, folder), parts)
    return folder


def test_a_part_that_is_done_is_left_as_it_is(trained, monkeypatch):
    foundation = recipe.Foundation(TINY, trained)
    monkeypatch.setattr(foundation, "train", lambda part: pytest.fail(f"{part} was trained again"))
    recipe.bring_up_to_date(foundation, ("perception", "language"))


def test_a_folder_of_other_sizes_is_refused(trained):
    other = TINY.model_copy(update={"text_width": 64, "perception": LengthConfig(num_steps=9, batch_size=6)})
    with pytest.raises(ValueError, match="made with other perception, text_width; choose another folder"):
        recipe.bring_up_to_date(recipe.Foundation(other, trained), ("perception",))


@pytest.mark.slow
def test_a_part_does_not_begin_before_what_it_reads(tmp_path):
    with pytest.raises(ValueError, match="large begins from judgement; train it first"):
        recipe.bring_up_to_date(recipe.Foundation(TINY, tmp_path), ("large", "polish", "vae"))


@pytest.mark.slow
def test_parts_side_by_side_are_those_of_one_process(trained, tmp_path):
    """By the command, from whose module other processes have to call. The record lists every part once; the
    weights are the same to the bit.
    """
    train_tokenizer(tmp_path / "llava", num_scenes=300)
    path = tmp_path / "tiny.yaml"
    path.write_text(json.dumps(TINY.model_dump(mode="json")))
    parts = ",".join(recipe.PARTS[:-1])
    command = sys.executable, "-m", "repfusion.foundation", path, "--out", tmp_path, "--parts", parts
    subprocess.run(command, check=True)
    records = [json.loads((folder / recipe.RECORD).read_text()) for folder in (trained, tmp_path)]
    assert records[0]["parts"].keys() == records[1]["parts"].keys() == set(recipe.PARTS[:-1])
    for name in recipe.MODELS:
        for path in (trained / name).glob("*.safetensors"):
            ours, theirs = load_file(str(path)), load_file(str(tmp_path / name / path.name))
            assert all(torch.equal(value, theirs[key]) for key, value in ours.items()), (name, path.name)


@pytest.mark.slow
def test_a_compiled_training_learns_what_a_plain_one_does(trained, tmp_path):
    """By the command, since the compiler does not read types that are checked as these tests check them."""
    found = []
    for compile in ("false", "true"):
        folder = tmp_path / compile
        shutil.copytree(trained / "llava", folder / "llava", ignore=shutil.ignore_patterns("*.safetensors"))
        path = tmp_path / "tiny.yaml"
        path.write_text(json.dumps({**TINY.model_dump(mode="json"), "compile": compile == "true"}))
        command = sys.executable, "-m", "repfusion.foundation", path, "--out", folder, "--parts", "perception"
        subprocess.run(command, check=True)
        found.append(json.loads((folder / recipe.RECORD).read_text())["parts"]["perception"]["losses"])
    assert found[0] == pytest.approx(found[1], rel=2e-2)


def test_parts_that_there_are_not_are_named(trained, monkeypatch, capsys):
    path = trained / "tiny.yaml"
    path.write_text("device: cpu\n")
    monkeypatch.setattr(
        "sys.argv", ["foundation", str(path), "--parts", "perception,nose", "--out", str(trained)]
    )
    with pytest.raises(SystemExit) as ended:
        recipe.main()
    assert ended.value.code == 1
    assert "error: no parts nose; there are perception, judgement, polish" in capsys.readouterr().err


def test_only_a_whole_foundation_is_released(trained, tmp_path):
    weights, before = tmp_path / "weights", (trained / recipe.RECORD).read_text()
    (weights / "llava").mkdir(parents=True)
    (weights / "llava" / "stale.txt").write_text("of the last one")
    with pytest.raises(ValueError, match="not measured; run the part measure first"):
        recipe.release(trained, weights)
    record = json.loads(before)
    try:
        write_json(trained / recipe.RECORD, {**record, "quality": {}})
        recipe.release(trained, weights)
        write_json(trained / recipe.RECORD, {**record, "parts": {}})
        with pytest.raises(ValueError, match=r"perception, judgement, .* not done; train them first"):
            recipe.release(trained, weights)
    finally:
        (trained / recipe.RECORD).write_text(before)
    assert {path.name for path in weights.iterdir()} == {*recipe.MODELS, recipe.RECORD}
    assert not (weights / "llava" / "stale.txt").exists()
    for name in recipe.MODELS:
        files = [path.name for path in (trained / name).iterdir()]
        assert all(
            (weights / name / file).read_bytes() == (trained / name / file).read_bytes() for file in files
        )


OFTEN = TINY.model_copy(update={"save_every_sec": 1e-9})


def size_of(layer: torch.nn.Module) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
    return lambda x: {"loss": layer(x).square().mean()}


class CutOff(Exception):
    """Raised where a training is stopped."""


def test_a_training_that_was_cut_off_goes_on_to_the_same_weights(pool, trained, tmp_path):
    """The state is written after every step; one more step was begun."""
    length = LengthConfig(num_steps=6, batch_size=4)
    config = TINY.model_copy(update={"perception": length})

    def train(name: str, stop_at: int | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        both = Seeing(
            LlavaForConditionalGeneration(llava_config(config, load_tokenizer(trained / "llava"))),
            new_decoder(config),
        )
        objective = perception_objective(both, pool, config)

        def cut_off(step: int):
            if step == stop_at:
                raise CutOff
            return objective.draw(step)

        optimise(both, length, Objective(cut_off, objective.loss), tmp_path / name, OFTEN)
        return {key: value.clone() for key, value in both.state_dict().items()}

    whole = train("whole.safetensors", None)
    with pytest.raises(CutOff):
        train("cut.safetensors", 4)
    resumed = train("cut.safetensors", None)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_a_training_whose_time_is_over_keeps_a_step_and_goes_on_to_the_same_weights(tmp_path):
    length = LengthConfig(num_steps=4, batch_size=1)

    def train(name: str, until: float | None) -> torch.Tensor:
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 1)

        def draw(step: int) -> tuple[torch.Tensor]:
            return (torch.randn(5, 3, generator=torch.Generator().manual_seed(step)),)

        optimise(layer, length, Objective(draw, size_of(layer)), tmp_path / name, TINY, until)
        return layer.weight.detach().clone()

    whole = train("whole", None)
    for done in (1, 2, 3):
        with pytest.raises(OutOfTime, match=f"cut: {done} of 4 steps are done"):
            train("cut", 0.0)
    assert torch.equal(train("cut", 0.0), whole)  # the last step is the training's end


def test_scenes_that_were_drawn_in_time_are_not_drawn_again(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("repfusion.foundation.pool.CHUNK", 10)
    whole = ScenePool(TINY, trained / "llava", num_processes=1)
    for left in (3, 2):
        with pytest.raises(OutOfTime, match=f"1 of {left} chunks of scenes are drawn"):
            ScenePool(TINY, trained / "llava", num_processes=1, kept=tmp_path, until=0.0)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(kept) == 2
    again = ScenePool(TINY, trained / "llava", num_processes=1, kept=tmp_path, until=0.0)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert torch.equal(again.pixels, whole.pixels)
    assert torch.equal(again.dialogues.ids, whole.dialogues.ids)
    assert torch.equal(again.captions.starts, whole.captions.starts)
    other = TINY.model_copy(update={"num_scenes": 12})
    fewer = ScenePool(other, trained / "llava", num_processes=1, kept=tmp_path)
    assert len(fewer) == 12 and torch.equal(fewer.pixels, whole.pixels[:12])


@pytest.mark.slow
def test_what_other_processes_had_begun_when_time_was_over_is_kept(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("repfusion.foundation.pool.CHUNK", 4)
    with pytest.raises(OutOfTime, match="1 of 6 chunks"):
        ScenePool(TINY, trained / "llava", num_processes=2, kept=tmp_path, until=0.0)
    assert 2 <= len(list(tmp_path.iterdir())) <= 6
    again = ScenePool(TINY, trained / "llava", num_processes=1, kept=tmp_path)
    assert torch.equal(again.pixels, ScenePool(TINY, trained / "llava", num_processes=1).pixels)


def test_a_state_of_another_training_is_refused(tmp_path):
    def train(width: int, num_steps: int) -> None:
        layer, x = torch.nn.Linear(width, 1, bias=False), torch.ones(2, width)
        length = LengthConfig(num_steps=num_steps, batch_size=1)
        objective = Objective(lambda step: (x,), size_of(layer))
        optimise(layer, length, objective, tmp_path / "state", OFTEN)

    train(3, 2)
    for width, num_steps in ((4, 2), (3, 1)):
        with pytest.raises(ValueError, match="state of another training"):
            train(width, num_steps)
    train(3, 2)


def test_a_loss_that_is_not_finite_stops_a_training(tmp_path):
    layer = torch.nn.Linear(1, 1)
    with pytest.raises(RuntimeError, match=r"state: loss .*nan.* at step 0"):
        objective = Objective(lambda step: (torch.full((1, 1), torch.nan),), size_of(layer))
        optimise(layer, SHORT, objective, tmp_path / "state", TINY)


def test_the_recipes_folders_load_by_the_code_that_users_run(trained):
    encoder = RepresentationEncoder.from_pretrained(trained / "vision_tower")
    decoder = RAEDecoder.from_pretrained(trained / "decoder")
    world = WorldConfig(image_size=32)
    pixels = torch.from_numpy(np.stack([render(draw_scene(seed), world) for seed in range(3)]))
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


def test_a_grown_llava_says_what_the_small_one_says_until_it_is_trained(trained):
    """Widths that are no multiples, layers between the old ones, and weights far from their initial ones."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(trained / "llava")
    small = LlavaForConditionalGeneration(llava_config(TINY.model_copy(update={"text_layers": 2}), tokenizer))
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    size = {"text_width": 96, "text_layers": 5, "text_heads": 3}
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


def test_the_siblings_begin_as_the_llava(trained):
    """Three steps from it: the old channels of an embedding are still its own."""
    embeddings = []
    for one in ("llava", "llava_noise_taught", "llava_large"):
        weights = load_file(str(trained / one / "model.safetensors"))
        embeddings.append(weights["language_model.model.embed_tokens.weight"].float())
    first, *others = embeddings
    for other in others:
        moved = (other[:, : first.shape[1]] - first).norm()
        assert 0 < moved < 0.2 * first.norm()


def test_the_loss_over_a_frozen_tower_teaches_everything_else(pool, trained):
    llava = LlavaForConditionalGeneration(llava_config(TINY, load_tokenizer(trained / "llava")))
    seen = SeenPool(pool, trained)
    losses = sight_objective(llava, seen, SHORT, 2, lambda features, generator: features)(0)
    assert losses.keys() == {"answers", "captions"}
    sum(losses.values()).backward()
    learned = {name.split(".")[1] for name, p in llava.named_parameters() if p.grad is not None}
    assert learned == {"language_model", "multi_modal_projector", "weight"}


@pytest.mark.parametrize(("name", "width", "depth"), [("llava_large", 64, 3), ("llava_noise_taught", 32, 1)])
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


@pytest.mark.slow
def test_the_vae_learns_to_rebuild_one_batch(trained, tmp_path):
    """The loss falls: encoder and decoder are both trained, through the noise."""
    length = LengthConfig(num_steps=25, batch_size=6, lr=1e-2)
    config = TINY.model_copy(update={"num_scenes": 6, "vae": length, "vae_noise": 0.1})
    vae = make_vae(config, seed=5)
    objective = vae_objective(vae, ScenePool(config, trained / "llava", num_processes=1), config)
    before = sum(objective(0).values()).item()
    optimise(vae, length, objective, tmp_path / "vae.safetensors", config)
    assert sum(objective(0).values()).item() < 0.6 * before


@pytest.mark.parametrize(("image_size", "patch_size"), [(32, 8), (64, 8), (64, 16)])
def test_the_vaes_latents_lie_on_the_towers_grid(image_size, patch_size):
    config = TINY.model_copy(update={"image_size": image_size, "patch_size": patch_size})
    latents = make_vae(config, seed=0).encode(torch.zeros(1, 3, image_size, image_size)).latent
    assert latents.shape == (1, config.vae_channels, *config.grid)


def test_measuring_covers_every_model_by_kind_and_noise_level(trained):
    found = measure(trained, TINY, num=4)
    assert found.keys() == {"llava", "llava_noise_taught", "llava_large", "language", "decoder", "vae"}
    for name in ("llava", "llava_noise_taught", "llava_large"):
        one = found[name]
        by_kind = [
            one["fresh"],
            one["train"],
            one["held_out"],
            one["own_tower"],
            *one["by_noise_level"].values(),
        ]
        for split in by_kind[1:]:
            assert split.keys() == set(KINDS)
            assert all(0.25 <= value <= 0.75 for value in split.values())  # it was hardly trained
        assert len(one["by_noise_level"]) == 5
        assert one["description_exact_match"] == 0 and one["caption_loss"] > 3
    assert set(found["language"]["fresh"]) <= set(KINDS)
    assert 0 < found["vae"]["psnr"] < 20 and found["vae"]["psnr"] != found["decoder"]["psnr"]


def test_the_saved_llava_speaks_about_images(trained):
    """Through transformers' own generate: the processor-free path that `measure` uses."""
    tokenizer = AutoTokenizer.from_pretrained(trained / "llava")
    llava = LlavaForConditionalGeneration.from_pretrained(trained / "llava", dtype=torch.float32).eval()
    batch = tokenizer(["<image>" * TINY.num_tokens + " describe the image answer:"], return_tensors="pt")
    batch.pop("token_type_ids", None)
    out = llava.generate(**batch, pixel_values=torch.zeros(1, 3, 32, 32), max_new_tokens=3, do_sample=False)
    assert out.shape[1] > batch["input_ids"].shape[1]
