"""Small folders of the models that see, a family each, and what reads them."""

from pathlib import Path

import pytest
from tiny_vlms import SAVES, Seeing, class_of, processor_of

from repfusion.llm.load import load_language_model


@pytest.fixture(scope="session")
def vlm_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of every family that sees."""
    root = tmp_path_factory.mktemp("vlms")
    for family, save in SAVES.items():
        save(root / family)
    return {family: root / family for family in SAVES}


@pytest.fixture(scope="session", params=SAVES)
def seeing(request: pytest.FixtureRequest, vlm_folders: dict[str, Path]) -> Seeing:
    folder = vlm_folders[request.param]
    llm = load_language_model(folder, with_head=True, with_eyes=True)
    whole = class_of(request.param).from_pretrained(folder).eval()
    return Seeing(request.param, folder, llm, whole, processor_of(request.param, folder))
