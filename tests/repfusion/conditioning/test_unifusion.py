"""UniFusion's conditioner: what of a chat reaches the DiT, rewritings known ahead or written on the way, and
requests that do not touch each other.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from repfusion.conditioning import unifusion
from repfusion.conditioning.unifusion import RewritingConfig, UniFusionConditioner, UniFusionConfig, kept
from repfusion.data.readers import REWRITES
from repfusion.llm.chats.batch import tokenise_chats, with_written
from repfusion.llm.chats.format import Chat, ChatPart
from repfusion.llm.chats.read import Writing
from repfusion.llm.chats.rewriting import rewrite, with_quotes
from repfusion.llm.load import load_language_model
from repfusion.request import Request

TAPS = {"taps": (0, 1, -1)}
REWRITING = RewritingConfig(system="red", max_new_tokens=5)


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def conditioner(foundation, **fields) -> UniFusionConditioner:
    torch.manual_seed(0)
    llm = load_language_model(foundation / "llava", with_head=True, with_eyes=True)
    config = UniFusionConfig.model_validate({"lap": TAPS, **fields})
    made = UniFusionConditioner(llm, config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def contexts(made: UniFusionConditioner, requests, branches=None, seeds=None) -> list[Tensor]:
    """The real tokens of each request's context."""
    branches = branches or ["full"] * len(requests)
    with torch.no_grad():
        (context,) = made.prepare(made.collate(requests, branches, seeds)).static
    assert context.mask is not None
    return [tokens[mask] for tokens, mask in zip(context.tokens, context.mask, strict=True)]


def ended(monkeypatch, *rows: list[int], is_ended: bool = True) -> None:
    """The language model writes these rows, one a chat."""
    written = [Writing(row, is_ended) for row in rows]
    monkeypatch.setattr("repfusion.llm.chats.rewriting.write", lambda *args: written)


def test_a_prompt_and_its_images_condition_and_nothing_around_them(foundation):
    made = conditioner(foundation)
    batch = tokenise_chats(made.llm, [Chat("a red circle", [picture(0)]), Chat("a circle"), Chat()])
    keep = kept(batch)
    assert set(batch.parts[keep].tolist()) == {ChatPart.IMAGE, ChatPart.INSTRUCTION, ChatPart.TEMPLATE}
    assert (keep[0] == batch.is_any(ChatPart.IMAGE, ChatPart.INSTRUCTION)[0]).all()
    assert (keep[2] == batch.mask[2]).all()  # nothing was asked: the template alone
    found = contexts(made, [Request("a red circle", (picture(0),)), Request("a circle")])
    assert len(found[0]) == int(keep[0].sum()) and len(found[1]) == 2


def test_masked_activations_never_reach_the_dit(foundation, monkeypatch):
    """With a forced rewriting: states of all other tokens are spoiled after they were read."""
    made = conditioner(foundation, rewriting=REWRITING)
    ids = torch.tensor(made.llm.token_ids(["two blue circle"])[0])
    request = Request("a red circle", (picture(0), picture(1)), computed={REWRITES: ids})
    clean = contexts(made, [request, Request("a circle")])
    real = unifusion.read_chats

    def spoiled(llm, batch, layers):
        keep = batch.is_any(ChatPart.IMAGE, ChatPart.WRITTEN)
        keep[1] = batch.is_any(ChatPart.INSTRUCTION)[1]
        return tuple(torch.where(keep[..., None], state, 1e6) for state in real(llm, batch, layers))

    monkeypatch.setattr(unifusion, "read_chats", spoiled)
    again = contexts(made, [request, Request("a circle")])
    assert all(torch.equal(one, other) for one, other in zip(clean, again, strict=True))
    num_image = made.llm.eyes.look(picture(0)).num_tokens
    assert len(clean[0]) == 2 * num_image + len(ids)


def test_a_rewriting_is_the_same_known_ahead_or_written_on_the_way(foundation, monkeypatch):
    made = conditioner(foundation, rewriting=REWRITING)
    ids, other = made.llm.token_ids(["two blue circle", "green"])
    ended(monkeypatch, ids, other)
    requests = [Request("a red circle", (picture(0),)), Request("a square")]
    known = [
        Request(one.prompt, one.images, computed={REWRITES: torch.tensor(new)})
        for one, new in zip(requests, (ids, other), strict=True)
    ]
    written, ahead = contexts(made, requests), contexts(made, known)
    for one, two in zip(written, ahead, strict=True):
        torch.testing.assert_close(one, two)
    plain = contexts(made, [Request(one.prompt, one.images, False) for one in requests])
    assert [len(one) for one in plain] != [len(one) for one in written]
    elsewhere = contexts(made, [Request(one.prompt, one.images, "blue") for one in requests])
    assert not torch.allclose(elsewhere[0], written[0])  # another system prompt, the same words written


