"""What a tokenizer is trained on, which branches it has and how long it takes."""

from pydantic import Field

from repfusion.codes.network import BranchesConfig
from repfusion.decoding.config import RebuildingConfig, RebuildingRecipe


class TokenizerRecipe(RebuildingRecipe):
    """How a tokenizer is trained, whatever it is trained on. In ILLUME+ adversarial training begins at step
    20,000, at half the adaptive weight.
    """

    branches: BranchesConfig = BranchesConfig()
    """The branches, of which one may be left out, and their sizes."""
    semantic_weight: float = Field(default=1.0, ge=0)
    """Weight of the features' cosine distance beside the pixels' L1."""
    codebook_weight: float = Field(default=1.0, ge=0)
    """Weight of each codebook's loss."""


class TokenizerTrainingConfig(TokenizerRecipe, RebuildingConfig):
    """A tokenizer's training."""
