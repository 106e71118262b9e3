"""MaVEn (arXiv 2408.12321) for reference images: a few discrete tokens of each image stand beside its
continuous ones, of which a share is kept, chosen under the guidance of the discrete tokens and the text.

Faithful (paper) is that an image is both a short row of ids, embedded by rows of a vocabulary, and continuous
tokens; that of those a share alpha of each image is kept, the ones with the highest score; that a score
comes of the token, its image's discrete tokens and the text. Ours are the ids: a random-projection quantiser
(as BEST-RQ's, arXiv 2202.01855), frozen and saved, over means of neighbouring tokens, in the place of SEED's
tokenizer; that they reach the DiT and not the language model, which is frozen; and how the selector learns:
what is kept is weighed by its score (as Mixture-of-Depths does, arXiv 2404.02258), where the paper is told
the relevant patches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from repfusion.config import Config
from repfusion.layers import RMSNorm
from repfusion.llm.chats.batch import ChatBatch


class SelectionConfig(Config):
    """Which tokens of reference images reach the DiT."""

    share: float = Field(default=0.25, gt=0, le=1)
    """Share of each image's continuous tokens that is kept, rounded up."""
    num_discrete: int = Field(default=32, ge=1)
    """Discrete tokens of each image, at most as many as it has continuous ones (SEED, in MaVEn: 32)."""
    num_codes: int = Field(default=8192, ge=2)
    """Ids that there are (SEED: 8192)."""
    code_width: int = Field(default=16, ge=1)
    """Channels in which ids are told apart."""


@dataclass(frozen=True)
class ImageTokens:
    """Where the images of a batch lie in its chats, known on the CPU."""

    group: Int[Tensor, "b n"]
    """The discrete token, of those of all images, that an image token belongs to; the last of other tokens,
    which is of no image.
    """
    sizes: Int[Tensor, " g"]
    """Tokens of each group."""
    first: Int[Tensor, "b n"]
    """How many image tokens of its row stand before an image token's own image."""
    allowed: Int[Tensor, "b n"]
    """How many tokens of its image are kept; 0 where a token is of none."""
    image_of: Int[Tensor, "b n"]
    """The image of its row that a token is of; more than there are where it is of none."""
    slots: Int[Tensor, "b k"]
    """The groups of each row, in the order of its images, padded with the last one."""
    places: Int[Tensor, "b k 2"]
    """Row and column of each slot: discrete tokens stand above their image, left to right."""
    num_kept: tuple[int, ...]
    """Continuous tokens that are kept of each row."""

    @classmethod
    def of(cls, batch: ChatBatch, config: SelectionConfig) -> "ImageTokens":
        """The images of a batch of chats.

        Raises:
            ValueError: an image has fewer tokens than `num_discrete`.
        """
        num, width, where = config.num_discrete, batch.ids.shape[1], batch.places.cpu()
        image_of = batch.image_of.cpu()
        counts = [counts_of(row) for row in image_of.tolist()]
        edges = [edge for row in counts for edge in row]
        if fewest := [count for count in edges if count < num]:
            raise ValueError(
                f"selection.num_discrete is {num}, an image has {min(fewest)} tokens: lower it, or show "
                "larger images"
            )
        nobody = len(edges) * num
        group = torch.full((len(counts), width), nobody)
        first, allowed = torch.zeros(len(counts), width, dtype=torch.long), torch.zeros_like(group)
        slots, places, num_kept, image, seen = [], [], [], 0, 0
        for row, images in enumerate(counts):
            at = (image_of[row] >= 0).nonzero()[:, 0].split(images) if images else ()
            own, beside, kept_here, before = [], [], 0, 0
            for tokens, count in zip(at, images, strict=True):
                group[row, tokens] = image * num + torch.arange(count) * num // count
                first[row, tokens], allowed[row, tokens] = before, ceil(config.share * count)
                own += range(image * num, (image + 1) * num)
                beside.append(above(where[seen : seen + count], num))
                kept_here, before = kept_here + ceil(config.share * count), before + count
                image, seen = image + 1, seen + count
            slots.append(torch.tensor(own, dtype=torch.long))
            places.append(torch.cat([torch.empty(0, 2, dtype=torch.long), *beside]))
            num_kept.append(kept_here)
        image_of = torch.where(image_of < 0, width, image_of)
        padded = nn.utils.rnn.pad_sequence([*slots], batch_first=True, padding_value=nobody)
        if padded.shape[1] == 0:  # attention takes a place, which nobody sees
            padded = torch.full((len(counts), 1), nobody)
        placed = torch.zeros(*padded.shape, 2, dtype=torch.long)
        for row, own in enumerate(places):
            placed[row, : len(own)] = own
        sizes = group.flatten().bincount(minlength=nobody + 1)
        moved = (one.to(batch.ids.device) for one in (group, sizes, first, allowed, image_of, padded, placed))
        return cls(*moved, tuple(num_kept))


