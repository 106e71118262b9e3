"""The page of a workflow holds its numbers and pictures, and needs nothing outside itself."""

import json
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from browser import IN_A_BROWSER, in_browser
from PIL import Image

from pipelines.reporting.charts import Line, chart, log_ticks, ticks
from pipelines.reporting.report import read_workflow, write_report
from pipelines.shards.manifest import Manifest, ShardTable, write_output
from pipelines.shards.storage import Folder
from pipelines.shards.store import Sidecar
from repfusion.data.columns import manifest_digest
from repfusion.evaluation.gallery import Tile, gallery
from repfusion.evaluation.record import Evaluation, EvaluationConfig, SuiteResult
from repfusion.tracking import Tracker, TrackingConfig


def write_stage(
    root: Path, stage: str, upstream: dict[str, str], samples: int, drops: dict[str, int]
) -> None:
    shard = Sidecar(
        name="00000",
        file="00000.tar",
        fingerprint="f" * 64,
        inputs={},
        samples=samples,
        bytes=123_456,
        sha256="a" * 64,
        drops=drops,
        files={},
        seconds=1.5,
        versions={},
    )
    shards = ShardTable.of([shard])
    manifest = Manifest(
        stage=stage,
        fingerprint=stage * 8,
        fields={f"{stage}.<odd> & name": 3},
        upstream=upstream,
        lineage={},
        num_shards=1,
        samples=samples,
        bytes=shards.bytes,
        shards_digest=shards.digest,
        drops=drops,
        seconds=61.5,
        shard_seconds=1.5,
        files={},
        extra={},
    )
    write_output(Folder.at(root / stage), manifest, shards)


def write_evaluation(folder, step: int, num_right: int) -> None:
    config = EvaluationConfig.model_validate({"suites": {"scenes": {"num_prompts": 12}}})
    (suite,) = config.build_suites().values()
    items, image = suite.items(), np.full((32, 32, 3), 25, np.uint8)
    scores = suite.score(items, [[] for _ in items])
    scores = scores.model_copy(update={"values": {**scores.values, "overall": num_right / 12}})
    folder.mkdir(parents=True)
    tiles = [Tile(image, item.request.prompt, i < num_right) for i, item in enumerate(items)]
    gallery([("", tiles)]).save(folder / "gallery.png")
    result = SuiteResult(num_items=12, scores=scores, **config.versions()["scenes"])
    evaluation = Evaluation(checkpoint="c", step=step, config=config, suites={"scenes": result}, seconds=1)
    (folder / "scores.json").write_text(evaluation.model_dump_json())


@pytest.fixture(scope="module")
def workflow(tmp_path_factory):
    """A finished workflow with a tracked training, two evaluations and a stage that is not complete."""
    tmp_path = tmp_path_factory.mktemp("workflow")
    write_stage(tmp_path, "image_features", {"curate": "x"}, 3_955, {})
    write_stage(tmp_path, "ingest", {}, 4_000, {"http_404": 7})
    write_stage(tmp_path, "curate", {"ingest": "x"}, 3_960, {"caption <empty>": 3, "undecodable": 37})
    (tmp_path / "prompt_features").mkdir()
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tracker = Tracker(TrackingConfig(uri=uri))
    for step in (10, 20, 30):
        tracker.log_metrics({"train/loss": 1 / step}, step)
    tracker.finish()
    checkpoint = tmp_path / "train" / "checkpoints" / "step_00000030"
    checkpoint.mkdir(parents=True)
    (checkpoint / "complete.json").write_text("{}")
    (checkpoint / "config.json").write_text(json.dumps({"digests": {"encoder": "e" * 64, "mllm": "d" * 64}}))
    (tmp_path / "train" / "config.json").write_text(json.dumps({"init_from": "weights/base"}))
    (tmp_path / "train" / "train.json").write_text(
        json.dumps(
            {
                "steps": 30,
                "samples_per_sec": 55.5,
                "final_loss": 0.0432,
                "train_sec": 130.0,
                "world_size": 2,
                "tracking_uri": uri,
                "run_id": tracker.run_id,
                "checkpoint": str(checkpoint),
            }
        )
    )
    write_evaluation(tmp_path / "evaluate" / "step_00000000", 0, 3)
    write_evaluation(tmp_path / "evaluate" / "step_00000030", 30, 9)
    return tmp_path


