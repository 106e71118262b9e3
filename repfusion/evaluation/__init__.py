"""A checkpoint -> images of held-out prompts -> scores per task, checked by the exact detector."""

from repfusion.evaluation.checkpoints import (
    Evaluation,
    EvaluationConfig,
    evaluate_checkpoint,
    read_evaluation,
)
from repfusion.evaluation.gallery import gallery
from repfusion.evaluation.scores import Scores, score_images

__all__ = [
    "Evaluation",
    "EvaluationConfig",
    "Scores",
    "evaluate_checkpoint",
    "gallery",
    "read_evaluation",
    "score_images",
]
