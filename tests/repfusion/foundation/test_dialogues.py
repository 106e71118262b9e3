"""The texts of the small foundation and its tokenizer: what is learned of them, and what changes nothing."""

import re

import numpy as np
import pytest
import torch

from repfusion.foundation.dialogues import (
    DESCRIBE,
    IGNORED,
    pad,
    text_ids,
    train_tokenizer,
    write_dialogue,
    write_judgement,
    write_text,
)
from repfusion.llm.words import WORDS
from repfusion.scenes.captions import ADJECTIVES, NOUNS, NUMBERS, canonical_caption, plural
from repfusion.scenes.world import WorldConfig, draw_scene


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize(
    "word",
    [
        *(form for nouns in NOUNS.values() for noun in nouns for form in (noun, plural(noun))),
        *(word for words in ADJECTIVES.values() for word in words),
        *(*NUMBERS.values(), "2", "3", "4"),
        *("left", "right", "of", "side", "its", "above", "below", "over", "under", "beneath", "underneath"),
        *("higher", "than", "top", "and", "with", "photo", "illustration", "please", "yes", "no", "without"),
    ],
)
def test_words_of_the_world_are_one_token_each(tokenizer, word):
    assert tokenizer.tokenize(f"a {word} and")[1:-1] == [f"\u0120{word}"]
    assert len(tokenizer(f"{word}", add_special_tokens=False).input_ids) == 1  # first in a text as well


@pytest.mark.parametrize(
    "text", ["a red circle", "zebra, 12 km\u00b2 \u2013 na\u00efve \u732b \U0001f600", "</s> a"]
)
def test_any_text_has_tokens_and_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids).strip() == text.replace(
        ",", ""
    )


@pytest.mark.parametrize(
    "text",
    [
        "A red circle.",
        "a RED circle!",
        "  a  red circle ",
        "a red, circle",
        "a red circle ?",
        "a\nred circle...",
    ],
)
def test_case_and_punctuation_change_nothing(tokenizer, text):
    assert tokenizer(text).input_ids == tokenizer("a red circle").input_ids


def test_what_stands_within_a_word_is_kept(tokenizer):
    assert tokenizer("3.5 e.g").input_ids != tokenizer("35 eg").input_ids


def test_nothing_stands_between_a_claim_and_its_image(tokenizer):
    """RepFusion reads the visual tokens right after the prompt's."""
    prompt = tokenizer("a red circle").input_ids
    ((ids, start),) = text_ids(tokenizer, [("a red circle<image>", "yes")], 4)
    assert ids[:start] == [*prompt, 3, 3, 3, 3]
    assert tokenizer("a red circle ").input_ids == prompt


def test_the_words_of_the_texts_lie_beside_the_tokenizer(tmp_path):
    train_tokenizer(tmp_path, num_scenes=300)
    words = (tmp_path / WORDS).read_text().split()
    assert words == sorted(set(words)) and {"red", "circle", "yes", "describe"} <= set(words)
    assert not any(word.endswith((".", "?")) or word != word.lower() for word in words)


def test_special_tokens(tokenizer):
    ids = tokenizer("a red circle").input_ids
    assert ids[0] == tokenizer.bos_token_id == 1
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)
    assert tokenizer("<image>" * 3, add_special_tokens=False).input_ids == [3, 3, 3]


def test_dialogues_learn_answers_alone(tokenizer):
    pairs = [("<image> what colour is the circle? answer:", "red"), ("<image> a", "yes")]
    ids, labels = pad(text_ids(tokenizer, pairs, num_image_tokens=4), tokenizer.pad_token_id)
    assert ids.shape == labels.shape
    for row, answer in zip(labels, ("red", "yes"), strict=True):
        learned = row[row != IGNORED]
        assert tokenizer.decode(learned[:-1]).strip() == answer
        assert learned[-1] == tokenizer.eos_token_id
    assert (ids == 3).sum(1).tolist() == [4, 4]
    learned = labels != IGNORED
    assert torch.equal(ids[learned], labels[learned])
    assert ids[0, 0] == tokenizer.bos_token_id
    last = int(learned[1].nonzero()[-1])
    assert set(ids[1, last + 1 :].tolist()) == {tokenizer.pad_token_id}  # padded on the right


