"""A suite's configuration -> the suite: the one place that knows which suites there are."""

from typing import Annotated

from pydantic import Field

from repfusion.evaluation.suites.base import Suite
from repfusion.evaluation.suites.edits import EditsSuite, EditsSuiteConfig
from repfusion.evaluation.suites.prompts import PromptsSuite, PromptsSuiteConfig
from repfusion.evaluation.suites.published.compbench.suite import CompBenchSuite, CompBenchSuiteConfig
from repfusion.evaluation.suites.published.dpg import DPGSuite, DPGSuiteConfig
from repfusion.evaluation.suites.published.genai import GenAISuite, GenAISuiteConfig
from repfusion.evaluation.suites.published.geneval import GenEvalSuite, GenEvalSuiteConfig
from repfusion.evaluation.suites.published.geneval2 import GenEval2Suite, GenEval2SuiteConfig
from repfusion.evaluation.suites.published.oneig import OneIGSuite, OneIGSuiteConfig
from repfusion.evaluation.suites.published.wise import WISESuite, WISESuiteConfig
from repfusion.evaluation.suites.references import ReferencesSuite, ReferencesSuiteConfig
from repfusion.evaluation.suites.scenes import ScenesSuite, ScenesSuiteConfig

SuiteConfig = Annotated[
    ScenesSuiteConfig
    | EditsSuiteConfig
    | ReferencesSuiteConfig
    | PromptsSuiteConfig
    | CompBenchSuiteConfig
    | GenEvalSuiteConfig
    | GenEval2SuiteConfig
    | DPGSuiteConfig
    | WISESuiteConfig
    | GenAISuiteConfig
    | OneIGSuiteConfig,
    Field(discriminator="kind"),
]
"""A union of the suites' configurations, told apart by `kind`."""


def build_suite(config: SuiteConfig, seed: int) -> Suite:
    """The suite of a configuration; `seed` decides what it draws."""
    match config:
        case ScenesSuiteConfig():
            return ScenesSuite(config, seed)
        case EditsSuiteConfig():
            return EditsSuite(config, seed)
        case PromptsSuiteConfig():
            return PromptsSuite(config, seed)
        case ReferencesSuiteConfig():
            return ReferencesSuite(config, seed)
        case CompBenchSuiteConfig():
            return CompBenchSuite(config)
        case GenEvalSuiteConfig():
            return GenEvalSuite(config)
        case GenEval2SuiteConfig():
            return GenEval2Suite(config)
        case DPGSuiteConfig():
            return DPGSuite(config)
        case WISESuiteConfig():
            return WISESuite(config)
        case GenAISuiteConfig():
            return GenAISuite(config)
        case OneIGSuiteConfig():
            return OneIGSuite(config)
