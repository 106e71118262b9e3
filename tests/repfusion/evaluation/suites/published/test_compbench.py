"""T2I-CompBench++: verdicts on recorded answers as computed by hand, its files, and BLIP's probability of
yes against transformers' own answer.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_blip import ASK, save_blip
from tiny_judges import save_owlv2

from repfusion.evaluation.judges.blip import BlipJudge
from repfusion.evaluation.suites.build import build_suite
from repfusion.evaluation.suites.published.compbench.prompts import Names, phrases_of, truth_of
from repfusion.evaluation.suites.published.compbench.rule import check_compbench, relation_score
from repfusion.evaluation.suites.published.compbench.suite import CompBenchSuite, CompBenchSuiteConfig
from repfusion.evaluation.suites.published.outputs import missing_record

SIZE = [479, 479]


def at(x: float, y: float, score: float = 0.8, side: float = 100.0) -> dict:
    """A recorded thing by its centre."""
    return {"box": [x - side / 2, y - side / 2, x + side / 2, y + side / 2], "score": score}


def box(x: float, y: float, side: float = 100.0) -> tuple[float, float, float, float]:
    left, top, right, bottom = at(x, y, side=side)["box"]
    return left, top, right, bottom


@pytest.mark.parametrize(
    ("relation", "x", "y", "official", "mended"),
    [
        ("on the left of", -120, 0, 1.0, 1.0),
        ("on the right of", -120, 0, 0.0, 0.0),
        ("on the left of", -120, 120, 0.0, 0.0),  # no further along one axis than along the other
        ("on the left of", -121, 120, 1.0, 1.0),
        ("on the left of", -50, 0, 0.3, 0.3),  # half of either is shared: a third of the union, 0.1 / (1/3)
        ("on the left of", -90, 0, 1.0, 1.0),  # 1,000 of 19,000 px
        ("on the top of", 0, -120, 1.0, 1.0),
        ("on the bottom of", 0, -120, 0.0, 0.0),
        ("on the bottom of", 10, 130, 1.0, 1.0),
        ("on top of", 0, -120, 0.0, 1.0),
        ("next to", 149, 0, 1.0, 1.0),
        ("next to", 300, 0, 1.0, 0.5),  # officially within 150 px along either axis
        ("near", 300, 150, 0.5, 0.5),
        ("on side of", 150, 200, 0.75, 0.75),
    ],
)
def test_relations_hold_as_computed_by_hand(relation, x, y, official, mended):
    other = box(200, 200)
    assert relation_score(relation, box(200 + x, 200 + y), other, True) == pytest.approx(official)
    assert relation_score(relation, box(200 + x, 200 + y), other, False) == pytest.approx(mended)


def score(truth: dict, record: dict, official: bool = True, threshold: float = 0.5) -> float:
    return check_compbench(truth, record, official, threshold).score


def test_spatial_scores_as_computed_by_hand():
    truth = {"category": "spatial", "relation": "on the left of", "things": ["dog", "bench"]}

    def spatial(dogs: list, benches: list, size: list = SIZE, **changes) -> float:
        return score(truth, {"objects": {"dog": dogs, "bench": benches}, "size": size}, **changes)

    assert spatial([at(50, 50, 0.8)], [at(250, 50, 0.6)]) == pytest.approx(0.25 * 0.8 + 0.25 * 0.6 + 0.5)
    # the surest of each class are looked at
    assert spatial([at(50, 50, 0.9), at(300, 50)], [at(250, 50, 0.6)]) == pytest.approx(0.875)
    assert spatial([at(300, 50, 0.9)], [at(100, 50, 0.9)]) == 0  # 0.45 is below a half
    assert spatial([at(300, 50, 1.0)], [at(100, 50, 1.0)]) == 0.5
    assert spatial([at(50, 50, 1.0)], []) == 0
    assert spatial([at(50, 50, 0.5)], [at(250, 50)]) == 0  # has to be surer than a half
    assert spatial([at(50, 50, 0.5)], [at(250, 50)], threshold=0.4) == pytest.approx(0.825)
    near = {**truth, "relation": "near"}
    record = {"objects": {"dog": [at(100, 100, 0.8)], "bench": [at(700, 700, 0.8)]}, "size": [958, 958]}
    # 600 px of 958 are 300 of 479
    assert score(near, record) == pytest.approx(0.4 + 0.25)
    persons = {**truth, "things": ["person", "person"]}
    record = {"objects": {"person": [at(50, 50, 0.9), at(250, 50, 0.7)]}, "size": SIZE}
    assert score(persons, record) == 0  # officially both are the same person
    assert score(persons, record, official=False) == pytest.approx(0.25 * 0.9 + 0.25 * 0.7 + 0.5)
    assert check_compbench(truth, {"objects": {}, "size": SIZE}, True, 0.5).reason == "no dog; no bench"


def test_numeracy_is_half_presence_and_half_the_number():
    dogs = [at(100 * i, 0) for i in range(3)]
    record = {"objects": {"dog": dogs, "bench": [at(0, 0)]}, "size": SIZE}

    def counted(*counts: tuple[str, int], official: bool = True) -> float:
        return score({"category": "numeracy", "counts": list(counts)}, record, official)

    assert counted(("dog", 3)) == 1 and counted(("dog", 2)) == 0.5 and counted(("cat", 1)) == 0
    assert counted(("dog", 3), ("bench", 2)) == 0.75
    assert counted(("dog", 3), ("bench", 1), ("cat", 2), ("dog", 1)) == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    # one and two of a class: officially three are neither's number, mended they are both's
    assert counted(("dog", 1), ("dog", 2)) == 0.5
    assert counted(("dog", 1), ("dog", 2), official=False) == 1
    # boxes that share more than 0.9 of their union or of either are one thing
    record["objects"]["dog"] = [at(50, 50), at(52, 50), at(50, 50, side=20), at(62, 50)]
    assert counted(("dog", 2)) == 1


def test_binding_is_the_product_over_phrases():
    truth = {"category": "color", "phrases": ["a red dog", "a blue bench"]}
    found = check_compbench(truth, {"yes": [0.91234567, 0.4]}, True, 0.5)
    assert found.score == round(0.9123 * 0.4, 4) and found.reason == "no a blue bench"
    assert score(truth, {"yes": [0.91234567, 0.4]}, official=False) == pytest.approx(0.91234567 * 0.4)


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def test_prompts_say_what_is_asked_for(tmp_path):
    folder = write(tmp_path, new_objects="dog - dogs\ncell phone - cell phones\nboy - boys\nsheep - sheep\n")
    names = Names(folder / "new_objects.txt")
    prompt = "Three dogs, a boy and eight cell phones. two sheep, four unknowns"
    assert names.counts(prompt) == [("dog", 3), ("boy", 1), ("cell phone", 8), ("sheep", 2)]
    truth = truth_of("numeracy", "two boys", {}, names, "x")
    assert truth == {"category": "numeracy", "counts": [["person", 2]]}
    truth = truth_of("spatial", "a big dog on the top of a woman.", {}, None, "x")
    assert truth["relation"] == "on the top of" and truth["things"] == ["dog", "person"]
    assert phrases_of("A red dog, a blue bench and the sky with clouds.") == [
        "A red dog",
        "a blue bench",
        "the sky",
        "clouds",
    ]
    for category, prompt, lacks in (
        ("numeracy", "dogs", "a number and a name"),
        ("spatial", "a dog under a cat", "two things and one of"),
        ("color", "and", "a noun phrase"),
    ):
        with pytest.raises(ValueError, match=f"file: prompt 3, '{prompt}': expected {lacks}"):
            truth_of(category, prompt, {}, names, "file: prompt 3")
    write(tmp_path, new_objects="dog dogs\n")
    with pytest.raises(ValueError, match=r"new_objects\.txt:1: 'dog dogs'; expected `singular - plural`"):
        Names(folder / "new_objects.txt")


def test_what_is_missing_is_said_before_anything_is_drawn(tmp_path):
    folder = write(tmp_path / "files", color_val="a red dog\na blue bench\n")
    with pytest.raises(ValueError, match="blip is not given, which judges color"):
        CompBenchSuiteConfig(folder=folder, categories=("color",))
    with pytest.raises(ValueError, match="detector is not given, which judges spatial, numeracy"):
        CompBenchSuiteConfig(folder=folder, categories=("spatial", "numeracy"))
    values = {"folder": folder, "categories": ("color",), "blip": tmp_path / "blip"}
    with pytest.raises(ValueError, match="phrases is not given; an official score of color"):
        CompBenchSuiteConfig(**values, official=True)
    lines = tmp_path / "phrases.jsonl"
    lines.write_text(json.dumps({"prompt": "a red dog", "phrases": ["a red dog", "top"]}) + "\n")
    official = CompBenchSuiteConfig(**values, official=True, phrases=lines)
    with pytest.raises(ValueError, match="2 prompts, the official file has 300"):
        CompBenchSuite(official).items()
    write(folder, color_val="a red dog\n" * 299 + "a blue bench\n")
    with pytest.raises(ValueError, match=r"prompt 300, 'a blue bench': .* has no line of it"):
        CompBenchSuite(official).items()
    mended = CompBenchSuite(CompBenchSuiteConfig(**values, phrases=lines))
    items = mended.items()
    assert items[0].key == "color/000" and items[0].truth["phrases"] == ["a red dog"]
    assert items[299].truth["phrases"] == ["a blue bench"] and items[0].num_outputs == 10


def test_categories_are_means_and_missing_images_are_counted(tmp_path):
    folder = write(tmp_path, color_val="a red dog\na blue bench\n", spatial_val="a dog near a bench\n")
    values = {"folder": folder, "blip": tmp_path, "detector": save_owlv2(tmp_path / "owl"), "num_images": 2}
    mended = CompBenchSuite(CompBenchSuiteConfig(**values, categories=("color", "spatial")))
    items = mended.items()
    near = {"objects": {"dog": [at(50, 50, 1.0)], "bench": [at(90, 50, 1.0)]}, "size": SIZE}
    answers = [
        [{"yes": [1.0]}, {"yes": [0.5]}],
        [{"yes": [0.25]}, missing_record("missing_image", "gone")],
        [near, near],
    ]
    found = mended.score(items, answers)
    assert found.values["category/color"] == pytest.approx((1 + 0.5 + 0.25 + 0) / 4)
    assert found.values["overall"] == pytest.approx((0.4375 + 1) / 2)
    assert found.counts["judged"].correct == 5 and found.intervals["overall"].low >= 0
    official = CompBenchSuite(mended.config.model_copy(update={"official": True}))
    assert official.score(items, answers).values["category/color"] == pytest.approx(1.75 / 3)
    assert mended.rule_version != official.rule_version
    assert set(found.values) <= {value.name for value in mended.values}
    assert isinstance(build_suite(mended.config, 0), CompBenchSuite)


@torch.no_grad()
def test_blips_probability_is_that_of_its_own_first_word(tmp_path):
    judge = BlipJudge(save_blip(tmp_path / "blip"), "cpu")
    image = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    phrases = ["a red dog", "A (blue) bench.!"]
    found = judge(image, phrases)
    assert judge.ids_of(phrases[0]) == [ASK, 7, 8, 9, 6, 3] and judge.ids_of(phrases[1]) == [
        ASK,
        7,
        10,
        11,
        6,
        3,
    ]
    pixels = judge.processor(image, input_data_format="channels_last", return_tensors="pt")["pixel_values"]
    for phrase, got in zip(phrases, found, strict=True):
        ids = torch.tensor([judge.ids_of(phrase)])
        out = judge.model.generate(
            input_ids=ids,
            pixel_values=pixels,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=1,
            output_logits=True,
            return_dict_in_generate=True,
        )
        yes, no = out.logits[0][0, [4, 5]].softmax(-1)
        assert got == pytest.approx(float(yes / (yes + no)), abs=1e-5)
    assert found[0] != found[1] and judge(image, []) == []
    large = BlipJudge(tmp_path / "blip", "cpu", image_size=32)
    assert large(image, phrases) != found
    with pytest.raises(ValueError, match="an answer begins with number 12; expected one more"):
        BlipJudge(save_blip(tmp_path / "small", vocab_size=13), "cpu")
