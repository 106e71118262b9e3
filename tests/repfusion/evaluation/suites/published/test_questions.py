"""Suites whose judge answers questions: scores as computed by hand, judges that always say the same, and
files and answers that are none.
"""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tiny_judges import save_always
from tiny_vlms import save_qwen3_vl

from repfusion.evaluation.judges.questions import QuestionJudge, QuestionJudgeConfig
from repfusion.evaluation.suites.base import Item, Scores, Suite
from repfusion.evaluation.suites.build import build_suite
from repfusion.evaluation.suites.published.dpg import COLUMNS, DPGSuite, DPGSuiteConfig, read_dpg
from repfusion.evaluation.suites.published.genai import GenAISuite, GenAISuiteConfig
from repfusion.evaluation.suites.published.geneval2 import (
    GenEval2Suite,
    GenEval2SuiteConfig,
    geometric_mean,
    soft_scores,
    variants_of,
)
from repfusion.evaluation.suites.published.oneig import OneIGSuite, OneIGSuiteConfig
from repfusion.evaluation.suites.published.outputs import missing_record
from repfusion.evaluation.suites.published.wise import WISESuite, WISESuiteConfig
from repfusion.evaluation.suites.published.yes_no import yes_or_no, zeroed
from repfusion.request import Request

IMAGE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)


class Saying(dict[str, QuestionJudgeConfig]):
    """Judges that always say one word, by it, each written when it is needed."""

    def __init__(self, root: Path):
        super().__init__()
        self.root = root

    def __missing__(self, word: str) -> QuestionJudgeConfig:
        self[word] = QuestionJudgeConfig(folder=save_always(self.root / word, word), precision="float32")
        return self[word]


@pytest.fixture(scope="module")
def saying(tmp_path_factory) -> Saying:
    return Saying(tmp_path_factory.mktemp("always"))


def write_json(path: Path, value) -> Path:
    path.write_text(json.dumps(value))
    return path


def dpg_file(path: Path, rows: Sequence[Sequence] | None = None, columns: Sequence[str] = COLUMNS) -> Path:
    """Two prompts; in the second, questions 3 and 2 depend on 1 through each other, and 3 comes first."""
    rows = rows or [
        ("a", "a dog on a mat", 1, "0", "entity - whole (dog)", "Is there a dog?"),
        ("a", "a dog on a mat", 2, "1", "attribute - color (dog, red)", "Is the dog red?"),
        ("b", "a cat", 1, "0", "entity - whole (cat)", "Is there a cat?"),
        ("b", "a cat", 3, "2", "relation - spatial (cat)", "Is it on a mat?"),
        ("b", "a cat", 2, "1", "entity - part (tail)", "Has it a tail?"),
    ]
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([columns, *rows])
    return path


GENEVAL2 = {
    "prompt": "two dogs",
    "atom_count": 2,
    "vqa_list": [["How many dogs are in the image?", "two"], ["Are there any dogs in the image?", "Yes"]],
    "skills": ["count", "object"],
}


def suites_of(tmp_path: Path, judge: QuestionJudgeConfig) -> dict[str, Suite]:
    """Every suite that asks yes or no, over files of its own."""
    (tmp_path / "g2.jsonl").write_text(
        json.dumps({**GENEVAL2, "vqa_list": [["Any dogs?", "Yes"]], "skills": ["object"]})
    )
    rows = [{"prompt_id": one, "Prompt": "it", "Explanation": "a dog", "Category": "c"} for one in (1, 500)]
    asked = {"question": {"1": "A dog?", "2": "Is it red?"}, "dependency": {"1": [0], "2": [1]}}
    (tmp_path / "q").mkdir(exist_ok=True)
    for name in ("anime", "human", "object"):
        write_json(tmp_path / "q" / f"{name}.json", {"000": asked})
    (tmp_path / "oneig.csv").write_text("category,id,prompt_en\nPortrait,000,a man\nText_Rendering,000,a\n")
    images = {"num_images": 1}
    configs = [
        GenEval2SuiteConfig(file=tmp_path / "g2.jsonl", judge=judge),
        DPGSuiteConfig(file=dpg_file(tmp_path / "dpg.csv"), judge=judge, **images),
        WISESuiteConfig(files=(write_json(tmp_path / "w.json", rows),), judge=judge, version="verified"),
        GenAISuiteConfig(file=write_json(tmp_path / "g.json", {"7": {"prompt": "a dog"}}), judge=judge),
        OneIGSuiteConfig(prompts=tmp_path / "oneig.csv", questions=tmp_path / "q", judge=judge, **images),
    ]
    return {config.kind: build_suite(config, 0) for config in configs}


