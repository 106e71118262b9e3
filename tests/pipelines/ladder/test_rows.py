"""The rows: every one builds, each rung changes one thing, and a DiT matched in FLOPs is matched."""

import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from pipelines.ladder.config import CONFIGS, LadderConfig
from pipelines.ladder.data import stages_of
from pipelines.ladder.plans.base import Plan, Row
from pipelines.ladder.plans.choice import plan_of
from pipelines.ladder.rows import (
    FLOPS_TOLERANCE,
    Common,
    image_flops,
    matched_dit,
    matched_dits,
    model_of,
)
from pipelines.ladder.task import budget_of, model_digest
from repfusion.config import ConfigError, load_config
from repfusion.diffusion.flow import FlowConfig
from repfusion.diffusion.sampler import SamplerConfig
from repfusion.model.dit import DiTConfig
from repfusion.weights import WEIGHTS

DIT = DiTConfig(hidden_size=96, depth=3, num_heads=6)
REPFUSION, UNIFUSION = plan_of("repfusion"), plan_of("unifusion")
PLANS = {"ladder": REPFUSION, "unifusion": UNIFUSION, "related": plan_of("related")}
"""By the folder of docs/ that holds what was written down of it."""
ROWS = REPFUSION.rows
SHIPPED = sorted(CONFIGS.glob("*.yaml"))


def common(**changes) -> Common:
    values = {"weights": WEIGHTS, "dit": DIT, "flow": FlowConfig(base_dim=256), "sampler": SamplerConfig()}
    return Common(**{**values, "prompt_tokens": 10, "image_size": 64, **changes})


@pytest.mark.parametrize(
    "row",
    [row for plan in PLANS.values() for row in plan.listed if row.same_flops_as is None],
    ids=lambda row: row.name,
)
def test_every_row_is_a_valid_model_on_the_common_dit(row: Row):
    model = model_of(row, common(), {})
    assert model.mllm == WEIGHTS / row.llm
    assert model.encoder.path == WEIGHTS / ("vae" if row.space == "vae" else "vision_tower")
    assert model.decoder == WEIGHTS / ("vae" if row.space == "vae" else "decoder")
    assert model.conditioning.method == row.conditioning["method"]
    assert (model.dit, model.flow.base_dim) == (DIT, 256)


def test_each_rung_changes_one_thing_of_the_row_it_names():
    ladders = [(plan, steps) for plan in PLANS.values() for steps in plan.ladders.values()]
    for plan, steps in ladders:
        names = [step.row for step in steps]
        for step in steps[1:]:
            assert step.before in names[: names.index(step.row)]
            row, before = plan.rows[step.row], plan.rows[step.before]
            changed = [
                field
                for field in ("llm", "second", "space", "conditioning")
                if getattr(row, field) != getattr(before, field)
            ]
            assert len(changed) == 1, (step.row, step.before, changed)


def test_the_ladders_end_in_repfusion_with_the_papers_figures():
    figures = {name: [ROWS[step.row].paper for step in steps] for name, steps in REPFUSION.ladders.items()}
    assert figures == {
        "From TextEmbed": [0.47, 0.54, 0.64, 0.65, 0.68, 0.70],
        "From Transfusion": [0.56, 0.54, 0.62, 0.64, 0.68, 0.70],
    }
    assert {steps[-1].row for steps in REPFUSION.ladders.values()} == {"repfusion"}


@pytest.mark.slow
def test_a_matched_dit_takes_the_flops_asked_for_and_keeps_its_proportions():
    base = model_of(ROWS["text_embed_language"], common(), {})
    start = image_flops(base, common())
    for factor in (2.0, 8.0):
        dit = matched_dit(base, factor * start, common())
        reached = image_flops(base.model_copy(update={"dit": dit}), common())
        assert reached == pytest.approx(factor * start, rel=0.05)
        assert dit.hidden_size // dit.num_heads == DIT.hidden_size // DIT.num_heads
        assert 0.5 < (dit.hidden_size / dit.depth) / (DIT.hidden_size / DIT.depth) < 2


@pytest.mark.slow
def test_rows_of_matched_flops_match_repfusion():
    shared = common()
    target = image_flops(model_of(ROWS["repfusion"], shared, {}), shared)
    dits = matched_dits(REPFUSION, shared)
    for name in ("text_embed_wide", "static_queries_wide"):
        model = model_of(ROWS[name], shared, dits)
        assert image_flops(model, shared) == pytest.approx(target, rel=FLOPS_TOLERANCE)
        assert model.dit.hidden_size > DIT.hidden_size