def tracked_at(workflow) -> str:
    return f"sqlite:///{workflow / 'mlflow.db'}"


def test_holds_stages_drops_curve_scores_pictures_and_lineage(workflow):
    path = write_report(workflow, tracking_uri=tracked_at(workflow))
    page = path.read_text()
    assert path == workflow / "report.html"
    assert page.index("<b>ingest</b>") < page.index("<b>curate</b>") < page.index("<b>image_features</b>")
    for text in (
        "3,960",
        "http_404 7",
        "caption &lt;empty&gt; 3, undecodable 37",
        "2 min 10 s",
        "0.0432",
        "eeeeeeeeeeee</code>",
        "weights/base",
    ):
        assert text in page
    assert page.count("<img") == 2
    slider = re.search(
        r'<output>30</output><input type="range" min="0" max="1" value="1" data-steps="0 30"', page
    )
    assert slider and page.count('<img class="shown" alt="images of step 30"') == 1
    assert page.count("<svg") == 2 + 6  # loss, scores, one per task
    assert "--share:0.750" in page and "--share:0.250" in page
    for text in (
        "<b>75%</b><span>prompts followed (mean over tasks)</span>",
        "<b>0 &rarr; 0%</b><span>prompts with the new shape or colour</span>",
        "Percent of 12 held-out prompts that the image satisfies, checked by an exact detector of shapes and "
        "colours; <i>overall</i> is the mean over the six tasks, <i>shuffled</i> the same images against "
        "other prompts of the same task; <i>strict position</i> takes no diagonal for a relation; <i>by "
        "chance</i>: the things asked for, in random cells. 30 sampling steps, guidance 4. Step 0 is the "
        "checkpoint that training started from.",
        "Drawn from held-out prompts; green frames are right, red ones wrong.",
        '<tr><th>step</th><th class="n">overall</th><th class="n">single object</th>',
        '<th class="n">new concept</th><th class="n">shuffled</th>',
        ">shuffled prompts</text>",
    ):
        assert text in page


def test_intervals_and_the_chance_of_position_stand_beside_the_scores(workflow):
    page = write_report(workflow).read_text()
    assert "its 95% interval over prompts" in page
    # none of 2 position prompts is right: Wilson's interval ends at 66%
    assert page.count('--share:0.000">0</span><small>0&ndash;66</small>') >= 2
    assert ">strict by chance</text>" in page and '--share:0.333">33</span></td>' in page


def test_is_self_contained_and_well_formed(workflow):
    page = write_report(workflow).read_text()
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "<script src" not in page and "url(" not in page and "@import" not in page
    body = page[page.index("<body>") : page.index("</body>") + 7]
    body = re.sub(r"(<img[^>]*)>", r"\1/>", body)
    for entity, text in {"&rarr;": "-", "&ndash;": "-"}.items():
        body = body.replace(entity, text)
    ET.fromstring(body)


def test_the_page_fits_a_phone_and_a_dark_screen(workflow):
    page = write_report(workflow).read_text()
    assert 'name="viewport"' in page and "@media (max-width: 640px)" in page and "overflow-x: auto" in page
    dark = page[page.index("prefers-color-scheme: dark") :]
    drawn = set(re.findall(r'stroke="(#[0-9a-f]{6})"', page)) - {"#b5532a", "#8a8a90"}
    assert drawn and all(f'svg [stroke="{colour}"]' in dark for colour in drawn)


def test_the_last_gallery_becomes_the_workflows(workflow):
    write_report(workflow)
    last = workflow / "evaluate" / "step_00000030" / "gallery.png"
    assert (workflow / "gallery.png").read_bytes() == last.read_bytes()
    assert Image.open(workflow / "gallery.png").mode == "RGB"


