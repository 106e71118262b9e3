"""What is read, said, drawn and retrieved in a dialogue, against a reading of everything at once."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from prompting import asked
from tiny_gill import make_gill, noise_images, save_gill, write_noise

from repfusion.conditioning.related.gill import IMAGE_STATES
from repfusion.dialogue import __main__ as command
from repfusion.dialogue.hold import Dialogue, HoldingConfig
from repfusion.dialogue.turns import given_turns, read_turns
from repfusion.diffusion.sampler import SamplerConfig, sample
from repfusion.lineage.describe import read_png
from repfusion.lineage.trace import trace
from repfusion.request import Request
from repfusion.retrieval.conversation import Conversation, SpeakingConfig, choose, middle_square
from repfusion.retrieval.decision import Decision
from repfusion.retrieval.embedding import GillReader
from repfusion.retrieval.index import ImageIndex, build_index

CPU = torch.device("cpu")
SHORT = ["speaking.max_tokens=4", "sampler.num_steps=2", "always_image=true"]


@pytest.fixture(scope="module")
def reader(foundation: Path, statistics, tmp_path_factory) -> GillReader:
    return GillReader(save_gill(tmp_path_factory.mktemp("gill"), make_gill(foundation, statistics)), CPU)


@pytest.fixture(scope="module")
def index(reader: GillReader, tmp_path_factory) -> ImageIndex:
    folder = tmp_path_factory.mktemp("index")
    return build_index(reader, write_noise(folder / "curate", num=2), folder / "index")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.fromarray(noise_images(1)[0]).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def read_at_once(reader: GillReader, parts: list[torch.Tensor]) -> torch.Tensor:
    """Last states of a whole context, without keys and values of an earlier reading."""
    tokens = torch.cat(parts, dim=1)
    return reader.conditioner.llm.language_model(inputs_embeds=tokens, use_cache=False).last_hidden_state[0]


def test_speaking_equals_reading_everything_anew_for_each_token(reader: GillReader):
    llm, conditioner, image = reader.conditioner.llm, reader.conditioner, noise_images(1)[0]
    asked_for = Conversation(reader)
    asked_for.say("a red", "text")
    asked_for.show(image, "image")
    asked_for.say("circle", "text")
    spoken = asked_for.speak(SpeakingConfig(max_tokens=6), torch.Generator())
    states = asked_for.call()
    with torch.no_grad():
        ids = [llm.begin_id, *llm.token_ids(["a red"])[0]], llm.token_ids(["circle"])[0]
        seen = conditioner.see(reader.latents_of([image]).mean(1)).reshape(1, 4, -1)
        parts = [llm.embed(torch.tensor([ids[0]])), seen, llm.embed(torch.tensor([ids[1]]))]
        words: list[int] = []
        for _ in range(7):
            last = read_at_once(reader, parts)[-1]
            scores = torch.cat([llm.head.weight @ last, (conditioner.scored_tokens @ last)[:1]])
            chosen = int(scores.argmax())
            if chosen in (llm.end_id, len(scores) - 1) or len(words) == 6:
                break
            words.append(chosen)
            parts.append(llm.embed(torch.tensor([[chosen]])))
        whole = read_at_once(reader, [*parts, conditioner.image_tokens[None]])[-3:]
    expected = {llm.end_id: "end", len(scores) - 1: "image"}.get(chosen, "max_tokens")
    assert (spoken.text, spoken.ending) == (
        llm.tokenizer.decode(words, skip_special_tokens=True).strip(),
        expected,
    )
    torch.testing.assert_close(states, whole, atol=1e-5, rtol=1e-4)


def test_a_prompt_that_is_said_is_drawn_as_one_that_is_asked_for(reader: GillReader):
    prompt, model = "a red circle", reader.model
    conversation = Conversation(reader)
    conversation.say(prompt, "text")
    said = Request(computed={IMAGE_STATES: conversation.call()})
    noise = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    config = SamplerConfig(num_steps=2, guidance_scale=3.0)
    plain = sample(model, [*asked([prompt, "green"])[0]], noise, config)
    mixed = sample(model, [said, Request("green")], noise, config)
    torch.testing.assert_close(mixed, plain, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(mixed[0], sample(model, asked(["", "green"])[0], noise, config)[0], atol=1e-3)


def test_the_likeliest_token_or_one_that_the_seed_draws():
    scores = torch.tensor([1.0, 3.0, 2.0, -1.0])
    assert choose(scores, SpeakingConfig(), torch.Generator()) == 1
    warm = SpeakingConfig(temperature=1.0, top_p=0.8)
    drawn = [choose(scores, warm, torch.Generator().manual_seed(seed)) for seed in range(40)]
    assert set(drawn) == {1, 2}  # 0.66 and 0.24 of all: the others lie beyond the share
    assert drawn == [choose(scores, warm, torch.Generator().manual_seed(seed)) for seed in range(40)]


def test_images_are_shown_by_their_middle_square():
    image = torch.arange(4 * 8 * 3).reshape(4, 8, 3).byte().numpy()
    assert (middle_square(image, 4) == image[:, 2:6]).all()
    halved = image[:, 2:6].astype(float).reshape(2, 2, 2, 2, 3).mean((1, 3))
    assert abs(middle_square(image, 2) - halved).max() <= 0.5


def test_a_dialogue_by_the_command(reader, index, picture, monkeypatch, capsys, tmp_path):
    """Two turns; the first image is drawn and the second retrieved, once more is another."""

    def run(*arguments: object) -> str:
        given = ["--checkpoint", reader.folder, "--device", "cpu", *arguments]
        monkeypatch.setattr(sys, "argv", ["command", *map(str, given)])
        command.main()
        return capsys.readouterr().out

    parts = ["--say", "a red", "--image", picture, "--reply", "--say", "two blue square"]
    said = run(*parts, "--out", tmp_path / "drawn", *SHORT)
    assert "[reply_01.png, drawn]" in said and "2 turn(s) ->" in said
    told = json.loads((tmp_path / "drawn" / "dialogue.json").read_text())["turns"]
    assert [turn["role"] for turn in told] == ["user", "model"] * 2
    assert told[0]["parts"] == [{"say": "a red"}, {"image": str(picture)}] and told[3]["seed"] == 1
    record = read_png(tmp_path / "drawn" / "reply_02.png")
    assert record["rows"][0]["seeds"] == [1] and len(record["images"]) == 1 and "retrieved" not in record

    turns = {"turns": [[{"say": "a red"}, {"image": "a.png"}], [{"say": "two blue square"}]]}
    (tmp_path / "turns.json").write_text(json.dumps(turns))
    given = ["--turns", tmp_path / "turns.json", "--index", index.folder, "--out", tmp_path / "found"]
    run(*given, "images=retrieve", *SHORT)
    replies = json.loads((tmp_path / "found" / "dialogue.json").read_text())["turns"][1::2]
    assert {reply["sample"] for reply in replies} == {"000000000", "000010000"}, "the second is another"
    assert [reply["say"] for reply in replies] == [told[1]["say"], told[3]["say"]]
    links = {link.name: link for link in trace(tmp_path / "found" / "reply_01.png")}
    assert links["retrieved"].value.startswith(f"{replies[0]['sample']} of") and "sampler" not in links
    with pytest.raises(SystemExit, match="holds a dialogue already; choose another folder"):
        run(*given, "images=retrieve", *SHORT)
    with pytest.raises(SystemExit, match="images: decide needs a decision"):
        run(*given[:4], "--out", tmp_path / "new", "images=decide")
    with pytest.raises(SystemExit, match="images: retrieve needs an index"):
        run("--say", "a", "--out", tmp_path / "new", "images=retrieve")


@pytest.mark.parametrize(("bias", "source"), [(5.0, "drawn"), (-5.0, "retrieved")])
def test_the_decision_says_where_an_image_comes_from(reader, index, tmp_path, bias: float, source: str):
    config = HoldingConfig.model_validate(
        {"images": "decide", "always_image": True, "sampler": {"num_steps": 1}, "speaking": {"max_tokens": 0}}
    )
    decision = Decision(torch.zeros(32), torch.tensor([bias]))
    told = Dialogue(reader, config, tmp_path, index, decision).hold(given_turns([("--say", "a red")]))
    assert told[1]["source"] == source and told[1]["say"] == ""
    assert told[1]["probability_drawn"] == pytest.approx(torch.tensor(bias).sigmoid().item())


def test_what_the_context_does_not_hold_is_named_before_anything_is_said(reader, picture, tmp_path):
    """The tiny context takes 128 tokens: begin, 3 of an image's call, and 31 images of 4."""
    parts = [("--image", str(picture))] * 32
    dialogue = Dialogue(reader, HoldingConfig(), tmp_path / "out")
    match = r"turn 1, part 32 \(.*a\.png\): takes 4 tokens, and 0 are left: .*31 images of 4 tokens each fit"
    with pytest.raises(ValueError, match=match):
        dialogue.hold(given_turns(parts))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"turn 2, part 1 \('red red.*takes 130 tokens, and 122 are left"):
        dialogue.hold(given_turns([("--say", "a red"), ("--reply", ""), ("--say", "red " * 130)]))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no json", "expected"),
        ('{"turns": []}', "turns"),
        ('{"turns": [[]]}', "turn 1 is empty"),
        ('{"turns": [[{"say": "a", "image": "b.png"}]]}', 'either "say" or "image"'),
        ('{"turns": [[{"image": "nowhere.png"}]]}', "image .*nowhere.png"),
    ],
)
def test_turns_that_are_none_are_named(tmp_path: Path, text: str, said: str):
    (tmp_path / "turns.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_turns(tmp_path / "turns.json")
