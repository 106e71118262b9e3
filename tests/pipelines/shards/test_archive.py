"""Tars that others wrote: grouped as webdataset groups them, and nothing passed over uncounted."""

import gzip
import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.shards.archive import Archive, Group, KeyEnd, Missing
from pipelines.shards.storage import Folder
from repfusion.tars import TarError

Entry = tuple[str, bytes, bytes, str]
"""Name, type, bytes and target of a member."""


def write(path: Path, entries: list[Entry]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, kind, data, target in entries:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(data), target
            archive.addfile(info, io.BytesIO(data))
    path.write_bytes(stream.getvalue())
    return stream.getvalue()


def file(name: str, data: bytes = b"x") -> Entry:
    return (name, tarfile.REGTYPE, data, "")


def grouped(
    path: Path, key_end: KeyEnd = "first_dot", max_bytes: int = 1000
) -> tuple[list[Group], list[tuple[str, str]]]:
    with Archive(Folder.at(path.parent), path.name, key_end, lambda _: True, max_bytes) as archive:
        return list(archive.groups()), archive.strays


STEMS = st.sampled_from(["a", "b", "c/a", "c/.h", "._a", "__meta__", "é", "no", "1"])
EXTENSIONS = st.sampled_from(
    [".png", ".PNG", ".txt", ".json", ".left.png", ".a.txt", ".cls", "", ".", ".TXT"]
)
ENTRIES = st.lists(
    st.one_of(
        st.builds(lambda stem, end, data: file(stem + end, data), STEMS, EXTENSIONS, st.binary(max_size=600)),
        st.builds(
            lambda stem, end, kind, target: (stem + end, kind, b"", target),
            STEMS,
            EXTENSIONS,
            st.sampled_from([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE]),
            st.sampled_from(["a.png", "b.txt", "../x", "/etc/passwd"]),
        ),
        st.builds(lambda stem: (stem, tarfile.DIRTYPE, b"", ""), STEMS),
    ),
    max_size=12,
)


@settings(max_examples=1000, deadline=None)
@given(entries=ENTRIES, key_end=st.sampled_from(["first_dot", "last_dot"]))
def test_every_member_is_in_a_group_or_a_stray_and_samples_are_webdatasets(
    tmp_path_factory, entries: list[Entry], key_end: KeyEnd
):
    path = tmp_path_factory.getbasetemp() / "random.tar"
    write(path, entries)
    groups, strays = grouped(path, key_end)
    files = [entry for entry in entries if entry[1] != tarfile.DIRTYPE]
    assert sum(len(group.members) for group in groups) + len(strays) == len(files)
    assert all(group.members for group in groups)
    if key_end == "last_dot" or not all(plain(entry) for entry in files):
        return
    expected = of_webdataset(path)
    assert expected is None or [(group.key, group.members) for group in groups] == expected


def plain(entry: Entry) -> bool:
    """Whether webdataset reads a member by the rules that we keep: it passes over links in silence, and takes
    the folder for the key of a hidden file.
    """
    return entry[1] == tarfile.REGTYPE and "/." not in entry[0]


def of_webdataset(path: Path) -> list[tuple[str, dict[str, bytes]]] | None:
    """None where it refuses the tar."""
    from webdataset.tariterators import tarfile_to_samples

    try:
        samples = list(tarfile_to_samples()([{"url": str(path)}]))
    except ValueError:
        return None
    return [(one.pop("__key__"), {k: v for k, v in one.items() if k[:2] != "__"}) for one in samples]


def test_a_member_twice_in_a_row_begins_another_group(tmp_path):
    write(tmp_path / "x.tar", [file("a.png"), file("a.txt"), file("a.png"), file("a.txt"), file("b.PNG")])
    groups, _ = grouped(tmp_path / "x.tar")
    assert [(group.key, sorted(group.members)) for group in groups] == [
        ("a", ["png", "txt"]),
        ("a", ["png", "txt"]),
        ("b", ["png"]),
    ]


def test_links_within_the_tar_are_followed_and_others_are_named(tmp_path):
    path = tmp_path / "x.tar"
    entries = [
        file("a.png", b"picture"),
        ("b.png", tarfile.LNKTYPE, b"", "a.png"),
        ("c.png", tarfile.SYMTYPE, b"", "a.png"),
        ("d.png", tarfile.SYMTYPE, b"", "../../etc/passwd"),
        ("e.png", tarfile.SYMTYPE, b"", "f.png"),
        file("f.png", b"later"),
        ("g.png", tarfile.FIFOTYPE, b"", ""),
    ]
    data = write(path, entries)
    members = {group.key: group.members["png"] for group in grouped(path)[0]}
    assert members["b"] == members["c"] == members["a"] == b"picture"
    reasons = {key: found.reason for key, found in members.items() if isinstance(found, Missing)}
    assert reasons == {"d": "broken_link", "e": "broken_link", "g": "unreadable_member"}
    path.write_bytes(gzip.compress(data))
    members = {group.key: group.members["png"] for group in grouped(path)[0]}
    assert members["a"] == b"picture" and members["b"] == Missing(
        "broken_link", "b.png: links in a compressed tar are not followed"
    )


def test_members_above_the_limit_are_not_read(tmp_path):
    write(tmp_path / "x.tar", [file("a.png", bytes(1001)), file("b.png", bytes(1000))])
    groups, _ = grouped(tmp_path / "x.tar")
    assert groups[0].members["png"] == Missing("too_many_bytes", "a.png: 1,001 bytes, at most 1,000")
    assert groups[1].members["png"] == bytes(1000)


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_gzip_is_an_error_behind_what_is_sound(tmp_path, damage):
    path = tmp_path / "x.tar.gz"
    data = bytearray(gzip.compress(write(path, [file(f"{i}.png", bytes([i]) * 900) for i in range(50)]), 0))
    if damage == "cut":
        del data[-3000:]
    else:
        data[-4] ^= 1
    path.write_bytes(data)
    with Archive(Folder.at(tmp_path), path.name, "first_dot", lambda _: True, 1000) as archive:
        read = []
        with pytest.raises(TarError, match="gzip"):
            read.extend(group.key for group in archive.groups())
