"""Garbage is what no workflow refers to, and nothing else: it is listed, and deleted only when asked."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from running import run_all, start_training, statuses

from pipelines.build import build_stages, data_stages
from pipelines.commands import collect_garbage
from pipelines.config import WorkflowConfig
from pipelines.shards.storage import Folder
from pipelines.workflow.collect import find_garbage
from pipelines.workflow.locks import DataLocks, locked_roots
from pipelines.workflow.verify import verify

pytestmark = pytest.mark.ray


def garbage(*configs: WorkflowConfig) -> dict[str, str]:
    """Why each thing can go, by its path under the first root."""
    found = find_garbage([build_stages(config) for config in configs], [config.root for config in configs])
    place = Folder.at(configs[0].root).url + "/"
    names = [(one.folder if one.name is None else one.folder / one.name).url for one in found]
    return {name.removeprefix(place): one.why for name, one in zip(names, found, strict=True)}


def files(root: Path) -> dict[str, bytes]:
    found = (path for path in root.rglob("*") if path.is_file() and not path.name.endswith(".lock"))
    return {str(path.relative_to(root)): path.read_bytes() for path in found}


def litter(root: Path) -> dict[str, str]:
    """One of each kind, and things that are not ours."""
    shutil.copytree(root / "image_features", root / "rewrites")
    shutil.copytree(root / "image_features", root / "train.stale-12345678")
    (root / "curate" / "quarantine").mkdir()
    (root / "curate" / "quarantine" / "00001.tar").write_bytes(b"broken")
    (root / "image_features" / ".00001.abc.tmp").mkdir()
    (root / "image_features" / ".00001.abc.tmp" / "00001.tar").write_bytes(b"half")
    (root / "image_features" / ".manifest.json.x.tmp").write_bytes(b"half")
    shutil.copy(root / "prompt_features" / "00003.tar", root / "prompt_features" / "00004.tar")
    (root / "notes").mkdir()
    (root / "notes" / "todo.txt").write_text("mine")
    (root / "readme.txt").write_text("mine")
    return {
        "rewrites": "no workflow given has this stage",
        "train.stale-12345678": "set aside",
        "curate/quarantine": "quarantined by verify",
        "image_features/.00001.abc.tmp": "half-written",
        "image_features/.manifest.json.x.tmp": "half-written",
        "prompt_features/00004.tar": "no manifest lists it",
    }


def test_a_complete_workflow_has_no_garbage(complete_run):
    assert garbage(complete_run) == {}


def test_it_is_listed_first_and_deleted_when_asked(run_copy, capsys):
    clean = files(run_copy.root)
    expected = litter(run_copy.root)
    littered = files(run_copy.root)
    assert garbage(run_copy) == expected
    collect_garbage([run_copy], delete=False)
    assert "6 items" in capsys.readouterr().out and files(run_copy.root) == littered
    collect_garbage([run_copy], delete=True)
    assert "removed 6 of 6 items" in capsys.readouterr().out
    mine = {"notes/todo.txt": b"mine", "readme.txt": b"mine"}
    assert files(run_copy.root) == clean | mine
    assert set(statuses(run_copy).values()) == {"fresh"} and garbage(run_copy) == {}


def test_sizes_are_of_all_files_below(run_copy):
    litter(run_copy.root)
    found = find_garbage([build_stages(run_copy)], [run_copy.root])
    sizes = {one.folder.name: one.bytes for one in found if one.name is None}
    assert sizes["quarantine"] == 6
    assert sizes["rewrites"] == sum(
        path.stat().st_size for path in (run_copy.root / "image_features").glob("[!.]*")
    )


def test_an_earlier_stop_leaves_later_stages_to_whoever_has_them(run_copy, configure):
    short = configure(run_copy.root, last_stage="image_features")
    assert garbage(short) == {"prompt_features": "no workflow given has this stage"}
    assert garbage(short, run_copy) == {} == garbage(run_copy, short)


def test_what_is_stale_or_at_work_stays(run_copy, configure):
    changed = configure(run_copy.root, curate={"max_caption_chars": 50})
    assert garbage(changed) == {}
    (run_copy.root / "image_features" / "manifest.json").unlink()
    (run_copy.root / "image_features" / "00009.tar").write_bytes(b"of a run that goes on")
    assert garbage(run_copy) == {}


def test_workflows_that_share_their_data(run_copy, tmp_path, configure):
    """Each under its own root, the data of both at one address, written in different ways."""
    here = str(run_copy.root)
    one = configure(tmp_path / "one", data_url=here)
    two = configure(tmp_path / "two", data_url=f"file://{here}/", last_stage="image_features")
    assert set(statuses(one).values()) == {"fresh"}
    assert garbage(two) == {f"{here}/prompt_features": "no workflow given has this stage"}
    assert garbage(two, one) == {} == garbage(one, two)


@pytest.mark.parametrize("spelling", ["relative", "linked", "dotted"])
def test_another_spelling_of_a_path_is_the_same_place(run_copy, tmp_path, configure, monkeypatch, spelling):
    """Else the stages of one workflow would be garbage to another that names their folder differently."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(run_copy.root, target_is_directory=True)
    place = {"relative": "run", "linked": str(tmp_path / "link"), "dotted": f"{tmp_path}/other/../run"}[
        spelling
    ]
    (tmp_path / "other").mkdir()
    short = configure(tmp_path / "other", data_url=place, last_stage="image_features")
    assert garbage(run_copy, short) == {} == garbage(short, run_copy)
    short = configure(Path(place), last_stage="image_features")
    assert garbage(run_copy, short) == {} == garbage(short, run_copy)


