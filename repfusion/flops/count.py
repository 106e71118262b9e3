"""A model -> FLOPs of a training sample and of an image, by part, for every method that keeps the contracts.

Counted is what torch's FlopCounterMode counts (see `counter`): every matrix product and convolution, 2 FLOPs
a multiply-add, and attention's two products over the whole square, causal or not; backward without what
autograd does not compute. Not counted: norms, activations, rotations, token lookups, softmax, the optimizer,
a second forward for checkpointed activations.
"""

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import cache, partial
from math import floor, prod
from types import SimpleNamespace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from repfusion.data.config import CAPTION
from repfusion.data.dataset import Sample
from repfusion.data.readers import REWRITES
from repfusion.data.recipe import Recipe
from repfusion.diffusion.flow import CAPTIONED, uniforms
from repfusion.diffusion.sampler import SamplerConfig, num_evaluations
from repfusion.flops.counter import Cost, Number, Twin
from repfusion.inputs import Inputs
from repfusion.latents.load import Decoder
from repfusion.latents.statistics import LatentStatistics
from repfusion.llm.base import LanguageModel
from repfusion.llm.chats.eyes import Eyes
from repfusion.llm.chats.format import Chat, ChatPart, ChatTokens
from repfusion.model.text_to_image import TextToImage
from repfusion.model.trainable import Trainable
from repfusion.request import Request

T = TypeVar("T")
LLM, CONDITIONER, DENOISER, DECODER = "language model", "conditioner", "denoiser", "decoder"
EYES = "vision tower"
"""The parts. The `vision tower`, with what leads from it into the language model, is there where that sees
images for the condition. `conditioner` is what a method has beside the language model (projector, queries,
connector, embedder of the noise level); `denoiser` is the DiT, or Transfusion's velocity head.
"""
Costs = dict[str, Cost]
"""Costs by part."""
NUM_SEEDS = 2**12
"""Among which the seeds of example samples are looked for."""


class WordTokenizer:
    """A token a word, whatever it is."""

    def __call__(self, prompts: list[str], **options: bool) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[[0 for _ in prompt.split()] for prompt in prompts])


class WordChats:
    """Chats whose instruction has a token a word and stands after its images, in the template of a model's
    folder; of a model without a tokenizer, begin token and cue stand around it and a mark on either side of
    each image.
    """

    def __init__(self, llm: LanguageModel):
        has_tokenizer = hasattr(llm.tokenizer, "chat_template")
        self.format = llm.chat_format if has_tokenizer else None

    def tokens_of(self, chat: Chat, image_lengths: Sequence[int]) -> ChatTokens:
        num_words = len(chat.instruction.split())
        if self.format is None:
            image_of = [-1, -1]
            for image, length in enumerate(image_lengths):
                image_of += [-1, *[image] * length, -1]
        else:
            image_of = list(self.format.tokens_of(Chat(), image_lengths).image_of)
        parts = [ChatPart.TEMPLATE if image < 0 else ChatPart.IMAGE for image in image_of]
        parts += [ChatPart.INSTRUCTION] * num_words
        return ChatTokens([0] * len(parts), parts, [*image_of, *[-1] * num_words])


def prompt_of(num_tokens: int, number: int = 0) -> str:
    """A prompt of so many tokens for `WordTokenizer`, begin token included, unlike that of another number."""
    return " ".join([f"<{number}>"] * (num_tokens - 1))


class Example(Sample):
    """A sample of no data set.

    Args:
        caption: its only one.
        arrays: of columns, by their name.
        images: its source pictures.
    """

    def __init__(self, caption: str, arrays: Mapping[str, np.ndarray], images: Sequence[np.ndarray] = ()):
        self.key, self.captions, self.arrays = "example", {CAPTION: (caption,)}, arrays
        self.images = tuple(images)

    @property
    def weights(self) -> Mapping[str, float]:
        """There is one caption to draw."""
        return {CAPTION: 1.0}

    @property
    def num_sources(self) -> int:
        """How many source pictures it has."""
        return len(self.images)

    def sources(self) -> tuple[np.ndarray, ...]:
        """The source pictures that it was given."""
        return self.images

    def read(self, column: str, caption: str = CAPTION) -> np.ndarray | None:
        """The array of a column, None where it has none."""
        return self.arrays.get(column)


def plus(first: Costs, times: Number, second: Costs) -> Costs:
    """first + times * second."""
    return {part: first[part] + times * second[part] for part in first}


def between(counted: Mapping[int, Costs], length: Number) -> Costs:
    """Costs of a length, fractions included, from counts at three others: exact, since costs are quadratic in
    a number of tokens.
    """
    costs = dict.fromkeys(next(iter(counted.values())), Cost())
    for point, found in counted.items():
        others = [other for other in counted if other != point]
        weight = prod(Fraction(length - other) / (point - other) for other in others)
        costs = plus(costs, weight, found)
    return {part: Cost(float(cost.forward), float(cost.backward)) for part, cost in costs.items()}


