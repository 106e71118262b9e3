"""Turns -> the model's replies, in text and images, drawn or retrieved, in a folder.

OUT/  dialogue.json   every turn and reply, written anew after each reply
      reply_01.png    the image of the first reply, where it has one; it carries its lineage
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor

from repfusion.conditioning.related.gill import IMAGE_STATES
from repfusion.config import Config
from repfusion.dialogue.turns import Turn, TurnPart
from repfusion.diffusion.sampler import SamplerConfig
from repfusion.files import write_json
from repfusion.generate import Kept, generate, image_record, kept_of, save_image, to_uint8
from repfusion.generation.outputs import fitting_scale, grid
from repfusion.generation.prompts import PromptRow
from repfusion.latents.load import Decoder
from repfusion.request import Request
from repfusion.retrieval.conversation import Conversation, Said, SpeakingConfig
from repfusion.retrieval.decision import Decision
from repfusion.retrieval.embedding import GillReader
from repfusion.retrieval.index import Hit, ImageIndex

DIALOGUE = "dialogue.json"
Source = Literal["drawn", "retrieved"]


class HoldingConfig(Config):
    """How a dialogue is held."""

    speaking: SpeakingConfig = SpeakingConfig()
    sampler: SamplerConfig = SamplerConfig()
    images: Literal["decide", "draw", "retrieve"] = "draw"
    """Where images come from; `decide` asks the decision, which was learned."""
    always_image: bool = False
    """Whether every reply has an image, whether or not the model calls for one."""
    lineage: Kept = "all"
    """What a PNG carries."""
    seed: int = Field(default=0, ge=0)
    """Decides the noise of the first image that is drawn; the next one takes the next seed."""


@dataclass
class Dialogue:
    """A dialogue that goes on in a folder.

    Raises:
        ValueError: the folder holds a dialogue already, or images cannot come from where they should.
    """

    reader: GillReader
    config: HoldingConfig
    out: Path
    index: ImageIndex | None = None
    decision: Decision | None = None
    told: list[dict[str, Any]] = field(default_factory=list)
    """Turns and replies as `dialogue.json` holds them."""
    shown: list[UInt8[np.ndarray, "_ _ 3"]] = field(default_factory=list)
    """Images that the model was shown."""
    found: set[tuple[str, str]] = field(default_factory=set)
    """Images that were retrieved, none of which is shown again."""
    num_drawn: int = 0

    def __post_init__(self) -> None:
        if (self.out / DIALOGUE).exists():
            raise ValueError(f"--out {self.out} holds a dialogue already; choose another folder")
        if self.config.images != "draw" and self.index is None:
            raise ValueError(f"images: {self.config.images} needs an index of images; name it by --index")
        if self.config.images == "decide" and self.decision is None:
            raise ValueError(
                "images: decide needs a decision, which 'python -m repfusion.retrieval decide' learns; name "
                "it by --decision, or choose draw or retrieve"
            )
        self.conversation = Conversation(self.reader)
        self.generator = torch.Generator().manual_seed(self.config.speaking.seed)

    def hold(self, turns: Sequence[Turn]) -> list[dict[str, Any]]:
        """The turns and the replies to each. Raises ValueError where a part does not fit into the context;
        what was said before it lies in the folder.
        """
        check_room(self.reader, turns)
        for turn in turns:
            for part in turn:
                self._read(part)
            self.told.append({"role": "user", "parts": [as_told(part) for part in turn]})
            self.told.append(self._reply(turn))
            write_json(self.out / DIALOGUE, {"turns": self.told})
        return self.told

    def _read(self, part: TurnPart) -> None:
        if part.text is not None:
            self.conversation.say(part.text, part.place)
        if part.image is not None:
            self.conversation.show(part.image, part.place)
            self.shown.append(part.image)

    def _reply(self, turn: Turn) -> dict[str, Any]:
        spoken = self.conversation.speak(self.config.speaking, self.generator)
        reply: dict[str, Any] = {"role": "model", "say": spoken.text, "ending": spoken.ending}
        if spoken.ending == "image" or self.config.always_image:
            reply |= self._picture(self.conversation.call(), turn, spoken)
        return reply

    def _picture(self, states: Float[Tensor, "k c"], turn: Turn, spoken: Said) -> dict[str, Any]:
        """The image of a reply, written; and what the dialogue says of it."""
        source, facts = self._choose(states)
        prompt = " ".join(part.text for part in turn if part.text is not None)
        path = self.out / f"reply_{len(self.told) // 2 + 1:02d}.png"
        row = PromptRow(f"{prompt} {spoken.text}".strip(), (self.config.seed + self.num_drawn,))
        record = image_record(self.reader.folder, [row], self.config.sampler, self.shown)
        if source == "drawn":
            picture = self._draw(states)
            facts["seed"] = row.seeds[0]
        else:
            assert self.index is not None
            hit = self._retrieve(states)
            picture = self.index.image(hit)
            found = {"shard": hit.shard, "sample": hit.key, "score": hit.score}
            record["retrieved"] = {**found, "folder": self.index.record.images, "index": self.index.digest}
            facts |= found
        scale = fitting_scale(picture.shape[0], None)
        save_image(grid([picture], [1], scale), path, kept_of(record, self.config.lineage))
        return {"image": path.name, "source": source, **facts}

    def _choose(self, states: Float[Tensor, "k c"]) -> tuple[Source, dict[str, Any]]:
        if self.config.images != "decide":
            return ("drawn" if self.config.images == "draw" else "retrieved"), {}
        assert self.decision is not None
        share = self.decision.draws(states[None]).item()
        return ("drawn" if share > 0.5 else "retrieved"), {"probability_drawn": share}

    def _draw(self, states: Float[Tensor, "k c"]) -> UInt8[np.ndarray, "h w 3"]:
        model, seed = self.reader.model, self.config.seed + self.num_drawn
        self.num_drawn += 1
        request = Request(computed={IMAGE_STATES: states})
        sampler = self.config.sampler.on(self.reader.device)
        return to_uint8(generate(model, self._decoder, [request], seed, sampler))[0]

    @cached_property
    def _decoder(self) -> Decoder:
        return self.reader.model.load_decoder()

    def _retrieve(self, states: Float[Tensor, "k c"]) -> Hit:
        """The nearest image that was not shown in this dialogue. Raises ValueError where there is none."""
        assert self.index is not None
        hits = self.index.find(self.reader.of_states(states[None]), len(self.found) + 1)[0]
        for hit in hits:
            if (hit.shard, hit.key) not in self.found:
                self.found.add((hit.shard, hit.key))
                return hit
        raise ValueError(
            f"index {self.index.folder} has {len(self.index)} images, all of which were shown: draw, or "
            "index more"
        )


def check_room(reader: GillReader, turns: Sequence[Turn]) -> None:
    """Raises ValueError, naming the first part, where the turns alone do not fit into the context, before
    anything is said.
    """
    conversation = Conversation(reader)
    for part in (one for turn in turns for one in turn):
        if part.text is not None:
            conversation.say(part.text, part.place)
        if part.image is not None:
            conversation.show(part.image, part.place)


def as_told(part: TurnPart) -> dict[str, str | None]:
    """A part as `dialogue.json` holds it."""
    return {"say": part.text} if part.text is not None else {"image": part.file}
