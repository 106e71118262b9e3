"""Every row of every plan trains, is scored and leaves a result, on small models of the real classes, in both
spaces.
"""

import shutil
from pathlib import Path

import pytest
from diffusers import AutoencoderDC
from tiny_training import IMAGE_SIZE, make_foundation
from transformers import AutoTokenizer, LlamaForCausalLM, LlavaForConditionalGeneration

from pipelines.ladder.config import LadderConfig
from pipelines.ladder.data import prepare
from pipelines.ladder.plans.base import Row
from pipelines.ladder.plans.choice import PlanName, plan_of
from pipelines.ladder.results import Result
from pipelines.ladder.task import Task, tasks_of
from pipelines.ladder.worker import run_task

pytestmark = [pytest.mark.slow, pytest.mark.ray]
REPFUSION, UNIFUSION, RELATED = plan_of("repfusion"), plan_of("unifusion"), plan_of("related")
BLOCKS = {
    "block_types": ("ResBlock",) * 4,
    "block_out_channels": (8, 8, 8, 16),
    "layers_per_block": (1,) * 4,
    "qkv_multiscales": ((),) * 4,
}
"""Blocks of encoder and decoder alike: an eighth of the image's side."""


def make_weights(folder: Path) -> Path:
    """All folders that the rows name; the language model is the LLaVA's, without vision."""
    make_foundation(folder, text_layers=4)
    for name in ("llava_noise_taught", "llava_large"):
        shutil.copytree(folder / "llava", folder / name)
    llava = LlavaForConditionalGeneration.from_pretrained(folder / "llava")
    language = LlamaForCausalLM(llava.config.text_config)
    language.model.load_state_dict(llava.model.language_model.state_dict())
    language.save_pretrained(folder / "language")
    AutoTokenizer.from_pretrained(folder / "llava").save_pretrained(folder / "language")
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in BLOCKS.items()}
    AutoencoderDC(latent_channels=4, attention_head_dim=8, **sides).save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def tasks(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Task]:
    return make_tasks("repfusion", weights, tmp_path_factory.mktemp("ladder"))


@pytest.fixture(scope="module")
def unifusion_tasks(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Task]:
    return make_tasks("unifusion", weights, tmp_path_factory.mktemp("unifusion"))


@pytest.fixture(scope="module")
def related_tasks(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Task]:
    return make_tasks("related", weights, tmp_path_factory.mktemp("related"))


def make_tasks(plan: PlanName, weights: Path, root: Path) -> dict[str, Task]:
    config = LadderConfig.model_validate(
        {
            "plan": plan,
            "root": root / "runs",
            "weights": weights,
            "tracking_uri": None,
            "seeds": [0],
            "dit": {"hidden_size": 16, "depth": 1, "num_heads": 2},
            "data": {
                "scenes": {"num_samples": 24, "wording": "terse", "world": {"image_size": IMAGE_SIZE}},
                "num_validation": 6,
            },
            "training": {"num_steps": 3, "global_batch_size": 4, "engine": {"micro_batch_size": 4}},
            "scoring": {
                "final": {"suites": {"scenes": {"num_prompts": 12}}, "sampler": {"num_steps": 2}},
                "curve_prompts": 6,
                "num_points": 1,
            },
            "ray": {"num_cpus": 2, "object_store_mib": 80},
        }
    )
    columns = prepare(config, config.compared.listed)
    return {task.row: task for task in tasks_of(config, columns)}


@pytest.mark.parametrize("row", REPFUSION.listed, ids=lambda row: row.name)
def test_a_row_leaves_a_result(tasks: dict[str, Task], row: Row):
    check_row(row, tasks[row.name])


@pytest.mark.parametrize("row", UNIFUSION.listed, ids=lambda row: row.name)
def test_a_row_of_unifusions_plan_leaves_a_result(unifusion_tasks: dict[str, Task], row: Row):
    task = unifusion_tasks[row.name]
    assert (row.rewriting is not None) == ("rewrites" in task.train.data.columns)
    check_row(row, task)


@pytest.mark.parametrize("row", RELATED.listed, ids=lambda row: row.name)
def test_a_row_of_the_related_systems_leaves_a_result(related_tasks: dict[str, Task], row: Row):
    check_row(row, related_tasks[row.name])


def check_row(row: Row, task: Task) -> None:
    result = Result.model_validate_json(run_task(task))
    (point,) = result.points
    assert (point.step, point.num_prompts) == (3, 12)
    assert 0 < point.validation_loss < 10
    assert result.flops_per_image and result.trainable_parameters
    vision = {"vae"} if row.space == "vae" else {"vision_tower", "decoder"}
    assert result.weights.keys() == {row.llm, row.second or row.llm, *vision}


def test_the_rows_differ_in_what_they_train_and_cost_as_their_names_say(tasks: dict[str, Task]):
    results = {name: Result.model_validate_json(run_task(task)) for name, task in tasks.items()}
    trained = {name: result.trainable_parameters or 0 for name, result in results.items()}
    flops = {name: result.flops_per_image or 0 for name, result in results.items()}
    assert (
        trained["repfusion_tuned"] > trained["repfusion"]
        and trained["repfusion_language_tuned"] == trained["repfusion_tuned"]
    )
    assert trained["text_embed_wide"] > trained["text_embed_language"]
    assert flops["static_queries"] < flops["timestep_queries"]
    for name in (
        "repfusion_tuned",
        "repfusion_language",
        "text_embed_wide",
        "static_queries_wide",
        "timestep_queries",
    ):
        assert flops[name] == pytest.approx(flops["repfusion"], rel=0.06), name
