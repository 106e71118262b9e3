"""The page: values, order and what is missing, from made-up result files alone."""

import re
from pathlib import Path

import pytest

from pipelines.ladder.config import LadderConfig
from pipelines.ladder.plans.repfusion import REPFUSION
from pipelines.ladder.report import write_report
from pipelines.ladder.results import CheckpointScores, ComputePoint, Result, append, select
from pipelines.ladder.task import budget_of

SETTINGS = budget_of(LadderConfig(), "fingerprint")
TASKS = ("single_object", "two_objects", "counting", "colours", "position", "colour_attribution")


def result(row: str, seed: int, score: float, budget: str = "b", name: str = "base", **changes) -> Result:
    points = tuple(
        CheckpointScores(
            step=step,
            headline="overall",
            values={"overall": value, **{f"task/{t}": value for t in TASKS}, "shuffled_overall": 0.02},
            num_prompts=prompts,
            validation_loss=1.0 - value,
        )
        for step, value, prompts in ((50, score / 2, 120), (100, score, 480))
    )
    values = {
        "row": row,
        "seed": seed,
        "budget_name": name,
        "budget": budget * 64,
        "model": row * 4,
        "time": "2026-11-21T00:00:00+00:00",
        "settings": SETTINGS,
        "weights": {"llava": "1"},
        "points": points,
        "samples_per_sec": 100.0 + seed,
        "train_sec": 1800.0,
        "score_sec": 0.0,
        "flops_per_image": 3.5e9,
        "trainable_parameters": 1_040_000,
        "dit": {"depth": 4, "hidden_size": 128},
        "hardware": "one core",
        "commit": "c" * 40,
    }
    return Result(**{**values, **changes})


def failed(row: str, seed: int) -> Result:
    return result(row, seed, 0.0, status="failed", error="ValueError: no such folder", points=())


@pytest.fixture
def config(tmp_path: Path) -> LadderConfig:
    docs = tmp_path / "docs"
    return LadderConfig(
        results=docs / "ladder" / "results.jsonl",
        compute_results=docs / "ladder" / "compute.jsonl",
        report=docs / "ladder.md",
    )


def page(config: LadderConfig, lines: list[Result], budget: str | None = None) -> str:
    for line in lines:
        append(config.results, line)
    return write_report(config, budget).read_text()


