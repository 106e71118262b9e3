"""GenEval: verdicts on recorded detections as computed by hand, and the whole way from an image to one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_judges import LABELS, save_clip, save_grounding_dino, save_mask2former, save_owlv2

from repfusion.evaluation.judges.colours import COLOURS, ColourJudge, cut_out
from repfusion.evaluation.judges.detections import Detection
from repfusion.evaluation.judges.detectors import load_detector
from repfusion.evaluation.judges.vocabulary import check_classes, class_ids
from repfusion.evaluation.suites.base import Item
from repfusion.evaluation.suites.published.geneval import GenEvalSuite, GenEvalSuiteConfig, read_geneval
from repfusion.evaluation.suites.published.geneval_rule import GenEvalRule, check_image, relations
from repfusion.evaluation.suites.published.outputs import missing_record

OFFICIAL, MENDED = GenEvalRule(True, 1.0), GenEvalRule(False, 1.0)
SIZE = 10.0


def at(x: float, y: float, score: float = 0.95, colour: str | None = None, size: float = SIZE) -> dict:
    """A recorded thing by its upper left corner."""
    thing = {"box": [x, y, x + size, y + size], "score": score}
    return thing if colour is None else {**thing, "colours": [float(one == colour) for one in COLOURS]}


def verdict(record: dict, include: list, tag: str, rule: GenEvalRule = OFFICIAL, exclude: list = ()) -> bool:
    found = check_image({"tag": tag, "include": include, "exclude": list(exclude)}, {"objects": record}, rule)
    assert bool(found.reason) == (not found.score)
    return bool(found.score)


@pytest.mark.parametrize(
    ("x", "y", "official", "mended"),
    [
        (-10, 0, {"left of"}, {"left of"}),  # boxes that touch: 10 px apart, 2 within the margin, 8/10
        (-2, 0, set(), set()),  # exactly the margin of a tenth of both sizes
        (-3, 0, set(), {"left of"}),  # 1/3 of the whole offset, all of the rest
        (-4, 0, set(), {"left of"}),  # 2/4 is no more than a half
        (-4.1, 0, {"left of"}, {"left of"}),
        (0, 30, {"below"}, {"below"}),
        (30, -30, {"right of", "above"}, {"right of", "above"}),
        (-10, 4, {"left of"}, {"left of"}),  # (8, 2) of 10.77, and of 8.25
        (0, 0, set(), set()),
    ],
)
def test_relations_are_those_computed_by_hand(x, y, official, mended):
    first, second = (100.0 + x, 100.0 + y, 110.0 + x, 110.0 + y), (100.0, 100.0, 110.0, 110.0)
    assert relations(first, second, True) == official
    assert relations(first, second, False) == mended


def test_all_six_tasks():
    dog, cat = {"class": "dog", "count": 1}, {"class": "cat", "count": 1}
    assert verdict({"dog": [at(0, 0, 0.31)]}, [dog], "single_object")
    assert not verdict({"dog": [at(0, 0, 0.3)]}, [dog], "single_object")  # has to be surer than 0.3
    assert verdict({"dog": [at(0, 0)], "cat": [at(50, 0)]}, [dog, cat], "two_object")
    assert not verdict({"dog": [at(0, 0)]}, [dog, cat], "two_object")
    three, four = [{"class": "dog", "count": 3}], [{"class": "dog", "count": 4}]
    dogs = [at(20 * i, 0) for i in range(3)]
    assert verdict({"dog": dogs}, three, "counting", exclude=four)
    assert verdict({"dog": [*dogs, at(80, 0, 0.9)]}, three, "counting", exclude=four)  # 0.9 does not count
    assert not verdict({"dog": [*dogs, at(80, 0, 0.901)]}, three, "counting", exclude=four)
    assert not verdict({"dog": dogs[:2]}, three, "counting", exclude=four)
    red = {**dog, "color": "red"}
    assert verdict({"dog": [at(0, 0, colour="red")]}, [red], "colors")
    assert not verdict({"dog": [at(0, 0, 0.9, "red"), at(9, 0, 0.95, "blue")]}, [red], "colors")
    blue = {**cat, "color": "blue"}
    record = {"dog": [at(0, 0, colour="red")], "cat": [at(50, 0, colour="blue")]}
    assert verdict(record, [red, blue], "color_attr")
    swapped = {"dog": [at(0, 0, colour="blue")], "cat": [at(50, 0, colour="red")]}
    assert not verdict(swapped, [red, blue], "color_attr")
    left = [cat, {**dog, "position": ["left of", 0]}]
    assert verdict({"cat": [at(50, 0)], "dog": [at(0, 0)]}, left, "position")
    assert not verdict({"cat": [at(0, 0)], "dog": [at(50, 0)]}, left, "position")
    assert not verdict({"dog": [at(0, 0)]}, left, "position")


def test_only_the_surest_count_and_every_pair_has_to_hold():
    two = {"class": "cat", "count": 2}
    left = [two, {"class": "dog", "count": 1, "position": ["left of", 0]}]
    cats = [at(50, 0, 0.9), at(90, 0, 0.8), at(-50, 0, 0.7)]
    assert verdict({"cat": cats, "dog": [at(0, 0)]}, left, "position")  # the third is not looked at
    cats[1]["box"], cats[2]["box"] = cats[2]["box"], cats[1]["box"]
    assert not verdict({"cat": cats, "dog": [at(0, 0)]}, left, "position")
    many = [at(12 * i, 0) for i in range(20)]
    seventeen = [{"class": "cat", "count": 17}]
    assert not verdict({"cat": many}, seventeen, "single_object")  # 16 of a class at most


def test_ties_and_overlaps():
    red = [{"class": "dog", "count": 1, "color": "red"}]
    tied = {"dog": [at(0, 0, 0.5, "red"), at(50, 0, 0.5, "blue")]}
    assert verdict(tied, red, "colors", MENDED)  # the first
    assert not verdict(tied, red, "colors", OFFICIAL)  # NumPy's order, turned round
    twice = {"dog": [at(0, 0, 0.99), at(0, 1, 0.95)]}  # 110 of 132 px shared
    one, two = [{"class": "dog", "count": 1}], [{"class": "dog", "count": 2}]
    assert not verdict(twice, one, "counting", exclude=two)
    assert verdict(twice, one, "counting", GenEvalRule(True, 0.8), exclude=two)
    assert not verdict(twice, one, "counting", GenEvalRule(True, 0.9), exclude=two)


LINES = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "position",
        "include": [
            {"class": "couch", "count": 1},
            {"class": "dog", "count": 1, "position": ["left of", 0]},
        ],
        "prompt": "a photo of a dog left of a couch",
    },
    {
        "tag": "color_attr",
        "include": [
            {"class": "dog", "count": 1, "color": "red"},
            {"class": "computer mouse", "count": 1, "color": "blue"},
        ],
        "prompt": "a photo of a red dog and a blue computer mouse",
    },
    {
        "tag": "counting",
        "include": [{"class": "dog", "count": 2}],
        "exclude": [{"class": "dog", "count": 3}],
        "prompt": "a photo of two dogs",
    },
]


def written(path: Path, lines: list) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("judges")
    return {"detector": save_mask2former(root / "mask2former"), "clip": save_clip(root / "clip")}


def suite_of(folders: dict[str, Path], path: Path, **fields) -> GenEvalSuite:
    return GenEvalSuite(GenEvalSuiteConfig(file=written(path / "p.jsonl", LINES), **folders, **fields))


def test_files_of_other_versions_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"p.jsonl:1: unknown key 'klass'[^$]*fields are tag, include"):
        read_geneval(written(tmp_path / "p.jsonl", [{**LINES[0], "klass": 1}]), False)
    missing = {name: value for name, value in LINES[0].items() if name != "tag"}
    with pytest.raises(ValueError, match=r"p.jsonl:2: tag: Field required"):
        read_geneval(written(tmp_path / "p.jsonl", [LINES[0], missing]), False)
    with pytest.raises(ValueError, match="the official file has"):
        read_geneval(written(tmp_path / "p.jsonl", LINES), True)
    ahead = {**LINES[1], "include": [LINES[1]["include"][1]]}
    with pytest.raises(ValueError, match="dog is left of thing 0, which does not come before it"):
        read_geneval(written(tmp_path / "p.jsonl", [ahead]), False)
    (tmp_path / "p.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"p\.jsonl:1: no JSON"):
        read_geneval(tmp_path / "p.jsonl", False)


def test_a_detector_without_a_class_is_refused_before_anything_is_drawn(folders, tmp_path):
    check_classes(folders["detector"], ["couch", "computer mouse", "dog"], "p.jsonl")
    assert class_ids(folders["detector"])["couch"] == LABELS.index("sofa")
    lines = [{**LINES[0], "include": [{"class": "zebra", "count": 1}]}]
    path = written(tmp_path / "q.jsonl", lines)
    suite = GenEvalSuite(GenEvalSuiteConfig(file=path, **folders))
    with pytest.raises(ValueError, match=r"lacks 1 of the 1 classes that .*q.jsonl asks for: zebra"):
        suite.items()


def test_missing_images_are_counted(folders, tmp_path):
    """An image that is not there is wrong, or, officially, not counted; the score says of how many."""
    right = {"objects": {"bench": [at(0, 0)]}}
    records = [right, right, right, missing_record("undecodable_image", "cut short")]
    (item, *_) = suite_of(folders, tmp_path).items()
    for official, expected in ((False, 0.75), (True, 1.0)):
        suite = suite_of(folders, tmp_path)
        suite.rule = GenEvalRule(official, 1.0)
        object.__setattr__(suite.config, "official", official)
        scores = suite.score([item], [records])
        assert scores.values["overall"] == expected and scores.by_item == {"00000": 0.75}
        assert scores.counts["judged"].correct == 3 and scores.counts["judged"].total == 4
        assert scores.counts["missing/undecodable_image"].correct == 1
        assert scores.values["judged"] == 0.75 and "cut short" in scores.reasons["00000"]


def test_the_overall_score_is_the_mean_over_tasks(folders, tmp_path):
    suite = suite_of(folders, tmp_path, num_images=2)
    items = suite.items()
    right, wrong = {"objects": {"bench": [at(0, 0)]}}, {"objects": {}}
    placed = {"objects": {"couch": [at(50, 0)], "dog": [at(0, 0)]}}
    answers = [[right, wrong], [placed, placed], [wrong, wrong], [wrong, wrong]]
    scores = suite.score(items, answers)
    assert scores.values["overall"] == pytest.approx((0.5 + 1 + 0 + 0) / 4)
    assert scores.values["prompts"] == 0.5 and scores.counts["task/position"].correct == 2
    interval = scores.intervals["overall"]
    assert interval.low < scores.values["overall"] < interval.high
    assert suite.score(items, json.loads(json.dumps(answers))) == scores
    assert {value.name for value in suite.values} >= scores.values.keys()


def test_the_whole_way_from_an_image_to_a_verdict(folders, tmp_path):
    """Mask2Former's records are what its outputs say by MMDetection's formula, computed here otherwise."""
    suite = suite_of(folders, tmp_path, num_images=1)
    items = suite.items()
    images = [np.random.default_rng(i).integers(0, 256, (40, 56, 3), np.uint8) for i in range(len(items))]
    answers = suite.judge("cpu")(items, [[image] for image in images])
    scores = suite.score(items, json.loads(json.dumps(answers)))
    assert scores.counts["judged"].correct == 4 and 0 <= scores.values["overall"] <= 1
    detector = load_detector(folders["detector"], "cpu")
    found = detector(images[1], ["couch", "dog"])
    inputs = detector.processor(images[1], input_data_format="channels_last", return_tensors="pt")
    with torch.no_grad():
        out = detector.model(**inputs)
    likely = out.class_queries_logits[0].softmax(-1)[:, :-1]
    assert sum(map(len, found.values())) == 2 * len(likely)  # 24 pairs, all of them among the 100
    best = found["dog"][0]
    height, width = int(inputs["pixel_mask"][0].any(1).sum()), int(inputs["pixel_mask"][0].any(0).sum())
    logits = torch.nn.functional.interpolate(
        out.masks_queries_logits, inputs["pixel_mask"].shape[1:], mode="bilinear"
    )
    logits = torch.nn.functional.interpolate(logits[..., :height, :width], (40, 56), mode="bilinear")[0]
    scored = [
        float(likely[q, 1]) * float(mask.sigmoid()[mask > 0].mean() if (mask > 0).any() else 0)
        for q, mask in enumerate(logits)
    ]
    assert best.score == pytest.approx(max(scored), rel=1e-4)
    mask = (logits[int(np.argmax(scored))] > 0).numpy()
    assert np.array_equal(best.mask, mask)
    rows, columns = np.nonzero(mask)
    assert best.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    recorded = answers[1][0]["objects"]["dog"]
    assert [one["score"] for one in recorded] == [one.score for one in found["dog"] if one.score > 0.1]


def test_colours_are_told_by_the_thing_alone(folders):
    image = np.random.default_rng(0).integers(0, 100, (20, 30, 3), np.uint8)
    mask = np.zeros((20, 30), bool)
    mask[5:10, 3:9] = True
    cut = cut_out(image, Detection((3.0, 4.6, 10.4, 11.0), 1.0, mask))
    assert cut.shape == (6, 7, 3) and (cut[5] == 0x99).all()
    assert np.array_equal(cut[:5, :6], image[5:10, 3:9])
    assert cut_out(image, Detection((30.0, 20.0, 30.0, 20.0), 1.0)).shape == (1, 1, 3)
    judge = ColourJudge(folders["clip"], "cpu")
    things = [Detection((0.0, 0.0, 20.0, 20.0), 1.0), Detection((3.0, 5.0, 9.0, 10.0), 1.0, mask)]
    first, second = judge(image, things, "dog")
    assert len(first) == len(COLOURS) and first != second and judge(image, [], "dog") == []
    model, tokenizer = judge.model, judge.tokenizer
    with torch.no_grad():
        texts = []
        for template in ("a photo of a red dog", "a photo of a red-colored dog", "a photo of a red object"):
            ids = tokenizer(template, add_special_tokens=False).input_ids
            row = torch.tensor([[tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]])
            texts.append(model.get_text_features(row).pooler_output[0])
        mean = torch.stack([text / text.norm() for text in texts]).mean(0)
        pixels = judge.processor(image[:20, :20], return_tensors="pt")["pixel_values"]
        seen = model.get_image_features(pixels).pooler_output[0]
    assert first[0] == pytest.approx(float(seen @ mean / seen.norm() / mean.norm()), abs=1e-5)


@pytest.mark.parametrize("save", [save_owlv2, save_grounding_dino])
def test_detectors_that_are_asked_in_words(save, tmp_path, monkeypatch):
    from repfusion.evaluation.judges import asked_detectors

    monkeypatch.setattr(asked_detectors, "FLOOR", 0.0)
    detector = load_detector(save(tmp_path), "cpu")
    check_classes(tmp_path, ["zebra"], "p.jsonl")  # knows any
    image = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
    found = detector(image, ["dog", "bench"])
    everything = [one for things in found.values() for one in things]
    assert len(everything) == (16 if save is save_owlv2 else 6)  # each box once, for its likeliest class
    for things in found.values():
        assert [one.score for one in things] == sorted((one.score for one in things), reverse=True)
        assert all(one.mask is None and one.box[2] <= 56 and one.box[3] <= 40 for one in things)
    alone = detector(image, ["dog"])["dog"]
    assert len(alone) == len(everything)


def test_an_unknown_detector_is_refused(folders):
    with pytest.raises(ValueError, match="model_type 'clip'; expected 'mask2former', 'owlv2' or"):
        load_detector(folders["clip"], "cpu")


def test_an_item_has_as_many_answers_as_images(folders, tmp_path):
    suite = suite_of(folders, tmp_path)
    items: list[Item] = suite.items()
    with pytest.raises(ValueError, match="item 00000: 1 answers; expected 4"):
        suite.score(items[:1], [[{"objects": {}}]])