def test_a_training_that_rewrites_needs_the_column():
    assert UniFusionConfig().columns == {}
    assert UniFusionConfig(rewriting=REWRITING).columns[REWRITES].is_required


def test_a_share_of_the_training_is_shown_without_rewriting(foundation):
    rewriting = REWRITING.model_copy(update={"share": 0.5})
    made = conditioner(foundation, rewriting=rewriting.model_dump())
    ids = torch.tensor(made.llm.token_ids(["two blue circle and green"])[0])
    requests = [Request("a red circle", computed={REWRITES: ids})] * 40
    lengths = [len(one) for one in contexts(made, requests, seeds=range(40))]
    assert set(lengths) == {3, len(ids)} and 10 < lengths.count(3) < 30
    again = [len(one) for one in contexts(made, requests[:7], seeds=range(7))]
    assert again == lengths[:7]  # by the sample's seed alone


def test_in_training_only_rewritings_of_a_column_are_read(foundation, monkeypatch):
    made = conditioner(foundation, rewriting=REWRITING)
    monkeypatch.setattr(unifusion, "rewrite", lambda *args: pytest.fail("written in training"))
    ids = torch.tensor(made.llm.token_ids(["two blue circle"])[0])
    requests = [Request("a red circle"), Request("a red circle", computed={REWRITES: ids})]
    plain, rewritten = contexts(made, requests, seeds=[0, 1])
    torch.testing.assert_close(plain, contexts(made, [Request("a red circle", rewrite=False)])[0])
    assert len(rewritten) == len(ids)


@pytest.mark.parametrize(("row", "is_ended"), [([], True), ([20, 21], False)])
def test_where_nothing_or_no_end_is_written_the_prompt_serves(foundation, monkeypatch, row, is_ended):
    made = conditioner(foundation, rewriting=REWRITING)
    ended(monkeypatch, row, is_ended=is_ended)
    (found,) = contexts(made, [Request("a red circle")])
    assert len(found) == 3
    batch = tokenise_chats(made.llm, [Chat("a red circle", system="red")])
    (one,) = rewrite(made.llm, batch, ["a red circle"], 5)
    assert (one.ids, one.reason) == ((), "endless" if row else "empty")


def test_prompts_that_could_not_be_rewritten_are_counted(foundation, monkeypatch, caplog):
    """Of those that ask for it: the last one does not."""
    made = conditioner(foundation, rewriting=REWRITING)
    good = Writing(made.llm.token_ids(["two blue circle"])[0], True)
    written = [Writing([], True), good, Writing([20] * 5, False), Writing([], True), Writing([], True)]
    monkeypatch.setattr("repfusion.llm.chats.rewriting.write", lambda *args: written)
    requests = [Request("a red circle")] * 4 + [Request("a red circle", rewrite=False)]
    found = contexts(made, requests)
    assert [len(one) for one in found] == [3, len(good.ids), 3, 3, 3]
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("rewritings of 4 prompts: 2 empty, 1 endless (endless: no end within 5 tokens)")
    caplog.clear()
    ended(monkeypatch, good.ids)
    contexts(made, requests[:1])
    assert not caplog.records


def test_a_request_does_not_depend_on_the_others(foundation):
    made = conditioner(foundation, image_lap=True)
    requests = [
        Request("two blue circle left of a green square", (picture(0), picture(1))),
        Request("a circle"),
        Request("a red circle", (picture(2),)),
    ]
    branches = ["full", "none", "images"]
    together = contexts(made, requests, branches)
    for request, branch, tokens in zip(requests, branches, together, strict=True):
        torch.testing.assert_close(contexts(made, [request], [branch])[0], tokens)


