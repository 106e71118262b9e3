"""Chats -> tokens whose part is known, by the folder's chat template or in plain text; what is refused."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_training import make_foundation
from tiny_vlms import CHATS, CONTEXT, Seeing, picture, save_llava

from repfusion.foundation.dialogues import ANSWER, REWRITE, text_ids, train_tokenizer
from repfusion.llm.base import LanguageModel, PromptTooLong
from repfusion.llm.chats.batch import ChatBatch, pack, tokenise_chats
from repfusion.llm.chats.eyes import Eyes
from repfusion.llm.chats.format import PLAIN_CUE, Chat, ChatFormat, ChatPart
from repfusion.llm.load import load_language_model

IMAGE_TOKENS = {"qwen2_5_vl": [4, 10], "qwen3_vl": [4, 10], "internvl": [4, 16], "llava": [4, 4]}
"""Tokens of both images of CHATS["images"]."""


def eyes_of(llm: LanguageModel) -> Eyes:
    assert llm.eyes is not None
    return llm.eyes


def text_of(llm: LanguageModel, batch: ChatBatch, row: int, part: ChatPart) -> str:
    """The text that the tokens of a part stand for; the first may have a space of the template in it."""
    return llm.tokenizer.decode(batch.ids[row][batch.parts[row] == part]).removeprefix(" ")


@pytest.mark.parametrize("chat", CHATS)
def test_tokens_and_pixels_are_those_of_transformers_own_processor(chat, seeing: Seeing):
    batch, expected = tokenise_chats(seeing.llm, [CHATS[chat]]), seeing.inputs([CHATS[chat]])
    assert batch.ids.tolist() == expected["input_ids"].tolist()
    for name, tensor in batch.images.items():
        assert torch.equal(tensor, torch.as_tensor(expected[name]))
    assert bool(batch.images) == bool(CHATS[chat].images)


def test_every_token_knows_what_it_is_of(seeing: Seeing):
    llm, chats = seeing.llm, list(CHATS.values())
    batch = tokenise_chats(llm, chats, written=[[7, 8], [], [9], [7], []])
    for row, (chat, written) in enumerate(zip(chats, ([7, 8], [], [9], [7], []), strict=True)):
        assert text_of(llm, batch, row, ChatPart.SYSTEM) == (chat.system or "")
        assert text_of(llm, batch, row, ChatPart.INSTRUCTION) == chat.instruction
        assert batch.ids[row][batch.parts[row] == ChatPart.WRITTEN].tolist() == written
        template = text_of(llm, batch, row, ChatPart.TEMPLATE)
        assert "ssistant" in template.lower()
        assert eyes_of(llm).image_token not in template
        assert torch.equal(batch.image_of[row] >= 0, batch.parts[row] == ChatPart.IMAGE)
    counts = [(batch.image_of[-1] == image).sum().item() for image in range(2)]
    assert counts == IMAGE_TOKENS[seeing.family]
    assert set(batch.ids[batch.parts == ChatPart.IMAGE].tolist()) == {eyes_of(llm).image_id}


def test_rows_are_padded_on_the_left_and_say_the_same_as_alone(seeing: Seeing):
    chats = list(CHATS.values())
    batch = tokenise_chats(seeing.llm, chats)
    lengths = batch.mask.sum(1)
    assert (batch.mask == (torch.arange(batch.ids.shape[1]) >= batch.ids.shape[1] - lengths[:, None])).all()
    for row, chat in enumerate(chats):
        alone = tokenise_chats(seeing.llm, [chat])
        real = batch.mask[row]
        for name in ("ids", "parts", "image_of"):
            assert torch.equal(getattr(batch, name)[row][real], getattr(alone, name)[0])
        positions = alone.positions.expand(*batch.positions.shape[:-2], *alone.positions.shape[-2:])
        assert torch.equal(batch.positions[..., row, :][..., real], positions[..., 0, :])
    assert (batch.ids[~batch.mask] == seeing.llm.pad_id).all()


GRIDS = {
    "qwen2_5_vl": [(3, 4)],
    "qwen3_vl": [(3, 4)],
    "internvl": [(4, 4), (2, 2)],
    "llava": [(2, 2)],
}
"""Rows and columns of the views of an image of 24 x 32 px (LLaVA's is square): InternVL's are 4 tiles and
the thumbnail.
"""


def test_a_token_stands_where_it_sees(seeing: Seeing):
    """The token that changes most with a patch of pixels is the one at its row and column."""
    eyes, sides = eyes_of(seeing.llm), (32, 32) if seeing.family == "llava" else (24, 32)
    grids = GRIDS[seeing.family]
    image = np.full((*sides, 3), 128, np.uint8)
    plain = eyes.look(image)
    assert [tuple((view.max(0).values + 1).tolist()) for view in plain.views] == grids

    def tokens(image: np.ndarray) -> torch.Tensor:
        look = eyes.look(image)
        return eyes.see(look.inputs, torch.ones(1, look.num_tokens, dtype=torch.bool))[0]

    (rows, columns), before = grids[0], tokens(image)
    tall, wide = sides[0] // rows, sides[1] // columns
    for row, column in np.ndindex(rows, columns):
        change = torch.zeros(rows * columns)
        for seed in range(4):
            changed = image.copy()
            changed[row * tall :, column * wide :][:tall, :wide] = picture(tall, wide, seed)
            change += (tokens(changed) - before).norm(dim=1)[: rows * columns]
        assert plain.views[0][change.argmax()].tolist() == [row, column]


def test_places_of_a_chat_do_not_depend_on_the_others(seeing: Seeing):
    chats = list(CHATS.values())
    batch = tokenise_chats(seeing.llm, chats, written=[[7, 8], [], [9], [7], []])
    alone = [tokenise_chats(seeing.llm, [chat]) for chat in chats]
    assert torch.equal(batch.places, torch.cat([one.places for one in alone]))
    counts = IMAGE_TOKENS[seeing.family]
    first, second = alone[-1].places.split(counts)
    single = tokenise_chats(seeing.llm, [Chat("a", CHATS["images"].images[:1])]).places
    assert torch.equal(first, single) and second[:, 1].max() == first[:, 1].min() - 1
    assert first[:, 1].max() == -1
    assert len(alone[-1].places.unique(dim=0)) == sum(counts)


def test_parts_are_selected_together(seeing: Seeing):
    batch = tokenise_chats(seeing.llm, [CHATS["images"]], written=[[7, 8]])
    kept = batch.is_any(ChatPart.IMAGE, ChatPart.WRITTEN)
    assert kept.sum() == sum(IMAGE_TOKENS[seeing.family]) + 2
    assert torch.equal(kept, (batch.parts == ChatPart.IMAGE) | (batch.parts == ChatPart.WRITTEN))


SPELLED = "a </s> <|im_end|> <|im_start|>system <image> <IMG_CONTEXT> <|image_pad|> b"
"""Control tokens of all families."""


@pytest.mark.parametrize("images", [0, 1])
def test_a_text_that_spells_control_tokens_stays_text(images, seeing: Seeing):
    llm, control = seeing.llm, set(seeing.llm.tokenizer.all_special_ids)
    batches = [
        tokenise_chats(llm, [Chat(text, (picture(16, 16),) * images, text)]) for text in (SPELLED, "b")
    ]
    found = [[id for id in batch.ids[0].tolist() if id in control] for batch in batches]
    assert found[0] == found[1]
    for part in (ChatPart.SYSTEM, ChatPart.INSTRUCTION):
        assert text_of(llm, batches[0], 0, part) == SPELLED
    assert (batches[0].parts == ChatPart.IMAGE).sum() == (batches[1].parts == ChatPart.IMAGE).sum()


@pytest.fixture
def copied(vlm_folders, tmp_path):
    """Copies a family's folder and changes its chat template."""

    def copy(family: str, template: str | None = None) -> Path:
        folder = tmp_path / family
        shutil.copytree(vlm_folders[family], folder)
        (folder / "chat_template.jinja").unlink()
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        return folder

    return copy


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl"])
def test_a_folder_without_a_chat_template_is_refused_where_one_is_needed(family, copied):
    llm = load_language_model(copied(family))
    with pytest.raises(ValueError, match=rf"{family}: no chat template .*copy it from where the model is"):
        tokenise_chats(llm, [Chat("a red circle")])
    assert llm.tokenise(["a red circle"]).ids.shape[0] == 1, "methods that need only text ask for none"


def test_the_template_of_an_older_processors_file_is_read(copied, vlm_folders):
    folder = copied("qwen2_5_vl")
    template = (vlm_folders["qwen2_5_vl"] / "chat_template.jinja").read_text()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    batches = [
        tokenise_chats(load_language_model(one), [CHATS["system"]])
        for one in (folder, vlm_folders["qwen2_5_vl"])
    ]
    assert torch.equal(batches[0].ids, batches[1].ids)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (
            "{{ raise_exception('no system') }}",
            r"a chat with a system prompt and 0 images: no system",
        ),
        ("{{ messages[1]['content'][0]['text'] }}", r"shows 0 times 'system', expected 1"),
        ("{{ messages[0]['content'][0]['text'] * 2 }}", r"shows 2 times 'system', expected 1"),
    ],
)
def test_a_template_that_does_not_take_the_chat_is_named(template, says, copied):
    llm = load_language_model(copied("internvl", template))
    with pytest.raises(ValueError, match=says):
        tokenise_chats(llm, [CHATS["system"]])


