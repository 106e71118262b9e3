"""The files of a training behind an fsspec URL, `output_url`: whole checkpoints, for a machine that has not
seen the training.

URL/  config.json  train.json  mlflow_run.json
      checkpoints/step_00000500/  the files of a checkpoint, and `complete.json`, put last and removed first
      checkpoints/step_00000500.damaged/

A store of objects has no rename, so `complete.json` alone says that a checkpoint is there.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from repfusion.files import atomic_path, is_store_error
from repfusion.runs.checkpoint import expired
from repfusion.runs.folder import (
    COMPLETE,
    LOOP,
    RESUME,
    STEP_FOLDER,
    RunFolder,
    checkpoint_folder,
    is_pinned,
    step_of,
)


@dataclass(frozen=True)
class RemoteRun:
    """What `output_url` holds.

    Every method raises OSError, naming the URL, where the store cannot be reached or refuses.
    """

    url: str

    @cached_property
    def _files(self) -> Any:
        import fsspec

        # a listing that was kept from before would hide what other machines wrote
        return fsspec.filesystem(self.url.partition("://")[0], use_listings_cache=False)

    def _at(self, *names: str) -> str:
        return "/".join([self.url.rstrip("/"), *names])

    def _of(self, step: int, *names: str) -> str:
        return self._at("checkpoints", checkpoint_folder(Path(), step).name, *names)

    def steps(self, resumable: bool = False) -> list[int]:
        """Steps of the complete checkpoints, in order; with `resumable`, those that still hold the state of
        the optimizer.
        """
        with _said(self.url):
            paths = self._files.find(self._at("checkpoints"))

        def holding(file: str) -> set[str]:
            found = (path.removesuffix(f"/{file}") for path in paths if path.endswith(f"/{file}"))
            return {path.rpartition("/")[2] for path in found}

        names = holding(COMPLETE) & holding(f"{RESUME}/{LOOP}") if resumable else holding(COMPLETE)
        return sorted(step_of(Path(name)) for name in names if STEP_FOLDER.fullmatch(name))

    def complete(self, step: int) -> bytes | None:
        """A checkpoint's `complete.json`; None where it has none."""
        with _said(self.url), suppress(FileNotFoundError):
            return self._files.cat_file(self._of(step, COMPLETE))

    def begin(self, step: int) -> None:
        """Makes room for a checkpoint: what lies there is none any more."""
        self._remove(step)

    def put(self, step: int, folder: Path, names: Iterable[str]) -> None:
        """Uploads files of the local checkpoint `folder`."""
        with _said(self.url):
            for name in names:
                self._files.put_file(str(folder / name), self._of(step, *name.split("/")))

    def fetch(self, step: int, folder: Path, name: str) -> None:
        """Downloads a file of a checkpoint into a local folder."""
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with _said(self.url):
            self._files.get_file(self._of(step, *name.split("/")), str(folder / name))

    def put_notes(self, run: RunFolder) -> None:
        """Uploads what the training says of itself."""
        with _said(self.url):
            for path in (run.config, run.tracked, run.summary):
                if path.is_file():
                    self._files.pipe_file(self._at(path.name), path.read_bytes())

    def fetch_notes(self, run: RunFolder) -> None:
        """Downloads what of that is not here yet."""
        for path in (run.tracked, run.summary):
            if path.exists():
                continue
            with _said(self.url), suppress(FileNotFoundError):
                data = self._files.cat_file(self._at(path.name))
                with atomic_path(path) as temporary:
                    temporary.write_bytes(data)

    def set_aside(self, step: int) -> str:
        """Gives a checkpoint the name NAME.damaged, or NAME.damaged-2 and so on, and returns it."""
        name, number = f"{checkpoint_folder(Path(), step).name}.damaged", 1
        target = name
        with _said(self.url):
            while self._files.exists(self._at("checkpoints", target)):
                number += 1
                target = f"{name}-{number}"
            self._files.copy(self._of(step), self._at("checkpoints", target), recursive=True)
        self._remove(step)
        return target

    def prune(
        self, root: Path, keep_resume: int, keep_last: int | None = None, keep_every_steps: int | None = None
    ) -> None:
        """Keeps what `runs.checkpoint.prune` would keep; `root` holds the local checkpoints, whose pins count
        here too.
        """
        for step in expired(self.steps(), keep_last, keep_every_steps):
            if not is_pinned(checkpoint_folder(root, step)):
                self._remove(step)
        for step in self.steps(resumable=True)[:-keep_resume]:
            with _said(self.url):
                self._files.rm(self._of(step, RESUME), recursive=True)

    def _remove(self, step: int) -> None:
        with _said(self.url):
            for path in (self._of(step, COMPLETE), self._of(step)):
                if self._files.exists(path):
                    self._files.rm(path, recursive=True)


@contextmanager
def _said(url: str) -> Iterator[None]:
    """Makes one class of a store's errors, which have none in common, and names the URL."""
    try:
        yield
    except Exception as error:
        if not (isinstance(error, OSError) or is_store_error(error)):
            raise
        raise OSError(
            f"{url}: {type(error).__name__}: {error}; see that the bucket exists, that the credentials in "
            "the environment may read and write it, and run again"
        ) from error
