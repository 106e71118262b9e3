"""The project's own rules: who may import what, what is explained, what is shipped."""

import ast
import os
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import yaml

from pipelines.config import WorkflowConfig
from repfusion.config import load_config
from repfusion.foundation.config import FoundationConfig
from repfusion.train import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("repfusion", "pipelines", "cluster")
"""Each imports those before it."""
SOURCES = sorted(path for package in PACKAGES for path in ROOT.glob(f"{package}/**/*.py"))
HEAVY = {
    "deepspeed": {"repfusion/training/engine.py"},
    "mlflow": {f"repfusion/tracking/{name}.py" for name in ("store", "source", "system")},
    "img2dataset": {"pipelines/sources/ingest.py"},
    "diffusers": {"repfusion/latents/vae.py", "repfusion/foundation/vae.py"},
    "peft": {"repfusion/conditioning/lora.py"},
    "av": {"repfusion/video/files.py"},
}
"""Libraries that are each imported in few places."""


def imported(path: Path) -> set[str]:
    """Top-level names of all modules a file imports, at any depth of it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_imports_point_one_way():
    for path in SOURCES:
        check_imports(str(path.relative_to(ROOT)), imported(path))


def check_imports(name: str, found: set[str]) -> None:
    if name.startswith("repfusion/"):
        assert not found & {"ray", "pipelines"}, f"{name}: repfusion runs without Ray and without pipelines"
    if not name.startswith("cluster/"):
        assert "cluster" not in found, f"{name}: nothing but cluster/ and its tests knows of clusters"
    for library, places in HEAVY.items():
        assert library not in found or name in places, f"{name}: {library} is imported in {places} alone"
    assert "__future__" not in found, f"{name}: postponed annotations hide the shapes from the type checks"


def import_graph() -> dict[str, set[str]]:
    """Modules of both packages -> the modules of ours that each imports, at any depth of it."""
    paths = {
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in SOURCES
    }

    def known(name: str) -> str:
        while name and name not in paths:
            name = name.rpartition(".")[0]
        return name

    graph: dict[str, set[str]] = {}
    for module, path in paths.items():
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        found = {known(f"{node.module}.{alias.name}") for node in nodes for alias in node.names}
        graph[module] = found - {"", module}
    return graph


def room(module: str) -> str:
    """The folder of a package that a module lies in, or the module itself at the package's top."""
    return ".".join(module.split(".")[:2])


