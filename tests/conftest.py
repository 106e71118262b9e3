"""What every test shares: one thread, no telemetry, no look at the network."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

for name, value in {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "WANDB_MODE": "disabled",
}.items():
    os.environ.setdefault(name, value)


LONGEST = (
    "repfusion/training/test_resume.py",
    "pipelines/stages/test_train.py",
    "pipelines/workflow/test_data_workflow.py",
    "repfusion/training/test_train.py",
    "repfusion/conditioning/test_methods.py",
    "extending/test_suite.py",
    "repfusion/flops/test_flops.py",
    "fuzz/test_fuzz.py",
)
"""Files that take longest, in the order in which `make test` begins them."""
MOVING_DATA = {"pipelines", "runtime", "shards", "sources", "workflow"}
"""Folders of the tests on Ray that move data; the others train and evaluate."""


@pytest.hookimpl(tryfirst=True)  # xdist looks for the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest goes first: pytest drops a file that is named beside its folder, so that the order
    of its arguments says nothing. A file's tests go to one process, those on Ray to one of two: each starts a
    Ray of its own, which takes eight seconds and does not rest when it has nothing to do.
    """
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(LONGEST)))
    on_ray = {item.path for item in items if item.get_closest_marker("ray")}
    for item in items:
        group = str(item.path.relative_to(Path(__file__).parent))
        if item.path in on_ray:
            group = "data on Ray" if item.path.parent.name in MOVING_DATA else "trainings on Ray"
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(autouse=True)
def process_as_others_find_it() -> Iterator[None]:
    """Sums differ in the last bits by the number of threads, which an engine sets, and by who multiplies:
    under ZeRO-3 DeepSpeed puts a function of its own in the place of torch's for the rest of the process. A
    task of Ray goes to the directory of its driver, also where a test calls it. MLflow's databases are made
    once.
    """
    import torch
    from quick_stores import make_stores_quick

    make_stores_quick()
    linear, directory = torch.nn.functional.linear, Path.cwd()
    torch.set_num_threads(1)
    yield
    torch.nn.functional.linear = linear
    os.chdir(directory)


@pytest.fixture(scope="module", autouse=True)
def modules_begin_clean() -> None:
    """The garbage collector walks over what a module's own tests make, and not each time over all that was
    imported before: half a second in a process that holds torch, Ray and MLflow.
    """
    gc.collect()
    gc.freeze()
