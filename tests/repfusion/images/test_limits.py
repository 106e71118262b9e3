"""What is refused for what it declares, before Pillow or libtiff make room for it."""

import time
import tracemalloc

import pytest
from image_forms import GREY, IMAGE, encoded, jpeg_of_scans, tiff

from repfusion.images.decode import read_image
from repfusion.images.limits import MAX_SCANS, BadImage, check_jpeg, check_tiff

BODY = GREY.tobytes()


def test_scans_are_those_of_the_first_picture():
    whole = encoded(IMAGE, "JPEG")
    scan = b"\xff\xda\0\x02"
    in_a_segment = b"\xff\xe5\x04\x02" + scan * 256
    assert check_jpeg(whole) and check_jpeg(whole[:2] + in_a_segment + whole[2:] + scan * 1000)
    assert not check_jpeg(whole[:-2]) and not check_jpeg(whole[:-2] + b"\xff\x00\xff\xd0\xff\x01")
    assert check_jpeg(jpeg_of_scans(MAX_SCANS))
    for many in (jpeg_of_scans(MAX_SCANS + 1), jpeg_of_scans(10_000)[:-2]):
        with pytest.raises(BadImage, match=r"\[too_many_scans\] a JPEG of more than 100 scans"):
            check_jpeg(many)


def test_a_plain_tiff_passes_and_other_bytes_are_not_looked_at():
    data = tiff(48, 40, [], BODY)
    check_tiff(data, 48 * 40)
    assert read_image(data).size == (48, 40)
    far = b"II*\0\xff\xff\xff\xff"
    for start in (b"", b"II", b"II*\0", b"MM\0*\0\0\0\x08", far, encoded(IMAGE), data[:-40]):
        check_tiff(start, 1)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            [(322, 4, 1, 65_536), (323, 4, 1, 65_536)],
            r"too_many_pixels\] 48 x 40 px in tiles of 65536 x 65536",
        ),
        (
            [(322, 4, 1, 60_000_000), (323, 4, 1, 1)],
            r"too_many_pixels.*tiles of 60000000 x 1 px; max_pixels 100,",
        ),
        ([(322, 3, 1, 16), (323, 9, 1, 65_536)], "without a readable TileLength"),
        ([(256, 8, 1, 48)], "without a readable ImageWidth"),
        ([(273, 4, 12_000_000, 8)], "12,000,000 values of StripOffsets; at most 196,608"),
        ([(324, 4, 12_000_000, 8)], "12,000,000 values of TileOffsets"),
        ([(320, 3, 12_000_000, 8)], "12,000,000 values of ColorMap"),
        ([(65_000, 5, 4_000_000, 8)], "4,000,000 values of"),
        ([(259, 3, 1, 34925)], "compression 34925, which is not read"),
        ([(259, 3, 1, 50001)], "compression 50001"),
    ],
)
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_tiff_that_declares_too_much_costs_nothing(fields, reason, order):
    data = tiff(48, 40, fields, BODY, order)
    start = time.thread_time()
    tracemalloc.start()
    with pytest.raises(BadImage, match=reason):
        read_image(data, max_pixels=100_000_000)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
    assert time.thread_time() - start < 0.1


def test_text_of_any_length_is_no_reason():
    data = tiff(48, 40, [(270, 2, 1 << 20, 8)], BODY + bytes(1 << 20))
    assert read_image(data).size == (48, 40)


def test_a_progressive_jpeg_in_a_tiff_and_a_big_tiff_are_refused():
    jpeg = jpeg_of_scans(50)
    data = tiff(64, 64, [(259, 3, 1, 7), (262, 3, 1, 6), (277, 3, 1, 3)], jpeg)
    with pytest.raises(BadImage, match="a TIFF with a progressive JPEG in it"):
        read_image(data)
    with pytest.raises(BadImage, match="a BigTIFF"):
        read_image(encoded(IMAGE, "TIFF", big_tiff=True))


def test_of_a_field_given_twice_the_larger_counts():
    data = tiff(48, 40, [(322, 4, 1, 16), (323, 4, 1, 16)], BODY)
    at = data.index(b"\x42\x01\x04\0\x01\0\0\0\x10")  # TileWidth
    other = b"\x42\x01\x04\0\x01\0\0\0" + (1 << 30).to_bytes(4, "little")
    with pytest.raises(BadImage, match="tiles of 1073741824 x 16"):
        check_tiff(data[: at - 12] + data[at : at + 12] + other + data[at + 12 :], 100_000_000)