def run(suite: Suite, image: np.ndarray = IMAGE) -> Scores:
    items = suite.items()
    answers = suite.judge("cpu")(items, [[image] * item.num_outputs for item in items])
    scores = suite.score(items, json.loads(json.dumps(answers)))
    assert {one.name for one in suite.values} >= {name for name in scores.values if "fine/" not in name}
    return scores


WORDS = [("Yes", 1.0), ("no", 0.0), ("maybe", 0.0)]
CASES = [(kind, *one) for one in WORDS for kind in ("geneval2", "dpg", "wise", "genai", "oneig")]
FAST = [("geneval2", "Yes", 1.0), ("dpg", "no", 0.0)]


@pytest.mark.parametrize(
    ("kind", "word", "expected"),
    [one if one in FAST else pytest.param(*one, marks=pytest.mark.slow) for one in CASES],
)
def test_judges_that_always_say_the_same_give_the_extreme_scores(kind, word, expected, saying, tmp_path):
    scores = run(suites_of(tmp_path, saying[word])[kind])
    assert scores.headline_value == pytest.approx(expected, abs=1e-6)
    assert scores.values["judged"] == 1.0
    assert scores.values["unexpected_answers"] == float(word == "maybe")
    assert all(share == pytest.approx(expected, abs=1e-6) for share in scores.by_item.values())


@pytest.mark.slow
def test_a_black_image_is_none_to_oneig(saying, tmp_path):
    scores = run(suites_of(tmp_path, saying["Yes"])["oneig"], np.zeros_like(IMAGE))
    assert scores.headline_value == 0 and scores.counts["missing/black_image"].correct == 1


def test_a_no_takes_with_it_what_depends_on_it():
    depends = {1: [0], 3: [2], 2: [1], 4: [0]}
    said = {1: 0.0, 3: 1.0, 2: 1.0, 4: 1.0}
    assert zeroed(said, depends, "ancestors") == {1: 0, 3: 0, 2: 0, 4: 1}
    assert zeroed(said, depends, "in_order") == {1: 0, 3: 1, 2: 0, 4: 1}  # 3 comes before 2
    assert zeroed(said, {1: [0], 2: [1], 3: [2], 4: [0]}, "in_order") == {1: 0, 3: 0, 2: 0, 4: 1}
    assert zeroed(said, depends, "parents") == {1: 0, 3: 1, 2: 0, 4: 1}
    assert zeroed({1: 1.0, 2: 1.0}, {1: [2], 2: [1]}, "ancestors") == {1: 1, 2: 1}  # ends in a circle too


@pytest.mark.parametrize(
    ("said", "answer"),
    [("yes", True), (" Yes.", True), ("no, it is not", False), ("NO", False), ("maybe", None), ("", None)],
)
def test_answers_are_yes_or_no_or_neither(said, answer):
    assert yes_or_no(said) is answer


def dpg_of(tmp_path: Path, judge: QuestionJudgeConfig, official: bool = False, rows=None) -> DPGSuite:
    suite = DPGSuite(DPGSuiteConfig(file=dpg_file(tmp_path / "d.csv", rows), judge=judge, num_images=2))
    object.__setattr__(suite.config, "official", official)
    return suite


def dpg_items(official: bool, path: Path) -> list[Item]:
    """The items of a file that is not the whole official one."""
    rows = read_dpg(path, False)
    if official:
        first = next(iter(rows.values()))
        first["questions"] = first["questions"][1:]
    return [Item(key, Request(one["text"]), 2, {"questions": one["questions"]}) for key, one in rows.items()]


