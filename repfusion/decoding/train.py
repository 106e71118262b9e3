"""Image shards and a frozen encoder -> the decoder that turns its features back into pixels (RAE, arXiv
2510.11690, section 3): from noised features, L1, and where they are configured LPIPS, an adversarial loss and
averaged weights; or from the same features the velocity of a decoder that draws.
"""

import math
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from tqdm import tqdm

from repfusion.config import weights_of
from repfusion.data.order import hash64
from repfusion.decoding.config import DecoderTrainingConfig, RebuildingConfig
from repfusion.decoding.discriminator import load_discriminator
from repfusion.decoding.drawing import DrawingGradients, Noised, latent_images
from repfusion.decoding.gradients import Gradients, Hidden, Part
from repfusion.decoding.making import drawing_decoder, load_painter, rebuilding_decoder
from repfusion.decoding.measure import HeldOut
from repfusion.decoding.perceptual import LPIPS
from repfusion.decoding.pictures import ImageShards
from repfusion.decoding.ranks import Ranks
from repfusion.decoding.state import DecoderProgress, DecoderState
from repfusion.devices.compiling import Compilation, compilation_for
from repfusion.files import write_json
from repfusion.foundation.optimise import COST_OF_EAGER, MAX_GRAD_NORM, forward_pass, rate, smoothed
from repfusion.latents.drawing_decoder import DrawingDecoder
from repfusion.latents.rae_decoder import RAEDecoder
from repfusion.pretrained.cache import fetch
from repfusion.tracking import StoreError, Tracker, TrackingConfig, store_identity
from repfusion.training.distributed import broadcast_object
from repfusion.training.engine import NonFiniteError

MEASURED = "measured.json"
"""Beside a decoder's weights: what it was trained on and how well it rebuilds what was held out."""
EXAMPLES = "reconstructions.png"
"""Beside a decoder's weights: images that were held out, above what it makes of them."""
R = TypeVar("R", bound=RebuildingConfig)
NUM_PAINTED = 256
"""Images by whose latents a VAE's are normalised: those of the first batch, were it so large."""
REPORT_STEPS = 20
"""Steps between two looks at the losses."""


