"""Which suites an evaluation has, and what decides its scores."""

import pytest

from pipelines.evaluation.config import EvaluateConfig
from pipelines.shards.digests import flatten
from repfusion.config import ConfigError, load_config


def test_a_suite_is_of_the_kind_of_its_name_unless_it_says_otherwise():
    suites = {"scenes": {"num_prompts": 6}, "shown": {"kind": "scenes", "split": "train"}}
    config = EvaluateConfig.model_validate({"suites": suites})
    assert [one.kind for one in config.suites.values()] == ["scenes", "scenes"]
    assert EvaluateConfig.model_validate(config.model_dump(mode="json")) == config
    assert load_config(EvaluateConfig, {}, ["suites.scenes.num_prompts=6"]).suites == {
        "scenes": config.suites["scenes"]
    }


@pytest.mark.parametrize(
    "suites, message",
    [
        ({"other": {"num_prompts": 6}}, "suites.other: .*expected tags: 'scenes', 'edits', 'references'"),
        ({"scenes": {"num_promts": 6}}, r"unknown key 'suites.scenes.num_promts'"),
        ({"../scenes": {"kind": "scenes"}}, "should match pattern"),
        ({}, "at least 1 item"),
    ],
)
def test_what_is_no_suite_is_named(suites: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(EvaluateConfig, {"suites": suites})


def test_scores_are_decided_by_suites_their_judges_and_rules_and_not_by_what_picks_the_best():
    config = EvaluateConfig()
    fields = flatten(config.decides, "evaluate.")
    assert fields["evaluate.suites.scenes.num_prompts"] == 240
    assert fields["evaluate.versions.scenes.judge"] and fields["evaluate.versions.scenes.rule"]
    other = config.model_copy(update={"best_by": "scenes/task/counting", "max_concurrent": 1})
    assert other.decides == config.decides
    assert config.model_copy(update={"seed": 1}).decides != config.decides