def test_dpg_as_computed_by_hand(saying, tmp_path):
    """Officially the first row is passed over, so that the first prompt fails and vanishes; categories are of
    the last image, before any zeroing.
    """
    said = [
        [{"said": ["yes", "yes"]}, {"said": ["no", "yes"]}],
        [{"said": ["no", "yes", "yes"]}, {"said": ["yes", "Yes", "no"]}],
    ]
    suite = dpg_of(tmp_path, saying["Yes"])
    scores = suite.score(suite.items(), said)
    # a: 2/2 and, 2 taken by 1, 0/2; b: all taken by 1, 0/3; then Yes counts, but 3 is taken by 2, 1/3
    assert scores.values["dpg"] == pytest.approx(((1 + 0) / 2 + (0 + 1 / 3) / 2) / 2)
    assert scores.values["category/entity"] == pytest.approx(np.mean([1, 0, 0, 0, 1, 0]))
    assert scores.values["fine/attribute - color"] == pytest.approx(0.5)
    assert scores.counts["unexpected_answers"].total == 10 and scores.values["unexpected_answers"] == 0
    official = dpg_of(tmp_path, saying["Yes"], official=True)
    items = dpg_items(True, tmp_path / "d.csv")
    cut = [[{"said": one["said"][1:]} for one in said[0]], said[1]]
    scores = official.score(items, cut)
    # b: 1 no, 3 kept since 2 is still yes, then 2 taken: 1/3; then `Yes` is no yes: 1 alone
    assert scores.values["dpg"] == pytest.approx((1 / 3 + 1 / 3) / 2)
    assert scores.counts["prompts"].correct == 1 and scores.counts["prompts"].total == 2
    assert scores.values["category/relation"] == 0.0 and scores.values["category/entity"] == 0.5
    assert scores.counts["orphans"].correct == 1


def test_a_missing_image_of_dpg_is_wrong_or_officially_fails_its_prompt(saying, tmp_path):
    gone = missing_record("missing_image", "b/1")
    said = [[{"said": ["yes", "yes"]}] * 2, [{"said": ["yes"] * 3}, gone]]
    suite = dpg_of(tmp_path, saying["Yes"])
    scores = suite.score(suite.items(), said)
    assert scores.values["dpg"] == 0.75 and scores.counts["missing/missing_image"].correct == 1
    official = dpg_of(tmp_path, saying["Yes"], official=True)
    assert official.score(suite.items(), said).values["dpg"] == 1.0
    assert official.score(suite.items(), said).values["judged"] == 0.75


def test_files_of_dpg_that_are_none(tmp_path):
    columns = [name for name in COLUMNS if name != "dependency"]
    with pytest.raises(ValueError, match="lacks the columns dependency; it has item_id"):
        read_dpg(dpg_file(tmp_path / "d.csv", [("a", "b", 1, "t (x)", "q?")], columns), False)
    for row, said in [
        (("a", "t", "x", "0", "t", "q"), "proposition_id 'x' and dependency '0'; expected a number"),
        (("a", "t", 1, "1", "t", "q"), "question 1 depends on itself"),
        (("a", "t", 1, "0"), "data row 1 is cut short before tuple"),
    ]:
        with pytest.raises(ValueError, match=said):
            read_dpg(dpg_file(tmp_path / "d.csv", [row]), False)
    with pytest.raises(ValueError, match="a has question 1 twice"):
        read_dpg(dpg_file(tmp_path / "d.csv", [("a", "t", 1, "0", "t", "q")] * 2), False)
    with pytest.raises(ValueError, match="2 prompts, the official file has 1065"):
        read_dpg(dpg_file(tmp_path / "d.csv"), True)


