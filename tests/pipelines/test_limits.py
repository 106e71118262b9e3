"""How many tokens a caption may have, by what a workflow's configuration says of its readers."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from running import run_all
from transformers import AutoTokenizer

from pipelines.build import build_stages
from pipelines.config import WorkflowConfig

Make = Callable[..., WorkflowConfig]
LONG = {"long": {"field": "long"}, "short": {"field": "short"}}


def fields(config: WorkflowConfig, stage: str) -> dict[str, Any]:
    return next(one for one in build_stages(config) if one.name == stage).fields


def limits(config: WorkflowConfig) -> list[int]:
    return list(fields(config, "judge").get("curate.caption_limits", {}).values())


@pytest.fixture
def roomy(models: dict[str, Path], tmp_path: Path) -> Path:
    """The tests' LLaVA with a tokenizer that names no length: the context of 64 alone decides."""
    folder = Path(shutil.copytree(models["llava"], tmp_path / "roomy"))
    tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=10**30)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("conditioning", "room"),
    [
        ("text_embed", 63),
        ("noisy_latents", 63 - 16),
        ("transfusion", 63 - 16),
        ({"method": "queries"}, 63 - 16),
        ({"method": "queries", "num_queries": 5, "interface": "cross_attention"}, 63 - 5),
    ],
)
def test_the_context_minus_what_the_method_reads_beside(conditioning, room, make_config: Make, roomy):
    model = {"mllm": roomy, "conditioning": conditioning}
    config = make_config(last_stage="curate", trainings={"train": {"model": model}})
    assert limits(config) == [room]


@pytest.mark.parametrize(("most", "expected"), [("context", [47]), (20, [20]), (100, [47]), (None, [])])
def test_a_number_of_ones_own_can_only_be_less(most, expected, make_config: Make):
    config = make_config(curate={"max_caption_tokens": most})
    assert limits(config) == expected
    assert fields(config, "judge")["curate.max_caption_tokens"] == most


def test_one_limit_for_each_tokenizer_the_least_of_its_readers(make_config: Make, models, roomy):
    """The digest is of what decides the tokens: two folders of one tokenizer share it."""
    twin = Path(shutil.copytree(models["llava"], roomy.parent / "twin"))
    (twin / "README.md").write_text("another folder")
    given = {"a": (models["llava"], 5), "b": (twin, 25), "c": (roomy, 16)}
    trainings = {
        name: {
            "model": {
                "encoder": {"path": models["tower"]},
                "mllm": mllm,
                "conditioning": {"method": "queries", "interface": "cross_attention", "num_queries": beside},
            }
        }
        for name, (mllm, beside) in given.items()
    }
    config = make_config(last_stage="curate").model_copy(update={"trainings": {}})
    values = config.model_dump(mode="json", exclude={"columns", "trainings"}) | {"trainings": trainings}
    assert sorted(limits(WorkflowConfig.model_validate(values))) == [63 - 25, 63 - 16]


def test_captions_are_limited_by_those_who_draw_them(make_config: Make):
    """A training that draws an alternative alone does not limit the main one."""
    config = make_config(
        last_stage="captions",
        columns={"captions": {"captions": LONG}},
        trainings={
            "train": {
                "model": {"conditioning": "noisy_latents"},
                "data": {"caption_weights": {"long.txt": 1}},
            }
        },
    )
    assert limits(config) == []
    found = fields(config, "captions")
    assert list(found["columns.captions.captions.long.max_tokens"].values()) == [47]
    assert found["columns.captions.captions.short.max_tokens"] == {}


def test_prompt_features_are_made_of_every_caption(make_config: Make):
    config = make_config(
        last_stage="prompt_features",
        columns={"captions": {"captions": LONG}},
        trainings={"train": {"data": {"caption_weights": {"long.txt": 1}}}},
    )
    assert limits(config) == [47]
    found = fields(config, "captions")
    assert {tuple(found[f"columns.captions.captions.{name}.max_tokens"].values()) for name in LONG} == {(47,)}


def test_a_missing_folder_is_named_with_its_key_unless_nothing_is_counted(make_config: Make, tmp_path):
    gone = {"train": {"model": {"mllm": tmp_path / "gone", "conditioning": "noisy_latents"}}}
    with pytest.raises(ValueError, match=r"trainings\.train\.model\.mllm: .*gone is no folder"):
        build_stages(make_config(last_stage="curate", trainings=gone))
    free = make_config(last_stage="curate", trainings=gone, curate={"max_caption_tokens": None})
    assert limits(free) == []


@pytest.mark.slow
def test_a_caption_that_does_not_fit_is_a_counted_drop_with_its_key(make_config: Make, tmp_path, pool):
    """The tests' LLaVA takes 47 tokens beside the begin token."""
    (tmp_path / "images").mkdir()
    for index in range(6):
        colours = np.full((32, 32, 3), 40 * index, np.uint8)
        Image.fromarray(colours).save(tmp_path / "images" / f"{index}.png")
        caption = "a red circle " * (16 if index == 4 else 15)
        (tmp_path / "images" / f"{index}.txt").write_text(caption)
    own = {
        "source": {"kind": "folder", "path": str(tmp_path / "images"), "shard_size": 6},
        "last_stage": "curate",
    }
    results, _ = run_all(make_config(**own), pool)
    assert results["curate"].manifest.drops == {"caption_too_many_tokens": 1}
    drops = pq.read_table(tmp_path / "run" / "curate" / "00000.drops.parquet").to_pylist()
    assert [(one["key"], one["detail"]) for one in drops] == [
        ("000000004", "48 tokens, at most 47 (curate.max_caption_tokens)")
    ]
    results, _ = run_all(make_config(**own, curate={"max_caption_tokens": None}), pool)
    assert results["curate"].manifest.drops == {} and results["curate"].manifest.samples == 6
