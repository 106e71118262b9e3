"""Tars whose keys, names, members and compression are not as we would write them."""

import io
import json
import os
import tarfile

import pytest
from foreign_tars import drops, picture, read, run, samples, write_tar

from pipelines.sources import tars as tar_source
from pipelines.sources.ingest import IngestConfig
from pipelines.sources.inputs import find_inputs
from pipelines.sources.tars import TarsConfig, jobs


def test_a_dot_in_keys_is_a_counted_drop_or_a_key_by_choice(tmp_path):
    members = {
        f"shot.{i:03d}.{end}": data
        for i in range(5)
        for end, data in (("png", picture("PNG")), ("txt", b"x"))
    }
    write_tar(tmp_path / "in.tar", {**members, "z.jpg": picture(), "z.txt": b"z"})
    config = TarsConfig(path=str(tmp_path / "in.tar"))
    (sidecar,) = run(config, tmp_path / "out")
    assert sidecar.samples == 1 and sidecar.drops == {"dotted_key": 5}
    assert drops(tmp_path / "out")[3][2].startswith("shot.003: WebDataset's keys end at the first dot")
    (sidecar,) = run(config.model_copy(update={"key_ends": "last_dot"}), tmp_path / "last")
    assert sidecar.samples == 6 and sidecar.drops == {}
    keys = [json.loads(members["json"])["source_key"] for members in read(tmp_path / "last").values()]
    assert keys == [f"shot.{i:03d}" for i in range(5)] + ["z"]
    write_tar(tmp_path / "in.tar", {"only.one.png": picture("PNG"), "only.one.txt": b"x"})
    (sidecar,) = run(config, tmp_path / "out")
    assert sidecar.samples == 0 and sidecar.drops == {"dotted_key": 1}


def test_a_member_given_twice_is_a_sample_and_a_counted_repeat(tmp_path):
    first, second = picture(colour="red"), picture(colour="blue")
    members = [
        ("a.jpg", first),
        ("a.txt", b"1"),
        ("a.jpg", second),
        ("a.txt", b"2"),
        ("b.jpg", first),
        ("b.txt", b"3"),
    ]
    write_tar(tmp_path / "in.tar", members)
    (sidecar,) = run(TarsConfig(path=str(tmp_path / "in.tar")), tmp_path / "out")
    assert sidecar.drops == {"duplicate_key": 1}
    kept = list(read(tmp_path / "out").values())
    assert [one["txt"] for one in kept] == [b"1", b"3"] and kept[0]["jpg"] == first


def test_of_several_images_the_plain_one_is_taken_and_the_rest_counted(tmp_path):
    picked, mask = picture("PNG"), picture("PNG", (30, 30))
    write_tar(
        tmp_path / "in.tar",
        [
            ("0.mask.png", mask), ("0.png", picked), ("0.txt", b"x"),
            ("1.left.png", mask), ("1.right.png", picked), ("1.txt", b"x"),
            ("2.photo.png", picked), ("2.txt", b"x"), ("2.cls", b"7"),
        ],
    )  # fmt: skip
    config = TarsConfig(path=str(tmp_path / "in.tar"))
    (sidecar,) = run(config, tmp_path / "out", IngestConfig(image_size=None, max_drop_fraction=0.34))
    assert sidecar.samples == 2
    assert sidecar.drops == {"extra_image": 1, "several_images": 1, "unused_member": 1}
    assert [one["png"] for one in read(tmp_path / "out").values()] == [picked, picked]
    assert drops(tmp_path / "out")[0] == ("00000000000", "extra_image", "0.mask.png")
    (sidecar,) = run(config.model_copy(update={"image_extension": "Right.png"}), tmp_path / "right")
    assert sidecar.samples == 1 and sidecar.drops["no_image"] == 2


def test_members_in_upper_case_and_of_no_sample(tmp_path):
    good = picture()
    write_tar(
        tmp_path / "in.tar",
        [
            ("._a.jpg", b"mac"), ("a.JPG", good), ("a.TXT", b"shouted"), ("a.JSON", b'{"n": 1}'),
            ("README", b"none"), ("__info__", b"none"), (".DS_Store", b"none"), ("folder/._b.jpg", b"mac"),
            ("folder/b.jpg", good), ("folder/b.txt", b"x"),
        ],
    )  # fmt: skip
    (sidecar,) = run(
        TarsConfig(path=str(tmp_path / "in.tar")), tmp_path / "out", IngestConfig(image_size=None)
    )
    assert sidecar.samples == 2, "what belongs to no sample is no share of what may be lost"
    assert sidecar.drops == {"hidden_file": 3, "no_extension": 1, "metadata_file": 1}
    first = next(iter(read(tmp_path / "out").values()))
    assert first["txt"] == b"shouted" and json.loads(first["json"])["n"] == 1


