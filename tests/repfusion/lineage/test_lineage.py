"""From an image back to checkpoint, run, data and frozen weights: every link checked, every break named."""

import json
import shutil
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import make_columns, tiny_model

from repfusion.data.columns import manifest_digest
from repfusion.export import export
from repfusion.files import file_sha256, write_json
from repfusion.generate import main as generate_main
from repfusion.latents.statistics import LatentStatistics
from repfusion.lineage.__main__ import main
from repfusion.lineage.describe import code_version, lineage_record, lock_digest, png_info, read_png
from repfusion.lineage.trace import trace
from repfusion.model.build import build_model
from repfusion.runs.checkpoint import frozen_digests, save_checkpoint
from repfusion.weights import WEIGHTS

FEATURES = "data main/image_features"
ROOT = Path(__file__).resolve().parents[3]


def write_manifest(folder: Path, fingerprint: str, samples: int = 20) -> None:
    fields = {"schema": 1, "stage": folder.name, "fingerprint": fingerprint, "samples": samples}
    (folder / "manifest.json").write_text(json.dumps({**fields, "seconds": 1.5, "shard_seconds": 1.0}))


class World:
    """A training's leavings: foundation, columns with manifests, a checkpoint with lineage.json."""

    def __init__(self, root: Path, foundation: Path):
        self.foundation = shutil.copytree(foundation, root / "foundation")
        self.columns = make_columns(root / "data", num_samples=8)
        for stage in ("curate", "image_features"):
            write_manifest(self.columns / stage, f"{stage}-fingerprint")
        self.data = {"images": self.columns / "curate", "image_features": self.columns / "image_features"}
        statistics = LatentStatistics.load(self.columns / "image_features" / "statistics.safetensors")
        torch.manual_seed(0)
        generator = build_model(tiny_model(self.foundation), statistics)
        self.checkpoint = root / "train" / "checkpoints" / "step_00000042"
        save_checkpoint(self.checkpoint, generator, generator.trainable_state(), step=42)
        self.lineage = lineage_record(
            step=42,
            datasets={"main": self.data},
            digests=frozen_digests(generator),
            run_id="0123abcd",
            tracking_uri="sqlite:///runs/mlflow.db",
        )
        write_json(self.checkpoint / "lineage.json", self.lineage)
        self.image = root / "x.png"

    def draw(self, monkeypatch: pytest.MonkeyPatch, source: Path | None = None, *options: str) -> None:
        arguments = ["--checkpoint", source or self.checkpoint, "--prompt", "a red circle", "--seed", 5]
        arguments += ["--out", self.image, "--num-steps", 1, "--device", "cpu", "--num-images", 2]
        monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments), *options])
        generate_main()


@pytest.fixture
def world(tmp_path, foundation) -> World:
    return World(tmp_path, foundation)


def states(subject: Path) -> dict[str, str]:
    return {link.name: link.state for link in trace(subject)}


def broken(subject: Path) -> dict[str, str]:
    return {link.name: link.note for link in trace(subject) if link.state in ("differs", "missing")}


def test_describe_holds_what_the_run_stood_on(world):
    latents = world.columns / "image_features"
    assert world.lineage["datasets"]["main"]["image_features"] == {
        "folder": str(latents),
        "manifest_digest": manifest_digest(latents),
        "fingerprint": "image_features-fingerprint",
    }
    assert world.lineage["datasets"]["main"].keys() == {"images", "image_features"}
    assert world.lineage["lock_digest"] == file_sha256(ROOT / "requirements.lock") == lock_digest()
    assert world.lineage.keys() == {
        *("run_id", "tracking_uri", "git_commit", "lock_digest", "step", "init_from", "datasets", "digests")
    }
    assert world.lineage["digests"].keys() == {"encoder", "mllm"}


def test_the_code_is_the_commit_and_says_when_it_was_changed():
    code_version.cache_clear()

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    is_dirty = git("status", "--porcelain", "--untracked-files=no") != ""
    assert code_version() == git("rev-parse", "HEAD") + ("-dirty" if is_dirty else "")


def test_a_column_without_a_manifest_is_described_as_such(world):
    (world.columns / "image_features" / "manifest.json").unlink()
    found = lineage_record(step=0, datasets={"main": world.data}, digests={})
    column = found["datasets"]["main"]["image_features"]
    assert column["manifest_digest"] is None and column["fingerprint"] is None and found["run_id"] is None