def test_images_stand_in_rows_and_columns_and_text_in_a_line(foundation):
    """Whatever stands around them in the chat, in the batch, or before them in the context."""
    made = conditioner(foundation, rewriting=REWRITING)
    ids = torch.tensor(made.llm.token_ids(["two blue circle and green"])[0])
    requests = [
        Request("a red circle", (picture(0), picture(1)), rewrite=False),
        Request("a circle", (picture(2),), computed={REWRITES: ids}),
        Request("two blue circle left of a green square", rewrite=False),
        Request(),
    ]
    branches = ["full", "full", "full", "none"]
    with torch.no_grad():
        (context,) = made.prepare(made.collate(requests, branches)).static
    assert context.mask is not None and context.positions is not None
    places = [one[mask].tolist() for one, mask in zip(context.positions, context.mask, strict=True)]
    one = [[0, -2], [0, -1], [1, -2], [1, -1]]
    two = [[row, column - 2] for row, column in one]
    assert places[0] == [*one, *two, [0, 0], [1, 1], [2, 2]]
    assert places[1] == [*one, *[[k, k] for k in range(len(ids))]]
    assert places[2] == [[k, k] for k in range(len(places[2]))] and len(places[2]) == 8
    assert places[3] == [[k, k] for k in range(len(places[3]))]
    for request, branch, expected in zip(requests, branches, places, strict=True):
        (alone,) = made.prepare(made.collate([request], [branch])).static
        assert alone.positions is not None and alone.positions[0].tolist() == expected


def test_branches_read_what_they_say(foundation):
    made = conditioner(foundation)
    one, two = Request("a red circle", (picture(0),)), Request("a blue square", (picture(0),))
    images = [contexts(made, [request], ["images"])[0] for request in (one, two)]
    assert torch.equal(*images)
    other = contexts(made, [Request("a red circle", (picture(1),))], ["images"])[0]
    assert len(other) == len(images[0]) and not torch.allclose(other, images[0])
    nothing = [contexts(made, [request], ["none"])[0] for request in (one, Request("a"))]
    assert torch.equal(*nothing)


def test_image_tokens_may_have_layers_of_their_own(foundation):
    made = conditioner(foundation, image_lap=True)
    request = Request("a red circle", (picture(0),))
    before = contexts(made, [request])[0]
    assert made.image_lap is not None
    with torch.no_grad():
        made.image_lap.pool.add_(1.0)
    after = contexts(made, [request])[0]
    num_image = made.llm.eyes.look(picture(0)).num_tokens
    assert not torch.allclose(before[:num_image], after[:num_image])
    assert torch.equal(before[num_image:], after[num_image:])


@pytest.mark.parametrize("image_lap", [False, True])
def test_gradients_reach_the_pooling_alone(foundation, image_lap):
    made = conditioner(foundation, image_lap=image_lap).train()
    frozen = {name: p.clone() for name, p in made.named_parameters() if name.startswith("llm.")}
    inputs = made.collate([Request("a red circle"), Request("a circle")], ["full", "none"], [0, 1])
    (context,) = made.prepare(inputs).static
    assert context.mask is not None
    (context.tokens * context.mask[..., None]).square().sum().backward()
    for name, parameter in made.named_parameters():
        assert (parameter.grad is not None) == (not name.startswith("llm.")), name
    assert all(torch.equal(p, frozen[name]) for name, p in made.named_parameters() if name in frozen)


def test_written_tokens_follow_their_chats(foundation):
    llm = load_language_model(foundation / "llava", with_head=True, with_eyes=True)
    chats = [Chat("a red circle", [picture(0)]), Chat("a circle")]
    rows = [[20, 21, 22], []]
    after = with_written(llm, tokenise_chats(llm, chats), rows)
    at_once = tokenise_chats(llm, chats, rows)
    for name in ("ids", "parts", "image_of", "positions"):
        assert torch.equal(getattr(after, name), getattr(at_once, name)), name


@pytest.mark.parametrize(
    ("text", "asked", "mended"),
    [
        ('a cross that says "adqr"', ['"adar"'], 'a cross that says "adar"'),
        ('a cross that says "adar"', ['"adar"'], 'a cross that says "adar"'),
        ("a cross", ['"adar"'], 'a cross "adar"'),
        ('"b" and "c"', ['"B"', '"C"'], '"B" and "C"'),
        ('"b"', ['"B"', '"C"'], '"B" "C"'),
        ('a "d"', [], 'a "d"'),
    ],
)
def test_quotes_are_put_right(text, asked, mended):
    assert with_quotes(text, asked) == mended


def test_lost_quotes_are_counted_and_mended(foundation, monkeypatch):
    llm = load_language_model(foundation / "llava", with_head=True, with_eyes=True)
    prompt = 'a red circle "blue"'
    batch = tokenise_chats(llm, [Chat(prompt, system="red")])
    ended(monkeypatch, llm.token_ids(["a red circle"])[0])
    (one,) = rewrite(llm, batch, [prompt], 9)
    assert (one.num_quotes, one.num_lost) == (1, 1)
    assert list(one.ids) == llm.token_ids(['a red circle "blue"'])[0]