def test_the_curve_comes_from_the_tracked_run(workflow):
    expected = [(10, 0.1), (20, 0.05), (30, pytest.approx(1 / 30))]
    assert read_workflow(workflow, tracking_uri=tracked_at(workflow)).losses == expected
    assert read_workflow(workflow).losses == []  # what lies in the folder leads nowhere


def test_names_the_data_as_the_tracked_run_does(workflow):
    page = write_report(workflow).read_text()
    for stage in ("ingest", "curate", "image_features"):
        assert f'title="{manifest_digest(workflow / stage)}"' in page


def test_data_alone_is_a_report_too(tmp_path):
    write_stage(tmp_path, "ingest", {}, 10, {})
    page = write_report(tmp_path).read_text()
    assert "<b>ingest</b>" in page
    assert "<h2>Scores" not in page and "<h2>Training" not in page
    assert not (tmp_path / "gallery.png").exists()


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no complete stage"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 600, [0, 200, 400, 600]),
        (0.031, 0.038, [0.032, 0.034, 0.036, 0.038]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_logarithmic_ticks_are_one_two_and_five_of_each_power():
    assert log_ticks(0.1, 20) == pytest.approx([0.1, 0.2, 0.5, 1, 2, 5, 10, 20])
    assert log_ticks(3, 4) == []


def test_a_logarithmic_axis_gives_each_power_the_same_room():
    svg = chart([Line("", [(0.1, 0.0), (1.0, 1.0), (10.0, 2.0)], "black")], 300, 120, x_log=True)
    dots = [dot for dot in ET.fromstring(svg).iter("circle") if dot.get("class") is None]
    first, middle, last = (float(dot.get("cx", "")) for dot in dots)
    assert middle - first == pytest.approx(last - middle, abs=0.11)


def test_a_legend_that_is_too_long_goes_on_in_a_row_of_its_own_above_the_curves():
    names = [f"a rather long name {i}" for i in range(6)]
    drawn = ET.fromstring(chart([Line(n, [(0.0, 0.0), (1.0, 1.0)], "black") for n in names], 500, 200))
    texts = {text.text: text for text in drawn.iter("text")}
    assert all(float(texts[n].get("x", "")) + 7 * len(n) <= 500 for n in names)
    rows = {float(texts[n].get("y", "")) for n in names}
    assert len(rows) > 1
    assert all(float(dot.get("cy", "")) > max(rows) for dot in drawn.iter("circle"))


def test_a_chart_survives_single_points_constants_and_nan():
    for points in ([(5.0, 0.3)], [(0.0, 1.0), (1.0, 1.0)], [(0.0, 0.5), (1.0, math.nan), (2.0, 0.7)]):
        svg = chart([Line("loss", points, "black")], 300, 120)
        ET.fromstring(svg)
        assert "nan" not in svg
    assert chart([Line("loss", [], "black")], 300, 120) == ""


@pytest.mark.slow
@IN_A_BROWSER
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_a_phone_and_answers_slider_clicks_and_pointers(workflow, width):
    page = write_report(workflow, tracking_uri=tracked_at(workflow))
    found = in_browser(
        page,
        "said.push(document.documentElement.scrollWidth <= window.innerWidth);"
        "const slider = document.querySelector('input[type=range]'), shown = () => "
        "[...document.querySelectorAll('.steps img')].filter(one => one.offsetParent).map(one => one.alt);"
        "said.push(shown()); slider.value = 0; slider.oninput(); said.push(shown());"
        "const whole = document.querySelector('dialog.whole');"
        "document.querySelector('.steps img.shown').click(); said.push(whole.open);"
        "whole.querySelector('img').click(); said.push(whole.open);"
        "const chart = document.querySelector('svg');"
        "chart.dispatchEvent(new Event('click', {bubbles: true}));"
        "said.push(whole.firstChild.tagName, chart.querySelector('circle.point title').textContent)",
        width,
    )
    images = [["images of step 30"], ["images of step 0"]]
    assert found == [True, *images, True, False, "svg", "overall 0: 0.25"]
