"""A folder of any family, with a fault: a ValueError that names it, from the headers alone as from the
whole.
"""

import itertools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, LAYERS, save_llava
from tiny_models import clip as clip_config

from repfusion.llm.load import load_language_model
from repfusion.weights import WEIGHTS

Weights = dict[str, torch.Tensor]
LLMS = [name for name in FAMILIES if FAMILIES[name].load.__name__ == "language_model"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    torch.manual_seed(0)
    for name, family in FAMILIES.items():
        family.save(root / name)
    return {name: root / name for name in FAMILIES}


@pytest.fixture
def copied(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a family's folder, to be spoilt."""
    return lambda name: Path(shutil.copytree(folders[name], tmp_path / name))


def change(file: Path, how: Callable[[Weights], Weights]) -> None:
    weights = {name: value.clone() for name, value in load_file(file).items()}
    save_file(how(weights), file, metadata={"format": "pt"})


def refused(name: str, folder: Path, says: str) -> None:
    """With the same words from the headers alone (a VAE is always read whole)."""
    load = FAMILIES[name].load
    with pytest.raises(ValueError, match=says) as whole:
        load(folder)
    assert str(folder) in str(whole.value)
    with pytest.raises(ValueError) as headers:
        load(folder, on_meta=True)
    assert str(headers.value) == str(whole.value)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_whole_folder_loads_and_its_headers_say_the_same_shapes(name, folders):
    loaded, bare = FAMILIES[name].load(folders[name]), FAMILIES[name].load(folders[name], on_meta=True)
    shapes = {key: value.shape for key, value in loaded.state_dict().items()}
    assert {key: value.shape for key, value in bare.state_dict().items()} == shapes
    is_vae = FAMILIES[name].file != "model.safetensors"
    assert is_vae or {parameter.device.type for parameter in bare.parameters()} == {"meta"}


FAULTS = ("missing", "misnamed", "misshapen", "not finite")


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        *(("llava", fault) for fault in FAULTS),
        *((name, "missing") for name in FAMILIES if name != "llava"),
        *(
            pytest.param(name, fault, marks=pytest.mark.slow)
            for name, fault in itertools.product(FAMILIES, FAULTS[1:])
            if name != "llava"
        ),
    ],
)
def test_any_tensor_that_is_missing_misnamed_misshapen_or_not_finite_is_named(name, fault, copied):
    family, folder = FAMILIES[name], copied(name)
    names = sorted(key for key in load_file(folder / family.file) if key.startswith(family.own))
    victim = random.Random(f"{name} {fault}").choice(names)
    last = victim.rsplit(".", 1)[-1]  # what is before it may have another name in this version of the library

    def spoil(weights: Weights) -> Weights:
        value = weights.pop(victim)
        match fault:
            case "missing":
                return weights
            case "misnamed":
                return {**weights, f"other.{victim}": value}
            case "misshapen":
                return {**weights, victim: torch.zeros(*value.shape, 2)}
        value.view(-1)[-1] = float("nan")
        return {**weights, victim: value}

    change(folder / family.file, spoil)
    if fault == "not finite":
        with pytest.raises(ValueError, match=rf"{last} holds values that are not finite"):
            family.load(folder)
        return
    says = {"missing": "missing: ", "misnamed": "unexpected: other.", "misshapen": "of another shape: "}[
        fault
    ]
    refused(name, folder, rf"weights do not fit config\.json.*{says}\S*{last}[ ;].*save_pretrained")


def test_of_many_faults_the_first_and_their_number_are_named(copied):
    folder = copied("llama")
    change(folder / "model.safetensors", lambda all: {k: v for k, v in all.items() if ".layers." not in k})
    refused("llama", folder, rf"missing: model\.layers\.0\.\S+, .*\({9 * LAYERS} in all\)")


@pytest.mark.parametrize("name", ["llava", "llava_tower"])
def test_the_layout_of_the_original_llava_is_refused_by_name(name, copied):
    folder = copied(name)

    def original(weights: Weights) -> Weights:
        names = {
            key: key.removeprefix("language_model.")
            .replace("multi_modal_projector.linear_1", "model.mm_projector.0")
            .replace("multi_modal_projector.linear_2", "model.mm_projector.2")
            .replace("vision_tower.vision_model", "model.vision_tower.vision_tower.vision_model")
            for key in weights
        }
        return {names[key]: value for key, value in weights.items()}

    change(folder / "model.safetensors", original)
    refused(
        name,
        folder,
        r"the layout of the original LLaVA repository; convert it with convert_llava_weights_to_hf",
    )


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"auto_map": {"AutoModel": "modeling.Model"}},
            r"config\.json asks for code of its own \(auto_map\)",
        ),
        ({"quantization_config": {"load_in_4bit": True}}, r"quantised \(quantization_config\)"),
        ({"mm_vision_tower": "openai/clip"}, "original LLaVA repository"),
        ({"model_type": "llava_llama"}, "original LLaVA repository"),
        ({"model_type": "internvl_chat", "auto_map": {"AutoModel": "m.M"}}, "layout of InternVL's own repos"),
        (
            {"num_attention_heads": "two", "text_config": {"hidden_size": "x"}},
            "cannot be loaded by its config",
        ),
    ],
)
def test_what_a_config_asks_for_and_is_never_done(fields, says, copied):
    folder = copied("llava")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    refused("llava", folder, says)


