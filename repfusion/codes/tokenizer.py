"""Images <-> rows of ids, by a folder: FOLDER/model.safetensors and FOLDER/config.json, as a training of
`repfusion.decoding.codes` writes them.
"""

from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from safetensors.torch import save_file
from torch import Tensor, nn

from repfusion.codes.network import CodeStream, DualTokenizer, TokenizerConfig
from repfusion.config import Config
from repfusion.files import weights_digest, write_json
from repfusion.latents.encoder import PixelEncoder
from repfusion.latents.load import EncoderConfig
from repfusion.pretrained.config import read_config, validated_config
from repfusion.pretrained.weights import load_own
from repfusion.weights import WEIGHTS, WEIGHTS_MARK, portable

WHAT, WRITER = "tokenizer", "a tokenizer's training (python -m repfusion.decoding.codes)"


class UnknownCode(ValueError):
    """An id outside the codebook of the stream that has its place in the row."""


class TokenizerFolder(Config):
    """What a tokenizer's config.json says."""

    network: TokenizerConfig
    """The network."""
    encoder: EncoderConfig
    """The frozen tower whose features have the semantic codes; encoding needs it, decoding does not."""
    encoder_digest: str
    """sha256 of that tower's weights."""


class ImageTokenizer(nn.Module):
    """A frozen tokenizer: an image is one row of `num_tokens` ids, semantic codes before pixel codes, whose
    ranges are apart.

    Args:
        network: of both branches.
        tower: makes features; None decodes alone, or has no semantic branch.
        digest: names the weights.
    """

    def __init__(self, network: DualTokenizer, tower: PixelEncoder | None, digest: str):
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.tower = tower
        self.digest = digest
        self.streams: list[CodeStream] = network.config.streams
        self.image_size: int = network.config.image_size
        """Side in px of the images."""

    @property
    def num_tokens(self) -> int:
        """Ids of an image."""
        return self.streams[-1].stop

    @property
    def vocabulary(self) -> int:
        """How many ids there are."""
        return self.streams[-1].first_code + self.streams[-1].num_codes

    @torch.no_grad()
    def encode(self, pixels: Float[Tensor, "b 3 h w"]) -> Int[Tensor, "b n"]:
        """Rows of ids, int64, of pixels in [0, 1].

        Raises:
            ValueError: images of another size, values outside [0, 1], or a tokenizer that was loaded to
                decode alone.
        """
        if pixels.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"pixels are {pixels.shape[-2]} x {pixels.shape[-1]}, the tokenizer takes {self.image_size} "
                f"x {self.image_size}; resize in 'ingest'"
            )
        low, high = pixels.aminmax()
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"pixels are in [{low:g}, {high:g}], expected [0, 1]; divide 8-bit values by 255"
            )
        tower = self._seeing()
        return self.network.codes(pixels, None if tower is None else tower(pixels))

    @torch.no_grad()
    def encode_images(self, images: UInt8[Tensor, "b h w 3"]) -> Int[Tensor, "b n"]:
        """`encode` of 8-bit images of the tokenizer's size; nothing here waits for a GPU to have finished."""
        pixels, tower = images.movedim(-1, 1).float().div(255), self._seeing()
        return self.network.codes(pixels, None if tower is None else tower.encode_images(images).features)

    def _seeing(self) -> PixelEncoder | None:
        """The tower whose features have codes; None where none has. Raises ValueError where it was not
        loaded.
        """
        if self.network.semantic is None:
            return None
        if self.tower is None:
            raise ValueError("the tokenizer was loaded without its tower, to decode alone; load it with it")
        return self.tower

    @torch.no_grad()
    def decode(self, codes: Int[Tensor, "b n"]) -> Float[Tensor, "b 3 h w"]:
        """Pixels, about [0, 1] and not clamped, of whole rows, or of the semantic codes alone where there is
        a pixel branch too.

        Raises:
            UnknownCode: an id is outside the codebook of its stream.
            ValueError: rows of another length.
        """
        lengths = {self.streams[0].stop, self.num_tokens}
        if codes.shape[1] not in lengths:
            raise ValueError(
                f"rows of {codes.shape[1]} codes; an image of this tokenizer has "
                f"{' or '.join(map(str, sorted(lengths)))}"
            )
        self.check_codes(codes)
        return self.network.decoded(codes)

    def check_codes(self, codes: Int[Tensor, "b n"]) -> None:
        """Raises UnknownCode, naming the first row and place, where an id is outside the codebook of its
        stream.
        """
        for stream in self.streams:
            own = codes[:, stream.places]
            last = stream.first_code + stream.num_codes - 1
            wrong = (own < stream.first_code) | (own > last)
            if wrong.any():
                row, place = wrong.nonzero()[0].tolist()
                raise UnknownCode(
                    f"row {row}, place {stream.start + place}: code {int(own[row, place])}; the "
                    f"{stream.name} codes of this tokenizer are {stream.first_code} to {last}: use the "
                    "tokenizer that made them"
                )

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, with_tower: bool = False, on_meta: bool = False
    ) -> "ImageTokenizer":
        """Loads strictly, in float32, frozen and in eval mode.

        Args:
            folder: as a tokenizer's training writes it.
            with_tower: whether it is to encode, for which the tower of its config.json is loaded.
            on_meta: shapes without memory, and no digest: of the weights the headers alone are read.

        Raises:
            ValueError: the folder lacks a file, weights are missing, left over, of another shape or not
                finite, or the tower is not the one that the tokenizer was trained on.
        """
        folder = Path(folder)
        said = read_folder(folder)
        network = load_own(lambda: DualTokenizer(said.network), folder, WHAT, WRITER, on_meta)
        tower = None
        if with_tower and said.network.semantic is not None:
            tower = said.encoder.load(on_meta)
            if not on_meta and tower.digest != said.encoder_digest:
                raise ValueError(
                    f"{WHAT} folder {folder}: it was trained on a tower of weights "
                    f"{said.encoder_digest[:12]}, {said.encoder.path} holds {tower.digest[:12]}; put the "
                    "right one there"
                )
        return cls(network, tower, "none" if on_meta else weights_digest(folder))


def read_folder(folder: Path) -> TokenizerFolder:
    """What a tokenizer's config.json says. Raises ValueError where it is missing, or none of a tokenizer."""
    fields = read_config(folder, WHAT, WRITER)
    fields = portable(fields, WEIGHTS_MARK, str(WEIGHTS))
    return validated_config(TokenizerFolder, fields, f"{WHAT} folder {folder}", WRITER)


def save_tokenizer(
    folder: Path, network: DualTokenizer, encoder: EncoderConfig, encoder_digest: str, dtype: torch.dtype
) -> None:
    """Writes the folder of a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    said = TokenizerFolder(network=network.config, encoder=encoder, encoder_digest=encoder_digest)
    write_json(folder / "config.json", portable(said.model_dump(mode="json")))
    tensors = {name: one.to(dtype).contiguous() for name, one in network.state_dict().items()}
    save_file(tensors, str(folder / "model.safetensors"))