def test_one_whole_ladder_stands_before_the_next_is_begun():
    runs = REPFUSION.in_order(tuple(ROWS))
    assert [seed for _, seed in runs] == sorted(seed for _, seed in runs)
    assert [name for name, seed in runs if seed == 0] == list(ROWS)
    assert all(runs.count((name, row.num_seeds - 1)) == 1 for name, row in ROWS.items())
    assert len(runs) == sum(row.num_seeds for row in ROWS.values())
    assert REPFUSION.in_order(["text_embed", "repfusion"], [7]) == [("repfusion", 7), ("text_embed", 7)]


@pytest.mark.parametrize(("folder", "plan"), PLANS.items(), ids=list(PLANS))
def test_the_rows_are_those_that_were_written_down(folder: str, plan: Plan):
    text = (Path(__file__).parents[3] / "docs" / folder / "plan.md").read_text()
    listed = {}
    for names, llm, _, number in re.findall(
        r"^\| ([a-z0-9_, ]+) \| ([a-z_]+) \| ([^|]+) \| (\d) \|$", text, re.M
    ):
        listed |= {name: (llm, int(number)) for name in names.split(", ")}
    assert listed == {name: (row.llm, row.num_seeds) for name, row in plan.rows.items()}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_hold_and_name_a_typo(path: Path, tmp_path: Path):
    config = load_config(LadderConfig, path)
    assert config.compared.in_order(config.chosen, config.seeds)
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "num_stepz": 3}))
    with pytest.raises(ConfigError, match="num_stepz"):
        load_config(LadderConfig, wrong)


def test_overrides_choose_rows_and_seeds_and_a_row_that_is_not_there_is_named():
    overrides = ["rows=[repfusion,static_queries]", "seeds=[4]", "training.num_steps=7"]
    config = load_config(LadderConfig, SHIPPED[0], overrides)
    assert (config.rows, config.seeds) == (("repfusion", "static_queries"), (4,))
    assert config.training.num_steps == 7
    with pytest.raises(ConfigError, match=r"no rows repfussion; there are repfusion, static_queries"):
        load_config(LadderConfig, SHIPPED[0], ["rows=[repfussion]"])
    with pytest.raises(ConfigError, match=r"expected key\.path=value"):
        load_config(LadderConfig, SHIPPED[0], ["seeds"])
    with pytest.raises(ValidationError, match="no rows x"):
        LadderConfig(rows=("x",))


def test_a_budget_is_what_decides_scores_and_nothing_else():
    config = LadderConfig()
    budget = budget_of(config, "data")
    engine = config.training.engine.model_copy(update={"micro_batch_size": 8, "num_threads": 3})
    training = config.training.model_copy(update={"engine": engine})
    same = config.model_copy(update={"training": training, "rows": ("repfusion",), "seeds": (7,)})
    assert budget_of(same, "data") == budget
    assert budget_of(config, "other data") != budget
    longer = config.training.model_copy(update={"num_steps": 5})
    assert budget_of(config.model_copy(update={"training": longer}), "data") != budget


def test_a_models_digest_follows_weights_and_fields_not_folders(tmp_path: Path):
    row = ROWS["repfusion"]
    weights = {"llava": "a", "vision_tower": "b", "decoder": "c"}
    here, there = model_of(row, common(), {}), model_of(row, common(weights=tmp_path), {})
    digest = model_digest(row, here, weights)
    assert model_digest(row, there, weights) == digest
    assert model_digest(row, here, {**weights, "llava": "z"}) != digest
    assert model_digest(row, model_of(row, common(dit=DiTConfig()), {}), weights) != digest
    joined = plan_of("related").rows["li_dit_two"]
    weights |= {"language": "d"}
    here, there = model_of(joined, common(), {}), model_of(joined, common(weights=tmp_path), {})
    digest = model_digest(joined, here, weights)
    assert here.conditioning.second_llm == WEIGHTS / "language"
    assert model_digest(joined, there, weights) == digest
    assert model_digest(joined, here, {**weights, "language": "z"}) != digest


def test_both_spaces_encode_the_same_images_into_columns_of_their_own(tmp_path: Path):
    """The second encoder is a copy of the first: only places and names may differ."""
    import shutil

    for name, source in {"vision_tower": "vision_tower", "vae": "vision_tower"}.items():
        shutil.copytree(WEIGHTS / source, tmp_path / name)
    config = LadderConfig(root=tmp_path / "root", weights=tmp_path, tracking_uri=None)
    stages = stages_of(config, [ROWS[name] for name in ("text_embed", "text_embed_vae", "repfusion")])
    names = [stage.name for stage in stages]
    assert names == ["source", "ingest", "judge", "curate", "image_features", "image_features_vae"]
    assert len({stage.folder.url for stage in stages}) == 6
    curate = stages[3]
    assert [stage.upstream[0].fingerprint for stage in stages[4:]] == [curate.fingerprint] * 2
    assert stages[4].fingerprint != stages[5].fingerprint