@pytest.mark.parametrize("name", ["llama", "clip_tower", "rae_decoder", "kl_encoder"])
@pytest.mark.parametrize("file", ["auto_map", "no json", "no fields", "adapter"])
def test_a_folder_that_asks_for_code_or_is_damaged_is_refused_whatever_it_is(name, file, copied):
    folder = copied(name)
    path = folder / "config.json"
    match file:
        case "auto_map":
            fields = json.loads(path.read_text()) | {"auto_map": {"AutoModel": "modeling.Model"}}
            path.write_text(json.dumps(fields))
            (folder / "modeling.py").write_text("raise SystemExit('ran')")
            says = "never run"
        case "no json":
            path.write_text("{")
            says = r"config\.json is not JSON .*copy it again"
        case "no fields":
            path.write_text("[1]")
            says = r"config\.json holds a list"
        case _:
            (folder / "adapter_config.json").write_text("{}")
            says = "an adapter of another model"
    refused(name, folder, says)


def shard(folder: Path, file: str, parts: int = 2) -> list[Path]:
    """The weights in several files with an index."""
    stem, weights = file.removesuffix(".safetensors"), load_file(folder / file)
    (folder / file).unlink()
    where, files = {}, []
    for part in range(parts):
        name = f"{stem}-{part + 1:05d}-of-{parts:05d}.safetensors"
        own = {key: weights[key] for key in sorted(weights)[part::parts]}
        save_file(own, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(own, name)
        files.append(folder / name)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / f"{file}.index.json").write_text(json.dumps(index))
    return files


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_in_several_files_load_and_one_that_is_gone_is_named(name, copied, folders):
    folder = copied(name)
    files = shard(folder, FAMILIES[name].file)
    whole, parts = FAMILIES[name].load(folders[name]).state_dict(), FAMILIES[name].load(folder).state_dict()
    assert all(torch.equal(parts[key], value) for key, value in whole.items())
    files[1].write_bytes(files[1].read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"not readable|cannot be loaded"):
        FAMILIES[name].load(folder)
    files[1].unlink()
    refused(name, folder, rf"{files[1].name} of 2 files that \S+\.index\.json names is gone; copy the folder")


@pytest.mark.parametrize("name", FAMILIES)
def test_pickles_are_named_and_not_read(name, copied):
    folder, file = copied(name), FAMILIES[name].file
    (folder / file).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    refused(
        name, folder, rf"no {file} and no .*; pytorch_model\.bin is not read, as unpickling can run any code"
    )


def test_names_of_older_and_newer_versions_are_read(copied, folders):
    """Buffers that used to be saved, and LLaVA's names before and after they changed."""
    expected = load_language_model(folders["llava"]).state_dict()
    folder = copied("llava")

    def older(weights: Weights) -> Weights:
        prefix = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
        ids = "vision_tower.vision_model.embeddings.position_ids"
        return {**weights, prefix: torch.ones(4), ids: torch.arange(5)[None]}

    def newer(weights: Weights) -> Weights:
        changes = {
            "language_model.model.": "model.language_model.",
            "language_model.lm_head": "lm_head",
            "vision_tower.": "model.vision_tower.",
            "multi_modal_projector.": "model.multi_modal_projector.",
        }
        found = {}
        for key, value in weights.items():
            start = next(old for old in changes if key.startswith(old))
            found[changes[start] + key.removeprefix(start)] = value
        return found

    for how in (older, newer):
        shutil.copyfile(folders["llava"] / "model.safetensors", folder / "model.safetensors")
        change(folder / "model.safetensors", how)
        load_language_model(folder, on_meta=True)
        for key, value in load_language_model(folder).state_dict().items():
            assert torch.equal(value, expected[key]), key


def test_the_same_folder_gives_the_same_bits_each_time(folders):
    one, other = (load_language_model(folders["qwen2_tied"], with_head=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert one.head is not None
    assert one.head.weight is one.language_model.get_input_embeddings().weight, "tied, as its config says"


def test_reading_headers_draws_no_random_number(folders):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for name in ("llava", "clip", "rae_decoder"):
        FAMILIES[name].load(folders[name], on_meta=True)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("model_type", ["gemma2", "gpt2", "smollm3", "olmo2"])
def test_a_language_model_of_another_family_is_refused_with_those_that_are_read(model_type, copied):
    folder = copied("llama")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": model_type}))
    refused("llama", folder, rf"model_type '{model_type}'; expected 'llava' or .*llama, mistral.*qwen3_vl")


def test_the_shipped_folders_are_whole():
    for name in ("llava", "language", "llava_noise_taught", "llava_large"):
        load_language_model(WEIGHTS / name, on_meta=True)


def test_a_llava_whose_config_names_another_width_is_refused(tmp_path):
    save_llava(tmp_path, clip_config())
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    fields["vision_config"]["hidden_size"] = 32
    path.write_text(json.dumps(fields))
    refused("llava", tmp_path, r"of another shape: model\.multi_modal_projector\.linear_1\.weight \(16, 16\)")