def row_of(text: str, start: str, section: str) -> list[str]:
    part = text.split(f"## {section}\n")[1].split("\n## ")[0]
    line = next(line for line in part.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


LADDER = [
    *(result("repfusion", seed, 0.60 + 0.02 * seed) for seed in range(3)),
    *(result("repfusion_tuned", seed, 0.50 + 0.01 * seed) for seed in range(3)),
    *(result("static_queries", seed, 0.70 + 0.02 * seed) for seed in range(2)),
]


def test_the_table_holds_means_errors_and_differences_by_seed(config: LadderConfig):
    text = page(config, LADDER)
    # 0.60, 0.62, 0.64: mean 0.62, standard error 0.02 / sqrt(3); differences 0.10, 0.11, 0.12
    rung = row_of(text, "back to a frozen LLM = RepFusion", "From TextEmbed")
    assert rung == [
        "back to a frozen LLM = RepFusion",
        "0.70",
        "+0.02",
        "0.620 ± 0.012",
        "3",
        "+0.110 ± 0.006",
        "yes",
    ]
    assert row_of(text, "+ freeze the LLM = RepFusion", "From Transfusion")[3:] == rung[3:]
    row = row_of(text, "RepFusion", "All rows")
    assert row[1:9] == [
        "0.70",
        "0.620 ± 0.012",
        "3",
        "0.020 ± 0.000",
        "0.380 ± 0.012",
        "1.04M",
        "3.50",
        "101",
    ]
    assert row_of(text, "RepFusion", "Score against step")[1:] == ["0.310 ± 0.006", "0.620 ± 0.012"]
    assert "50: 120, 100: 480" in text and "4.0 hours of runs" in text and "ccccccc" in text
    claim = next(line for line in text.splitlines() if "an MLLM prefers to stay frozen" in line)
    assert "+0.110 ± 0.006 | 3 |" in claim and claim.endswith("| 0.12 | 0.05 |")
    tested = row_of(text, "1", "The claims")
    # 0.60 and 0.62 against 0.70 and 0.72: no scatter, so no p of the t test
    assert tested[2:] == ["-0.100 ± 0.000", "2", *tested[4:8], "-", "not shown"]
    assert row_of(text, "2", "The claims")[2:] == ["missing", "0", *["-"] * 5, "missing"]


def test_claims_are_compared_by_validation_loss_within_a_latent_space(config: LadderConfig):
    lines = [*LADDER, *(result(row, 0, 0.5) for row in ("text_embed_language", "text_embed_vae"))]
    part = page(config, lines).split("## The same by validation loss\n")[1].split("\n## ")[0]
    # losses 0.40, 0.38, 0.36 against 0.50, 0.49, 0.48
    tuned = next(line for line in part.splitlines() if "an MLLM prefers to stay frozen" in line)
    assert tuned.endswith("| -0.110 ± 0.006 | 3 | 0.0014 |")
    queries = next(
        line for line in part.splitlines() if "reads the noisy latents beats static queries |" in line
    )
    assert "| +0.100 ± 0.000 | 2 |" in queries
    assert "RAE beats VAE" not in part and "same FLOPs" not in part


def test_rows_without_results_say_so_in_the_papers_order(config: LadderConfig):
    text = page(config, LADDER)
    part = text.split("## From TextEmbed\n")[1].split("\n## ")[0]
    rungs = [line.split("|")[1].strip() for line in part.splitlines() if line.startswith("| ")][1:]
    assert rungs[0] == "TextEmbed, VAE" and rungs[1] == "+ noisy latents into the LLM"
    assert row_of(text, "+ RAE", "From TextEmbed") == [
        "+ RAE",
        "0.64",
        "+0.10",
        "missing",
        "0",
        "missing",
        "",
    ]
    assert row_of(text, "TextEmbed, VAE", "All rows")[2:4] == ["missing", "0"]
    assert re.search(r"^\| RAE beats VAE .* \| missing \| 0 \| - \| - \| - \| - \|$", text, re.M)


def test_pairs_in_another_order_than_the_papers_are_named(config: LadderConfig):
    text = page(config, LADDER)
    assert "Of 3 pairs of rows" in text and "1 stand in the same order" in text
    assert (
        "- RepFusion (0.70, here 0.620) above static queries (0.55, here 0.710): here the other way" in text
    )


def test_results_of_another_budget_or_other_weights_stay_out(config: LadderConfig):
    stale = result("repfusion", 5, 0.99, weights={"llava": "0"})
    other = result("repfusion", 0, 0.11, budget="q", name="quick")
    text = page(config, [stale, other, *LADDER])
    assert row_of(text, "RepFusion", "All rows")[2] == "0.620 ± 0.012"
    assert "made with other weights or another model: 1" in text
    assert "of the budget quick qqqqqqqq: 1" in text
    assert row_of(page(config, [], "quick"), "RepFusion", "All rows")[2] == "0.110"
    with pytest.raises(ValueError, match="budget none: 0 fit; there are"):
        write_report(config, "none")


def test_the_last_result_of_a_seed_counts_and_failures_stay_visible_until_made_good(config: LadderConfig):
    lines = [
        result("repfusion", 0, 0.1),
        failed("repfusion_tuned", 0),
        failed("repfusion_tuned", 1),
        result("repfusion", 0, 0.3),
    ]
    text = page(config, [*lines, result("repfusion_tuned", 1, 0.2)])
    assert row_of(text, "RepFusion", "All rows")[2] == "0.300"
    assert "- failed: repfusion_tuned seed 0: ValueError: no such folder" in text
    assert "repfusion_tuned seed 1" not in text


def test_of_a_row_whose_model_changed_only_the_present_one_counts():
    old, new = result("repfusion_tuned", 0, 0.9, model="old"), result("repfusion_tuned", 1, 0.2)
    found = select(REPFUSION, [old, new])
    assert (found.scores, found.other_weights) == ({"repfusion_tuned": {1: 0.2}}, (old,))


def test_notes_are_kept_and_a_page_without_results_says_how_to_get_them(config: LadderConfig):
    assert "No results yet" in page(config, [])
    notes = config.report.with_suffix("") / "notes.md"
    notes.write_text("Written by hand.\n\n- and kept\n")
    once = page(config, LADDER)
    assert once.endswith("## Notes\n\nWritten by hand.\n\n- and kept\n")
    assert write_report(config).read_text() == once


def test_charts_are_svg_files_of_their_own(config: LadderConfig):
    text = page(config, LADDER)
    for name in re.findall(r"!\[\w+\]\((.*)\)", text):
        svg = (config.report.parent / name).read_text()
        assert svg.startswith('<svg xmlns="http://www.w3.org/2000/svg"') and svg.rstrip().endswith("</svg>")
        assert "repfusion" in svg
    assert "ladder/compute.svg" not in text


def test_a_ladder_of_which_one_row_has_run_has_no_chart(config: LadderConfig):
    folder = config.report.with_suffix("")
    folder.mkdir(parents=True)
    (folder / "from_transfusion.svg").write_text("of an earlier budget")
    text = page(config, [line for line in LADDER if line.row != "repfusion_tuned"])
    assert re.findall(r"!\[(\w+)\]", text) == ["static_conditions"]
    assert [path.name for path in folder.glob("*.svg")] == ["static_conditions.svg"]
    text = page(config, [result("transfusion_language", 0, 0.5)])
    assert "ladder/from_transfusion.svg" in text


def test_compute_is_shown_for_the_checkpoints_of_the_table(config: LadderConfig):
    def point(seed: int, num_steps: int, score: float, **changes) -> ComputePoint:
        identity = LADDER[0].model_dump(include={"row", "budget_name", "budget", "model", "time"})
        values = {"num_steps": num_steps, "num_prompts": 240, "flops_per_image": num_steps * 1e9}
        return ComputePoint(**{**identity, **values, "seed": seed, "score": score, **changes})

    for line in (point(0, 5, 0.2), point(1, 5, 0.4), point(0, 30, 0.6), point(0, 30, 0.9, model="old")):
        append(config.compute_results, line)
    text = page(config, LADDER)
    row = row_of(text, "RepFusion", "Test-time compute")
    assert row[1:] == ["0.300 ± 0.100 (5.00)", "0.600 (30.00)"]
    assert "ladder/compute.svg" in text