def test_soft_tifa_as_computed_by_hand(saying, tmp_path):
    assert variants_of("Yes") == ["Yes", "yes", " Yes", " yes"]
    assert variants_of("two") == ["two", "Two", "2", " two", " Two", " 2"]
    count = {"two": [5, "two", 0.25], " two": [6, " two", 0.25], "2": [7, "2", 0.25], " 2": [8, " ", 0.125]}
    count["Two"] = [5, "two", 0.25]  # begins with a token that another variant has
    record = {
        "answers": [{"said": "two", "variants": count}, {"said": "?", "variants": {"Yes": [9, "Yes", 0.25]}}]
    }
    assert soft_scores(record, official=True) == [1.125, 0.25]
    assert soft_scores(record, official=False) == [0.75, 0.25]
    (tmp_path / "g.jsonl").write_text(json.dumps(GENEVAL2))
    suite = GenEval2Suite(GenEval2SuiteConfig(file=tmp_path / "g.jsonl", judge=saying["Yes"]))
    scores = suite.score(suite.items(), [[record]])
    assert scores.values["soft_tifa_gm"] == pytest.approx(np.sqrt(0.75 * 0.25))
    assert scores.values["soft_tifa_am"] == 0.5 and scores.values["skill/count"] == 0.75
    assert scores.counts["unexpected_answers"].correct == 1
    assert geometric_mean([0.5, 0.0]) == 0.0
    gone = suite.score(suite.items(), [[missing_record("missing_image", "")]])
    assert gone.values["soft_tifa_gm"] == 0.0 and gone.values["skill/count"] == 0.0
    (tmp_path / "g.jsonl").write_text(json.dumps({**GENEVAL2, "skills": ["count"]}))
    with pytest.raises(ValueError, match="2 questions and 1 skills"):
        suite.items()
    official = GenEval2SuiteConfig(file=tmp_path / "g.jsonl", judge=saying["Yes"], official=True)
    (tmp_path / "g.jsonl").write_text(json.dumps(GENEVAL2))
    with pytest.raises(ValueError, match="1 prompts, the official file has 800"):
        GenEval2Suite(official).items()


def wise_of(
    tmp_path: Path, judge: QuestionJudgeConfig, version: str, ids: Sequence[int], **fields
) -> WISESuite:
    rows = [{"prompt_id": one, "Prompt": f"p{one}", "Explanation": "e", "Subcategory": "s"} for one in ids]
    files = (write_json(tmp_path / "w.json", rows),)
    return WISESuite(WISESuiteConfig(files=files, judge=judge, version=version, **fields))


def test_wise_as_computed_by_hand(saying, tmp_path):
    ids = [1, 401, 568, 701, 801, 901]
    legacy = wise_of(tmp_path, saying["Yes"], "legacy", ids)
    items = legacy.items()
    assert [item.truth["category"] for item in items] == [
        "culture", "time", "space", "biology", "physics", "chemistry",
    ]  # fmt: skip
    best = "Consistency: 2\nRealism: 2\nAesthetic Quality: 2"
    half = "**Consistency**: 2\n**Realism**: 0\n**Aesthetic Quality**: 1"
    said = [half, best, "Consistency: 0\nRealism: 0\nAesthetic Quality: 0", best, "Consistency: 2", "none"]
    scores = legacy.score(items, [[{"said": one}] for one in said])
    assert scores.values["category/culture"] == pytest.approx((0.7 * 2 + 0.1) / 2)
    assert scores.values["wiscore"] == pytest.approx(0.4 * 0.75 + 0.167 + 0.1)
    assert scores.counts["unexpected_answers"].correct == 2
    verified = wise_of(tmp_path, saying["Yes"], "verified", ids)
    said = ["yes", "no", "Yes", "no", "perhaps", "no"]
    scores = verified.score(items, [[{"said": one}] for one in said])
    assert scores.values["wiscore"] == pytest.approx(0.4 + 0.12)
    assert scores.counts["unexpected_answers"].correct == 1
    part = verified.score(items[:2], [[{"said": "no"}], [{"said": "yes"}]])
    assert part.values["wiscore"] == pytest.approx(0.12 / 0.52)
    assert legacy.rule_version != verified.rule_version


def test_files_of_wise_that_are_none(saying, tmp_path):
    with pytest.raises(ValueError, match="prompt_id 1 comes twice"):
        wise_of(tmp_path, saying["Yes"], "legacy", [1, 1]).items()
    with pytest.raises(ValueError, match="the official file has 1000"):
        wise_of(tmp_path, saying["Yes"], "legacy", [1], official=True).items()
    suite = wise_of(tmp_path, saying["Yes"], "legacy", [1])
    write_json(tmp_path / "w.json", [{"prompt_id": 1, "Prompt": "p"}])
    with pytest.raises(ValueError, match=r"w.json: prompt 1: Explanation: Field required"):
        suite.items()
    (tmp_path / "protocol.txt").write_text("Judge {prompt}")
    asked = wise_of(tmp_path, saying["Yes"], "legacy", [1], protocol=tmp_path / "protocol.txt")
    with pytest.raises(ValueError, match=r"lacks \{explanation\}"):
        asked.judge_version  # noqa: B018