def at_length(count: Callable[[int], Costs], length: Number) -> Costs:
    """Costs of a number of text tokens; a mean of several will do. Of a prompt that is a begin token alone
    there is but one, so that a batch would read it once for all.
    """
    if length >= 2 and length == floor(length):
        return count(int(length))
    first = max(2, floor(length))
    return between({point: count(point) for point in range(first, first + 3)}, length)


def trained(model: Trainable, inputs: Inputs) -> None:
    """A forward and a backward pass, as the engine makes them; gradients are not kept."""
    loss = torch.stack([losses.mean() for losses in model(inputs).values()]).sum()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if weights:
        torch.autograd.grad(loss, weights, allow_unused=True)


def batch_flops(model: Trainable, inputs: Inputs) -> Number:
    """FLOPs of a forward and a backward pass over a batch, whatever the model is."""
    twin = Twin(model)
    bare = twin.inputs(inputs)
    _, costs = twin.costs(lambda one: trained(one, bare), {}, "model", twin.model.layers())
    return costs["model"].total


def eyes_cost(eyes: Eyes, images: Mapping[str, Tensor]) -> Cost:
    """FLOPs of seeing images, which the vision tower takes as `ChatBatch.images`."""
    if (known := eyes.flops(images)) is not None:
        return Cost(known)
    twin = Twin(eyes)
    bare, none = twin.inputs(images), torch.zeros(1, 0, dtype=torch.bool)
    with torch.no_grad():
        return twin.costs(lambda one: one.see(bare, none), {}, EYES)[1][EYES]


class Counter:
    """Counts FLOPs of a text-to-image model at whole numbers of text tokens, on its twin.

    Args:
        model: on any device, meta included.
        images: what every request shows, of a method that reads images.
    """

    def __init__(self, model: TextToImage, images: Sequence[np.ndarray] = ()):
        n, d = model.latent_shape
        statistics = LatentStatistics.empty(0, 0)
        llm = model.conditioner.llm
        words = {id(one.tokenizer): WordTokenizer() for one in model.conditioner.language_models}
        self.twin = Twin(model, {id(model.statistics): statistics, **words})
        self.model = self.twin.model
        some = self.twin.inputs(torch.empty(n, d, dtype=torch.float64, device="meta"))
        statistics.count, statistics.mean, statistics.m2 = 1, some, some
        twin_llm = self.model.conditioner.llm
        twins = self.model.conditioner.language_models
        for one in twins:
            one.max_text_tokens = one.context = 2**31
        if model.config.conditioning.reads_images:
            twin_llm.chat_format = WordChats(llm)
        self.parts: dict[str, nn.Module] = {
            CONDITIONER: self.model.conditioner,
            LLM: nn.ModuleList(twins),
            DENOISER: self.model.denoiser,
        }
        self.images, self.seeing = tuple(images), Cost()
        if llm.eyes is not None and (blind := twin_llm.eyes) is not None:
            looks = [llm.eyes.look(image) for image in images]
            for look in looks:
                self.seeing += eyes_cost(llm.eyes, look.inputs)
            self.parts[EYES] = blind
            known = dict(zip(map(id, images), looks, strict=True))
            # every request shows the same, so that what the eyes do is counted, and done, once
            blind.look = lambda image: known[id(image)]
            blind.see = lambda images, is_image: (torch.empty(is_image.numel(), llm.width), {})

    def costs(self, work: Callable[[TextToImage], T]) -> tuple[T, Costs]:
        """What some work of the model returns, and its costs but for what its eyes do."""
        result, found = self.twin.costs(work, self.parts, CONDITIONER, self.model.layers())
        return result, {part: found[part] for part in (EYES, LLM, CONDITIONER, DENOISER) if part in found}

    def seen(self, costs: Costs, times: int) -> Costs:
        """Costs with those of seeing the images so many times."""
        return {**costs, EYES: costs[EYES] + times * self.seeing} if EYES in costs else costs

    def example(self, num_tokens: int, number: int, has_text_features: bool) -> Example:
        """A sample whose caption has so many tokens and is unlike that of another number."""
        arrays = {self.model.config.features: np.zeros(self.model.latent_shape, np.float16)}
        if has_text_features:
            states = np.zeros((num_tokens, self.model.conditioner.llm.width), np.float16)
            ids = np.zeros(num_tokens - 1, np.int32)
            names = [name for name in self.model.columns if name != self.model.config.features]
            arrays |= {name: ids if name == REWRITES else states for name in names}
        shapes = self.model.conditioner.array_shapes
        arrays |= {name: np.zeros(shape, np.float16) for name, shape in shapes.items()}
        return Example(prompt_of(num_tokens, number), arrays, self.images)

    def batch(self, num_tokens: int, seeds: Sequence[int], has_text_features: bool, dropped: bool) -> Costs:
        """Costs of training on a batch, a sample a seed; `dropped` samples are shown without a condition."""
        samples = [self.example(num_tokens, number, has_text_features) for number in range(len(seeds))]
        inputs = self.model.collate(samples, Recipe(float(dropped)), seeds)
        bare = self.twin.inputs(inputs)
        costs = self.costs(lambda model: trained(model, bare))[1]
        return self.seen(costs, 0 if dropped else len(seeds))

    def row(self, num_tokens: int) -> tuple[Costs, Costs]:
        """Costs of reading a prompt for many steps, and of a velocity after it, without gradients. A method
        that rewrites writes as many tokens as the prompt has, which takes what reading the chat does.
        """
        rewrites = REWRITES in self.model.columns
        written = {REWRITES: torch.zeros(num_tokens - 1, dtype=torch.int32)} if rewrites else {}
        request = Request(prompt_of(num_tokens), self.images, computed=written)
        z = self.twin.inputs(torch.empty(1, *self.model.latent_shape, device="meta"))
        t = self.twin.inputs(torch.empty(1, device="meta"))
        with torch.no_grad():
            inputs = self.twin.inputs(self.model.conditioner.collate([request], ["full"]))
            prompted, once = self.costs(lambda model: model.prompted(inputs))
            once = {**once, LLM: (1 + rewrites) * once[LLM]}
            return self.seen(once, 1), self.costs(lambda model: model.velocity(z, t, prompted))[1]


