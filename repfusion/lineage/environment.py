"""What a run was made with: the commit, the lock file's digest, the versions, the machine."""

import platform
import re
import socket
import subprocess
from importlib import metadata
from pathlib import Path

from repfusion.files import file_sha256

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("torch", "deepspeed", "transformers", "mlflow", "ray", "numpy", "webdataset")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def git_commit() -> str | None:
    """Commit of this code; None where it lies in no checkout."""
    return _git("rev-parse", "HEAD") or None


def has_local_changes() -> bool | None:
    """Whether tracked files differ from the commit; None where there is none."""
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return None if changes is None else changes != ""


def lock_digest() -> str | None:
    """sha256 of `requirements.lock`; None where the package was installed without it."""
    path = ROOT / "requirements.lock"
    return file_sha256(path) if path.exists() else None


def versions() -> dict[str, str]:
    """Python and the libraries that decide what a training computes, as installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def node_name() -> str:
    """This machine's name, in the characters that a metric's name may have."""
    return re.sub(r"[^\w.-]", "_", socket.gethostname(), flags=re.ASCII)