def test_an_image_leads_back_to_everything(world, monkeypatch):
    world.draw(monkeypatch)
    links = {link.name: link for link in trace(world.image)}
    assert list(links) == [
        *("image", "prompt", "seed", "sampler", "checkpoint", "step", "run", "code"),
        *("data main/images", FEATURES, "config", "encoder", "mllm"),
    ]
    checked = ("checkpoint", "data main/images", FEATURES, "encoder", "mllm")
    assert {links[name].state for name in checked} == {"agrees"}
    assert links["prompt"].value == "a red circle" and links["seed"].value == "5 to 6"
    assert links["checkpoint"].value == str(world.checkpoint) and links["step"].value == "42"
    assert links["run"].value == "0123abcd" and "sqlite:///runs/mlflow.db" in links["run"].note
    assert "fingerprint image_featur" in links[FEATURES].note
    assert links["encoder"].value == str(world.foundation / "vision_tower")
    assert not broken(world.image)


def change_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b" ")


@pytest.mark.parametrize(
    ("damage", "name", "note"),
    [
        (
            lambda w: write_manifest(w.columns / "image_features", "other"),
            FEATURES,
            "holds manifest",
        ),
        (lambda w: shutil.rmtree(w.columns / "curate"), "data main/images", "no such folder"),
        (lambda w: (w.columns / "curate" / "manifest.json").unlink(), "data main/images", "manifest none"),
        (lambda w: change_weights(w.foundation / "llava"), "mllm", "trained with"),
        (lambda w: shutil.rmtree(w.foundation / "vision_tower"), "encoder", "no weights there"),
        (lambda w: (w.checkpoint / "ema.safetensors").unlink(), "checkpoint", "ema.safetensors is missing"),
    ],
)
def test_what_no_longer_agrees_is_named(world, monkeypatch, capsys, damage, name, note):
    world.draw(monkeypatch)
    damage(world)
    for subject in (world.image, world.checkpoint):
        found = broken(subject)
        assert list(found) == [name] and note in found[name]
    monkeypatch.setattr(sys, "argv", ["lineage", str(world.image)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert str(stopped.value.code).startswith("error: 1 of ") and name in str(stopped.value.code)
    assert "0123abcd" in capsys.readouterr().out


def test_an_image_of_another_checkpoint_of_the_same_name(world, monkeypatch):
    world.draw(monkeypatch)
    complete = world.checkpoint / "complete.json"
    complete.write_text(complete.read_text().replace("42", "43"))
    found = broken(world.image)
    assert list(found) == ["checkpoint"] and "recorded" in found["checkpoint"]


def test_an_image_remembers_the_training_of_a_checkpoint_that_is_gone(world, monkeypatch):
    world.draw(monkeypatch)
    shutil.rmtree(world.checkpoint)
    links = {link.name: link for link in trace(world.image)}
    assert links["checkpoint"].state == "missing" and "no complete.json there" in links["checkpoint"].note
    assert links["run"].value == "0123abcd" and links["step"].value == "42"
    assert links[FEATURES].state == "agrees"


def test_a_fine_tuned_checkpoint_names_the_one_it_started_from(world):
    parent = world.checkpoint.parent / "step_00000007"
    shutil.copytree(world.checkpoint, parent)
    (parent / "complete.json").write_text((parent / "complete.json").read_text().replace("42", "7"))
    lineage = lineage_record(step=42, datasets={"main": world.data}, digests={}, init_from=parent)
    write_json(world.checkpoint / "lineage.json", lineage)
    links = {link.name: link for link in trace(world.checkpoint)}
    assert links["init from"].value == str(parent) and links["init from"].state == "agrees"
    shutil.rmtree(parent)
    assert list(broken(world.checkpoint)) == ["init from"]


def test_every_data_set_of_a_mix_is_checked(world):
    lineage = lineage_record(step=42, datasets={"main": world.data, "photos": world.data}, digests={})
    write_json(world.checkpoint / "lineage.json", lineage)
    write_manifest(world.columns / "image_features", "other")
    assert list(broken(world.checkpoint)) == [FEATURES, "data photos/image_features"]


def test_an_export_stands_for_itself(world, tmp_path, monkeypatch):
    out = export(world.checkpoint, tmp_path / "out")
    assert states(out)["checkpoint"] == states(out)["encoder"] == states(out)["data main/images"] == "agrees"
    moved = shutil.move(out, tmp_path / "moved")
    for folder in (world.checkpoint, world.foundation, world.columns):
        shutil.rmtree(folder)
    world.draw(monkeypatch, moved)
    for subject in (moved, world.image):
        found = states(subject)
        assert found["export"] == "agrees" and found["checkpoint"] == "elsewhere"
        assert found["encoder"] == found["mllm"] == found[FEATURES] == "elsewhere"
        assert not broken(subject)
    assert {link.name: link.value for link in trace(world.image)}["run"] == "0123abcd"
    change_weights(moved / "denoiser")
    assert "denoiser/model.safetensors" in broken(moved)["export"]
    shutil.rmtree(moved)
    found = {link.name: link for link in trace(world.image)}
    assert found["export"].state == "missing" and found["checkpoint"].state == "elsewhere"
    assert found["run"].value == "0123abcd"


def test_the_shipped_base_tells_what_is_known(tmp_path):
    links = {link.name: link for link in trace(WEIGHTS / "base")}
    assert links["checkpoint"].state == links["encoder"].state == links["mllm"].state == "agrees"
    assert links["step"].value == "14500" and "DiT 6 x 192" in links["config"].note
    assert links["run"].state == links["data"].state == "unknown" and "no lineage.json" in links["run"].note


def test_a_checkpoint_without_lineage_is_helped_by_its_training(world):
    (world.checkpoint / "lineage.json").unlink()
    output_dir = world.checkpoint.parent.parent
    write_json(output_dir / "mlflow_run.json", {"uri": "sqlite:///m.db", "run_id": "beef"})
    images, *columns = ((name, str(folder)) for name, folder in world.data.items())
    write_json(output_dir / "config.json", {"data": {"images": images[1], "columns": dict(columns)}})
    links = {link.name: link for link in trace(world.checkpoint)}
    assert links["run"].value == "beef"
    assert links[FEATURES].state == "unknown"
    assert links[FEATURES].value == str(world.columns / "image_features")
    assert not broken(world.checkpoint)


def test_the_command_prints_a_table(world, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lineage", str(world.checkpoint)])
    main()
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == len(trace(world.checkpoint))
    name_width, state_width = len(FEATURES), len("recorded")
    for row, link in zip(rows, trace(world.checkpoint), strict=True):
        assert row[:name_width].rstrip() == link.name
        assert row[name_width + 2 :][:state_width].rstrip() == link.state
        assert row[name_width + state_width + 4 :] == f"{link.value}  {link.note}".rstrip()


@pytest.mark.slow
def test_the_command_tells_scripts_by_its_exit_status_and_json(world):
    write_manifest(world.columns / "image_features", "other")
    command = [sys.executable, "-m", "repfusion.lineage", str(world.checkpoint), "--json"]
    told = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert told.returncode == 1 and FEATURES in told.stderr
    shown = json.loads(told.stdout)
    assert not shown["agrees"]
    assert [one["name"] for one in shown["links"] if one["state"] == "differs"] == [FEATURES]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "neither a checkpoint nor an export"),
        (lambda path: path.write_text("hello"), "not a readable image"),
    ],
)
def test_what_has_no_lineage_is_refused(tmp_path, monkeypatch, make, message):
    subject = tmp_path / "x.png"
    make(subject)
    monkeypatch.setattr(sys, "argv", ["lineage", str(subject)])
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        main()


