"""Texts are read as text, whatever they spell; a tokenizer fits its model, or is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_models import save_causal
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from repfusion.llm.base import PromptTooLong
from repfusion.llm.load import load_language_model
from repfusion.llm.tokenizer import (
    CaptionLimit,
    load_tokenizer,
    longest_sure_bytes,
    plain_ids,
    prompt_context,
)
from repfusion.scenes.captions import caption_scene
from repfusion.scenes.world import draw_scene
from repfusion.weights import WEIGHTS

CONTROL = ("<s>", "</s>", "<pad>", "<image>")
TEXTS = ("a red circle", "two blue squares left of a green cross", "naïve café, 12 €")


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """LLaMA's kind: BPE over words that begin with a low line, bytes for what is in no word."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    whole = special + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=whole, show_progress=False)
    rng = np.random.default_rng(0)
    tokenizer.train_from_iterator((caption_scene(draw_scene(seed), rng) for seed in range(100)), trainer)
    fields = json.loads(tokenizer.to_str())
    # LLaMA's bytes are no control tokens
    fields["added_tokens"] = [one for one in fields["added_tokens"] if one["content"] in special]
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(fields)), **roles)


def byte_level() -> PreTrainedTokenizerFast:
    """Qwen's kind: byte-level BPE behind NFC, control tokens after the words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    rng = np.random.default_rng(0)
    tokenizer.train_from_iterator((caption_scene(draw_scene(seed), rng) for seed in range(100)), trainer)
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in CONTROL])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


KINDS = {"bytes": byte_level, "sentencepiece": sentencepiece_like, "shipped": None}


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if (make := KINDS[request.param]) is None:
        return WEIGHTS / "llava"
    folder = tmp_path_factory.mktemp(request.param)
    save_causal("Llama", folder, vocab_size=700)
    make().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("word", CONTROL)
def test_a_control_token_in_a_text_is_characters(folder, word):
    tokenizer, llm = AutoTokenizer.from_pretrained(folder), load_language_model(folder)
    control = tokenizer.convert_tokens_to_ids(word)
    text = f"a red {word} circle{word}"
    assert control in tokenizer(text, add_special_tokens=False).input_ids, "what happens without care"
    ids = llm.token_ids([text])[0]
    assert control not in ids
    assert tokenizer.decode(ids).strip() == text
    assert llm.tokenise([text]).ids[0].tolist() == [llm.begin_id, *ids]


def test_other_texts_have_the_ids_that_they_always_had(folder):
    tokenizer, rng = AutoTokenizer.from_pretrained(folder), np.random.default_rng(7)
    texts = [*TEXTS, "", *(caption_scene(draw_scene(seed), rng) for seed in range(2000))]
    assert plain_ids(load_tokenizer(folder), texts) == tokenizer(texts, add_special_tokens=False).input_ids


def test_so_many_bytes_are_never_more_tokens(folder):
    """Whatever the text: characters that Unicode composes or decomposes, rare ones, a space before all."""
    tokenizer, rng = load_tokenizer(folder), np.random.default_rng(0)
    letters = [*"aé ́ïﷺ漢𝄞ऀ\u0344\ufb2c", "red"]
    texts = ["".join(rng.choice(letters, size=rng.integers(1, 30))) for _ in range(500)]
    for text, ids in zip(texts, plain_ids(tokenizer, texts), strict=True):
        sure = longest_sure_bytes(len(ids) - 1)  # the limit that it exceeds by one
        assert len(text.encode()) > sure, text


def test_a_caption_limit_counts_tokens_where_it_must(folder):
    text = "a red circle left of a blue square"
    num_tokens = len(plain_ids(load_tokenizer(folder), [text])[0])
    assert CaptionLimit(folder, num_tokens).excess(text) is None
    says = f"{num_tokens} tokens, at most {num_tokens - 1}"
    assert CaptionLimit(folder, num_tokens - 1).excess(text) == says
    loaded = CaptionLimit(folder, 3 * len(text) + 6)
    assert loaded.excess(text) is None and "tokenizer" not in vars(loaded), "sure by its bytes alone"


def test_the_context_of_a_folder_is_known_without_its_model(folder):
    assert prompt_context(folder, 0) == load_language_model(folder).max_text_tokens
    llm = load_language_model(folder)
    llm.leave_room(7)
    assert prompt_context(folder, 7) == llm.max_text_tokens


def test_the_first_prompt_that_is_too_long_is_named(folder):
    llm = load_language_model(folder)
    long = "a red circle left of a blue square " * 40
    with pytest.raises(
        PromptTooLong, match=r"prompt 'a red circle .*'\.\.\. has \d+ tokens; the context takes"
    ):
        llm.check_lengths(["a", long, "b"])


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    save_causal("Llama", tmp_path / "llama")
    return tmp_path / "llama"


def refused(folder: Path, says: str) -> None:
    for on_meta in (False, True):
        with pytest.raises(ValueError, match=says) as error:
            load_language_model(folder, on_meta=on_meta)
        assert str(folder) in str(error.value)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(llama):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.add_tokens(["<photo>"], special_tokens=True)
    tokenizer.save_pretrained(llama)
    refused(llama, r"token '<photo>' with id 8, the model has 8 embeddings; .*resize_token_embeddings")


def test_a_folder_without_a_tokenizer_says_which_files_were_expected(llama):
    (llama / "tokenizer.json").unlink()
    refused(
        llama, r"no tokenizer; expected tokenizer\.json or vocab\.json and merges\.txt, with tokenizer_config"
    )
    (llama / "tokenizer.json").write_text("{")
    refused(llama, "cannot be loaded with its tokenizer")


def test_a_tokenizer_that_asks_for_code_of_its_own_is_refused(llama):
    path = llama / "tokenizer_config.json"
    fields = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["tokenization.Own", None]}}
    path.write_text(json.dumps(fields))
    (llama / "tokenization.py").write_text("raise SystemExit('ran')")
    refused(llama, r"tokenizer_config\.json asks for code of its own \(auto_map\), which is never run")


def test_a_tokenizer_whose_words_are_its_control_tokens_is_refused(llama):
    """A unigram model takes the best piece, and a control token is one like any other."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((letter, -5.0) for letter in "abs<>")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles).save_pretrained(llama)
    refused(llama, "its tokenizer makes a control token of '</?s>' in a text")


def test_shipped_tokenizers_are_one_file(tmp_path):
    """So that a data set counted for one of the shipped language models serves them all."""
    names = ("llava", "language", "llava_noise_taught", "llava_large")
    files = {(WEIGHTS / name / file).read_bytes() for name in names for file in ("tokenizer.json",)}
    assert len(files) == 1
    shutil.copytree(WEIGHTS / "llava", tmp_path / "copy")
    assert prompt_context(tmp_path / "copy", 16) == 64
