"""A scheduler, ours or one of diffusers' -> the solver that samples; one that asks for more is refused."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args

from repfusion.diffusion.sampler import Solver

TAKEN: dict[str, Solver] = {
    "FlowMatchEulerDiscreteScheduler": "euler",
    "FlowMatchHeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpm",
}
"""Schedulers of diffusers by the solver that they stand for."""
MUST_BE: dict[str, Any] = {
    "use_dynamic_shifting": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "stochastic_sampling": False,
    "invert_sigmas": False,
    "shift_terminal": None,
    "use_flow_sigmas": True,
    "prediction_type": "flow_prediction",
    "solver_order": 2,
    "solver_type": "midpoint",
    "algorithm_type": "dpmsolver++",
    "thresholding": False,
    "euler_at_final": False,
    "lower_order_final": True,
    "final_sigmas_type": "zero",
}
"""Fields of theirs that decide the samples, and the one value of each that is followed."""
SHIFTS = ("shift", "flow_shift")


@dataclass(frozen=True)
class FlowScheduler:
    """How a model is sampled: the solver, and the shift of its noise levels, which is the model's own."""

    solver: Solver
    shift: float

    @property
    def config(self) -> dict[str, Any]:
        """Fields from which diffusers' schedulers (`from_config`) make the same solver."""
        name = next(name for name, solver in TAKEN.items() if solver == self.solver)
        shifts = dict.fromkeys(SHIFTS, self.shift)
        return {"_class_name": name, "solver": self.solver, **shifts, **MUST_BE}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **changes: Any) -> "FlowScheduler":
        """The scheduler of a `config`, with changes such as `solver="dpm"`. Raises ValueError on another
        solver.
        """
        fields = {**config, **changes}
        if fields["solver"] not in get_args(Solver):
            raise ValueError(f"solver {fields['solver']!r}: expected one of {', '.join(get_args(Solver))}")
        return cls(cast(Solver, fields["solver"]), float(fields["shift"]))

    def follow(self, scheduler: Any) -> "FlowScheduler":
        """What stands for another scheduler, ours or one of diffusers', at the shift of this one.

        Raises:
            ValueError: it is another kind of scheduler, or one of its fields asks for other steps or levels.
        """
        name = type(scheduler).__name__
        if isinstance(scheduler, FlowScheduler):
            solver, fields = scheduler.solver, {"shift": scheduler.shift}
        elif name in TAKEN:
            solver, fields = TAKEN[name], dict(scheduler.config)
        else:
            taken = ", ".join(TAKEN)
            raise ValueError(f"a {name} as scheduler; expected a FlowScheduler, or of diffusers {taken}")
        for key in SHIFTS:
            if key in fields and not math.isclose(fields[key], self.shift, rel_tol=1e-6):
                raise ValueError(
                    f"scheduler: {key} {fields[key]:g}, the model was trained at {self.shift:g}; make it by "
                    "from_config(pipe.scheduler.config)"
                )
        for key, value in MUST_BE.items():
            if key in fields and (fields[key] or None) != (value or None):
                raise ValueError(f"scheduler: {key} {fields[key]!r} cannot be followed; expected {value!r}")
        return FlowScheduler(solver, self.shift)