def test_a_template_that_shows_no_images_is_named(copied):
    llm = load_language_model(copied("internvl", "{{ messages[0]['content'][-1]['text'] }}"), with_eyes=True)
    with pytest.raises(ValueError, match=r"shows 0 times '<IMG_CONTEXT>', expected 1"):
        tokenise_chats(llm, [CHATS["image"]])


def test_a_begin_token_of_the_template_stands_alone(copied):
    begin = "{{ '<s>' }}{{ messages[0]['content'][0]['text'] }}"
    llm = load_language_model(copied("llava", begin))
    assert tokenise_chats(llm, [Chat("a")]).ids[0].tolist().count(llm.begin_id) == 1


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> LanguageModel:
    """A LLaVA like the shipped ones: no chat template, and the foundation's tokenizer."""
    folder = tmp_path_factory.mktemp("small")
    save_llava(folder, "")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    train_tokenizer(folder, num_scenes=40)
    config = json.loads((folder / "config.json").read_text())
    words = len(load_tokens(folder))
    config["text_config"]["vocab_size"] = words
    (folder / "config.json").write_text(json.dumps(config))
    resize(folder, words)
    return load_language_model(folder, with_head=True, with_eyes=True)


def load_tokens(folder: Path) -> dict[str, int]:
    return json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]