class RebuildingTraining(Generic[R]):
    """The training of a network that rebuilds images, which was built and goes on from its state where there
    is one. A kind of network says how it is built, shown images, measured and written.

    Raises: ValueError: no images, an encoder or a judge that is none, a batch that the ranks cannot share, or
    a state of another training.
    """

    network: nn.Module
    """What is trained; it ends in pixels, as `Rebuilds` says."""
    image_size: int
    """Side in px of the images."""
    kind: ClassVar[str]
    """What messages call the network."""

    def __init__(self, config: R, ranks: Ranks):
        self.config, self.ranks = config, ranks
        self.parts = ranks.parts(config.length.batch_size, config.micro_batch_size)
        self.device = ranks.device(config.device)
        self.build()
        self.network.train().to(self.device)
        self.pictures = ImageShards(config.images, self.image_size, config.held_out_share)
        self.look()
        self.perceptual = self.discriminator = None
        if config.perceptual is not None:
            self.perceptual = LPIPS.from_pretrained(config.perceptual.path).to(self.device)
        if config.adversarial is not None:
            seed = hash64("discriminator", config.seed) % 2**63
            given = config.adversarial.path, config.adversarial.image_size, seed
            self.discriminator = load_discriminator(*given).to(self.device)
        self.state = DecoderState(self.network, self.discriminator, config)
        self.path = state_of(config.out)
        self.progress = self.state.load(self.path) if self.path.is_file() else DecoderProgress()
        compilation = None
        if config.compile:
            compilation = compilation_for(self.device.type, "a step", COST_OF_EAGER, dynamic=False)
        self.gradients = self.new_gradients(compilation)

    def build(self) -> None:
        """Makes `network` and `image_size`, and loads what is frozen."""
        raise NotImplementedError

    def look(self) -> None:
        """Takes of the images what has to be known of them before the first step."""

    def hidden(self, seen: Any) -> Hidden:
        """What the last layer reads, of what the network is shown."""
        raise NotImplementedError

    def draw(self, step: int) -> list[Part]:
        """This rank's images of a step and what they are rebuilt from, by micro-batch."""
        raise NotImplementedError

    def rebuilt(self) -> Float[Tensor, "b 3 h w"]:
        """What the network, which is in eval mode, makes of the images held out, in [0, 1]."""
        raise NotImplementedError

    def further_measures(self) -> dict[str, float]:
        """What is measured of the kind beside how well it rebuilds; the network is in eval mode."""
        return {}

    def save(self, folder: Path) -> None:
        """Writes the network, whose weights are those to be written now."""
        raise NotImplementedError

    def new_gradients(self, compilation: Compilation | None) -> Gradients | DrawingGradients:
        """How the gradients of a step are made."""
        config, perceptual, adversary = self.config, None, None
        if config.perceptual is not None and self.perceptual is not None and config.perceptual.weight:
            perceptual = self.perceptual, config.perceptual.weight
        if config.adversarial is not None and self.discriminator is not None:
            adversary = self.discriminator, config.adversarial.weight
        return Gradients(self.network, self.hidden, perceptual, adversary, self.ranks, compilation)

    def images(self, step: int) -> list[UInt8[Tensor, "b h w 3"]]:
        """This rank's images of a step, by micro-batch."""
        seed = self.config.seed
        return [self.pictures.batch(step, seed, numbers).to(self.device) for numbers in self.parts]

    def take_step(self, step: int) -> dict[str, float]:
        """One update of all that is trained; returns its losses. Called by all ranks.

        Raises:
            NonFiniteError: on every rank, before anything is updated.
        """
        config, adversarial, state = self.config, self.config.adversarial, self.state
        trains_heads = adversarial is not None and step >= adversarial.discriminator_from_step
        if adversarial is not None and trains_heads:
            assert isinstance(self.gradients, Gradients)
            losses = self.gradients.adversarial(self.draw(step), step >= adversarial.gan_from_step)
        else:
            losses = self.gradients.plain(self.draw(step))
        groups = [list(state.named.values())]
        if trains_heads:
            groups.append(list(state.heads.values()))
        means = dict(zip(losses, self.ranks.mean(list(losses.values())), strict=True))
        norms = [self._average(group) for group in groups]
        *values, own, others = torch.stack([*means.values(), norms[0], norms[-1]]).tolist()
        found = dict(zip(means, values, strict=True))
        self._refuse_not_finite(step, found, {self.kind: own, "discriminator": others})
        for group, norm in zip(groups, norms, strict=True):
            nn.utils.clip_grads_with_norm_(group, MAX_GRAD_NORM, norm)
        num_steps, final = config.length.num_steps, config.final_lr_ratio
        _apply(state.optimizer, config.length.lr * rate(step, num_steps, final))
        if adversarial is not None and state.heads_optimizer is not None and trains_heads:
            first = adversarial.discriminator_from_step
            _apply(state.heads_optimizer, adversarial.lr * rate(step - first, num_steps - first, final))
        if state.ema is not None:
            state.ema.update(step)
        return found

    def _average(self, parameters: list[nn.Parameter]) -> Float[Tensor, ""]:
        """Makes the gradients those of the whole batch; returns their norm."""
        grads = [p.grad for p in parameters if p.grad is not None]
        assert len(grads) == len(parameters)
        if self.ranks.world_size > 1:
            torch._foreach_copy_(grads, self.ranks.mean(grads))
        return nn.utils.get_total_norm(grads)

    def _refuse_not_finite(self, step: int, losses: dict[str, float], norms: dict[str, float]) -> None:
        # the means and the norms are the same on every rank, so that all of them stop
        wrong = [f"the loss {name}" for name, value in losses.items() if not math.isfinite(value)]
        wrong += [f"the gradient of the {name}" for name, value in norms.items() if not math.isfinite(value)]
        if not wrong:
            return
        keys = self.pictures.keys(step, self.config.seed, range(self.config.length.batch_size))
        named = ", ".join(keys[:16]) + (f" and {len(keys) - 16} more" if len(keys) > 16 else "")
        raise NonFiniteError(
            f"step {step}: {' and '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} not finite; nothing "
            f"was updated. Samples: {named}. Look at these, or lower length.lr or adversarial.lr; "
            f"{self.path} holds the state of some steps before, where there is one"
        )

    def measure(self, path: Path, tracker: Tracker) -> dict[str, float]:
        """How well the weights that would be written rebuild what is held out; some of it is drawn into the
        file. Both are logged.
        """
        self.network.eval()
        with self.state.averaged():
            rebuilt, further = self.rebuilt(), self.further_measures()
        self.network.train()
        self.held_out.draw(rebuilt, path)
        found = {**self.held_out.measures(rebuilt, self.perceptual), **further}
        tracker.log_metrics({f"eval/{name}": value for name, value in found.items()}, self.progress.step)
        tracker.log_image(path, "reconstructions", self.progress.step)
        return found

    @cached_property
    def held_out(self) -> HeldOut:
        """What the network is measured on."""
        images = self.pictures.measured(self.config.num_measured).to(self.device)
        return HeldOut(to_pixels(images), self.features(images))

    def features(self, images: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b n d"] | None:
        """What the frozen encoder makes of images; None where there is none."""
        raise NotImplementedError


class DecodingTraining(RebuildingTraining[DecoderTrainingConfig]):
    """A decoder learns to make images of noised features of its encoder."""

    kind = "decoder"
    decoder: RAEDecoder | DrawingDecoder

    def build(self) -> None:
        self.encoder = self.config.encoder.load().to(self.device)
        self.network = self.decoder = self.new_decoder()
        self.image_size = self.encoder.image_size

    def new_decoder(self) -> RAEDecoder | DrawingDecoder:
        """What is trained, before its first step."""
        raise NotImplementedError

    def noised(self, step: int, images: Sequence[UInt8[Tensor, "b h w 3"]]) -> list[Float[Tensor, "b n d"]]:
        """Features of a step's images under noise, by micro-batch."""
        config = self.config
        size = config.length.batch_size
        with forward_pass(self.device):
            features = [self.encoder.encode_images(one).features for one in images]
        # of the whole batch on every rank, so that the noise of an image is the same on any number of them
        generator = torch.Generator(self.device).manual_seed(
            hash64("decoder noise", config.seed, step) % 2**63
        )
        sigma = config.feature_noise * torch.rand(size, 1, 1, generator=generator, device=self.device)
        shape = size, *features[0].shape[1:]
        noise = sigma * torch.randn(shape, generator=generator, device=self.device)
        return [
            seen + noise[numbers.start : numbers.stop]
            for seen, numbers in zip(features, self.parts, strict=True)
        ]

    def features(self, images: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b n d"]:
        return self.encoder.encode_images(images).features

    def rebuilt(self) -> Float[Tensor, "b 3 h w"]:
        return self.held_out.rebuilt(self.decoder)

    def save(self, folder: Path) -> None:
        self.decoder.save_pretrained(folder, dtype=getattr(torch, self.config.dtype))


class DecoderTraining(DecodingTraining):
    """An RAE decoder learns to rebuild images in one pass."""

    def new_decoder(self) -> RAEDecoder:
        self.rae = rebuilding_decoder(self.config, self.encoder)
        return self.rae

    def hidden(self, seen: Float[Tensor, "b n d"]) -> Hidden:
        return self.rae.hidden(seen), {}

    def draw(self, step: int) -> list[Part]:
        """This rank's images of a step and their noised features, by micro-batch."""
        images = self.images(step)
        noised = self.noised(step, images)
        return [(to_pixels(own), seen) for own, seen in zip(images, noised, strict=True)]


class DrawingTraining(DecodingTraining):
    """A decoder that draws learns the velocity of images, or of a VAE's latents."""

    def new_decoder(self) -> DrawingDecoder:
        self.drawing = drawing_decoder(self.config, self.encoder)
        return self.drawing

    def look(self) -> None:
        """Loads the VAE in whose latents is drawn, and takes their statistics."""
        self.painter = load_painter(self.config.method, self.image_size)
        if self.painter is None:
            return
        self.painter.to(self.device)
        if self.config.init_from is None:
            images = self.pictures.batch(0, self.config.seed, range(NUM_PAINTED)).to(self.device)
            self.drawing.measure_canvas(latent_images(self.painter, to_pixels(images)))

    def new_gradients(self, compilation: Compilation | None) -> DrawingGradients:
        return DrawingGradients(self.drawing, self.painter, compilation)

    def draw(self, step: int) -> list[Part]:
        """This rank's images of a step, their noised features and seeds, by micro-batch."""
        images = self.images(step)
        shares = zip(images, self.noised(step, images), self.parts, strict=True)
        return [(to_pixels(own), Noised(seen, self._seeds(step, numbers))) for own, seen, numbers in shares]

    def _seeds(self, step: int, numbers: range) -> list[int]:
        return [hash64("decoder flow", self.config.seed, step, number) for number in numbers]


def _apply(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def train_decoder(config: DecoderTrainingConfig) -> dict[str, Any]:
    """Writes the decoder to `out`, and beside its weights how it was measured; returns that. A training that
    was cut off goes on. Under torchrun each rank takes its share of every batch.

    Raises:
        ValueError: no images, an encoder or a judge that is none, a batch that the ranks cannot share, or a
            state of another training, or a tracking store that cannot be reached.
        NonFiniteError: a loss or a gradient is not finite; nothing was updated.
    """
    draws = config.method.kind == "drawing"
    return train_to_the_end(DrawingTraining if draws else DecoderTraining, config)


def train_to_the_end(kind: type[RebuildingTraining[R]], config: R) -> dict[str, Any]:
    """What `train_decoder` does, of any kind of network; raises what it raises."""
    fetch(weights_of(config).values())
    ranks = Ranks.join()
    training = kind(config, ranks)
    progress, num_steps = training.progress, config.length.num_steps
    tracker = start_tracking(training)
    status, saved_at = "FAILED", time.monotonic()
    bar = tqdm(
        range(progress.step, num_steps),
        desc=training.path.stem,
        mininterval=10,
        initial=progress.step,
        disable=not ranks.is_main,
    )
    try:
        for step in bar:
            # Step
            found = training.take_step(step)
            done = progress.step = step + 1
            is_last = done == num_steps

            # Report
            if step % REPORT_STEPS == 0 or is_last:
                progress.shown = smoothed(progress.shown, found)
                shown = {name: f"{value:.4f}" for name, value in progress.shown.items()}
                bar.set_postfix(shown, refresh=False)
                metrics = {**found, "lr": training.state.optimizer.param_groups[0]["lr"]}
                tracker.log_metrics({f"train/{name}": value for name, value in metrics.items()}, done)

            # Measure
            every = config.measure_every_steps
            if ranks.is_main and not is_last and every is not None and done % every == 0:
                path = pictures_of(config.out) / f"step_{done:08d}.png"
                progress.history.append({"step": float(done), **training.measure(path, tracker)})

            # State
            if ranks.is_main and not is_last and time.monotonic() - saved_at > config.save_every_sec:
                training.state.save(training.path, progress)
                saved_at = time.monotonic()
        written = write_network(training, tracker) if ranks.is_main else {}
        status = "FINISHED"
    finally:
        bar.close()
        tracker.finish(status)
    return broadcast_object(written) if ranks.world_size > 1 else written


def start_tracking(training: RebuildingTraining[Any]) -> Tracker:
    """A new MLflow run, or the one that this training started before. Rank 0 has it, the others track
    nothing.

    Raises:
        ValueError: the store cannot be reached.
    """
    config, progress = training.config, training.progress
    if not training.ranks.is_main or config.tracking.uri is None:
        return Tracker(TrackingConfig())
    store = store_identity(config.tracking.uri)
    is_same = config.tracking.run_id is None and progress.run.get("store") == store
    run = {"run_id": progress.run["run_id"]} if is_same else {}
    try:
        tracker = Tracker(config.tracking.model_copy(update=run))
        tracker.log_config(config.as_written())
        tracker.log_environment(world_size=training.ranks.world_size)
    except StoreError as error:
        raise ValueError(f"tracking could not start: {error}") from error
    progress.run = {"run_id": str(tracker.run_id), "store": store}
    return tracker


def write_network(training: RebuildingTraining[Any], tracker: Tracker) -> dict[str, Any]:
    """The last state, the network's folder and what was measured, which is returned. Rank 0's."""
    config, progress = training.config, training.progress
    training.state.save(training.path, progress)
    with training.state.averaged():
        training.save(config.out)
    found: dict[str, Any] = {
        **training.measure(config.out / EXAMPLES, tracker),
        "num_measured": float(len(training.held_out.pixels)),
        "num_images": float(len(training.pictures.drawn)),
        "num_steps": float(config.length.num_steps),
        **{f"loss_{name}": value for name, value in progress.shown.items()},
    }
    if progress.history:
        found["history"] = progress.history
    write_json(config.out / MEASURED, found)
    return found


def state_of(out: Path) -> Path:
    """Where the state of a training that writes to `out` lies."""
    return out.with_name(f"{out.name}.state")


def pictures_of(out: Path) -> Path:
    """Where what was drawn before the end lies, of a training that writes to `out`."""
    return out.with_name(f"{out.name}.pictures")


def to_pixels(images: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b 3 h w"]:
    """8-bit images, channels last, as float32 in [0, 1]."""
    return images.movedim(-1, 1).float() / 255
