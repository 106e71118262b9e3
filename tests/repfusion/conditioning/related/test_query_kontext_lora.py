"""Query-Kontext's LoRA: it trains with the light DiT, is all that is saved of the language model, and goes
on, frozen, through the later trainings, a checkpoint and an export.
"""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from tiny_training import tiny_model, tiny_train

from repfusion.conditioning.lora import LoraConfig, add_lora
from repfusion.conditioning.related.query_kontext import QueryKontextConditioner, QueryKontextConfig
from repfusion.export import export
from repfusion.llm.load import load_language_model
from repfusion.model.build import build_model
from repfusion.model.check import check_model
from repfusion.model.config import ModelConfig
from repfusion.model.dit import DiTConfig
from repfusion.model.text_to_image import TextToImage, untrained
from repfusion.request import Request
from repfusion.runs.checkpoint import check_continues, load_checkpoint, load_start, save_checkpoint
from repfusion.runs.exported import load_export
from repfusion.runs.folder import checkpoint_folder, step_of
from repfusion.train import train

LORA = LoraConfig(rank=2, alpha=6.0, targets=("q_proj", "down_proj"))
REQUESTS = [Request("two blue circle left of a green square"), Request("a circle"), Request()]


def conditioner(foundation: Path, lora: LoraConfig | None = LORA, dtype=torch.float32):
    torch.manual_seed(0)
    llm = load_language_model(foundation / "llava", dtype, with_eyes=True)
    return QueryKontextConditioner(llm, QueryKontextConfig(num_queries=3, width=24, lora=lora))


def speak(made: torch.nn.Module) -> None:
    """Moves what is 0 at first, so that the LoRA counts."""
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))


def tokens(made: QueryKontextConditioner) -> torch.Tensor:
    return made.prepare(made.collate(REQUESTS, ["full", "full", "none"])).static[0].tokens


def model_config(foundation: Path, **fields) -> ModelConfig:
    method = QueryKontextConfig(**{"num_queries": 3, "lora": LORA, **fields})
    return tiny_model(foundation, "unifusion").model_copy(update={"conditioning": method})


def whole_model(foundation: Path, statistics, **fields) -> TextToImage:
    torch.manual_seed(1)
    return build_model(model_config(foundation, **fields), statistics)


def save(model: TextToImage, folder: Path) -> Path:
    save_checkpoint(folder, model, model.trainable_state(), step=step_of(folder))
    return folder


def of_lora(state) -> dict[str, torch.Tensor]:
    return {name: p for name, p in state.items() if ".lora_" in name}


def test_it_is_w_plus_alpha_over_rank_times_b_a(foundation):
    """The same states come of a language model whose own weights have been moved by the products."""
    made, plain = conditioner(foundation), conditioner(foundation, lora=None)
    speak(made)
    plain.queries.data.copy_(made.queries)
    plain.connector.load_state_dict(made.connector.state_dict())
    before = tokens(plain)
    with torch.no_grad():
        for own, other in zip(made.llm.layers, plain.llm.layers, strict=True):
            for adapted, linear in (
                (own.self_attn.q_proj, other.self_attn.q_proj),
                (own.mlp.down_proj, other.mlp.down_proj),
            ):
                a, b = adapted.lora_A.default.weight, adapted.lora_B.default.weight
                assert a.shape == (2, linear.in_features) and b.shape == (linear.out_features, 2)
                linear.weight += 3.0 * b @ a
    torch.testing.assert_close(tokens(made), tokens(plain), rtol=1e-4, atol=1e-4)
    assert (tokens(made) - before).abs().max() > 0.1


def test_at_first_it_changes_nothing(foundation):
    made = conditioner(foundation)
    states = made.llm.read(made.llm.tokenise(["a red circle", "two"]))
    plain = load_language_model(foundation / "llava")
    assert torch.equal(states, plain.read(plain.tokenise(["a red circle", "two"])))


def test_gradients_reach_the_lora_alone_in_the_language_model(foundation):
    made = conditioner(foundation)
    speak(made)
    tokens(made).square().sum().backward()
    trained = {name for name, p in made.named_parameters() if p.grad is not None}
    assert {name for name in trained if name.startswith("llm.")} == set(made.adapters)
    assert len(made.adapters) == 2 * 2 * 2
    assert all(made.get_parameter(name).grad.abs().max() > 0 for name in made.adapters)


def test_over_a_language_model_in_bfloat16_its_weights_are_float32(foundation):
    made = conditioner(foundation, dtype=torch.bfloat16)
    assert {made.get_parameter(name).dtype for name in made.adapters} == {torch.float32}
    assert made.llm.layers[0].self_attn.q_proj.base_layer.weight.dtype == torch.bfloat16
    assert tokens(made).isfinite().all()


def test_layers_that_the_family_does_not_have_are_refused_before_weights_are_read(foundation):
    wrong = model_config(foundation, lora=LoraConfig(targets=("q_proj", "qkv_proj", "lm_head")))
    expected = (
        r"^model: lora\.targets qkv_proj, lm_head: no linear layers .*a LlamaModel; expected some of q_proj"
    )
    with pytest.raises(ValueError, match=expected):
        check_model(wrong)


def test_what_a_rank_holds_frozen_is_all_but_the_lora(foundation, statistics):
    model = whole_model(foundation, statistics)
    frozen = {id(p) for part in model.frozen_parts() for p in part.parameters()}
    assert frozen == {id(p) for p in model.parameters() if not p.requires_grad}
    llm = whole_model(foundation, statistics, lora=None).conditioner.llm.language_model
    assert untrained(llm) == [llm] and untrained(llm.requires_grad_(True)) == []


