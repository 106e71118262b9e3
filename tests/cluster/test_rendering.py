"""What is handed to SLURM, KubeRay and the cloud launcher, judged by their own schemas and shells."""

import copy
import gzip
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError

from cluster.kinds.cloud import CloudCluster, launcher_values
from cluster.kinds.kube.kuberay import KubeRay
from cluster.kinds.kube.manifests import KubeRayCluster
from cluster.kinds.slurm import Slurm, SlurmCluster
from cluster.launcher import launcher_of, load_cluster
from cluster.submission import image_guard

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def from_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


# KubeRay


def closed(schema: Any) -> Any:
    """A schema that refuses fields it does not know, as the API server does on strict validation."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items()}
    if "properties" in found and isinstance(found.get("type"), str):
        found.setdefault("additionalProperties", False)
    if found.pop("x-kubernetes-int-or-string", False):
        found["type"] = ["integer", "string"]
        found.pop("anyOf", None)
    return found


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    """The spec of KubeRay 1.7.0's own RayJob, out of its CustomResourceDefinition (Apache License 2.0)."""
    text = gzip.decompress(Path(__file__).with_name("rayjob_1_7_0.json.gz").read_bytes())
    return closed(json.loads(text))


def problems(schema: dict[str, Any], value: Any) -> list[str]:
    return [
        f"{'/'.join(map(str, one.absolute_path))}: {one.message[:120]}"
        for one in Draft202012Validator(schema).iter_errors(value)
    ]


def cluster_schema(schema: dict[str, Any]) -> dict[str, Any]:
    return schema["properties"]["rayClusterSpec"]


def pod_schema(schema: dict[str, Any]) -> dict[str, Any]:
    head = cluster_schema(schema)["properties"]["headGroupSpec"]
    return head["properties"]["template"]["properties"]["spec"]


def kuberay(**changes: Any) -> KubeRay:
    values = yaml.safe_load((ROOT / "cluster/configs/kuberay.yaml").read_text())
    return KubeRay("kuberay", KubeRayCluster.model_validate({**values, **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"token": False, "claim": None, "secret": None, "queue": None, "evaluation": None, "mlflow": None},
        {"workers": {"gpu": {"num_gpus": 2, "node_selector": {"gpu": "h100"}, "resources": {"disk": 1.0}}}},
    ],
)
def test_kuberay_s_manifests_are_what_its_schemas_say(changes, schema):
    found = kuberay(**changes).manifests()
    assert problems(cluster_schema(schema), found["cluster"]["spec"]) == []
    assert problems(schema, found["job"]["spec"]) == []
    if "mlflow" in found:
        assert problems(pod_schema(schema), found["mlflow"]["spec"]["template"]["spec"]) == []
    if "evaluation" in found:
        template = found["evaluation"]["spec"]["jobTemplate"]["spec"]["template"]
        assert problems(pod_schema(schema), template["spec"]) == []


def test_the_schema_refuses_what_is_wrong(schema):
    good = kuberay().manifests()["cluster"]["spec"]
    for path, value in (
        (("headGroupSpec", "tmplate"), {}),
        (("authOptions", "mode"), "tokens"),
        (("workerGroupSpecs", 0, "minReplicas"), "1"),
        (("workerGroupSpecs", 1, "template", "spec", "containers", 0, "env", 0, "valu"), "x"),
    ):
        wrong = copy.deepcopy(good)
        *above, last = path
        place: Any = wrong
        for key in above:
            place = place[key]
        place[last] = value
        assert len(problems(cluster_schema(schema), wrong)) == 1, path


def pods(values: Any) -> Iterator[dict[str, Any]]:
    """Every pod's spec within a manifest."""
    if isinstance(values, dict):
        if "containers" in values:
            yield values
        values = list(values.values())
    for one in values if isinstance(values, list) else ():
        yield from pods(one)


def test_every_pod_is_unprivileged_and_has_its_secrets_by_reference():
    for name, manifest in kuberay().manifests().items():
        for pod in (found := list(pods(manifest))):
            assert pod["securityContext"]["runAsNonRoot"] is True
            for container in pod["containers"]:
                assert container["securityContext"]["allowPrivilegeEscalation"] is False
                secret = "repfusion-mlflow" if name == "mlflow" else "repfusion-secrets"
                assert container["envFrom"] == [{"secretRef": {"name": secret}}]
                assert container["resources"]["requests"] == container["resources"]["limits"]
        assert len(found) == {"cluster": 4, "job": 4}.get(name, name != "mlflow-service")


