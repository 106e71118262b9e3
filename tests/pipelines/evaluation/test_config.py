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


SUITES = {"scenes": {}, "many": {"kind": "scenes", "num_prompts": 600}}
RARE = {"suites": SUITES, "suite_every_steps": {"many": 100}}


def test_a_rare_suite_has_its_turn_at_its_steps_and_the_last():
    config = EvaluateConfig.model_validate(RARE)
    turns = {step: list(config.scoring_at(step, 250).suites) for step in (0, 50, 100, 150, 200, 250)}
    both = ["scenes", "many"]
    assert turns == {0: both, 50: ["scenes"], 100: both, 150: ["scenes"], 200: both, 250: both}
    assert config.scoring_at(250, 250) == config.scoring
    oftener = config.model_copy(update={"suite_every_steps": {"many": 50}})
    assert oftener.decides != config.decides
    assert EvaluateConfig().scoring_at(1, 2) == EvaluateConfig().scoring


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"suite_every_steps": {"much": 5}}, "suite_every_steps names 'much'; the suites are scenes, many"),
        (
            {"suite_every_steps": {"scenes": 5}},
            "suite 'scenes' picks the best .*, so every evaluation",
        ),
        ({"best_by": "many/overall"}, "suite 'many' picks the best checkpoint"),
        ({"suite_every_steps": {"many": 0}}, "greater than or equal to 1"),
    ],
)
def test_a_rare_suite_is_one_of_the_suites_and_picks_no_best(changes, message):
    with pytest.raises(ConfigError, match=message):
        load_config(EvaluateConfig, {**RARE, **changes})
