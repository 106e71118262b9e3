"""The language model as a controller, against a slow reference: updates in context without those of the token
alone, their sum and its noise, the mixture in a frozen DiT that comes from a checkpoint of text_embed.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from prompting import asked, prepare, training_inputs
from pydantic import ValidationError
from slow_layers import keys_values, rms
from tiny_training import make_foundation, tiny_model, tiny_train
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from repfusion.conditioning.related.llm_controller import (
    LlmControllerConditioner,
    LlmControllerConfig,
    UpdateSum,
    left_padded_noise,
)
from repfusion.layers import Attention
from repfusion.llm.load import load_language_model
from repfusion.model.blocks.mixed_attention import MixedAttentionBlock
from repfusion.model.build import build_model
from repfusion.model.text_to_image import TextToImage
from repfusion.runs.checkpoint import load_checkpoint, load_start, save_checkpoint
from repfusion.runs.folder import checkpoint_folder
from repfusion.train import train

PROMPTS = ["a red circle", "two blue square left of a green circle", ""]
FROZEN = LlmControllerConfig()


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of four layers, whose weights say more than they are made with."""
    folder = make_foundation(tmp_path_factory.mktemp("deep"), text_layers=4) / "llava"
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.model.language_model.layers.parameters():
            parameter.mul_(5 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder)
    return folder


