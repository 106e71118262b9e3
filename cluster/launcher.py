"""What every kind of cluster can do, and the one place that knows the kinds."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from cluster.config import NAME, ClusterError
from cluster.kinds.cloud import Cloud, CloudCluster
from cluster.kinds.kube.kuberay import KubeRay, KubeRayCluster
from cluster.kinds.local import Local
from cluster.kinds.nodes import LocalCluster
from cluster.kinds.slurm import Slurm, SlurmCluster
from cluster.kinds.ssh import Ssh, SshCluster
from repfusion.config import load_config, read_values

CONFIGS = Path(__file__).parent / "configs"
Kind = Literal["local", "ssh", "slurm", "kuberay", "aws", "gcp"]


class Launcher(Protocol):
    """A cluster by its configuration. What it says is printed; what went wrong is a ClusterError."""

    def up(self) -> None:
        """Starts what is not running yet; where all runs, says so."""
        ...

    def status(self) -> bool:
        """Says what runs, and returns whether that is all there should be."""
        ...

    def submit(self, workflow: Path, overrides: Sequence[str], follow: bool) -> bool:
        """Hands a workflow over; where it is complete, says so. False where a followed job failed."""
        ...

    def jobs(self) -> None:
        """Lists the jobs."""
        ...

    def logs(self, job: str, follow: bool) -> bool:
        """Prints what a job says. False where a followed job failed."""
        ...

    def cancel(self, job: str) -> None:
        """Asks a job to end, so that it writes its checkpoint, and waits for it."""
        ...

    def down(self) -> None:
        """Ends exactly what `up` started, and says what is left."""
        ...

    def render(self) -> dict[str, str]:
        """Files that others carry out (scripts, manifests), by name."""
        ...


ClusterConfig = LocalCluster | SshCluster | SlurmCluster | KubeRayCluster | CloudCluster


def class_of(kind: Any, place: Path) -> type[ClusterConfig]:
    """The class of a kind. Raises ClusterError for any other."""
    match kind:
        case "local":
            return LocalCluster
        case "ssh":
            return SshCluster
        case "slurm":
            return SlurmCluster
        case "kuberay":
            return KubeRayCluster
        case "aws" | "gcp":
            return CloudCluster
        case _:
            raise ClusterError(f"{place}: kind is {kind!r}; expected one of {', '.join(get_args(Kind))}")


def load_cluster(name: str) -> tuple[str, ClusterConfig]:
    """A cluster's own name and configuration, by that name or by the path of a YAML file.

    Raises:
        ClusterError: there is none of that name, or of that kind.
        ConfigError: a key or a value is wrong.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else CONFIGS / f"{name}.yaml"
    if not path.is_file():
        raise ClusterError(_unknown(name, path))
    if not re.fullmatch(NAME, path.stem):
        raise ClusterError(f"{path}: a cluster's name is made of small letters, digits and '-', 40 at most")
    config = load_config(class_of(read_values(path).get("kind"), path), path)
    if bad := [one for one in getattr(config, "workers", {}) if not re.fullmatch(NAME, one) or one == "head"]:
        raise ClusterError(f"{path}: workers.{bad[0]}: expected small letters, digits and '-', not 'head'")
    return path.stem, config


def _unknown(name: str, path: Path) -> str:
    known = sorted(one.stem for one in CONFIGS.glob("*.yaml"))
    near = difflib.get_close_matches(name, known, n=1)
    meant = f"did you mean CLUSTER={near[0]}? " if near else ""
    return f"no cluster {name!r}: {path} does not exist; {meant}there are {', '.join(known)}"


def launcher_of(name: str) -> Launcher:
    """The cluster that `CLUSTER=name` means."""
    own_name, config = load_cluster(name)
    match config:
        case LocalCluster():
            return Local(own_name, config)
        case SshCluster():
            return Ssh(own_name, config)
        case SlurmCluster():
            return Slurm(own_name, config)
        case KubeRayCluster():
            return KubeRay(own_name, config)
        case CloudCluster():
            return Cloud(own_name, config)
