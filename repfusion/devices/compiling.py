"""torch.compile with a way back: what cannot be compiled runs as it is, which is said with what it costs, and
what was compiled is counted.
"""

import logging
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

log = logging.getLogger(__name__)


def missing_for(device_type: str) -> str | None:
    """What compiling for a device needs and this machine lacks, and how to get it; None where all is there.

    Inductor writes C++ for a CPU, and for a GPU Triton, whose launcher is C: both include Python.h.
    """
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not header.is_file():
        return f"no {header} (Debian: python3-dev)"
    if device_type == "cuda":
        from torch.utils._triton import has_triton_package

        if not has_triton_package():
            return "no triton (pip install triton, of the release that torch names)"
        return None if any(map(shutil.which, ("cc", "gcc", "clang"))) else "no C compiler (Debian: gcc)"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "no C++ compiler (Debian: g++)"
    return None


class Compilation:
    """Functions that are compiled together, or else not at all: where one cannot be, all of them run as they
    are.

    Args:
        what: is compiled, for messages.
        cost: what running it as it is costs.
        dynamic: as torch.compile's; None compiles a second size for all further ones.
        options: Inductor's, such as `{"triton.cudagraphs": True}`.
    """

    def __init__(
        self, what: str, cost: str, dynamic: bool | None = None, options: dict[str, Any] | None = None
    ):
        self.what, self.cost, self.dynamic, self.options = what, cost, dynamic, options
        self.num_graphs = 0
        """Graphs that were compiled so far, each for other shapes, dtypes or Python values."""
        self.failure: str | None = None
        """Why nothing is compiled any more."""
        # one object, since dynamo tells backends apart by identity
        self._backend = self._compile_graph

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, compiled at its first call for each kind of arguments."""
        compiled = torch.compile(function, backend=self._backend, dynamic=self.dynamic)

        def compiled_or_plain(*args: Any, **kwargs: Any) -> Any:
            if self.failure is None:
                try:
                    return compiled(*args, **kwargs)
                # raised while it compiles: nothing has run yet
                except torch._dynamo.exc.TorchDynamoException as error:
                    self.give_up(f"{type(error).__name__}: {error}")
            return function(*args, **kwargs)

        return compiled_or_plain

    def module(self, module: nn.Module) -> None:
        """Compiles a module's `forward`, in place. Hooks stay outside: they run as they did."""
        module.forward = self(module.forward)

    def give_up(self, reason: str) -> None:
        """Runs everything as it is from now on, and says so."""
        if self.failure is None:
            self.failure = reason
            shown = reason if len(reason) < 600 else f"{reason[:600]}..."
            log.warning("%s cannot be compiled and runs as it is: %s. %s", self.what, shown, self.cost)

    def _compile_graph(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        from torch._inductor.compile_fx import compile_fx

        self.num_graphs += 1
        return compile_fx(graph, inputs, config_patches=self.options)


def compilation_for(device_type: str, what: str, cost: str, **options: Any) -> Compilation:
    """A compilation for a device, given up from the start, with a warning, where this machine cannot."""
    made = Compilation(what, cost, **options)
    if (missing := missing_for(device_type)) is not None:
        made.give_up(missing)
    return made


class RecompilationWatch:
    """Counts what is compiled after a warm-up: each time holds a step up, as shapes do that never settle.

    Args:
        compilation: of the training; None where nothing is compiled.
        warmup: steps in which compiling is expected: the first one, and the first of other sizes.
    """

    def __init__(self, compilation: Compilation | None, warmup: int = 10):
        self.compilation, self.warmup = compilation, warmup
        self.num_steps = self.settled = self.said = 0

    def step(self) -> None:
        """One step is over."""
        self.num_steps += 1
        if self.num_steps == self.warmup:
            self.settled = self.said = self.num_graphs

    @property
    def num_graphs(self) -> int:
        """Graphs compiled so far."""
        return 0 if self.compilation is None else self.compilation.num_graphs

    @property
    def num_recompilations(self) -> int:
        """Graphs compiled since the warm-up."""
        return self.num_graphs - self.settled if self.num_steps >= self.warmup else 0

    def report(self) -> None:
        """Warns of what was compiled since the last call, after the warm-up."""
        if (new := self.settled + self.num_recompilations - self.said) > 0 and self.num_steps >= self.warmup:
            self.said += new
            log.warning(
                "%d graphs were compiled in the last steps, after the first %d: something changes shape or "
                "value at every step; TORCH_LOGS=recompiles says what",
                new,
                self.warmup,
            )