def test_a_png_of_another_program_is_refused(tmp_path):
    from PIL import Image

    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="no text chunk 'repfusion'"):
        read_png(tmp_path / "x.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png", pnginfo=png_info({"prompt": "é \U0001f600"}))
    assert read_png(tmp_path / "x.png") == {"prompt": "é \U0001f600"}


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(path: Path, *chunks: bytes) -> Path:
    """A PNG file of one pixel with chunks in front of its pixels."""
    from PIL import Image

    Image.new("RGB", (1, 1)).save(path)
    data = path.read_bytes()
    start = data.index(b"IDAT") - 4
    path.write_bytes(data[:start] + b"".join(chunks) + data[start:])
    return path


RECORD = {
    **{"rows": [{"prompt": "a", "seeds": [0]}], "num_steps": 1, "solver": "euler", "guidance_scale": 4.0},
    **{"guidance_interval": [0, 1], "checkpoint": {"path": "x", "digest": "d", "step": 1}, "lineage": None},
}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no JSON"),
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[1]", "is list, expected an object"),
        ("{}", "not what this program writes there; rows: Field required"),
        (
            json.dumps(RECORD | {"rows": [{"prompt": "a", "seeds": ["five"]}]}),
            "rows.0.seeds.0: Input should be",
        ),
        (json.dumps(RECORD | {"rows": [{"prompt": "a", "seeds": []}]}), "rows.0.seeds: List should have"),
        (json.dumps(RECORD | {"guidance_interval": [0]}), "guidance_interval.1: Field required"),
        (json.dumps(RECORD | {"checkpoint": "x"}), "checkpoint: Input should be"),
        (json.dumps(RECORD | {"lineage": {"run_id": 3}}), "lineage.run_id: Input should be"),
        (json.dumps(RECORD | {"lineage": {"datasets": {"\x1b[2J": 3}}}), "lineage"),
    ],
)
def test_a_record_that_is_none_of_ours_is_an_error(tmp_path, monkeypatch, text, message):
    path = png_with(tmp_path / "x.png", chunk(b"tEXt", b"repfusion\0" + text.encode("latin-1")))
    monkeypatch.setattr(sys, "argv", ["lineage", str(path)])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = str(stopped.value.code)
    assert said.startswith(f"error: {path}: its text chunk 'repfusion'") and message in said
    assert "\x1b" not in said