def counts_of(image_of: Sequence[int]) -> list[int]:
    """Tokens of each image of a row, in order."""
    return [image_of.count(image) for image in range(max(image_of) + 1)]


def above(places: Int[Tensor, "n 2"], num: int) -> Int[Tensor, "k 2"]:
    """Rows and columns of so many tokens above an image whose tokens stand at `places`, in rows as wide as it
    is, from the one that touches it upwards.
    """
    left, right = int(places[:, 1].min()), int(places[:, 1].max())
    numbers, wide = torch.arange(num), right + 1 - left
    return torch.stack([-1 - numbers // wide, left + numbers % wide], dim=-1)


@dataclass(frozen=True)
class Selected:
    """What of a batch's images conditions."""

    keep: Bool[Tensor, "b n"]
    """Continuous tokens that are kept."""
    gates: Float[Tensor, "b n"]
    """The weight of each, about 1 at first; 1 of tokens that are of no image."""
    tokens: Float[Tensor, "b k c"]
    """Discrete tokens of each row."""
    mask: Bool[Tensor, "b k"]
    """The real ones of them."""


class ReferenceSelection(nn.Module):
    """Image tokens as the language model is shown them -> ids, and which of its states there are kept.

    Args:
        width: channels of the language model.
        config: shares and ids.
    """

    def __init__(self, width: int, config: SelectionConfig):
        super().__init__()
        self.num_discrete = config.num_discrete
        codes = F.normalize(torch.randn(config.num_codes, config.code_width), dim=1)
        self.projection = nn.Parameter(torch.randn(width, config.code_width), requires_grad=False)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.embedding = nn.Embedding(config.num_codes, width)
        self.norm = RMSNorm(width, eps=1e-6)
        self.score = nn.Sequential(nn.Linear(3 * width, width), nn.GELU(), nn.Linear(width, 1))

    def ids(self, means: Float[Tensor, "g c"]) -> Int[Tensor, " g"]:
        """The code that is nearest, in angle, to each mean of neighbouring image tokens."""
        projected = F.layer_norm(means, means.shape[1:]) @ self.projection.to(means.dtype)
        return (projected @ self.codes.to(means.dtype).T).argmax(1)

    def forward(
        self,
        shown: Float[Tensor, "b n c"],
        states: Float[Tensor, "b n c"],
        is_text: Bool[Tensor, "b n"],
        images: ImageTokens,
    ) -> Selected:
        """What is kept.

        Args:
            shown: embeddings of all tokens, those of images as the tower made them.
            states: hidden states of all tokens, of a layer that has read them.
            is_text: the tokens of the text that guides.
            images: where the images are.
        """
        sums = shown.new_zeros(len(images.sizes), shown.shape[2])
        sums = sums.index_add(0, images.group.flatten(), shown.flatten(0, 1))
        discrete = self.embedding(self.ids((sums / images.sizes.clamp(min=1)[:, None])[:-1]))
        normed = self.norm(states)
        guides = with_nobody(self._of_images(discrete))[images.group], mean_of(normed, is_text)
        around = torch.cat([normed, guides[0], guides[1][:, None].expand_as(normed)], dim=-1)
        scores = self.score(around)[..., 0]
        keep, mask = highest(scores, images), images.slots < len(images.sizes) - 1
        gates = torch.where(keep, 2 * scores.sigmoid(), 1)
        return Selected(keep, gates, with_nobody(discrete)[images.slots], mask)

    def _of_images(self, discrete: Float[Tensor, "g c"]) -> Float[Tensor, "g c"]:
        """The mean of the discrete tokens of each one's image."""
        whole = discrete.unflatten(0, (len(discrete) // self.num_discrete, self.num_discrete)).mean(1)
        return whole.repeat_interleave(self.num_discrete, 0)


def with_nobody(tokens: Float[Tensor, "g c"]) -> Float[Tensor, "h c"]:
    """Tokens, and a 0 for what is of no image."""
    return torch.cat([tokens, tokens.new_zeros(1, tokens.shape[1])])


def mean_of(tokens: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"]) -> Float[Tensor, "b c"]:
    """The mean of the marked tokens; 0 where there is none."""
    real = mask[..., None].to(tokens.dtype)
    return (tokens * real).sum(1) / real.sum(1).clamp(min=1)


def highest(scores: Float[Tensor, "b n"], images: ImageTokens) -> Bool[Tensor, "b n"]:
    """The tokens of the highest scores of each image, as many as are allowed; of equal ones the first."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, images.image_of.gather(1, order).argsort(dim=1, stable=True))
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    ranks = torch.empty_like(order).scatter(1, order, places) - images.first
    return ranks < images.allowed
