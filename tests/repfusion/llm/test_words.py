"""A folder with a list of words says what a language model never read; a user's prompt is warned of once."""

import shutil
import sys
from pathlib import Path

import pytest
from tiny_training import WORDS as READ

from repfusion.export import export
from repfusion.generate import main
from repfusion.llm.words import WORDS, unknown_words, unread, words_of
from repfusion.model.build import build_model
from repfusion.pipeline import RepFusionPipeline
from repfusion.runs.checkpoint import save_checkpoint


@pytest.fixture
def folder(foundation: Path, tmp_path: Path) -> Path:
    """A tokenizer's folder with its list."""
    shutil.copytree(foundation / "llava", tmp_path / "llava")
    (tmp_path / "llava" / WORDS).write_text("".join(f"{word}\n" for word in sorted(READ)))
    return tmp_path / "llava"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red circle", []),
        ("A RED circle, left of: two (blue) squares!", ["squares"]),
        ("a red-green circle", []),
        ("a red-dog circle", ["red-dog"]),
        ("a dog and a cat, a dog", ["dog", "cat"]),
        ("“a dog’s square” …", ["dog’s"]),
        ("красный круг", ["красный", "круг"]),
        ("一只狗。", ["一只狗"]),
        ("लाल वृत्त", ["लाल", "वृत्त"]),
        ("Straße", ["strasse"]),
        ("a 🐶", ["🐶"]),
        ("", []),
        (" -- ' . ", []),
    ],
)
def test_unknown_words(folder, foundation, text, expected):
    assert unknown_words(folder, text) == expected
    assert unknown_words(foundation / "llava", text) == [], "a folder without a list"


def test_words_do_not_depend_on_how_a_letter_is_composed():
    assert words_of("Caf\u00e9") == words_of("cafe\u0301") == ["caf\u00e9"]


def test_a_warning_names_words_and_prompts(folder):
    assert unread(folder, ["a red circle", ""]) is None
    assert unread(folder, ["a dog", "a dog"]) == (
        "the model never read 'dog' in \"a dog\": it draws from the other words"
    )
    many = unread(folder, ["a dog and a cat", "two", *(f"a thing{i}" for i in range(4))])
    assert many is not None
    assert "'dog' and 'cat' in \"a dog and a cat\", 'thing0' in" in many
    assert "words in 2 more prompts: it" in many and "thing2" not in many
    assert "\x1b" not in str(unread(folder, ["a \x1b[31mdog"]))


@pytest.fixture
def checkpoint(folder, make_generator, statistics, tmp_path) -> Path:
    model = build_model(make_generator().config.model_copy(update={"mllm": folder}), statistics)
    save_checkpoint(tmp_path / "step_00000001", model, model.trainable_state(), step=1)
    return tmp_path / "step_00000001"


@pytest.mark.parametrize(("prompt", "is_read"), [("a red dog", False), ("a red circle", True)])
def test_the_command_warns_once(checkpoint, tmp_path, monkeypatch, capsys, prompt, is_read):
    arguments = ["--checkpoint", checkpoint, "--prompt", prompt, "--out", tmp_path / "x.png"]
    options = ["--num-images", 2, "--num-steps", 1, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["generate", *map(str, [*arguments, *options])])
    main()
    said = "warning: the model never read 'dog' in \"a red dog\": it draws from the other words\n"
    assert capsys.readouterr().err.count(said) == (0 if is_read else 1)


def test_the_pipeline_of_a_checkpoint_and_of_its_export_warns_once_a_call(checkpoint, tmp_path, caplog):
    for folder in (checkpoint, export(checkpoint, tmp_path / "out")):
        pipeline = RepFusionPipeline.from_pretrained(folder)
        pipeline(["a red circle", "a dog"], num_inference_steps=1, num_images_per_prompt=2)
        (record,) = (one for one in caplog.records if one.name == "repfusion.pipeline")
        assert record.getMessage() == (
            "the model never read 'dog' in \"a dog\": it draws from the other words"
        )
        caplog.clear()
        pipeline("a red circle", num_inference_steps=1)
        assert not [one for one in caplog.records if one.name == "repfusion.pipeline"]