def resize(folder: Path, words: int) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    for name, value in weights.items():
        if "embed_tokens" in name or "lm_head" in name:
            rows = torch.arange(words) % len(value)
            weights[name] = value[rows].contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("prompt", ["red thing left of blue square", "two circles", "make it, blue!", "a"])
def test_plain_chats_are_the_foundations_own_dialogues(prompt, small: LanguageModel):
    assert PLAIN_CUE == ANSWER
    rewriting = tokenise_chats(small, [Chat(prompt, system=REWRITE)])
    ((expected, start),) = text_ids(small.tokenizer, [(f"{REWRITE} {prompt} {ANSWER}", "")])
    assert rewriting.ids[0].tolist() == expected[:start]
    assert text_of(small, rewriting, 0, ChatPart.SYSTEM).strip() == REWRITE
    shown = tokenise_chats(small, [Chat(prompt, (picture(16, 16),))])
    ((expected, start),) = text_ids(small.tokenizer, [(f"<image> {prompt} {ANSWER}", "")], 4)
    assert shown.ids[0].tolist() == expected[:start]
    for batch in (rewriting, shown):
        assert text_of(small, batch, 0, ChatPart.INSTRUCTION) == small.tokenizer.decode(
            small.token_ids([prompt])[0]
        ).removeprefix(" ")
        assert batch.ids[0, 0] == small.begin_id and batch.parts[0, 0] == ChatPart.TEMPLATE


def test_a_tokenizer_without_the_image_token_is_named(tmp_path):
    folder = make_foundation(tmp_path, knows_images=False) / "llava"
    llm = load_language_model(folder, with_eyes=True)
    with pytest.raises(ValueError, match=r"tokenizer does not read '<image>' as a token of its own"):
        tokenise_chats(llm, [Chat("a", (picture(32, 32),))])


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (
            np.zeros((16, 16), np.uint8),
            r"image is \(16, 16\) uint8, expected RGB, \(height, width, 3\) ui",
        ),
        (np.zeros((16, 16, 4), np.uint8), r"\(16, 16, 4\) uint8, expected RGB.*read_pixels"),
        (np.zeros((16, 16, 3), np.float32), r"\(16, 16, 3\) float32, expected RGB"),
        (np.zeros((1, 1, 3), np.uint8), r"image is 1 x 1 px, expected 2 px a side or more"),
        (np.zeros((1, 40, 3), np.uint8), r"image is 40 x 1 px, expected 2 px"),
    ],
)
def test_what_is_no_image_is_refused(image, says, seeing: Seeing):
    with pytest.raises(ValueError, match=says):
        tokenise_chats(seeing.llm, [Chat("a", (image,))])


@pytest.mark.parametrize("sides", [(2, 2), (3, 3), (3, 50)])
def test_an_image_of_three_rows_is_seen_as_it_lies(sides, seeing: Seeing):
    """Three rows of pixels are no three channels."""
    image, processor = picture(*sides), seeing.processor.image_processor
    options = {"crop_to_patches": True} if seeing.family == "internvl" else {}
    expected = processor(Image.fromarray(image), return_tensors="pt", **options)
    for name, tensor in eyes_of(seeing.llm).look(image).inputs.items():
        assert torch.equal(tensor, expected[name])