def circles(graph: dict[str, set[str]]) -> str | None:
    """The first circle of a graph, as text."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " -> ".join(error.args[1])
    return None


def test_no_module_and_no_room_imports_in_a_circle():
    graph = import_graph()
    assert circles(graph) is None
    rooms: dict[str, set[str]] = {}
    for module, targets in graph.items():
        rooms.setdefault(room(module), set()).update({room(one) for one in targets} - {room(module)})
    assert circles(rooms) is None


LAYERS = [
    {"config", "devices", "display", "files", "images", "inputs", "layers", "locks"}
    | {"pretrained", "request", "scenes", "tars", "video", "weights"},
    {"latents", "data", "diffusion", "llm", "codes"},
    {"conditioning"},
    {"model"},
    {"runs"},
    {"training", "tracking", "lineage", "flops", "generation"},
    {"generate", "train", "export", "pipeline", "evaluation", "foundation", "decoding"}
    | {"retrieval", "dialogue"},
]
"""Rooms of the library, lowest first: a room imports its own layer and those below."""


def test_the_librarys_rooms_import_downwards():
    level = {f"repfusion.{name}": number for number, names in enumerate(LAYERS) for name in names}
    for module, targets in import_graph().items():
        if module in PACKAGES or not module.startswith("repfusion"):
            continue
        above = {one for one in targets if one != "repfusion" and level[room(one)] > level[room(module)]}
        assert not above, f"{module} imports {sorted(above)}, which lie above it"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_folder_holds_more_than_a_dozen_modules(package):
    for folder in {path.parent for path in SOURCES if path.is_relative_to(ROOT / package)}:
        modules = [path.stem for path in folder.glob("*.py") if path.stem not in ("__init__", "__main__")]
        assert len(modules) <= 12, (
            f"{folder.relative_to(ROOT)} holds {len(modules)} modules: make rooms in it"
        )


def test_there_is_one_base_of_configurations_and_one_loader():
    text = {path: path.read_text() for path in SOURCES}
    assert sum(one.count("ConfigDict(") for one in text.values()) <= 2
    assert [path.name for path, one in text.items() if "def load_config(" in one] == ["config.py"]


def test_a_public_class_has_its_name_to_itself():
    places: dict[str, list[str]] = {}
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert not {name: found for name, found in places.items() if len(found) > 1}


OWN_READERS = {"cls", "nn.Embedding", "LPIPS"}
OWN_READERS |= {"DrawingDecoder", "ImageTokenizer", "RAEDecoder", "RepresentationEncoder"}
OWN_READERS |= {"VAEDecoder", "VAEEncoder"}
"""What has a `from_pretrained` of ours (or reads nothing)."""


def test_folders_of_models_are_read_in_one_place_which_runs_no_code_of_theirs():
    """Of the libraries' own `from_pretrained` each call says so by word."""
    places = {
        "repfusion/pretrained/weights.py",
        "repfusion/pretrained/config.py",
        "repfusion/llm/tokenizer.py",
        "repfusion/latents/vae.py",
    }
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if node.func.attr != "from_pretrained" or ast.unparse(node.func.value) in OWN_READERS:
                continue
            name = str(path.relative_to(ROOT))
            assert name in places, f"{name}:{node.lineno} reads a model past repfusion/pretrained/"
            said = {ast.unparse(one) for one in node.keywords}
            assert said & {"**OWN_FILES_ALONE", "trust_remote_code=False"}, f"{name}:{node.lineno}"


SCENES = (
    "repfusion/scenes/",
    "repfusion/foundation/",
    "repfusion/evaluation/suites/scenes.py",
    "repfusion/evaluation/suites/edits.py",
    "repfusion/evaluation/suites/references.py",
    "repfusion/retrieval/recall.py",
    "repfusion/retrieval/decision.py",  # what is right, drawn or retrieved
    "pipelines/sources/scenes.py",
    "pipelines/sources/edits.py",
    "pipelines/sources/moving.py",
    "pipelines/ladder/science/",  # its rows are about scenes: captions, losses
    "pipelines/ladder/decoders/",  # measures on them
    "pipelines/ladder/worker.py",  # its validation loss
)
"""Who may know the embedded world; all others know suites."""


def test_the_embedded_world_is_known_where_it_is_drawn_and_judged_alone():
    knowing = {str(path.relative_to(ROOT)) for path in SOURCES if "from repfusion.scenes" in path.read_text()}
    assert not {name for name in knowing if not name.startswith(SCENES)}


def test_the_library_loads_without_what_it_may_not_import():
    code = (
        "import sys\n"
        "for name in ('ray', 'pipelines', 'deepspeed', 'mlflow', 'img2dataset', 'diffusers', 'peft', 'av'):\n"
        "    sys.modules[name] = None\n"
        "import repfusion.generate, repfusion.evaluation.checkpoints, repfusion.train\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


CONFIGS = sorted([*ROOT.glob("pipelines/configs/*.yaml"), *ROOT.glob("repfusion/**/*.yaml")])


def kind_of(path: Path) -> type:
    """The class of a shipped configuration, by where it lies."""
    if path.is_relative_to(ROOT / "pipelines"):
        return WorkflowConfig
    is_foundation = path.parent.name == "foundation" and path.name != "base.yaml"
    return FoundationConfig if is_foundation else TrainConfig


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_config_parses(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(kind_of(path), path)
    assert config.model_dump(mode="json") == load_config(kind_of(path), path).model_dump(mode="json")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_typo_in_a_config_is_named(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "num_stepz": 3}))
    with pytest.raises(ValueError, match="num_stepz"):
        load_config(kind_of(path), wrong)


