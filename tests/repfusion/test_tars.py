"""The one reader of tars: every member of every kind of tar, and damage by name."""

import hashlib
import io
import itertools
import resource
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repfusion.tars import CutTarError, Member, StreamSource, TarError, TarReader, index_tar, split_name

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def made(members: list[tuple[str, bytes]], kind: int = tarfile.GNU_FORMAT, **options: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=kind, **options) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def made_of(*infos: tarfile.TarInfo, kind: int = tarfile.GNU_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=kind) as archive:
        for info in infos:
            archive.addfile(info, io.BytesIO(bytes(info.size)))
    return stream.getvalue()


def info(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 0) -> tarfile.TarInfo:
    one = tarfile.TarInfo(name)
    one.type, one.linkname, one.size = kind, target, size
    return one


def read(data: bytes) -> list[tuple[Member, bytes]]:
    reader = TarReader(StreamSource(io.BytesIO(data)))
    return [(member, reader.data() if member.kind == "file" else b"") for member in reader]


def files(data: bytes) -> list[tuple[str, bytes]]:
    return [(member.name, content) for member, content in read(data) if member.kind == "file"]


def header(data: bytes, change: dict[int, bytes], at: int = 0) -> bytes:
    """A tar with bytes of a header changed, and its checksum made right again."""
    block = bytearray(data[at : at + 512])
    for position, new in change.items():
        block[position : position + len(new)] = new
    block[148:156] = b" " * 8
    block[148:155] = b"%06o\0" % sum(block)
    return data[:at] + bytes(block) + data[at + 512 :]


NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=300)


@settings(max_examples=150, deadline=None)
@given(
    members=st.lists(st.tuples(NAMES, st.binary(max_size=1100)), max_size=6),
    kind=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    times=st.integers(1, 3),
)
def test_any_tar_reads_as_tarfile_reads_it(members, kind, times):
    data = made(members, kind)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        expected = [(one.name, archive.extractfile(one).read()) for one in archive if one.isfile()]
        places = [(one.offset_data, one.size) for one in archive if one.isfile()]
    found = read(data)
    assert [(one.name, content) for one, content in found if one.kind == "file"] == expected
    assert [(one.offset, one.size) for one, _ in found if one.kind == "file"] == places
    assert files(data * times) == files(data) * times, "tars behind each other are one"
    without = [(one, b"") for one, _ in found]
    assert [(one, b"") for one in TarReader(StreamSource(io.BytesIO(data)))] == without, (
        "bytes need no reading"
    )


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_cut_tar_is_never_taken_for_whole(data):
    whole = made([(f"{index}.txt", bytes([index]) * data.draw(st.integers(0, 1500))) for index in range(3)])
    end = len(whole.rstrip(b"\0"))
    cut = data.draw(st.integers(0, -(-end // 512) * 512 + 1023))
    with pytest.raises(CutTarError, match="truncated"):
        read(whole[:cut])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_random_damage_gives_members_or_an_error_of_ours(data):
    whole = bytearray(made([(f"{'long' * 40}{index}.txt", b"x" * 700) for index in range(3)]))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, 512 * 12))] = data.draw(st.integers(0, 255))
    try:
        found = read(bytes(whole))
    except TarError:
        return
    assert all(len(content) == member.size for member, content in found)


@pytest.mark.parametrize("kind", FORMATS)
def test_names_of_bytes_that_are_no_utf8_are_escaped(kind):
    if kind == tarfile.PAX_FORMAT:
        data = made([("caf\udce9.png", b"x")], kind, errors="surrogateescape")
    else:
        data = made([("caf\xe9.png", b"x")], kind, encoding="latin-1")
    assert files(data) == [(r"caf\xe9.png", b"x")]


def test_links_are_given_with_what_they_stand_for():
    data = made_of(
        info("a/x.png", size=5),
        info("a/y.png", tarfile.SYMTYPE, "x.png"),
        info("b/z.png", tarfile.SYMTYPE, "../a/./x.png"),
        info("h.png", tarfile.LNKTYPE, "a/x.png"),
        info("o.png", tarfile.SYMTYPE, "/elsewhere/o.png"),
        info("l" * 150, tarfile.SYMTYPE, "t" * 150),
    )
    links = [(member.name, member.target) for member, _ in read(data) if member.kind == "link"]
    assert links == [
        ("a/y.png", "a/x.png"),
        ("b/z.png", "a/x.png"),
        ("h.png", "a/x.png"),
        ("o.png", "/elsewhere/o.png"),
        ("l" * 150, "t" * 150),
    ]


def test_folders_and_what_is_no_file_are_said_to_be():
    data = made_of(
        info("d", tarfile.DIRTYPE), info("f", tarfile.FIFOTYPE), info("c", tarfile.CHRTYPE), info("v/", b"\0")
    )
    assert [member.kind for member, _ in read(data)] == ["folder", "special", "special", "folder"]