def test_a_learned_answer_has_the_tokens_it_has_within_a_text(tokenizer):
    """Else the model would learn to write words that prompts never contain."""
    ((ids, start),) = text_ids(tokenizer, [("is it", "a red circle")], num_image_tokens=0)
    assert ids[start:-1] == tokenizer(" a red circle").input_ids[1:]
    assert ids[1:-1] == tokenizer("is it a red circle").input_ids[1:]


def test_captions_are_learned_whole_but_for_the_begin_token(tokenizer):
    texts = ["a red circle", "two blue crosses left"]
    ids, labels = pad(text_ids(tokenizer, [("", text) for text in texts]), tokenizer.pad_token_id)
    assert labels[0, 0] == IGNORED
    assert tokenizer.decode(labels[1][labels[1] != IGNORED], skip_special_tokens=True).strip() == texts[1]
    assert torch.equal(ids[labels != IGNORED], labels[labels != IGNORED])


def test_dialogues_hold_one_image_and_true_answers():
    rng = np.random.default_rng(0)
    kinds = {"claim": 0, "describe": 0, "question": 0, "edit": 0}
    image_first = 0
    scenes = [draw_scene(seed) for seed in range(900)]
    for scene in scenes:
        question, answer = write_dialogue(scene, rng, scenes[rng.integers(900)], WorldConfig())
        assert question.count("<image>") == 1
        if DESCRIBE in question:
            kinds["describe"] += 1
            assert answer == canonical_caption(scene)
        elif answer in ("yes", "no"):
            kinds["claim"] += 1
            assert question.endswith("<image>") and not question.endswith(" <image>")
        else:
            kinds["question" if "?" in question else "edit"] += 1
        if question.endswith(" answer:"):
            image_first += question.startswith("<image>")
    assert min(kinds.values()) > 90
    asked = kinds["describe"] + kinds["question"] + kinds["edit"]
    assert image_first == pytest.approx(asked / 2, abs=3 * asked**0.5 / 2)


def test_most_dialogues_of_the_second_course_are_claims():
    rng = np.random.default_rng(0)
    scenes = [draw_scene(seed) for seed in range(900)]
    said = [write_judgement(scene, rng, scenes[rng.integers(900)], WorldConfig()) for scene in scenes]
    assert all(question.count("<image>") == 1 for question, _ in said)
    claims = [question.removesuffix("<image>") for question, answer in said if answer in ("yes", "no")]
    assert 0.6 < len(claims) / len(said) < 0.75
    assert sum(answer == "yes" for _, answer in said) == pytest.approx(len(claims) / 2, abs=50)
    assert sum(DESCRIBE in question for question, _ in said) == pytest.approx(90, abs=40)


def test_texts_without_an_image_are_captions_and_rewritings(tokenizer):
    """Only what follows the terse prompt is learned; quoted words stay as they are, letter for letter."""
    rng = np.random.default_rng(0)
    halves = [write_text(draw_scene(seed), rng) for seed in range(400)]
    rewritings = [(asked, said) for asked, said in halves if asked]
    assert 60 < len(rewritings) < 140
    for asked, said in rewritings:
        assert asked.startswith("rewrite ") and asked.endswith(" answer:") and "<image>" not in asked
        assert re.findall(r'"\w+"', asked) == re.findall(r'"\w+"', said)
    assert any('"' in said for _, said in rewritings)
    for (asked, said), (ids, start) in zip(halves, text_ids(tokenizer, halves), strict=True):
        assert tokenizer.decode(ids[start:-1]).strip() == said.rstrip(".").lower()
        assert start == 1 if not asked else ids[start - 1] == tokenizer("answer").input_ids[-1]
