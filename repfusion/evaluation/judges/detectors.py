"""A folder -> a detector: the one match over families."""

from pathlib import Path

from repfusion.evaluation.judges.detections import Detector
from repfusion.evaluation.judges.folders import model_type_of
from repfusion.evaluation.judges.vocabulary import WHAT


def load_detector(folder: Path, device: str) -> Detector:
    """The detector of a folder written by save_pretrained, in float32.

    Raises:
        ValueError: the folder is missing, of no known family, or its weights do not fit.
    """
    match model_type_of(folder, WHAT):
        case "mask2former":
            from repfusion.evaluation.judges.mask2former import Mask2FormerDetector as Family
        case "owlv2":
            from repfusion.evaluation.judges.asked_detectors import Owlv2Detector as Family
        case "grounding-dino":
            from repfusion.evaluation.judges.asked_detectors import GroundingDinoDetector as Family
        case other:
            raise ValueError(
                f"{WHAT} folder {folder}: model_type {other!r}; expected 'mask2former', 'owlv2' or "
                "'grounding-dino'"
            )
    return Family(folder, device)
