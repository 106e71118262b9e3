"""Folders that do not fit each other are refused from their headers, by the code that builds the real
model.
"""

import json
import shutil
from pathlib import Path

import pytest
from tiny_training import GRID, METHODS, WIDTH, make_foundation, sparing, tiny_model

from repfusion.latents.load import EncoderConfig
from repfusion.latents.rae_decoder import RAEDecoder, RAEDecoderConfig
from repfusion.llm.tokenizer import prompt_context
from repfusion.model.build import build_model
from repfusion.model.check import check_model
from repfusion.model.config import ModelConfig
from repfusion.weights import WEIGHTS


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A foundation of another latent width and grid."""
    return make_foundation(tmp_path_factory.mktemp("wide"), tower_width=2 * WIDTH, grid=2 * GRID)


@pytest.mark.parametrize("conditioning", sparing(METHODS))
def test_what_is_checked_is_the_model_that_is_built(conditioning, foundation, statistics):
    config = tiny_model(foundation, conditioning)
    bare, built = check_model(config), build_model(config, statistics)
    assert {name: p.shape for name, p in bare.named_parameters()} == {
        name: p.shape for name, p in built.named_parameters()
    }
    assert {p.device.type for p in bare.parameters()} == {"meta"}
    llm = built.conditioner.llm
    assert prompt_context(config.mllm, config.tokens_beside) == llm.max_text_tokens


def decoder(folder: Path, **changes) -> Path:
    fields = {"feature_dim": WIDTH, "grid": (GRID, GRID), "patch_size": 16, "hidden_size": 16, "depth": 1}
    RAEDecoder(RAEDecoderConfig(**fields | changes)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            lambda wide, here: {"decoder": wide / "decoder"},
            r"decoder: .*reads \(grid, width\) \(\(4, 4\), 32\)",
        ),
        (
            lambda wide, here: {"decoder": decoder(here, feature_dim=8)},
            r"decoder: .*\(\(2, 2\), 8\), .* 16\)",
        ),
        (lambda wide, here: {"decoder": decoder(here, grid=(2, 4))}, r"decoder: .*\(\(2, 4\), 16\)"),
        (lambda wide, here: {"decoder": here / "gone"}, r"decoder: decoder folder .*gone: no config\.json"),
        (
            lambda wide, here: {
                "encoder": EncoderConfig(path=wide / "vision_tower"),
                "decoder": wide / "decoder",
                "dit": {"hidden_size": 48, "depth": 1, "num_heads": 2},
            },
            r"its projector takes width 16, the latents have 32; use the vision tower .*encoder\.path.*mllm",
        ),
        (
            lambda wide, here: {"encoder": {"path": wide / "vision_tower", "layer": -9}},
            r"encoder\.path: layer -9",
        ),
        (
            lambda wide, here: {"encoder": {"path": here}},
            r"encoder\.path: encoder folder .*: no config\.json",
        ),
        (lambda wide, here: {"mllm": here}, r"mllm: MLLM folder .*: no config\.json"),
        (
            lambda wide, here: {"dit": {"hidden_size": 12, "depth": 1, "num_heads": 1}},
            r"hidden_size 12 is below the latent width 16; raise dit\.hidden_size",
        ),
        (
            lambda wide, here: {"conditioning": {"method": "queries", "num_queries": 3}},
            r"conditioning\.num_queries is 3, the latents are 4 tokens",
        ),
        (
            lambda wide, here: {
                "conditioning": {
                    "method": "queries",
                    "num_queries": 128,
                    "interface": "cross_attention",
                }
            },
            r"its context of 128 leaves no room for a prompt beside 128",
        ),
    ],
)
def test_parts_that_do_not_fit_are_named_with_their_key(changes, says, foundation, wide, tmp_path):
    values = tiny_model(foundation).model_dump() | changes(wide, tmp_path / "here")
    with pytest.raises(ValueError, match=says):
        check_model(ModelConfig.model_validate(values))


def test_a_folder_without_a_weight_is_named_with_its_key(foundation, tmp_path):
    folder = shutil.copytree(foundation / "llava", tmp_path / "llava")
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    fields["text_config"]["num_hidden_layers"] += 1
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=rf"mllm: MLLM folder {folder}: weights do not fit .*layers\.2\."):
        check_model(tiny_model(foundation).model_copy(update={"mllm": folder}))


def test_the_shipped_models_fit():
    check_model(ModelConfig())
    vae = {"encoder": {"path": WEIGHTS / "vae", "image_size": 32}, "decoder": WEIGHTS / "vae"}
    check_model(ModelConfig.model_validate({**vae, "mllm": WEIGHTS / "language"}))