def test_trainings_are_listed_and_removed_when_they_are_asked_for(run_copy, capsys, configure):
    config = configure(run_copy.root, last_stage="train")
    training = build_stages(config)[-1]
    for name in ("other", "train.stale-12345678"):
        start_training(replace(training, folder=Folder.at(run_copy.root) / name))
    assert collect_garbage([config], delete=True) == 0
    said = capsys.readouterr().out
    assert "nothing to collect" in said and re.search(r"2 trainings, [\d,]+ bytes, are left alone", said)
    assert collect_garbage([config], delete=True, trainings=True) == 0
    assert "removed 2 of 2 items" in capsys.readouterr().out
    assert not (run_copy.root / "other").exists()


def test_what_could_not_be_removed_is_said(run_copy, capsys):
    elsewhere = run_copy.root.with_name("elsewhere")
    shutil.copytree(run_copy.root / "image_features", elsewhere)
    (run_copy.root / "rewrites").symlink_to(elsewhere, target_is_directory=True)
    (run_copy.root / "prompt_features" / "00004.tar").write_bytes(b"12345")
    assert collect_garbage([run_copy], delete=True) == 1
    said = capsys.readouterr()
    assert "removed 1 of 2 items, 5 bytes" in said.out
    assert f"could not remove {run_copy.root}/rewrites: " in said.err and elsewhere.is_dir()


def test_a_run_at_work_on_the_same_data_keeps_others_out(run_copy, tmp_path, configure, pool):
    """Of another root: neither the collector nor a run removes what it is writing."""
    here = run_copy.root
    one = configure(tmp_path / "one", data_url=str(here))
    (tmp_path / "link").symlink_to(here, target_is_directory=True)
    two = configure(tmp_path / "two", data_url=str(tmp_path / "link"), source={"num_samples": 30})
    half = here / "image_features" / ".00000.abc.tmp"
    half.mkdir()
    with DataLocks(build_stages(one)) as data:
        data.write()
        for act in (
            lambda: collect_garbage([two], delete=True),
            lambda: run_all(two, pool),
            lambda: verify(data_stages(two), two.root, two.ray, pool=pool),
        ):
            with pytest.raises(ValueError, match=rf"{here}/\w+: another run is at work here: process \d+ on"):
                act()
        data.read()  # as while it trains
        assert set(statuses(one).values()) == {"fresh"}
        results, _ = run_all(configure(tmp_path / "three", data_url=str(here)), pool)
        assert all(result.skipped for result in results.values())
        with pytest.raises(ValueError, match="another run is at work here"):
            collect_garbage([two], delete=True)
    assert half.is_dir()


def test_what_another_workflow_is_at_work_on_is_left(run_copy, tmp_path, configure, capsys):
    """Its configuration was not given to the collector; but it reads the stage now."""
    short = configure(run_copy.root, last_stage="image_features")
    other = configure(tmp_path / "other", data_url=str(run_copy.root))
    (column,) = [stage for stage in build_stages(other) if stage.name == "prompt_features"]
    with DataLocks([column]) as data:
        data.read()
        assert collect_garbage([short], delete=True) == 1
        said = capsys.readouterr()
        assert "removed 0 of 1 items, 0 bytes" in said.out and "another run is at work here" in said.err
    assert collect_garbage([short], delete=True) == 0
    assert not (run_copy.root / "prompt_features").exists()
    # the number of whoever is next: it must not begin again while somebody looks at an old one
    assert [path.name for path in run_copy.root.glob(".prompt_features*")] == [".prompt_features.2.lock"]


def test_a_column_is_added_while_others_train_on_the_rest(run_copy, tmp_path, configure, pool):
    """What is made is held alone, what it is made from is shared."""
    shutil.rmtree(run_copy.root / "prompt_features")
    one = configure(tmp_path / "one", data_url=str(run_copy.root), last_stage="image_features")
    with DataLocks(build_stages(one)) as data:
        data.read()
        results, _ = run_all(run_copy, pool)
    assert [name for name, result in results.items() if not result.skipped] == ["prompt_features"]


def test_a_run_at_work_keeps_the_collector_out(run_copy):
    with locked_roots(run_copy.root), pytest.raises(ValueError, match="another run is at work"):
        collect_garbage([run_copy], delete=True)
