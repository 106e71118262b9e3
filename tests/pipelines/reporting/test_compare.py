"""Evaluations side by side: what may be compared, how sure a difference is, and a page that answers clicks
and keys in a real browser.
"""

import json
import re
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from browser import IN_A_BROWSER, in_browser

from pipelines.reporting.compare import compare, names_of
from pipelines.reporting.contenders import bootstrap, contender_of, pairings
from repfusion.evaluation.columns import outputs_column, write_items
from repfusion.evaluation.parts import parts_of
from repfusion.evaluation.record import Evaluation, EvaluationConfig, SuiteResult
from repfusion.files import write_json

PROMPTS = 12
TOOLS = """
const rows = () => [...document.querySelectorAll('.row')].filter(row => !row.hidden);
const count = () => said.push(rows().length);
const set = (name, value) => {
  const tool = document.querySelector(`[name=${name}]`);
  tool.value = value;
  tool.dispatchEvent(new Event('input'));
};
const press = (key, on = document.activeElement) =>
  on.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true, cancelable: true}));
"""


def evaluated(
    folder: Path,
    is_right: Callable[[int], bool] = lambda _: True,
    step: int = 5,
    prompts: int = PROMPTS,
    px: int = 8,
    outputs: bool = True,
    **fields,
) -> Path:
    """An evaluation as `evaluate_checkpoint` leaves it; the images are single grey tones."""
    config = EvaluationConfig.model_validate(
        {"suites": {"scenes": {"num_prompts": prompts, "include_new": False}}, **fields}
    )
    suite = config.build_suites()["scenes"]
    items = suite.items()
    rights = {item.key: float(is_right(number)) for number, item in enumerate(items)}
    scores = suite.score(items, [[] for _ in items]).model_copy(update={"by_item": rights, "reasons": {}})
    scores.values[scores.headline] = float(np.mean(list(rights.values())))
    result = SuiteResult(
        num_items=len(items), judge=suite.judge_version, rule=suite.rule_version, scores=scores
    )
    (folder / "scenes").mkdir(parents=True)
    write_items(folder / "scenes", items)
    if outputs:
        images = np.stack([np.full((px, px, 3), number % 256, np.uint8) for number in range(len(items))])
        for part in parts_of([1] * len(items)):
            own = images[part.images.start : part.images.stop]
            outputs_column(folder / "scenes", part.number).get({}, partial(np.array, own))
    evaluation = Evaluation(
        checkpoint=f"<{folder.name}>", step=step, config=config, suites={"scenes": result}, seconds=1.0
    )
    write_json(folder / "scores.json", evaluation.model_dump(mode="json"))
    return folder


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """The first is right on the first eight prompts, the second on every even one."""
    return [
        evaluated(tmp_path / "runs" / "a", lambda number: number < 8),
        evaluated(tmp_path / "runs" / "b", lambda number: number % 2 == 0),
    ]


def test_a_difference_is_of_paired_prompts_and_holds_its_mean(two):
    (pairing,) = pairings([contender_of(path) for path in two])
    shares = pairing.shares()
    assert shares.shape == (PROMPTS, 2) and shares.sum(0).tolist() == [8, 6]
    found = pairing.difference(1)
    assert found is not None
    mean, interval = found
    assert mean == pytest.approx(-2 / PROMPTS)
    assert interval.low < mean < interval.high
    assert pairing.difference(1) == found


def test_the_bootstrap_covers_the_mean_as_often_as_it_says():
    random, held = np.random.default_rng(1), 0
    for _ in range(100):
        _, interval = bootstrap(random.normal(0.3, 1, 80), draws=400)
        held += interval.low <= 0.3 <= interval.high
    assert 88 <= held <= 99


def test_prompts_that_are_not_the_same_are_left_out_and_counted(two):
    path = two[1] / "scenes" / "items.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[3]["prompt"] = "another"
    lines[5]["key"] = "99999"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (pairing,) = pairings([contender_of(one) for one in two])
    assert len(pairing.rows) == PROMPTS - 2 and pairing.num_left_out == 3
    page = compare(two, two[0].parent / "page.html").read_text()
    assert "3 prompts are not the same in all" in page


def trained(folder: Path, place: str = "evaluations") -> Path:
    """A training with two evaluations."""
    (folder / "checkpoints").mkdir(parents=True)
    for step in (10, 200):
        evaluated(folder / place / f"step_{step:08d}", step=step)
    return folder


