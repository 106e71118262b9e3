"""A checkpoint and prompts -> images: each from its seed and prompt alone; PNG files say what made them."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from repfusion.devices.placing import autocast_of
from repfusion.diffusion.flow import initial_noise
from repfusion.diffusion.sampler import SamplerConfig, sample
from repfusion.files import file_sha256
from repfusion.generate import generate, image_record, main, to_uint8
from repfusion.generation.prompts import PromptRow
from repfusion.lineage.describe import read_png
from repfusion.request import Request
from repfusion.runs.checkpoint import save_checkpoint

PROMPTS = ["a red circle", "two blue square", "a green circle left of a blue square", "a red circle", ""]
REQUESTS = [Request(prompt) for prompt in PROMPTS]
CONFIG = SamplerConfig(num_steps=3, guidance_scale=2, precision="fp32")


@pytest.fixture
def generator(make_generator):
    return make_generator()


@pytest.fixture
def decoder(generator):
    return generator.load_decoder()


def test_a_seed_gives_the_same_images(generator, decoder):
    first, again = (generate(generator, decoder, REQUESTS, seed=4, config=CONFIG) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (5, 3, 32, 32) and first.dtype == torch.float32
    assert 0 <= first.min() and first.max() <= 1
    other = generate(generator, decoder, REQUESTS, seed=50, config=CONFIG)
    assert (first - other).abs().amax(dim=(1, 2, 3)).min() > 1e-2
    assert (first[0] - first[3]).abs().max() > 1e-2  # the same prompt, another number


def test_image_i_is_drawn_from_a_torch_generator_of_seed_plus_i(generator, decoder):
    """As whoever holds a seed would draw it by hand."""
    noise = torch.randn(generator.latent_shape, generator=torch.Generator().manual_seed(7 + 2))
    assert torch.equal(initial_noise(range(7, 10), generator.latent_shape)[2], noise)
    latents = sample(generator, REQUESTS[2:3], noise[None], CONFIG)
    by_hand = decoder(generator.denormalise(latents)).clamp(0, 1)
    assert torch.equal(generate(generator, decoder, REQUESTS[2:3], 9, CONFIG), by_hand)
    whole = generate(generator, decoder, REQUESTS, 7, CONFIG)
    torch.testing.assert_close(whole[2:3], by_hand, atol=1e-3, rtol=0)


def test_the_noise_leaves_torchs_own_randomness_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    initial_noise([1, 2], (4, 16))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_images_do_not_depend_on_the_batch_size(generator, decoder, batch_size):
    images = generate(generator, decoder, REQUESTS, config=CONFIG, batch_size=batch_size)
    whole = generate(generator, decoder, REQUESTS, config=CONFIG)
    torch.testing.assert_close(images, whole, atol=1e-3, rtol=0)


def test_an_image_does_not_depend_on_later_prompts(generator, decoder):
    alone = generate(generator, decoder, REQUESTS[:2], config=CONFIG)
    torch.testing.assert_close(
        alone, generate(generator, decoder, REQUESTS, config=CONFIG)[:2], atol=1e-3, rtol=0
    )


def test_pixels_are_rounded_not_truncated():
    pixels = torch.tensor([0.0, 0.499, 0.999, 1.0, -0.1, 1.1]).expand(3, 2, 6)
    expected = [0, 127, 255, 255, 0, 255]
    image = to_uint8(pixels)
    assert image.shape == (2, 6, 3) and image.dtype == np.uint8
    assert image[0, :, 0].tolist() == expected
    assert to_uint8(pixels[None]).shape == (1, 2, 6, 3)


@pytest.fixture
def checkpoint(generator, tmp_path):
    folder = tmp_path / "step_00000001"
    save_checkpoint(folder, generator, generator.trainable_state(), step=1)
    return folder


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments)])
    main()


def test_the_command_writes_the_images_the_function_makes(
    checkpoint, generator, decoder, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "new" / "x.png"
    common = ["--checkpoint", checkpoint, "--prompt", "a red circle", "--out", out, "--device", "cpu"]
    run_main(monkeypatch, *common, "--num-images", 2, "--seed", 3, "--num-steps", 2, "--scale", 2)
    assert str(out) in capsys.readouterr().out
    image = np.asarray(Image.open(out))
    assert image.shape == (64, 128, 3)
    made = to_uint8(
        generate(generator, decoder, [Request("a red circle")] * 2, 3, SamplerConfig(num_steps=2))
    )
    np.testing.assert_array_equal(image[::2, ::2], np.concatenate(list(made), axis=1))


@pytest.mark.parametrize("num_images", [1, 3])
def test_a_png_says_what_made_it(checkpoint, tmp_path, monkeypatch, num_images):
    out, prompt = tmp_path / "x.png", "a red circle — ünïcode"
    (checkpoint / "lineage.json").write_text(json.dumps({"run_id": "abc"}))
    common = ["--checkpoint", checkpoint, "--prompt", prompt, "--out", out, "--device", "cpu"]
    sampler = ("--num-steps", 2, "--solver", "heun", "--guidance-interval", 0.25, 1)
    run_main(monkeypatch, *common, "--num-images", num_images, "--seed", 3, *sampler)
    with Image.open(out) as image:
        assert json.loads(image.info["repfusion"]) == read_png(out)
    assert read_png(out) == {
        "rows": [{"prompt": prompt, "seeds": list(range(3, 3 + num_images))}],
        "images": [],
        "rewrite": None,
        "num_steps": 2,
        "solver": "heun",
        "guidance_scale": 4.0,
        "image_guidance_scale": None,
        "guidance_interval": [0.25, 1.0],
        "precision": autocast_of("auto", torch.device("cpu")),
        "checkpoint": {
            "path": str(checkpoint),
            "digest": file_sha256(checkpoint / "complete.json"),
            "step": 1,
        },
        "lineage": {"run_id": "abc"},
    }


@pytest.mark.parametrize(("solver", "interval"), [("euler", [0.0, 1.0]), ("heun", [0.0, 0.5])])
def test_the_record_is_enough_to_make_the_image_again(
    checkpoint, generator, decoder, tmp_path, monkeypatch, solver, interval
):
    out = tmp_path / "x.png"
    common = ["--checkpoint", checkpoint, "--prompt", "two blue square", "--out", out, "--device", "cpu"]
    sampler = (
        "--num-steps",
        3,
        "--solver",
        solver,
        "--guidance-scale",
        2.5,
        "--guidance-interval",
        *interval,
    )
    run_main(monkeypatch, *common, "--seed", 11, *sampler, "--scale", 1)
    record = read_png(out)
    assert (record["solver"], record["guidance_interval"]) == (solver, interval)
    config = SamplerConfig(**{name: record[name] for name in SamplerConfig.model_fields})
    (row,) = record["rows"]
    again = to_uint8(generate(generator, decoder, [Request(row["prompt"])], row["seeds"], config))[0]
    np.testing.assert_array_equal(np.asarray(Image.open(out)), again)


def test_other_formats_are_written_without_a_record(checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "x.jpg"
    run_main(monkeypatch, "--checkpoint", checkpoint, "--prompt", "a", "--out", out, "--num-steps", 1)
    with pytest.raises(ValueError, match="no text chunk"):
        read_png(out)


def test_a_record_of_shipped_weights_names_no_machine():
    from repfusion.weights import WEIGHTS

    record = image_record(WEIGHTS / "base", [PromptRow("a", (0,))], CONFIG)
    assert record["checkpoint"]["path"] == "{weights}/base" and record["checkpoint"]["step"] == 14500


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--prompt": "red " * 60}, "has 61 tokens; the context takes 48"),
        ({"--checkpoint": "/nowhere"}, "checkpoint /nowhere does not exist"),
        ({"--num-steps": 0}, "num_steps"),
    ],
)
def test_the_command_says_what_is_wrong(checkpoint, tmp_path, monkeypatch, change, message):
    arguments = {"--checkpoint": checkpoint, "--prompt": "a", "--out": tmp_path / "x.png", **change}
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, *(part for pair in arguments.items() for part in pair))
    assert str(stopped.value).startswith("error: ") and message in str(stopped.value)
    assert not (tmp_path / "x.png").exists()


def test_an_interval_the_wrong_way_round_is_refused(checkpoint, tmp_path, monkeypatch):
    common = ["--checkpoint", checkpoint, "--prompt", "a", "--out", tmp_path / "x.png"]
    with pytest.raises(SystemExit, match=r"\(0.7, 0.2\): expected noise levels 0 <= low <= high <= 1"):
        run_main(monkeypatch, *common, "--guidance-interval", 0.7, 0.2)


def pixels_of(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_prompts_are_rows_of_a_picture_and_seeds_its_columns(
    checkpoint, generator, decoder, tmp_path, monkeypatch, capsys
):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "two blue square", "seeds": [8, 2]}\n\n{"prompt": "a red dog"}\n')
    out = tmp_path / "x.png"
    common = ["--checkpoint", checkpoint, "--device", "cpu", "--num-steps", 1, "--batch-size", 2]
    options = ["--prompt", "a red circle", "--prompts-file", prompts, "--seed", 3, 11, 4, "--scale", 1]
    run_main(monkeypatch, *common, *options, "--out", out)
    rows = [("a red circle", [3, 11, 4]), ("two blue square", [8, 2]), ("a red dog", [3, 11, 4])]
    assert read_png(out)["rows"] == [{"prompt": prompt, "seeds": seeds} for prompt, seeds in rows]
    picture = pixels_of(out)
    assert picture.shape == (96, 96, 3) and (picture[32:64, 64:] == 255).all()
    expected = generate(generator, decoder, [Request("two blue square")], 2, SamplerConfig(num_steps=1))
    found = picture[32:64, 32:64].astype(int)
    assert np.abs(found - to_uint8(expected)[0]).max() <= 1  # another batch rounds otherwise

    run_main(monkeypatch, *common, *options, "--out", f"{tmp_path / 'each'}/")
    files = sorted(path.name for path in (tmp_path / "each").iterdir())
    assert files == sorted(f"{row}_seed{seed}.png" for row, (_, seeds) in enumerate(rows) for seed in seeds)
    np.testing.assert_array_equal(pixels_of(tmp_path / "each" / "1_seed2.png"), picture[32:64, 32:64])
    one = read_png(tmp_path / "each" / "1_seed2.png")
    assert one["rows"] == [{"prompt": "two blue square", "seeds": [2]}]
    assert "8 image(s) of 3 prompt(s)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--out": "x.pgn"}, "the ending '.pgn' is no format of images; expected FILE.png"),
        ({"--out": "x"}, "has no ending"),
        ({"--out": "prompts.txt/x.png"}, "prompts.txt is no folder"),
        ({"--device": "cuda:99"}, "device 'cuda:99': "),
        ({"--device": "gpu"}, "device 'gpu': "),
        ({"--device": "meta"}, "it holds no values"),
        ({"--num-images": 0}, "--num-images 0: expected at least 1"),
        ({"--seed": -1}, "--seed -1: expected 0 to"),
        ({"--scale": 0}, "--scale 0: expected at least 1"),
        ({"--batch-size": 0}, "--batch-size 0: expected at least 1"),
        ({"--num-steps": 0}, "options: num_steps: Input should be greater than or equal to 1 (got 0)"),
        ({"--guidance-scale": 0.5}, "options: guidance_scale: Input should be greater than or equal to 1"),
        ({"--prompts-file": "none.txt"}, "none.txt: "),
        ({"--prompts-file": "empty.txt"}, "empty.txt: holds no prompt; expected one a line"),
        ({"--prompts-file": "bad.jsonl"}, "bad.jsonl:2: unknown key 'seedz'; did you mean 'seed'?"),
        ({"--prompts-file": "json.jsonl"}, "json.jsonl:1: no JSON"),
        ({"--prompts-file": "both.jsonl"}, "both.jsonl:1: both seed and seeds; expected one of them"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": "a", "seedz": [1]}\n')
    (tmp_path / "json.jsonl").write_text("a red circle\n")
    (tmp_path / "both.jsonl").write_text('{"prompt": "a", "seed": 1, "seeds": [1]}\n')
    monkeypatch.setattr("repfusion.generate.load_any", lambda folder: pytest.fail("a model was loaded"))
    arguments = {"--prompts-file": "prompts.txt", "--out": "x.png", "--device": "cpu", **change}
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, *(part for pair in arguments.items() for part in pair))
    assert str(stopped.value).startswith("error: ") and message in str(stopped.value)


def test_no_prompt_and_too_many_seeds_are_errors(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="no prompt; expected --prompt TEXT or --prompts-file FILE"):
        run_main(monkeypatch, "--out", tmp_path / "x.png")
    with pytest.raises(SystemExit, match="--num-images 2 beside 3 seeds"):
        run_main(
            monkeypatch, *("--out", tmp_path / "x.png", "--prompt", "a", "--seed", 1, 2, 3, "--num-images", 2)
        )


def test_a_picture_that_no_format_holds_is_refused(checkpoint, tmp_path, monkeypatch):
    common = ["--checkpoint", checkpoint, "--prompt", "a", "--device", "cpu", "--num-steps", 1]
    with pytest.raises(SystemExit, match=r"a picture of 960000 x 32000 px; expected at most 65000 a side"):
        run_main(monkeypatch, *common, "--num-images", 30, "--scale", 1000, "--out", tmp_path / "x.png")


def test_help_says_the_defaults(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, "--help")
    said = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    defaults = ("(default: 30)", "(default: euler)", "(default: 4.0)", "(default: 0.0 1.0)", "(default: all)")
    assert all(one in said for one in defaults) and "default: []" not in said and "default: None" not in said