def outputs(model: torch.nn.Module, ids: list[int]) -> list[Tensor]:
    """Embeddings and every layer's output [m c], before the final norm, by hooks on transformers' model."""
    found = [model.get_input_embeddings()(torch.tensor(ids)).detach()]

    def keep(layer: torch.nn.Module, inputs: tuple, out: tuple | Tensor) -> None:
        found.append((out if isinstance(out, Tensor) else out[0]).detach().reshape(len(ids), -1))

    hooks = [layer.register_forward_hook(keep) for layer in model.layers]
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("subtracts_alone", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_sum_equals_a_slow_reference(deep, subtracts_alone):
    config = LlmControllerConfig(subtracts_alone=subtracts_alone)
    conditioner = LlmControllerConditioner(load_language_model(deep), config)
    llm, gains = conditioner.llm, torch.tensor([0.5, -1.0, 2.0])
    with torch.no_grad():
        conditioner.sum.gains.copy_(gains)
        text, found = prepare(conditioner, PROMPTS).static
    model = LlavaForConditionalGeneration.from_pretrained(deep).model.language_model.eval()
    for row, prompt in enumerate(PROMPTS):
        ids = llm.framed(llm.token_ids([prompt])[0])
        whole = outputs(model, ids)
        expected = []
        for place, one in enumerate(ids):
            alone = outputs(model, [one])
            total = whole[0][place].clone()
            for layer in range(1, 4):
                update = whole[layer][place] - whole[layer - 1][place]
                by = alone[layer][0] - alone[layer - 1][0]
                total += gains[layer - 1] * (update - by if subtracts_alone else update)
            expected.append(rms(total, 1.0))
        assert found.mask is not None and text.mask is not None
        torch.testing.assert_close(
            found.tokens[row, found.mask[row]], torch.stack(expected), rtol=1e-3, atol=1e-3
        )
        assert text.mask[row].sum() == len(ids)


def test_noise_is_each_layers_added_up_and_a_samples_own():
    """Its variance is the sum of 2 h(t); a row's does not depend on padding, nor on other rows."""
    made = UpdateSum(2048, 3, adds_noise=True)
    with torch.no_grad():
        made.noise.copy_(torch.tensor([0.5, -1.0, 1.0]))
        start = torch.zeros(1, 8, 2048)
        start[..., 0] = 1e4  # so that the norm hardly sees the noise
        noise = torch.randn(1, 8, 2048, generator=torch.Generator().manual_seed(0))
        clean, noisy = made(start, [start * 0] * 3), made(start, [start * 0] * 3, noise)
    scale = 1e4 / clean[0, 0, 0]
    expected = sum(2 * F.softplus(torch.tensor(one)) for one in (0.5, -1.0, 1.0))
    got = ((noisy - clean)[..., 1:] * scale).var()
    assert got.item() == pytest.approx(float(expected), rel=0.03)
    mask = torch.tensor([[False, True, True], [True, True, True]])
    both, alone = left_padded_noise([7, 8], mask, 4), left_padded_noise([7], mask[:1, 1:], 4)
    assert torch.equal(both[0, 1:], alone[0]) and not both[0, 0].any()
    assert not torch.equal(both[1, :2], both[0, 1:])


def found_by(attention: Attention, queries: list[Tensor], context: list[Tensor]) -> list[Tensor]:
    """What each token finds in a context, head by head."""
    heads = attention.num_heads
    known = [
        keys_values(attention.key_value.weight @ one, attention.key_norm.weight, heads, None)
        for one in context
    ]
    found = []
    for token in queries:
        mixed = []
        for head, query in enumerate((attention.query.weight @ token).reshape(heads, -1)):
            query = rms(query, attention.query_norm.weight)
            scores = torch.stack([query @ one[head][0] for one in known]) / len(query) ** 0.5
            mixed.append(sum(w * one[head][1] for w, one in zip(scores.softmax(0), known, strict=True)))
        found.append(attention.out.weight @ torch.cat(mixed) + attention.out.bias)
    return found


def test_the_mixture_equals_a_slow_reference():
    torch.manual_seed(0)
    block = MixedAttentionBlock(16, 2, 4.0, context_width=12, added_width=20).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        x = torch.randn(1, 5, 16, dtype=torch.float64)
        text, updates = (torch.randn(1, 4, width, dtype=torch.float64) for width in (12, 20))
        mask = torch.tensor([[True, True, False, True]])
        contexts = tuple((*block.keys_values(i, one), mask) for i, one in enumerate((text, updates)))
        got = block.attend(x, contexts)[0]
        queries = [rms(one, block.cross_norm.weight) for one in x[0]]
        old = found_by(block.cross_attention, queries, list(text[0, mask[0]]))
        new = found_by(block.added.attention, queries, list(updates[0, mask[0]]))
        (a1, a2), (b1, b2) = block.added.scale, block.added.exponent
        for token, one, first, second in zip(x[0], got, old, new, strict=True):
            torch.testing.assert_close(one, token + first * a1 * b1.exp() + second * a2 * b2.exp())


@pytest.fixture
def generator(make_generator, tmp_path) -> Path:
    """A checkpoint of text_embed."""
    model = make_generator("text_embed")
    save_checkpoint(tmp_path / "step_00000001", model, model.trainable_state(), step=1)
    return tmp_path / "step_00000001"


def controlled(foundation, statistics, method: LlmControllerConfig = FROZEN) -> TextToImage:
    torch.manual_seed(3)
    config = tiny_model(foundation, "text_embed").model_copy(update={"conditioning": method})
    return build_model(config, statistics).eval()


def test_at_first_it_is_the_generator_that_it_starts_from(foundation, statistics, generator, caplog):
    model, base = controlled(foundation, statistics), load_checkpoint(generator)
    with caplog.at_level("INFO"):
        load_start(model, generator)
    assert (
        "(the method 'text_embed'): 50 weights of it are taken, 0 left out, 19 of the model are fresh"
        in caplog.text
    )
    inputs = training_inputs(model, PROMPTS, range(3), model.shift)
    own = training_inputs(base, PROMPTS, range(3), base.shift)
    with torch.no_grad():
        assert torch.equal(model(inputs)["velocity"], base(own)["velocity"])


def test_the_generator_stays_frozen_and_is_saved(foundation, statistics, generator, tmp_path):
    model = controlled(foundation, statistics)
    load_start(model, generator)
    trained = set(model.trainable_state())
    assert trained and all(".added." in name or name.startswith("conditioner.sum.") for name in trained)
    inputs = training_inputs(model, PROMPTS, range(3), model.shift)
    with torch.no_grad():
        for block in model.denoiser.blocks:
            block.added.attention.out.weight.normal_()
    model(inputs)["velocity"].mean().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
    save_checkpoint(tmp_path / "step_00000002", model, model.trainable_state(), step=2)
    again = load_checkpoint(tmp_path / "step_00000002")
    with torch.no_grad():
        torch.testing.assert_close(again(inputs)["velocity"], model(inputs)["velocity"])


def test_what_does_not_fit_is_named(foundation, statistics, generator, columns, tmp_path, make_generator):
    with pytest.raises(ValidationError, match="init_from is not given: the method 'llm_controller'"):
        model = tiny_model(foundation, "text_embed").model_copy(update={"conditioning": FROZEN})
        tiny_train(foundation, columns, tmp_path / "run", model=model.model_dump())
    other = make_generator("metaquery")
    save_checkpoint(tmp_path / "step_00000003", other, other.trainable_state(), step=3)
    with pytest.raises(ValueError, match=r"conditioning\.method 'metaquery', expected 'llm_controller'"):
        load_start(controlled(foundation, statistics), tmp_path / "step_00000003")
    shallow = make_foundation(tmp_path / "shallow", text_layers=1) / "llava"
    with pytest.raises(ValueError, match="1 layer; llm_controller sums the updates of all layers but the"):
        LlmControllerConditioner(load_language_model(shallow))


@pytest.mark.slow
def test_trains_over_a_generator_of_another_language_model_and_resumes(
    foundation, columns, tmp_path, deep, statistics
):
    """A text_embed of one language model, then the controller with another: its own text encoder is checked,
    the DiT stays to the bit, a second call goes on.
    """
    first = {**tiny_model(foundation, "text_embed").model_dump()}
    train(tiny_train(foundation, columns, tmp_path / "first", model=first))
    start = checkpoint_folder(tmp_path / "first" / "checkpoints", 4)
    method = {"method": "llm_controller", "second": foundation / "llava"}
    model = {**first, "mllm": deep, "conditioning": method}
    changes = {"init_from": start, "model": model}
    train(tiny_train(foundation, columns, tmp_path / "next", **changes, num_steps=2))
    reports = []
    train(tiny_train(foundation, columns, tmp_path / "next", **changes), on_report=reports.append)
    assert [report.step for report in reports] == [3, 4]
    loaded = load_checkpoint(checkpoint_folder(tmp_path / "next" / "checkpoints", 4))
    base = load_checkpoint(start).trainable_state()
    assert loaded.kept and all(torch.equal(p, base[name]) for name, p in loaded.kept.items())
    assert any(
        p.abs().max() > 0 for name, p in loaded.trainable_state().items() if "added.attention.out" in name
    )
    wrong = {**model, "conditioning": {**method, "second": deep}}
    with pytest.raises(ValueError, match=r"reads with conditioning\.second, which holds"):
        train(tiny_train(foundation, columns, tmp_path / "wrong", init_from=start, model=wrong))
    stage_3 = {"zero_stage": 3}
    with pytest.raises(
        ValueError, match="zero_stage 3 shards the frozen weights of the method 'llm_controller'"
    ):
        train(tiny_train(foundation, columns, tmp_path / "sharded", engine=stage_3, **changes))


def test_requests_without_a_prompt_condition_on_the_begin_token(deep):
    conditioner = LlmControllerConditioner(load_language_model(deep))
    with torch.no_grad():
        _, found = conditioner.prepare(conditioner.collate(*asked([""]))).static
    embedding = conditioner.llm.embed(torch.tensor([[conditioner.llm.begin_id]]))[0, 0]
    torch.testing.assert_close(found.tokens[0, 0], rms(embedding, 1.0), rtol=1e-4, atol=1e-4)
