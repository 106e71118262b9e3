"""Questions about one of two images: what is asked, and which image tokens are kept."""

from pathlib import Path

import pytest
import torch

from repfusion.llm.chats.batch import ChatBatch
from repfusion.llm.chats.format import ChatPart
from repfusion.scenes.detector import detect

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


def test_a_question_has_one_answer_in_both_images_together():
    from multi_image_questions import draw_questions

    questions = draw_questions(6, seed=0, split="train")
    assert [one.about for one in questions] == [0, 1] * 3
    for one in questions:
        things = [detect(image.transpose(2, 0, 1) / 255) for image in one.images]
        named = [[thing.colour for thing in row if f"the {thing.shape}?" in one.text] for row in things]
        assert named[one.about] == [one.answer] and named[1 - one.about] == []


def test_a_share_of_each_images_tokens_is_kept_by_their_scores():
    from multi_image_questions import KeptChats, by_scores

    parts = torch.tensor([[ChatPart.PADDING, *[ChatPart.IMAGE] * 6, ChatPart.INSTRUCTION]])
    image_of = torch.tensor([[-1, 0, 0, 0, 1, 1, 1, -1]])
    batch = ChatBatch(parts, parts, image_of, parts, {}, torch.zeros(6, 2, dtype=torch.long))
    scores = torch.tensor([[9.0, 1, 3, 2, 6, 5, 4, 0]])
    keep = by_scores(batch, scores, share=0.4)
    assert keep[0, 1:].tolist() == [False, True, True, True, True, False, True]
    kept = KeptChats(parts, parts, image_of, parts, {}, batch.places, keep)
    assert kept.mask[0].tolist() == [False, *keep[0, 1:].tolist()]