def test_groups_scale_between_their_bounds_and_wait_in_kueue():
    cluster = kuberay().manifests()["cluster"]
    assert cluster["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "repfusion"
    assert cluster["spec"]["enableInTreeAutoscaling"] is True
    bounds = [
        (g["groupName"], g["minReplicas"], g["maxReplicas"]) for g in cluster["spec"]["workerGroupSpecs"]
    ]
    assert bounds == [("ingest", 0, 16), ("encode", 0, 8), ("train", 0, 2)]
    assert cluster["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_the_evaluation_waits_for_the_one_before_it_and_goes_where_the_workflow_lies():
    cron = kuberay().manifests()["evaluation"]["spec"]
    assert cron["concurrencyPolicy"] == "Forbid"
    (container,) = cron["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    # it does not leave before the job is over: else nothing would overlap
    assert "--no-wait" not in container["command"] and "root=/data/runs/demo" in container["command"]
    token = {"secretKeyRef": {"name": "kuberay", "key": "auth_token"}}
    assert {"name": "RAY_AUTH_TOKEN", "valueFrom": token} in container["env"]


def test_the_tracking_server_is_found_by_its_service_and_shows_no_secret():
    found = kuberay().manifests()
    deployment, service = found["mlflow"], found["mlflow-service"]
    assert service["metadata"]["name"] == "kuberay-mlflow"  # the host of the shipped mlflow_uri
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == labels == deployment["spec"]["selector"]["matchLabels"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["readinessProbe"]["httpGet"] == {"path": "/health", "port": 5000}
    assert ["--app-name", "basic-auth"] == container["command"][2:4]
    assert not {"MLFLOW_BACKEND_STORE_URI", "MLFLOW_AUTH_ADMIN_PASSWORD"} & {
        one["name"] for one in container["env"]
    }


@pytest.mark.parametrize(
    ("built", "wanted", "code"), [("a1", "a1", 0), ("b2", "a1", 1), ("", "a1", 1), ("a1", "a1+changes", 1)]
)
def test_an_image_of_another_commit_ends_the_job_with_the_reason(built, wanted, code):
    line = image_guard(wanted) + "echo runs"
    done = subprocess.run(
        ["sh", "-c", line], env={"REPFUSION_COMMIT": built}, capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    reason = f"the image has commit {built or 'unknown'}, this job was submitted from {wanted}"
    assert ("runs" in done.stdout) == (code == 0) and (reason in done.stdout) == (code == 1)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="there is no kubectl")
def test_kubectl_reads_the_manifests(tmp_path):
    names = [f"{name}.yaml" for name in kuberay().manifests()]
    for name, text in kuberay().render().items():
        (tmp_path / name).write_text(text)
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump({"resources": names}))
    done = subprocess.run(
        ["kubectl", "kustomize", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    kinds = sorted(one["kind"] for one in yaml.safe_load_all(done.stdout))
    assert kinds == ["CronJob", "Deployment", "RayCluster", "RayJob", "Service"]


# the cloud launcher


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_ray_s_own_validation_takes_the_launcher_s_file(name, tmp_path):
    import ray.autoscaler._private.util as launcher

    config = load_cluster(name)[1]
    assert isinstance(config, CloudCluster)
    values = launcher_values(name, config, tmp_path / "token")
    launcher.validate_config(launcher.prepare_config(copy.deepcopy(values)))
    with pytest.raises(ValidationError, match="max_workerz"):
        launcher.validate_config(launcher.prepare_config({**copy.deepcopy(values), "max_workerz": 1}))
    assert values["max_workers"] == 10 and values["file_mounts"] == {
        "~/.ray/auth_token": str(tmp_path / "token")
    }
    assert "RAY_AUTH_MODE=token" in values["head_start_ray_commands"][1]


# SLURM


def slurm_script(**changes: Any) -> str:
    values = yaml.safe_load((ROOT / "cluster/configs/slurm.yaml").read_text())
    (text,) = Slurm("slurm", SlurmCluster.model_validate({**values, **changes})).render().values()
    return text


def test_the_script_asks_for_whole_nodes_and_to_be_warned_and_put_back():
    lines = slurm_script().splitlines()
    directives = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert lines[0] == "#!/bin/bash"
    assert {"--exclusive", "--requeue", "--signal=B:TERM@600", "--nodes=2", "--ntasks-per-node=1"} <= {
        *directives
    }
    assert {"--partition=gpu", "--gres=gpu:8", "--time=1-00:00:00", "--open-mode=append"} <= {*directives}
    assert not any("array" in one for one in directives)


@pytest.mark.parametrize(
    "changes",
    [{}, {"environment": {"NOTE": 'it\'s "two" $words'}}, {"setup": ["module() { :; }", "module load cuda"]}],
)
def test_bash_takes_the_script(changes, tmp_path):
    script = tmp_path / "job.sh"
    script.write_text(slurm_script(**changes))
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["local2", "ssh"])
def test_kinds_without_files_render_none(name):
    assert launcher_of(name).render() == {}