def test_gnu_sparse_members_take_no_memory(tmp_path):
    """A list of holes that goes on in a second block, 12 GB in a tar of 12 kB, and pax's way of saying it."""
    parts = b"".join(b"%011o\0%011o\0" % (position << 30, 512) for position in range(1, 5))
    sparse = header(
        made_of(info("s.png", size=512 * 3)),
        {156: b"S", 386: parts, 482: b"\1", 483: b"%011o\0" % (12 << 30)},
    )
    more = b"".join(b"%011o\0%011o\0" % (position << 30, 512) for position in range(5, 7))
    data = sparse[:512] + more.ljust(512, b"\0") + sparse[512:2048] + made([("a.txt", b"behind")])
    found = read(data)
    assert [(one.name, one.kind, one.offset, one.size) for one, _ in found] == [
        ("s.png", "sparse", 1024, 1536),
        ("a.txt", "file", 3072, 6),
    ]
    one = info("GNUSparseFile.0/s.png", size=5)
    one.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.name": "s.png", "GNU.sparse.realsize": "9" * 10}
    assert [(m.name, m.kind) for m, _ in read(made_of(one, kind=tarfile.PAX_FORMAT))] == [("s.png", "sparse")]


@pytest.mark.parametrize(
    "size",
    [b"-0000001000\0", b"+0000001000\0", b"0x000001000\0", b"0_000001000\0", b"\xff" * 12, b"00000000900\0"],
)
def test_a_size_that_is_no_number_is_an_error(size):
    data = made([("a.txt", b"x"), ("b.txt", b"y")])
    with pytest.raises(TarError, match="no number"):
        read(header(data, {124: size}, at=1024))


@pytest.mark.parametrize("size", [b"77777777777\0", b"\x80" + b"\0" * 2 + b"\xff" * 9])
def test_a_size_beyond_the_file_takes_no_memory(size, tmp_path):
    (tmp_path / "x.tar").write_bytes(header(made([("a.txt", b"x")]), {124: size}))
    code = (
        "import sys; from repfusion.tars import *\n"
        "reader = TarReader(StreamSource(open(sys.argv[1], 'rb')))\n"
        "try: [reader.data() for _ in reader]\n"
        "except CutTarError: sys.exit(7)\n"
    )
    limit = 400 << 20
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x.tar")],
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert done.returncode == 7


@pytest.mark.parametrize(
    "text", [b"7 path=", b"x path=a\n", b"99 path=a\n", b"9 path\n", b"11 size=-1\n", b"\xff" * 20]
)
def test_a_pax_header_that_is_none_is_an_error(text):
    data = made_of(info("x", tarfile.XHDTYPE, size=len(text)))
    data = data[:512] + text.ljust(512, b"\0") + made([("a.txt", b"x")])
    with pytest.raises(TarError):
        read(data)


def test_bytes_behind_the_end_that_are_no_member_are_an_error():
    with pytest.raises(TarError, match="no header at byte 10,240 behind the end-of-archive mark"):
        read(made([("a.txt", b"x")]) + b"junk" * 128)
    with pytest.raises(TarError, match="long name and no member"):
        read(made_of(info("x", tarfile.GNUTYPE_LONGNAME, size=5)))


def test_checksums_of_signed_bytes_count():
    data = made([("caf\xe9", b"x")], tarfile.USTAR_FORMAT, encoding="latin-1")
    block = bytearray(data[:512])
    block[148:156] = b" " * 8
    block[148:155] = b"%06o\0" % sum(byte - 256 * (byte > 127) for byte in block)
    assert len(read(bytes(block) + data[512:])) == 1
    block[148:155] = b"%06o\0" % (sum(block) + 1)
    with pytest.raises(TarError, match="not a readable tar"):
        read(bytes(block) + data[512:])


def test_what_is_compressed_is_said_to_be():
    import gzip

    noise = b"".join(hashlib.sha256(bytes([index])).digest() for index in range(100))
    with pytest.raises(TarError, match="compressed by gzip"):
        read(gzip.compress(made([("a.txt", noise)]), mtime=0))


def test_the_index_is_that_of_the_bytes(tmp_path):
    data = made_of(
        info("d", tarfile.DIRTYPE), info("a.png", size=700), info("b.png", tarfile.LNKTYPE, "a.png")
    )
    (tmp_path / "x.tar").write_bytes(data)
    assert index_tar(tmp_path / "x.tar") == {"a.png": (1024, 700), "b.png": (1024, 700)}
    for bad, match in [
        (made([("a.png", b"x"), ("a.png", b"y")]), "two members of the name a.png"),
        (made_of(info("b.png", tarfile.SYMTYPE, "c.png")), "b.png is a link"),
        (b"", "empty"),
    ]:
        (tmp_path / "x.tar").write_bytes(bad)
        with pytest.raises(TarError, match=match):
            index_tar(tmp_path / "x.tar")


PARTS = ["a", "b.c", ".d", "", "é", "e..f", "g."]


@pytest.mark.parametrize("name", ["/".join(parts) for parts in itertools.product(PARTS, repeat=2)] + PARTS)
def test_keys_and_extensions_are_webdatasets(name: str):
    from webdataset.tariterators import base_plus_ext

    if name.rpartition("/")[2].startswith("."):
        # in a folder, webdataset takes the folder for the key of a hidden file
        assert split_name(name) is None
        return
    expected = base_plus_ext(name)
    assert split_name(name) == (None if expected == (None, None) else expected)


def test_the_reader_is_the_only_one():
    root = Path(__file__).resolve().parents[2]
    packages = [*root.glob("repfusion/**/*.py"), *root.glob("pipelines/**/*.py")]
    assert [path.name for path in packages if "import tarfile" in path.read_text()] == ["tars.py"]
    assert "tarfile.open" not in (root / "pipelines/shards/tars.py").read_text(), "it writes headers alone"