def train_costs(
    model: TextToImage,
    num_text_tokens: Number,
    has_text_features: bool = True,
    num_caption_tokens: Number | None = None,
    images: Sequence[np.ndarray] = (),
) -> Costs:
    """FLOPs of one training sample by part: what a batch of two takes more than a batch of one, so that what
    is done once a batch does not count. With a caption loss, of the mean sample: it adds the share of the
    samples that are captioned.

    Args:
        model: on any device, meta included.
        num_text_tokens: tokens of a prompt, begin token and padding included; a mean will do.
        has_text_features: for a method whose text features can be computed ahead, that they were.
        num_caption_tokens: of a caption to be said, its end token included; None is as many as of a prompt
            (which, on the average, is shorter by the dropped ones).
        images: source pictures of the sample, of a method that reads images.
    """
    counter = Counter(model, images)
    batch = cache(partial(counter.batch, has_text_features=has_text_features))
    order = uniforms(range(NUM_SEEDS))[:, CAPTIONED].argsort().tolist()
    captioned, silent = order[:2], [order[0], order[-1]]

    def sample(num_tokens: int, seeds: list[int], dropped: bool = False) -> Costs:
        both = batch(num_tokens, tuple(seeds), dropped=dropped)
        return plus(both, -1, batch(num_tokens, tuple(seeds[:1]), dropped=dropped))

    alone = at_length(lambda length: sample(length, silent), num_text_tokens)
    captioning = model.config.captioning
    if captioning is None:
        return alone
    said = at_length(lambda length: sample(length, captioned), num_text_tokens)
    if num_caption_tokens not in (None, num_text_tokens):
        # without its prompt, a sample costs as much as its caption is long
        for length, sign in ((num_caption_tokens, 1), (num_text_tokens, -1)):
            said = plus(said, sign, at_length(lambda one: sample(one, captioned, dropped=True), length))
    share = captioning.share
    return plus({part: (1 - share) * cost for part, cost in alone.items()}, share, said)


def train_flops(
    model: TextToImage,
    num_text_tokens: Number,
    has_text_features: bool = True,
    num_caption_tokens: Number | None = None,
) -> float:
    """FLOPs of one training sample, forward and backward (see `train_costs`)."""
    costs = train_costs(model, num_text_tokens, has_text_features, num_caption_tokens)
    return float(sum(cost.total for cost in costs.values()))


def sample_costs(
    model: TextToImage,
    num_text_tokens: Number,
    config: SamplerConfig = SamplerConfig(),
    decoder: Decoder | None = None,
    images: Sequence[np.ndarray] = (),
) -> dict[str, Number]:
    """FLOPs of one image by part. With guidance the empty prompt is a row of its own, without what `images`
    it refers to, padded to the other's length.
    """
    guided, unguided = num_evaluations(config, model.shift)
    counter = Counter(model, images)

    def image(num_tokens: int) -> Costs:
        once, each = counter.row(num_tokens)
        prompts = {part: (1 + (guided > 0 and part != EYES)) * cost for part, cost in once.items()}
        return plus(prompts, 2 * guided + unguided, each)

    costs = {part: cost.forward for part, cost in at_length(image, num_text_tokens).items()}
    return costs if decoder is None else {**costs, DECODER: decoder_cost(decoder).forward}


def sample_flops(
    model: TextToImage,
    num_text_tokens: Number,
    config: SamplerConfig = SamplerConfig(),
    decoder: Decoder | None = None,
) -> float:
    """FLOPs of one image (see `sample_costs`)."""
    return float(sum(sample_costs(model, num_text_tokens, config, decoder).values()))


def decoder_cost(decoder: Decoder) -> Cost:
    """FLOPs of decoding one image."""
    twin = Twin(decoder)
    features = twin.inputs(torch.empty(1, prod(decoder.grid), decoder.feature_dim, device="meta"))
    with torch.no_grad():
        return twin.costs(lambda one: one(features), {}, DECODER)[1][DECODER]
