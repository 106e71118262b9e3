"""A plan by its name."""

from typing import Literal

from pipelines.ladder.plans.base import Plan
from pipelines.ladder.plans.related import RELATED
from pipelines.ladder.plans.repfusion import REPFUSION
from pipelines.ladder.plans.unifusion import UNIFUSION

PlanName = Literal["repfusion", "unifusion", "related"]


def plan_of(name: PlanName) -> Plan:
    match name:
        case "repfusion":
            return REPFUSION
        case "unifusion":
            return UNIFUSION
        case "related":
            return RELATED
