"""Whole models of each related system: each learns which prompt belongs to which latents, and what else is in
a batch changes nothing.
"""

import pytest
import torch
from prompting import asked, read_prompts, training_inputs
from tiny_training import tiny_model, tiny_train

from repfusion.model.dit import DiTConfig
from repfusion.model.text_to_image import TextToImage
from repfusion.runs.checkpoint import load_checkpoint
from repfusion.runs.folder import checkpoint_folder
from repfusion.train import train
from repfusion.weights import WEIGHTS

SYSTEMS = ["metaquery", "blip3o", "li_dit"]
PROMPTS = ["a red circle", "two blue square", "a green circle left of a blue square", ""]


def speak_up(model: TextToImage) -> None:
    """Lets the random language model's layers say more than it is made with: at the queries, a prompt would
    hardly be heard.
    """
    with torch.no_grad():
        for layer in model.conditioner.llm.layers:
            for parameter in layer.parameters():
                parameter.mul_(5 if parameter.ndim > 1 else 1)


@pytest.mark.slow
@pytest.mark.parametrize("method", SYSTEMS)
def test_learns_which_prompt_belongs_to_which_latents(make_generator, method):
    """All samples start from the same pure noise, so that only the prompt can tell them apart."""
    model = make_generator(method, awake=False, dit=DiTConfig(hidden_size=32, depth=2, num_heads=2))
    speak_up(model)
    inputs = training_inputs(model, PROMPTS, range(4), shift=1.0)
    inputs |= {"noise": inputs["noise"][:1].expand(4, -1, -1), "t": torch.ones(4)}
    exchanged = {**inputs, "request": model.conditioner.collate(*asked(PROMPTS[::-1]))}
    optimizer = torch.optim.AdamW(model.trainable_state().values(), lr=5e-3, weight_decay=0)
    velocities = []
    for _ in range(80):
        losses = {name: one.mean() for name, one in model(inputs).items()}
        velocities.append(losses["velocity"].item())
        optimizer.zero_grad()
        torch.stack([*losses.values()]).sum().backward()
        optimizer.step()
    with torch.no_grad():
        right, wrong = (model(one)["velocity"].mean().item() for one in (inputs, exchanged))
    assert right < 0.5 * velocities[0] and wrong > 2 * right


def velocity(model: TextToImage, prompts: list[str], rows: slice) -> torch.Tensor:
    gen = torch.Generator().manual_seed(2)
    z_t = torch.randn(len(PROMPTS), *model.latent_shape, generator=gen)
    t = torch.tensor([0.2, 0.4, 0.6, 0.8])
    with torch.no_grad():
        return model.velocity(z_t[rows], t[rows], read_prompts(model, prompts))


@pytest.mark.parametrize("method", SYSTEMS)
def test_padding_and_other_prompts_change_nothing(make_generator, method):
    model = make_generator(method)
    together = velocity(model, PROMPTS, slice(4))
    for row, prompt in enumerate(PROMPTS):
        alone = velocity(model, [prompt], slice(row, row + 1))
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    other = velocity(model, ["a blue circle", *PROMPTS[1:]], slice(4))
    assert (other[0] - together[0]).abs().max() > 1e-3
    torch.testing.assert_close(other[1:], together[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "conditioning",
    [
        {"method": "metaquery", "num_queries": 3, "connector_depth": 1},
        {"method": "li_dit", "instruction": "a red", "refiner_depth": 1, "second": WEIGHTS / "language"},
        {"method": "gill", "num_queries": 24, "width": 16, "depth": 1, "second": WEIGHTS / "language"},
    ],
    ids=["metaquery", "li_dit", "gill"],
)
def test_trains_under_the_engine_and_its_checkpoint_is_whole(foundation, columns, tmp_path, conditioning):
    """Losses beside the velocity's are reported; what is loaded is what was trained."""
    model = {**tiny_model(foundation).model_dump(), "conditioning": conditioning}
    reports = []
    train(tiny_train(foundation, columns, tmp_path / "run", model=model), on_report=reports.append)
    assert len(reports) == 4 and all(0 < report.loss < 10 for report in reports)
    is_gill = conditioning["method"] == "gill"
    others = {"embedding", "retrieval", "caption", "image_tokens"} if is_gill else set()
    assert set(reports[-1].other_losses) == others
    loaded = load_checkpoint(checkpoint_folder(tmp_path / "run" / "checkpoints", 4))
    read = loaded.conditioner.language_models
    assert len(read) == 1 + ("second" in conditioning) and all(llm.is_frozen for llm in read)
