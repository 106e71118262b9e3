"""A decoded image of any mode -> upright 8-bit RGB over white."""

import struct

import numpy as np
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import TiffImageFile

from repfusion.images.limits import BadImage

PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
PNG_HEADER = struct.Struct(">IIBBBBB")
"""Width, height, bit depth, colour type, compression, filter, interlace; after PNG_START."""
ORIENTED = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}
"""Where Pillow looks for an orientation, in `Image.info`."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings an image of an EXIF orientation upright."""


def orientation(image: Image.Image) -> int:
    """EXIF's; 1, upright, where there is none that can be read. A PNG's is known once its pixels are loaded,
    a TIFF's is then applied already.
    """
    if not image.info.keys() & ORIENTED:
        return 1
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001  broken EXIF is common and costs no image
        return 1
    return found if isinstance(found, int) and found in TURNS else 1


def to_rgb(image: Image.Image, data: bytes) -> Image.Image:
    """A loaded image of the bytes `data` in mode RGB. Raises BadImage for pixels of no known range."""
    if image.mode in ("I", "F"):
        raise BadImage("undecodable_image", f"pixels of 32 bits (mode {image.mode}) have no known range")
    turn = TURNS.get(orientation(image))
    if image.format == "PNG":
        _scale_transparent_colour(image, depth=PNG_HEADER.unpack_from(data, len(PNG_START))[2])
    if image.mode.startswith("I;16"):
        image = _from_16_bit_grey(image)
    if image.mode == "La":  # premultiplied: Pillow turns it into LA alone
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        over_white = Image.new("RGB", image.size, "white")
        over_white.paste(image, mask=image.getchannel("A"))
        image = over_white
    elif image.mode != "RGB":
        image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def _scale_transparent_colour(image: Image.Image, depth: int) -> None:
    """Brings a PNG's transparent colour from the file's bit depth to the 8 bits that Pillow's pixels have;
    that of 16-bit grey keeps its 16.
    """
    colour, top = image.info.get("transparency"), (1 << depth) - 1

    def scale(value: int) -> int:
        return value >> 8 if depth == 16 else (value & top) * 255 // top

    if image.mode == "L" and isinstance(colour, int):
        image.info["transparency"] = scale(colour)
    elif image.mode == "RGB" and isinstance(colour, tuple):
        image.info["transparency"] = tuple(scale(value) for value in colour)


def _from_16_bit_grey(image: Image.Image) -> Image.Image:
    """8-bit grey, rounded, with alpha where a grey is transparent. Pillow's own would cut off all above
    255.
    """
    bits, is_inverted = 16, False
    if isinstance(image, TiffImageFile):
        bits = image.tag_v2.get(ExifTags.Base.BitsPerSample, (16,))[0]
        is_inverted = image.tag_v2.get(ExifTags.Base.PhotometricInterpretation) == 0
    values, top = np.asarray(image), (1 << bits) - 1
    shades = np.rint(np.arange(1 << 16).clip(max=top) * (255 / top)).astype(np.uint8)
    grey = Image.fromarray((255 - shades if is_inverted else shades)[values])
    if isinstance(colour := image.info.get("transparency"), int):
        grey.putalpha(Image.fromarray(np.where(values == colour, 0, 255).astype(np.uint8)))
    return grey