def test_oneig_zeroes_by_the_original_answers(saying, tmp_path):
    (tmp_path / "q").mkdir()
    asked = {"question": {"1": "a", "2": "b", "3": "c"}, "dependency": {"1": [0], "2": [1], "3": [2]}}
    packed = {name: json.dumps(value) for name, value in asked.items()}  # as some of the files have it
    for name in ("anime", "human", "object"):
        write_json(tmp_path / "q" / f"{name}.json", {"000": packed})
    (tmp_path / "p.csv").write_text("category,id,prompt_en\nGeneral_Object,000,a dog\n")
    fields = {
        "prompts": tmp_path / "p.csv",
        "questions": tmp_path / "q",
        "judge": saying["Yes"],
        "num_images": 2,
    }
    said = [[{"said": ["No", "Yes", "Yes"]}, {"said": ["Yes", "Yes", "yes"]}]]
    for official, expected in ((True, (1 / 3 + 2 / 3) / 2), (False, (0 + 1) / 2)):
        suite = OneIGSuite(OneIGSuiteConfig(official=official, **fields))
        scores = suite.score(suite.items(), said)
        assert scores.values["alignment"] == pytest.approx(expected) == scores.values["class/object"]
    write_json(tmp_path / "q" / "object.json", {"000": {"question": asked["question"]}})
    with pytest.raises(ValueError, match=r"object.json: 000: no `question` and `dependency`"):
        suite.items()
    write_json(tmp_path / "q" / "object.json", {})
    with pytest.raises(ValueError, match="has no questions of prompt 000"):
        suite.items()


def test_vqascore_by_skill(saying, tmp_path):
    prompts = {"00": {"prompt": "a dog"}, "01": {"prompt": "two dogs"}}
    skills = write_json(tmp_path / "s.json", {"basic": ["00"], "advanced": ["01"], "counting": ["01"]})
    config = GenAISuiteConfig(
        file=write_json(tmp_path / "g.json", prompts), skills=skills, judge=saying["Yes"]
    )
    suite = GenAISuite(config)
    scores = suite.score(suite.items(), [[{"said": "Yes", "yes": 0.75}], [{"said": "A", "yes": 0.25}]])
    assert scores.values["vqascore"] == 0.5 and scores.values["skill/advanced"] == 0.25
    assert scores.values["skill/counting"] == 0.25 and scores.counts["unexpected_answers"].correct == 1
    write_json(tmp_path / "g.json", {"00": {"text": "a dog"}})
    with pytest.raises(ValueError, match="00: no `prompt`"):
        suite.items()


@pytest.mark.slow
def test_first_words_are_the_models_own_probabilities(tmp_path):
    """Of a chat model with a template, one question at a time or several."""
    import torch

    save_qwen3_vl(tmp_path)
    questions = ["a red circle?", "is there a blue square left of it?", "two"]
    beginnings = [["Yes", " red"], ["no"], ["two", "2"]]
    found = []
    for size in (1, 3):
        config = QuestionJudgeConfig(folder=tmp_path, batch_size=size, precision="float32")
        judge = QuestionJudge(config, "cpu")
        found.append(judge.first_words(IMAGE, questions, beginnings))
    for one, other in zip(*found, strict=True):
        assert one.said == other.said
        for text, (id, token, likely) in one.probabilities.items():
            assert other.probabilities[text][:2] == (id, token)
            assert other.probabilities[text][2] == pytest.approx(likely, abs=1e-5)
    from repfusion.llm.chats.batch import tokenise_chats
    from repfusion.llm.chats.format import Chat
    from repfusion.llm.chats.read import write

    batch = tokenise_chats(judge.llm, [Chat(questions[0], (IMAGE,))], room=1)
    with torch.no_grad():
        (writing,) = write(judge.llm, batch, 1)
    written = judge.llm.tokenizer.decode(writing.ids) if writing.ids else None
    assert written is None or found[0][0].said == written