def test_names_that_are_no_utf8_are_kept_with_their_bytes_escaped(tmp_path):
    path = tmp_path / "in.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as archive:
        for name, data in (("caf\xe9.jpg", picture()), ("caf\xe9.txt", b"x")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    (sidecar,) = run(TarsConfig(path=str(path)), tmp_path / "out")
    assert sidecar.samples == 1 and sidecar.drops == {}
    (members,) = read(tmp_path / "out").values()
    assert json.loads(members["json"])["source_key"] == r"caf\xe9"


def test_compressed_tars_and_those_behind_each_other_are_read(tmp_path):
    import gzip

    folder = tmp_path / "in"
    for name, first in (("a.tar", 0), ("b.tar", 10), ("c.tar", 20)):
        write_tar(folder / name, samples(first, 2))
    plain = (folder / "b.tar").read_bytes()
    (folder / "b.tar").unlink()
    (folder / "b.tar.gz").write_bytes(gzip.compress(plain))
    (folder / "c.tar").write_bytes(gzip.compress((folder / "c.tar").read_bytes()))
    (folder / "d.tgz").write_bytes(gzip.compress(plain))
    write_tar(folder / "e.tar", samples(30, 1))
    (folder / "e.tar").write_bytes((folder / "e.tar").read_bytes() + plain)
    config = TarsConfig(path=str(folder))
    assert [sidecar.samples for sidecar in run(config, tmp_path / "out")] == [2, 2, 2, 2, 3]
    assert abs(tar_source.num_entries(config) - 11) <= 4
    assert [one["txt"] for one in read(tmp_path / "out", "00004").values()] == [
        b"picture 30",
        b"picture 10",
        b"picture 11",
    ]
    write_tar(folder / "f.tar.zst", samples(0, 1))
    with pytest.raises(ValueError, match=r"source\.path: .*f\.tar\.zst \(1 such archives of 6\) is not read"):
        jobs(config)


def test_links_and_what_is_too_large_are_followed_or_counted(tmp_path):
    good = picture()
    with tarfile.open(tmp_path / "in.tar", "w") as archive:
        for name, kind, target, data in [
            ("a.jpg", tarfile.REGTYPE, "", good), ("a.txt", tarfile.REGTYPE, "", b"x"),
            ("b.jpg", tarfile.LNKTYPE, "a.jpg", b""), ("b.txt", tarfile.SYMTYPE, "a.txt", b""),
            ("c.jpg", tarfile.SYMTYPE, "/elsewhere/c.jpg", b""), ("c.txt", tarfile.REGTYPE, "", b"x"),
            ("d.jpg", tarfile.REGTYPE, "", bytes(200_000)), ("d.txt", tarfile.REGTYPE, "", b"x"),
            ("e.jpg", tarfile.FIFOTYPE, "", b""), ("e.txt", tarfile.REGTYPE, "", b"x"),
        ]:  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, target, len(data)
            archive.addfile(info, io.BytesIO(data))
    ingest = IngestConfig(image_size=None, max_drop_fraction=1, max_download_bytes=100_000)
    (sidecar,) = run(TarsConfig(path=str(tmp_path / "in.tar")), tmp_path / "out", ingest)
    assert sidecar.samples == 2
    assert sidecar.drops == {"broken_link": 1, "too_many_bytes": 1, "unreadable_member": 1}
    assert [(one["jpg"], one["txt"]) for one in read(tmp_path / "out").values()] == [(good, b"x")] * 2


def test_nan_in_a_json_is_null_as_everywhere(tmp_path):
    """Metadata made by pandas says so that there is none."""
    members: dict[str, bytes] = {}
    for index in range(4):
        score = b"NaN" if index % 2 else b"0.5"
        members[f"{index}.png"], members[f"{index}.txt"] = picture("PNG"), b"caption"
        members[f"{index}.json"] = b'{"aesthetic": ' + score + b', "more": [-Infinity, {"x": NaN}]}'
    write_tar(tmp_path / "in.tar", members)
    (sidecar,) = run(TarsConfig(path=str(tmp_path / "in.tar")), tmp_path / "out")
    assert sidecar.samples == 4 and not sidecar.drops
    found = [json.loads(one["json"]) for one in read(tmp_path / "out").values()]
    assert [one["aesthetic"] for one in found] == [0.5, None, 0.5, None]
    assert found[0]["more"] == [None, {"x": None}]


@pytest.mark.parametrize(
    ("several", "caption", "kept", "drops"),
    [
        ("whole", b"a\nb\n", None, {"several_captions": 1}),
        ("first", b"a", None, {}),
        ("all", b"a", ["a", "b"], {}),
    ],
)
def test_captions_of_several_lines_and_lists_of_them(tmp_path, several, caption, kept, drops):
    members = {"0.png": picture("PNG"), "0.TXT": b"\xef\xbb\xbfa\nb\n", "0.json": b'{"list": ["a", "b"]}'}
    members |= {"1.png": picture("PNG"), "1.caption": "a\nb\n".encode("utf-16")}
    write_tar(tmp_path / "in.tar", members)
    config = TarsConfig(path=str(tmp_path / "in.tar"), several_captions=several)
    (sidecar,) = run(config, tmp_path / "out")
    assert sidecar.samples == 2
    for one in read(tmp_path / "out").values():
        assert one["txt"] == caption and json.loads(one["json"]).get("all_captions") == kept
    of_json = config.model_copy(update={"caption_field": "list"})
    (sidecar,) = run(of_json, tmp_path / "json")
    assert sidecar.drops == {**drops, "no_caption": 1}


def test_tars_by_a_pattern_of_numbers(tmp_path):
    for index in (8, 9, 10, 11):
        write_tar(tmp_path / "in" / f"{index:03d}.tar", samples(index, 1))
    pattern = f"{tmp_path}/in/{{009..011}}.tar"
    assert [job.arguments["file"].name for job in jobs(TarsConfig(path=pattern))] == [
        "009.tar", "010.tar", "011.tar",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"2 of the 4 names that .*lead to no file, first .*012\.tar"):
        jobs(TarsConfig(path=f"{tmp_path}/in/{{010..013}}.tar"))
    with pytest.raises(ValueError, match="its braces do not match"):
        jobs(TarsConfig(path=f"{tmp_path}/in/{{010..013.tar"))
    (tmp_path / "in" / "{009..011}.tar").write_bytes(b"")
    assert [file.name for file in find_inputs(pattern, (".tar",), "p", {})] == ["{009..011}.tar"]


def test_a_pattern_of_folders_and_of_patterns(tmp_path):
    for name in ("a/0.tar", "a/1.tar", "b/0.TAR", "c/0.tar"):
        write_tar(tmp_path / "in" / name, samples(0, 1))
    found = find_inputs(f"{tmp_path}/in/{{a,b}}", (".tar",), "p", {})
    assert [file.name for file in found] == ["a/0.tar", "a/1.tar", "b/0.TAR"]
    found = find_inputs(f"{tmp_path}/in/{{a,c}}/*.tar", (".tar",), "p", {})
    assert [file.name for file in found] == ["a/0.tar", "a/1.tar", "c/0.tar"]


def test_a_pattern_of_numbers_at_a_url(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    for index in range(3):
        memory.pipe(f"/numbered/a-{index:03d}.tar", b"x")
    found = find_inputs("memory://numbered/a-{000..002}.tar", (".tar",), "p", {})
    assert [(file.name, file.base, file.size) for file in found] == [
        (f"a-{index:03d}.tar",) * 2 + (1,) for index in range(3)
    ]
    with pytest.raises(ValueError, match=r"1 of the 4 names .* first memory://numbered/a-003\.tar"):
        find_inputs("memory://numbered/a-{000..003}.tar", (".tar",), "p", {})


def test_an_input_whose_name_is_no_text_is_named(tmp_path):
    with open(os.fsencode(tmp_path) + b"/caf\xe9.tar", "wb"):
        pass
    with pytest.raises(ValueError, match=r"p: .*caf\\udce9\.tar: the name is no UTF-8"):
        find_inputs(str(tmp_path), (".tar",), "p", {})