@pytest.mark.parametrize(
    ("kind", "keyword", "size", "times"),
    [
        (b"zTXt", b"repfusion\0\0", 1 << 28, 1),
        (b"iTXt", b"repfusion\0\1\0\0\0", 1 << 28, 1),
        (b"zTXt", b"k%d\0\0", 1 << 20, 200),
    ],
    ids=["zTXt", "iTXt", "many"],
)
def test_text_chunks_that_unpack_to_far_more_are_refused(tmp_path, kind, keyword, size, times):
    bomb = zlib.compress(bytes(size))
    chunks = [chunk(kind, (keyword % i if b"%" in keyword else keyword) + bomb) for i in range(times)]
    path, started = png_with(tmp_path / "x.png", *chunks), time.monotonic()
    with pytest.raises(ValueError, match=r"x\.png: not a readable image, expected a PNG file"):
        read_png(path)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("damage", ["cut", "checksum", "size", "eps"])
def test_damaged_and_disguised_images_are_refused(tmp_path, damage):
    path = png_with(tmp_path / "x.png", chunk(b"tEXt", b"repfusion\0{}"))
    data = bytearray(path.read_bytes())
    match damage:
        case "cut":
            data = data[: data.index(b"IDAT") + 6]
        case "checksum":
            data[data.index(b"{}")] ^= 1
        case "size":
            data[16:24] = struct.pack(">II", 1 << 15, 1 << 15)
            data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        case "eps":  # which Pillow would hand to Ghostscript
            data = bytearray(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.png: not a readable image"):
        read_png(path)


def test_a_prompt_sends_nothing_to_the_terminal(tmp_path, monkeypatch, capsys):
    evil = "a cat\x1b]0;mine\x07\x1b[2J\x9b31m\u202etxt.\nmllm  agrees"
    record = RECORD | {
        "rows": [{"prompt": evil, "seeds": [0]}],
        "checkpoint": {"path": "/\x1b[31m", "digest": "\x1b[0m"},
    }
    path = png_with(tmp_path / "x.png", chunk(b"tEXt", b"repfusion\0" + json.dumps(record).encode()))
    for options in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["lineage", str(path), *options])
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capsys.readouterr().out + str(stopped.value.code)
        assert not set(said) & set("\x1b\x07\x9b\u202e")
        assert not any(line.startswith("mllm") for line in said.splitlines())


def places_in(record: Any) -> list[str]:
    match record:
        case dict():
            return [place for part in record.values() for place in places_in(part)]
        case list():
            return [place for part in record for place in places_in(part)]
        case str() if "/" in record:
            return [record]
    return []


@pytest.mark.parametrize("source", ["checkpoint", "export"])
def test_an_image_that_is_given_away_names_no_place(world, tmp_path, monkeypatch, source):
    folder = world.checkpoint if source == "checkpoint" else export(world.checkpoint, tmp_path / "out")
    world.draw(monkeypatch, folder)
    assert places_in(read_png(world.image))
    world.draw(monkeypatch, folder, "--lineage", "portable")
    record = read_png(world.image)
    assert places_in(record) == [] and "sqlite" not in json.dumps(record)
    links = {link.name: link for link in trace(world.image)}
    assert not broken(world.image)
    assert (
        links["run"].value == "0123abcd" and links["checkpoint"].state == links[FEATURES].state == "recorded"
    )
    assert "left out" in links["checkpoint"].note and "left out" in links[FEATURES].note
    world.draw(monkeypatch, folder, "--lineage", "none")
    with pytest.raises(ValueError, match="no text chunk 'repfusion'"):
        read_png(world.image)


@pytest.mark.parametrize("name", ["lineage.json", "config.json"])
@pytest.mark.parametrize("text", ["", "[]", "{}", '{"run_id": 3}', "{"])
def test_a_folder_with_damaged_records_is_an_error_or_named(world, name, text):
    (world.checkpoint / name).write_text(text)
    try:
        assert broken(world.checkpoint)
    except ValueError as error:
        assert name in str(error)