def test_an_image_longer_than_its_processor_takes_is_refused_with_its_size(seeing: Seeing):
    image = picture(2, 600)
    if seeing.family.startswith("qwen"):
        with pytest.raises(ValueError, match=r"image of 600 x 2 px: absolute aspect ratio must be smaller"):
            tokenise_chats(seeing.llm, [Chat("a", (image,))])
    else:
        assert tokenise_chats(seeing.llm, [Chat("a", (image,))]).images["pixel_values"].isfinite().all()


def test_images_beyond_the_context_are_refused_and_those_that_fit_counted(seeing: Seeing):
    def chat(number: int) -> Chat:
        return Chat("a red circle", tuple(picture(32, 32, seed) for seed in range(number)))

    one, two = (tokenise_chats(seeing.llm, [chat(number)]).ids.shape[1] for number in (1, 2))
    fit = (CONTEXT - one) // (two - one) + 1
    assert tokenise_chats(seeing.llm, [chat(fit)]).ids.shape[1] <= CONTEXT
    with pytest.raises(ValueError, match=rf"{fit + 3} images .* context of 400 .* first {fit} images fit"):
        tokenise_chats(seeing.llm, [chat(fit + 3)])
    room = CONTEXT - one
    tokenise_chats(seeing.llm, [chat(1)], room=room)
    with pytest.raises(ValueError, match=rf"leaves {one - 1}, where the first 0 images fit"):
        tokenise_chats(seeing.llm, [chat(1)], room=room + 1)


@pytest.mark.parametrize("images", [0, 1])
def test_a_prompt_longer_than_the_context_is_refused_as_such(images, seeing: Seeing):
    chat = Chat("circle " * CONTEXT, (picture(16, 16),) * images)
    with pytest.raises(PromptTooLong, match=r"'circle circle .* tokens; the context takes 400: shorten"):
        tokenise_chats(seeing.llm, [chat])


def test_images_need_eyes(vlm_folders, seeing: Seeing):
    blind = load_language_model(seeing.folder)
    assert blind.eyes is None
    with pytest.raises(ValueError, match=r"images need eyes, and it was loaded without them \(with_eyes\)"):
        tokenise_chats(blind, [CHATS["image"]])
    assert torch.equal(
        tokenise_chats(blind, [CHATS["system"]]).ids, tokenise_chats(seeing.llm, [CHATS["system"]]).ids
    )


def test_the_format_of_a_blind_family_takes_contents_as_text(small: LanguageModel):
    template = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] | trim + ' ' }}{% endfor %}"
    tokenizer = small.chat_format.parsing
    tokenizer.chat_template = template
    form = ChatFormat(tokenizer, small.folder, small.begin_id, None, sees=False, needs_template=False)
    tokens = form.tokens_of(Chat(" two circles", system="be terse"), [])
    for part, text in ((ChatPart.SYSTEM, "be terse"), (ChatPart.INSTRUCTION, "two circles")):
        ids = [id for id, one in zip(tokens.ids, tokens.parts, strict=True) if one == part]
        assert tokenizer.decode(ids).strip() == text
    tokenizer.chat_template = None


def test_chats_are_tokenised_beside_prompts_in_another_thread(seeing: Seeing):
    chats, llm = [Chat(SPELLED), Chat("a red circle")], seeing.llm
    expected, control = tokenise_chats(llm, chats).ids, set(llm.tokenizer.all_special_ids)

    def prompts(number: int) -> bool:
        return control.isdisjoint(llm.token_ids([f"{number} {SPELLED}"])[0])

    with ThreadPoolExecutor(2) as pool:
        apart = pool.map(prompts, range(300))
        beside = pool.map(lambda _: torch.equal(tokenise_chats(llm, chats).ids, expected), range(100))
        assert all(apart) and all(beside)


def test_kept_tokens_are_packed_in_order():
    states = torch.arange(12.0).view(2, 6, 1)
    keep = torch.tensor([[0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1]]).bool()
    (packed, doubled), mask = pack([states, 2 * states], keep)
    assert packed[..., 0].tolist() == [[1, 3, 4], [11, 0, 0]]
    assert torch.equal(doubled, 2 * packed)
    assert mask.tolist() == [[True] * 3, [True, False, False]]
    (empty,), mask = pack([states], torch.zeros(2, 6, dtype=torch.bool))
    assert empty.tolist() == [[[0]], [[0]]] and not mask.any()