@pytest.mark.slow
def test_a_checkpoint_holds_the_lora_and_nothing_else_of_the_language_model(foundation, statistics, tmp_path):
    model = whole_model(foundation, statistics)
    speak(model)
    folder = save(model, tmp_path / "step_00000001")
    saved = load_file(folder / "ema.safetensors")
    within = {name for name in saved if name.startswith("conditioner.llm.")}
    assert within == {f"conditioner.{name}" for name in model.conditioner.adapters}
    own = of_lora(model.state_dict())
    for loaded in (load_checkpoint(folder), load_export(export(folder, tmp_path / "out"))):
        found = of_lora(loaded.state_dict())
        assert found.keys() == own.keys() and all(torch.equal(p, own[name]) for name, p in found.items())


@pytest.mark.slow
def test_later_trainings_keep_it_frozen_and_save_it(foundation, statistics, tmp_path):
    first = whole_model(foundation, statistics)
    speak(first)
    start = save(first, tmp_path / "step_00000001")
    own = of_lora(first.state_dict())
    for step, fields in enumerate(({"replaces_dit": True}, {"replaces_dit": True, "low_level": True}), 2):
        after = whole_model(foundation, statistics, **fields)
        check_continues(after, start)
        load_start(after, start)
        assert after.kept.keys() == own.keys() and not of_lora(after.trainable_state())
        assert after.conditioner.llm.is_frozen
        start = save(after, tmp_path / f"step_{step:08d}")
        kept = of_lora(load_checkpoint(start).state_dict())
        assert all(torch.equal(p, own[name]) for name, p in kept.items())


@pytest.mark.parametrize("other", [None, LORA.model_copy(update={"alpha": 7.0})], ids=["none", "alpha"])
def test_another_lora_than_the_training_befores_is_refused(foundation, statistics, tmp_path, other):
    """Weights of another alpha would fit, and say something else."""
    start = save(whole_model(foundation, statistics), tmp_path / "step_00000001")
    for fields in ({}, {"replaces_dit": True}):
        after = whole_model(foundation, statistics, lora=other, **fields)
        expected = r"checkpoint .*step_00000001: conditioning\.lora is .*, that of the training before .*6\.0"
        for read in (check_continues, load_start):
            with pytest.raises(ValueError, match=expected):
                read(after, start)


def test_a_frozen_lora_has_to_come_from_somewhere(foundation, columns, tmp_path):
    model = model_config(foundation, replaces_dit=True).model_dump()
    with pytest.raises(ValidationError, match="init_from is not given: the method 'query_kontext', as it is"):
        tiny_train(foundation, columns, tmp_path / "run", model=model)


@pytest.mark.slow
def test_it_learns_and_leaves_the_language_models_own_weights(foundation, statistics):
    """What was learned hangs on the LoRA: without it, the prompts are told apart no longer so well."""
    lora = LoraConfig(rank=4, alpha=8.0, targets=("q_proj", "v_proj", "down_proj"))
    model = whole_model(foundation, statistics, lora=lora)
    added = of_lora(dict(model.named_parameters()))
    read = dict(model.conditioner.llm.named_parameters(prefix="conditioner.llm"))
    own = {name: p.detach().clone() for name, p in read.items() if name not in added}
    requests = [Request(prompt) for prompt in ("a red circle", "two blue square", "green", "a circle")]
    inputs = {
        "request": model.conditioner.collate(requests, ["full"] * 4),
        "features": model.denormalise(torch.randn(4, *model.latent_shape)).half(),
        "t": torch.ones(4),
        "noise": torch.randn(1, *model.latent_shape).expand(4, -1, -1),
    }
    exchanged = {**inputs, "request": model.conditioner.collate(requests[::-1], ["full"] * 4)}
    optimizer = torch.optim.AdamW(model.trainable_state().values(), lr=5e-3, weight_decay=0)
    losses = []
    for _ in range(80):
        loss = model(inputs)["velocity"].mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right, wrong = (model(one)["velocity"].mean().item() for one in (inputs, exchanged))
        for parameter in added.values():
            parameter.zero_()
        without = model(inputs)["velocity"].mean().item()
    assert right < 0.5 * losses[0] and wrong > 2 * right and without > 1.5 * right
    assert all(torch.equal(read[name], p) for name, p in own.items())


@pytest.mark.slow
def test_two_trainings_of_the_engine(foundation, columns, tmp_path):
    """The first trains the LoRA, the second goes on with its average, to the bit."""
    first = model_config(foundation).model_dump()
    train(tiny_train(foundation, columns, tmp_path / "light", model=first))
    start = checkpoint_folder(tmp_path / "light" / "checkpoints", 4)
    found = of_lora(load_file(start / "ema.safetensors"))
    assert found and all(p.abs().max() > 0 for p in found.values())
    large = DiTConfig(hidden_size=32, depth=2, num_heads=2)
    second = {"conditioning": {"method": "query_kontext", "replaces_dit": True}, "dit": large.model_dump()}
    config = tiny_train(foundation, columns, tmp_path / "large", init_from=start, model=second)
    assert config.model.conditioning.lora == LORA
    train(config)
    after = load_checkpoint(checkpoint_folder(tmp_path / "large" / "checkpoints", 4))
    assert all(torch.equal(after.kept[name], p) for name, p in found.items())


def test_it_is_put_beside_every_layer_that_is_named(foundation):
    llm = load_language_model(foundation / "llava")
    num_before = sum(p.numel() for p in llm.parameters())
    names = add_lora(llm, LoraConfig(rank=3, targets=("o_proj",)), is_trained=False)
    assert len(names) == 2 * len(llm.layers) and llm.is_frozen
    assert sum(p.numel() for p in llm.parameters()) == num_before + 2 * 3 * (32 + 32)