def test_a_training_and_a_workflow_stand_for_their_last_evaluation(tmp_path):
    """A workflow keeps copies of scores, without images, in evaluate/."""
    workflow = trained(tmp_path / "workflow" / "train").parent
    shutil.copytree(workflow / "train" / "evaluations", workflow / "evaluate", ignore=lambda *_: {"scenes"})
    by_hand = trained(tmp_path / "by_hand", "evaluate")
    for path in (workflow, workflow / "train", by_hand):
        found = contender_of(path)
        assert found.evaluation.step == 200 and [one.step for one in found.history] == [10, 200]
        assert found.drawn("scenes")
    compare([workflow, by_hand], tmp_path / "page.html")
    trained(workflow / "other")
    with pytest.raises(ValueError, match=r"workflow: 2 trainings were evaluated; name one: .*other, .*train"):
        contender_of(workflow)
    with pytest.raises(ValueError, match="in place of a copy of its scores"):
        contender_of(workflow / "evaluate" / "step_00000200").drawn("scenes")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda a, b: (b / "scores.json").unlink(), r"b: no scores\.json, neither in it nor in evaluations/"),
        (
            lambda a, b: (b / "scenes/items.jsonl").unlink(),
            r"items\.jsonl is not there, .*b again",
        ),
        (
            lambda a, b: np.save(b / "scenes/outputs/00000.npy", np.zeros((3, 8, 8, 3), np.uint8)),
            "3 images; 12 items ask for 12",
        ),
        (
            lambda a, b: (b / "scenes/outputs/00000.npy").write_bytes(b"\x80\x04."),
            "scenes: .*; evaluate .*b again",
        ),
        (lambda a, b: (b / "scores.json").write_text("{}"), r"scores\.json is no evaluation"),
    ],
)
def test_what_cannot_be_compared_is_named(two, spoil, message, tmp_path):
    spoil(*two)
    with pytest.raises(ValueError, match=message):
        compare(two, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_one_evaluation_or_the_same_twice_is_refused(two, tmp_path):
    with pytest.raises(ValueError, match="1 evaluation; expected at least two"):
        compare(two[:1], tmp_path / "page.html")
    with pytest.raises(ValueError, match="the same evaluation twice"):
        compare([two[0], two[0] / "../a"], tmp_path / "page.html")


def test_the_page_needs_nothing_else_and_escapes_what_it_shows(two, tmp_path):
    other = evaluated(tmp_path / "runs" / "<c>", seed=3)
    page = compare([*two, other], tmp_path / "page.html").read_text()
    assert not re.search(r"(?:src|href)=[\"'](?!data:)", page) and "http" not in page
    assert "<c>" not in page and "&lt;c&gt;" in page
    assert "The evaluations differ in seed" in page


def test_names_are_what_tells_paths_apart(tmp_path):
    assert names_of([tmp_path / "x/a", tmp_path / "x/b/c"]) == ["a", "b/c"]
    assert names_of([tmp_path / "x", tmp_path / "x/b"]) == ["x", "b"]


@pytest.mark.slow
@IN_A_BROWSER
def test_filters_clicks_and_keys_do_what_they_say(two, tmp_path):
    page = compare(two, tmp_path / "page.html")
    prompt = contender_of(two[0]).drawn("scenes")["00001"].item["prompt"]
    found = in_browser(
        page,
        f"{TOOLS} count(); for (const rule of ['differ', 'right', 'wrong', '0', '1', 'all'])"
        "{ set('verdict', rule); count(); }"
        "set('group', 'counting'); count(); set('group', '');"
        f"set('search', {json.dumps(prompt.upper())}); said.push(rows()[0].dataset.prompt);"
        "said.push(document.querySelector('output').value);"
        "press('Escape'); count();"
        "const large = document.querySelector('dialog');"
        "press('/', document.body); said.push(document.activeElement.name);"
        "document.activeElement.blur(); press('j', document.body); press('j'); press('j');"
        "said.push(rows().indexOf(document.activeElement)); press('k');"
        "said.push(rows().indexOf(document.activeElement)); press('Enter'); said.push(large.open);"
        "said.push(large.querySelectorAll('img').length); press('ArrowRight');"
        "said.push(rows().indexOf(large.row)); large.querySelector('img').click(); said.push(large.open);"
        "rows()[4].querySelector('img').click(); said.push([large.open, rows().indexOf(large.row)])",
    )
    both, neither = 4, 2  # even ones below eight; odd ones from eight on
    assert found[:7] == [PROMPTS, PROMPTS - both - neither, both, neither, 4, 2, PROMPTS]
    assert found[7] == 2
    assert found[8] == prompt.lower() and found[9] == f"1 of {PROMPTS} prompts"
    assert found[10:] == [PROMPTS, "search", 2, 1, True, 2, 2, False, [True, 4]]


@pytest.mark.slow
@IN_A_BROWSER
def test_two_hundred_prompts_of_four_runs_are_there_within_two_seconds(tmp_path):
    paths: Sequence[Path] = [
        evaluated(tmp_path / f"runs/{name}", lambda number, by=by: number % by == 0, prompts=200, px=64)
        for name, by in (("a", 2), ("b", 3), ("c", 4), ("d", 5))
    ]
    page = compare(paths, tmp_path / "page.html")
    empty = tmp_path / "empty.html"
    empty.write_text("<html><body></body></html>")
    took = {}
    for path in (empty, page):
        started = time.monotonic()
        in_browser(path, "said.push(performance.now())")
        took[path] = time.monotonic() - started
    assert took[page] - took[empty] < 2