def test_every_target_is_explained_and_help_lists_it():
    text = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", text, re.M)
    assert phony is not None
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in phony[1].split():
        assert re.search(rf"^  make {target} +\S", shown, re.M), f"'{target}' is missing from make help"
    needed = {"help", "setup", "demo", "test", "lint", "foundation", "base", "mlflow", "status", "clean"}
    assert needed <= set(phony[1].split())


def test_the_lock_pins_everything_and_names_no_host():
    lines = [
        line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and line[0] != "#"
    ]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*", line) for line in lines)
    names = {line.split("==")[0].lower() for line in lines}
    assert "torch==2.13.0" in lines
    # each of them brings another build of torch
    assert not names & {"torchvision", "torchaudio", "timm", "lpips", "triton"}


def git_files(*options: str) -> list[str]:
    command = ["git", "ls-files", "-z", *options]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name]


def test_nothing_ignored_is_shipped_and_the_weights_stay_small():
    assert git_files("--cached", "--ignored", "--exclude-standard") == []
    sizes = [(ROOT / name).stat().st_size for name in git_files() if (ROOT / name).is_file()]
    assert sum(sizes) <= 56e6


def test_shipped_text_holds_no_path_of_a_machine():
    for name in git_files():
        path = ROOT / name
        if path.suffix in {".py", ".md", ".yaml", ".toml", ".lock", ".json", ""} and path.is_file():
            text = path.read_text(errors="replace")
            assert not re.search(r"(?<![\w.])/(home|root|opt|work)/\w", text), (
                f"{name} names a path of a machine"
            )


DANGLING = re.compile(r"(Of|Its|Those|By|As|The same|From|In|To|For|With)\b")
"""How a docstring begins that names no subject."""


def test_docstrings_name_their_subject():
    found = []
    for path in [*SOURCES, *ROOT.glob("benchmarks/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            for part in node.body if isinstance(getattr(node, "body", None), list) else ():
                text = getattr(getattr(part, "value", None), "value", None)
                if isinstance(part, ast.Expr) and isinstance(text, str) and DANGLING.match(text):
                    found.append(f"{path.relative_to(ROOT)}:{part.lineno}: {text.splitlines()[0]}")
    assert not found, "\n".join(found)


DECODING = re.compile(r"\bImage\.open\(|\bimdecode\(|\bimread\(|\bexif_transpose\(")
DECODER = "repfusion/images/decode.py"


def test_images_are_decoded_in_one_place():
    """Elsewhere orientation, transparency, 16 bits and limits would be forgotten."""
    opening = {str(path.relative_to(ROOT)) for path in SOURCES if DECODING.search(path.read_text())}
    assert opening == {DECODER}


UNCHECKED = {"data", "evaluation", "generate.py", "request.py", "scenes"}
"""What holds shapes that the tests do not check: they would take longer than what they check."""


def test_shapes_are_checked_wherever_they_are_written(pytestconfig: pytest.Config):
    """A new room of tensors has to be named where pytest is set up."""
    packages = pytestconfig.getoption("--jaxtyping-packages").split(",")
    checked = {re.sub("^repfusion.", "", name) for name in packages} - {"beartype.beartype"}
    shaped = [path.relative_to(ROOT) for path in SOURCES if "jaxtyping" in imported(path)]
    rooms = {path.parts[1] for path in shaped if path.parts[0] == "repfusion"}
    assert {room.removesuffix(".py") for room in rooms - UNCHECKED} == checked
    assert rooms >= UNCHECKED and len(shaped) > 40


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process")
def test_a_files_tests_go_to_one_process(request: pytest.FixtureRequest):
    """xdist knows a group by the end of the test's name."""
    assert request.node.nodeid.endswith("@test_frame.py")
