"""A suite's configuration -> the suite: the one place that knows which suites there are."""

from repfusion.evaluation.suites.base import Suite
from repfusion.evaluation.suites.scenes import ScenesSuite, ScenesSuiteConfig

SuiteConfig = ScenesSuiteConfig
"""A union of the suites' configurations, told apart by `kind`."""


def build_suite(config: SuiteConfig, seed: int) -> Suite:
    """The suite of a configuration; `seed` decides what it draws."""
    match config:
        case ScenesSuiteConfig():
            return ScenesSuite(config, seed)
