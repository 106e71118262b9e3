"""Terse prompts say what their rewritings say: each is read back into facts, word by word."""

import re
from collections import Counter

import numpy as np
from scene_texts import read

from repfusion.scenes.captions import ADJECTIVES, NOUNS, caption_scene, draw_prompts, plural
from repfusion.scenes.rewriting import (
    TERSE_ADJECTIVES,
    TERSE_NOUNS,
    Rewriting,
    caption_in,
    draw_rewriting,
    put_tersely,
)
from repfusion.scenes.world import COLOURS, SHAPES, draw_scene

COLOUR_OF = {word: colour for colour in COLOURS for word in (*ADJECTIVES[colour], *TERSE_ADJECTIVES[colour])}
SHAPE_OF = {
    form: shape
    for shape in SHAPES
    for word in (*NOUNS[shape], *TERSE_NOUNS[shape])
    for form in (word, plural(word))
}
SIDE_OF = {
    **{"left": "left of", "<": "left of", "right": "right of", ">": "right of"},
    **{"above": "above", "over": "above", "^": "above", "below": "below", "under": "below", "v": "below"},
}


def looks_of(text: str) -> Counter:
    """How often each shape and colour is named; "plus sign" is one shape."""
    words = re.sub("[,:]", "", text.replace("plus sign", "mark")).split()
    return Counter(filter(None, ((SHAPE_OF | COLOUR_OF).get(word) for word in words)))


def drawn(num: int) -> list[Rewriting]:
    rng = np.random.default_rng(0)
    return [draw_rewriting(draw_scene(seed), rng) for seed in range(num)]


def test_a_rewriting_names_the_things_of_its_terse_prompt():
    for one in drawn(1_500):
        terse, plain = (re.sub(r'"\w+"', "", text) for text in (one.terse, one.plain))
        assert looks_of(terse) == looks_of(plain), one


def test_a_rewriting_states_number_and_relation_of_its_terse_prompt():
    sides = Counter()
    for one in drawn(1_500):
        wanted, relation = read(re.sub(r' with the word "\w+"', "", one.plain))
        terse = re.sub(r'"\w+"', "", one.terse)
        if relation is not None:
            stated = {SIDE_OF[word] for word in terse.replace(",", "").split() if word in SIDE_OF}
            assert stated == {relation}, one
            sides[relation] += 1
        number = wanted[0].number
        if number > 1:
            word = {2: "two", 3: "three", 4: "four"}[number]
            assert re.search(rf"{word}\b|\b{number}x\b|\bx{number}\b", terse), one
    assert len(sides) == 4


def test_words_in_quotes_are_kept_to_the_letter():
    found = [one for one in drawn(1_500) if one.quoted]
    assert len(found) > 50
    for one in found:
        assert f'"{one.quoted}"' in one.terse and one.plain.endswith(f' with the word "{one.quoted}"')
    assert all('"' not in one.terse + one.plain for one in drawn(300) if not one.quoted)


def test_many_terse_prompts_use_words_that_no_caption_has():
    rare = {word for words in (*TERSE_NOUNS.values(), *TERSE_ADJECTIVES.values()) for word in words}
    prompts = drawn(600)
    assert sum(any(word in one.terse for word in rare) for one in prompts) > 300
    assert not any(any(f" {word}" in one.plain for word in rare) for one in prompts)


def test_terse_captions_are_terse_prompts_without_quotes_and_others_are_captions():
    for seed in range(300):
        scene = draw_scene(seed)
        draws = [np.random.default_rng(seed) for _ in range(3)]
        terse = caption_in(scene, draws[0], "terse")
        assert '"' not in terse and terse == draw_rewriting(scene, draws[1], quoted_share=0.0).terse
        assert caption_in(scene, draws[2], "varied") == caption_scene(scene, np.random.default_rng(seed))


def test_a_prompt_put_tersely_asks_for_the_same_in_other_words():
    rng = np.random.default_rng(0)
    prompts = draw_prompts(60, include_new=False, split="train")
    terse = [put_tersely(prompt, rng) for prompt in prompts]
    for before, after in zip(prompts, terse, strict=True):
        assert (after.task, after.wanted, after.relation) == (before.task, before.wanted, before.relation)
    assert sum(before.text != after.text for before, after in zip(prompts, terse, strict=True)) > 55
