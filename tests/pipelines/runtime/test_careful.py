"""A sample that kills or stalls its process is a counted drop, and the others of its shard stay."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.runtime.careful import Careful, KilledError, guarded
from pipelines.runtime.pool import ActorPool, ActorsConfig, run_shards
from pipelines.shards.storage import Folder
from pipelines.sources import folder as folder_source
from pipelines.sources.folder import FolderConfig, FolderWorker
from pipelines.sources.ingest import IngestConfig
from pipelines.sources.raw_samples import BadEntry, SampleMaker
from pipelines.stages.judge import judge


def obey(word: str) -> tuple[str, int]:
    match word.split():
        case ["die"]:
            os.kill(os.getpid(), signal.SIGSEGV)
        case ["exit"]:
            os._exit(3)
        case ["stall"]:
            time.sleep(60)
        case ["die", "once", flag] if not os.path.exists(flag):
            open(flag, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        case ["refuse"]:
            raise BadEntry("reason", "detail")
        case ["print"]:
            print("what libraries print is no answer")
    return word, os.getpid()


def test_what_a_call_in_another_process_gives_raises_or_does_to_it(tmp_path):
    with Careful(partial(partial, obey), timeout_sec=1.0) as careful:
        word, first = careful("print")
        assert word == "print" and first != os.getpid() and careful("a") == ("a", first)
        with pytest.raises(BadEntry) as refused:
            careful("refuse")
        assert (refused.value.reason, refused.value.detail) == ("reason", "detail")
        with pytest.raises(KilledError, match="SIGSEGV"):
            careful("die")
        with pytest.raises(KilledError, match="status 3"):
            careful("exit")
        with pytest.raises(KilledError, match="longer than 1 s"):
            careful("stall")
        assert careful(f"die once {tmp_path / 'flag'}")[0].startswith("die once"), "one death blames nobody"
        with ThreadPoolExecutor(4) as threads:
            words = [str(number) for number in range(40)]
            assert [word for word, _ in threads.map(careful, words)] == words
        pid = careful("last")[1]
    assert not Path(f"/proc/{pid}").exists()


def test_the_child_does_not_outlive_its_parent():
    script = (
        "import os, sys, time\n"
        "from functools import partial\n"
        "from pipelines.runtime.careful import Careful\n"
        "if __name__ == '__main__':\n"
        "    careful = Careful(partial(partial, eval), 60)\n"
        "    print(careful('__import__(\"os\").getpid()'), flush=True)\n"
        "    careful('__import__(\"time\").sleep(60)')\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()


def test_nothing_is_started_where_no_care_is_asked_for():
    with guarded(obey, partial(partial, obey), None) as same:
        assert same is obey


def test_a_judge_in_another_process_says_the_same():
    from pipelines.stages.curate import CurateConfig

    stream = io.BytesIO()
    Image.new("RGB", (8, 9), "red").save(stream, "PNG")
    config = CurateConfig(duplicates="near")
    with Careful(partial(partial, judge, config=config), 30) as careful:
        for members in ({"png": stream.getvalue(), "txt": b"x"}, {"png": b"junk", "txt": b"x"}, {}):
            assert careful(members) == judge(members, config)


class PoisonedMaker(SampleMaker):
    """Obeys captions."""

    def __call__(
        self,
        key: str,
        image: bytes | None,
        caption: str | None,
        metadata: dict[str, Any],
        sources: Sequence[bytes | None] = (),
    ) -> dict[str, bytes]:
        match (caption or "").split():
            case ["die"]:
                os.kill(os.getpid(), signal.SIGSEGV)
            case ["die", "once", flag] if not os.path.exists(flag):
                open(flag, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(key, image, caption, metadata, sources)


class PoisonedFolderWorker(FolderWorker):
    def __init__(self, folder: Folder, config: FolderConfig, ingest: IngestConfig):
        super().__init__(folder, config, ingest)
        self._make = PoisonedMaker(ingest)


def picture(index: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (20, 30), (index, 7, 9)).save(stream, "PNG")
    return stream.getvalue()


def captions(tmp_path: Path, number: int) -> list[str]:
    words = [f"picture {index}" for index in range(number)]
    words[3], words[12] = "die", f"die once {tmp_path / 'flag'}"
    return words


@pytest.mark.slow
@pytest.mark.ray
def test_samples_that_kill_their_actor_are_counted_and_the_others_stay(tmp_path: Path, pool: ActorPool):
    (tmp_path / "in").mkdir()
    for index, caption in enumerate(captions(tmp_path, 20)):
        (tmp_path / "in" / f"{index:02d}.png").write_bytes(picture(index))
        (tmp_path / "in" / f"{index:02d}.txt").write_text(caption)
    config, ingest = FolderConfig(path=str(tmp_path / "in"), shard_size=15), IngestConfig(image_size=16)
    actors = ActorsConfig(num_actors=2, backoff_sec=0.1)
    folder = Folder.at(tmp_path / "out")
    arguments = {"folder": folder, "config": config, "ingest": ingest}
    jobs = folder_source.jobs(config)
    made = run_shards(pool, "ingest", PoisonedFolderWorker, arguments, jobs, actors)
    assert [(made[name].samples, made[name].drops) for name in ("00000", "00001")] == [
        (14, {"killed_its_process": 1}),
        (5, {}),
    ]
    rows = pq.read_table(folder.path / "00000.drops.parquet").to_pylist()
    assert [(row["key"], row["detail"]) for row in rows] == [
        ("000000003", "03.png: its process was ended by SIGSEGV")
    ]
