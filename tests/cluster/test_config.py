"""Every shipped cluster parses; what is wrong with one is named."""

from pathlib import Path

import pytest
import yaml

from cluster.config import ClusterError, NodeConfig, option_words
from cluster.kinds.nodes import LocalCluster, LocalNodes
from cluster.launcher import CONFIGS, launcher_of, load_cluster
from cluster.submission import prepare
from repfusion.config import ConfigError

SHIPPED = sorted(CONFIGS.glob("*.yaml"))


def write(place: Path, name: str, **values) -> str:
    path = place / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_cluster_parses_and_has_a_launcher(path):
    name, config = load_cluster(path.stem)
    assert name == path.stem and config.kind == yaml.safe_load(path.read_text())["kind"]
    assert load_cluster(str(path)) == (name, config)
    assert type(launcher_of(path.stem)).__name__


def test_each_kind_is_shipped():
    kinds = {yaml.safe_load(path.read_text())["kind"] for path in SHIPPED}
    assert kinds == {"local", "ssh", "slurm", "kuberay", "aws", "gcp"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_typo_is_named_with_the_nearest_key(path, tmp_path):
    wrong = write(tmp_path, "wrong", **yaml.safe_load(path.read_text()), storrage={})
    with pytest.raises(ConfigError, match=r"unknown key 'storrage'; did you mean 'storage'"):
        load_cluster(wrong)


def test_an_unknown_cluster_is_told_the_known_ones():
    with pytest.raises(ClusterError, match=r"no cluster 'lokal2'.*did you mean CLUSTER=local2\?.*slurm"):
        load_cluster("lokal2")


@pytest.mark.parametrize("kind", ["locale", None])
def test_an_unknown_kind_is_told_the_known_ones(kind, tmp_path):
    values = {} if kind is None else {"kind": kind}
    with pytest.raises(ClusterError, match=f"kind is {kind!r}; expected one of local, ssh, slurm, kuberay"):
        load_cluster(write(tmp_path, "other", num_nodes=2, **values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "local", "workers": {"Big": {}}}, r"workers\.Big"),
        ({"kind": "local", "workers": {"head": {}}}, r"workers\.head"),
        ({"kind": "local", "port": 80}, r"port: .*1024"),
        ({"kind": "local", "head": {"count": 2}}, r"head\.count"),
        ({"kind": "slurm", "num_nodes": 0}, r"num_nodes"),
        ({"kind": "gcp", "region": "r", "zone": "z", "image": "i", "head": {"instance": "n"}}, r"project"),
        ({"kind": "aws", "region": "r", "zone": "z", "image": "i"}, r"head: Field required"),
        ({"kind": "kuberay", "image": "i", "workers": {"a": {"min_replicas": 3}}}, "min_replicas is 3"),
        (
            {"kind": "ssh", "folder": "/p", "head": {"host": "a"}, "workers": {"w": {"hosts": ["b", "a"]}}},
            "a: a host is one node of Ray",
        ),
    ],
)
def test_a_bad_value_is_named(values, message, tmp_path):
    with pytest.raises((ConfigError, ClusterError), match=message):
        load_cluster(write(tmp_path, "bad", **values))


def test_a_secret_in_the_environment_is_refused_and_not_shown(tmp_path):
    path = write(tmp_path, "open", kind="local", environment={"AWS_SECRET_ACCESS_KEY": "planted", "A": "1"})
    with pytest.raises(ConfigError, match="AWS_SECRET_ACCESS_KEY: the table of jobs would show it") as caught:
        load_cluster(path)
    assert "planted" not in str(caught.value)


def test_a_cluster_s_name_fits_into_names_of_folders_and_objects(tmp_path):
    with pytest.raises(ClusterError, match="small letters"):
        load_cluster(write(tmp_path, "My_Cluster", kind="local"))


def test_a_node_s_options_are_those_of_ray_start():
    node = NodeConfig(num_cpus=2, memory_gib=1.5, object_store_mib=100, resources={"disk": 1.0})
    assert option_words(node.start_options(role="ingest")) == [
        "--num-cpus=2",
        "--memory=1610612736",
        "--object-store-memory=104857600",
        "--labels=role=ingest",
        '--resources={"disk": 1.0}',
    ]
    assert NodeConfig().start_options() == {}


def test_a_local_cluster_s_nodes_are_named_by_group_and_number():
    config = LocalCluster.model_validate({"workers": {"a": {"count": 2}, "b": {"num_cpus": 3}}})
    wanted = LocalNodes("x", config).wanted
    assert list(wanted) == ["head", "a-0", "a-1", "b-0"]
    assert [node.num_cpus for _, node in wanted.values()] == [0, 1, 1, 3]


def test_storage_puts_every_workflow_and_training_in_a_folder_of_its_own(tmp_path):
    trainings = {"first": {}, "second": {"init_from": "stage:first"}}
    flow = Path(write(tmp_path, "flow", root="runs/mine", trainings=trainings))
    storage = {"root": "/shared/runs/", "data_url": "s3://b/data", "output_url": "s3://b/runs/"}
    _, cluster = load_cluster(write(tmp_path, "site", kind="local", storage=storage))
    config = prepare(cluster, flow, ()).config
    assert str(config.root) == "/shared/runs/mine" and config.data_url == "s3://b/data/mine"
    urls = {name: one.output_url for name, one in config.trainings.items()}
    assert urls == {"first": "s3://b/runs/mine/first", "second": "s3://b/runs/mine/second"}
