"""A tiny tokenizer, and columns whose codes are its."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny_codes import make_codes, write_tokenizer
from tiny_training import make_columns, tiny_train

from repfusion.codes.column import CODES
from repfusion.config import validate
from repfusion.data.config import DataConfig
from repfusion.train import TrainConfig

NETWORK = {"hidden_size": 32, "depth": 2, "num_heads": 2}


@dataclass(frozen=True)
class CodeWorld:
    """Folders of weights and of columns."""

    foundation: Path
    columns: Path
    tokenizer: Path

    @property
    def unidisc(self) -> dict[str, Any]:
        """A small model's section."""
        text = self.foundation / "llava"
        fields = {"kind": "unidisc", "tokenizer": self.tokenizer, "text": text, "text_length": 6}
        return {**fields, "network": NETWORK, "image_share": 0.4, "caption_share": 0.2}

    def training(self, out: Path, model: dict[str, Any], **changes: Any) -> TrainConfig:
        """Four steps of eight samples."""
        data = DataConfig(images=self.columns / "curate", columns={CODES: self.columns / CODES})
        plain = tiny_train(self.foundation, self.columns, out, data=data, **changes)
        return validate(TrainConfig, {**plain.model_dump(), "model": model})


@pytest.fixture(scope="module")
def world(foundation: Path, tmp_path_factory: pytest.TempPathFactory) -> CodeWorld:
    root = tmp_path_factory.mktemp("codes")
    tokenizer = write_tokenizer(root / "tokenizer", foundation / "vision_tower")
    columns = make_columns(root / "data")
    make_codes(columns / CODES, columns, tokenizer)
    return CodeWorld(foundation, columns, tokenizer)
