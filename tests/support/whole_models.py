"""What every method's whole model has to do: learn which prompt belongs to which latents, and read each
sample by itself.
"""

import torch
from prompting import asked, read_prompts, training_inputs

from repfusion.model.text_to_image import TextToImage

PROMPTS = ["a red circle", "two blue square", "a green circle left of a blue square", ""]


def check_prompts_are_learned(model: TextToImage, num_steps: int, lr: float) -> None:
    """All samples start from the same pure noise, so that only the prompt can tell them apart."""
    inputs = training_inputs(model, PROMPTS, range(4), shift=1.0)
    inputs |= {"noise": inputs["noise"][:1].expand(4, -1, -1), "t": torch.ones(4)}
    exchanged = {**inputs, "request": model.conditioner.collate(*asked(PROMPTS[::-1]))}
    optimizer = torch.optim.AdamW(model.trainable_state().values(), lr=lr, weight_decay=0)
    velocities = []
    for _ in range(num_steps):
        losses = {name: one.mean() for name, one in model(inputs).items()}
        velocities.append(losses["velocity"].item())
        optimizer.zero_grad()
        torch.stack([*losses.values()]).sum().backward()
        optimizer.step()
    with torch.no_grad():
        right, wrong = (model(one)["velocity"].mean().item() for one in (inputs, exchanged))
    assert right < 0.5 * velocities[0] and wrong > 2 * right


def velocity(model: TextToImage, prompts: list[str], rows: slice) -> torch.Tensor:
    """What the model says of some of four noisy latents, each of another level."""
    gen = torch.Generator().manual_seed(2)
    z_t = torch.randn(len(PROMPTS), *model.latent_shape, generator=gen)
    t = torch.tensor([0.2, 0.4, 0.6, 0.8])
    with torch.no_grad():
        return model.velocity(z_t[rows], t[rows], read_prompts(model, prompts))


def check_others_change_nothing(model: TextToImage) -> None:
    """Neither padding nor the other prompts of a batch reach a sample."""
    together = velocity(model, PROMPTS, slice(4))
    for row, prompt in enumerate(PROMPTS):
        alone = velocity(model, [prompt], slice(row, row + 1))
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    other = velocity(model, ["a blue circle", *PROMPTS[1:]], slice(4))
    assert (other[0] - together[0]).abs().max() > 1e-3
    torch.testing.assert_close(other[1:], together[1:], rtol=1e-4, atol=1e-5)
