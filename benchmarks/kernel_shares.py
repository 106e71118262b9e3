"""A torch profile of some steps -> where their time went, by group of kernels, as markdown."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

GROUPS = (
    ("communication", r"nccl|gloo|all_?reduce|all_?gather|reduce_?scatter|c10d"),
    ("norm, elementwise", r"^triton_(?!mm|tem)"),
    ("optimizer", r"multi_tensor_apply|fused_adam|_foreach|lerp"),
    ("attention", r"flash|fmha|attention|sdpa|softmax"),
    (
        "matmul",
        r"gemm|cutlass|nvjet|cublas|xmma|wgmma|triton_(mm|tem)|aten::(mm|bmm|addmm|matmul|linear)\b|mkldnn",
    ),
    ("copies", r"memcpy|memset|copy|CatArray|aten::(cat|to|clone|contiguous)\b|gather|scatter|index"),
)
"""Group -> pattern of a kernel's name, or of an operator's where there is no GPU; the first match counts."""
OTHER, IDLE = "norm, elementwise", "idle"


def group_of(name: str) -> str:
    return next((group for group, pattern in GROUPS if re.search(pattern, name, re.IGNORECASE)), OTHER)


def busy(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


@dataclass(frozen=True)
class Shares:
    groups: dict[str, float]
    """Group -> fraction of the profiled time. Kernels of two streams may overlap: the sum may exceed 1."""
    kernels: list[tuple[str, float, int]]
    """Name, fraction and calls a step, the longest first."""
    step_sec: float
    """Under the profiler, which makes it longer."""

    def markdown(self, num_kernels: int = 20) -> str:
        lines = [f"step under the profiler: {self.step_sec * 1e3:.1f} ms", ""]
        lines += ["| group | share | ms a step |", "|---|---|---|"]
        ordered = sorted(self.groups.items(), key=lambda item: -item[1])
        lines += [f"| {g} | {s:.1%} | {s * self.step_sec * 1e3:.1f} |" for g, s in ordered]
        lines += ["", "| kernel | group | share | ms a step | calls a step |", "|---|---|---|---|---|"]
        for name, share, calls in self.kernels[:num_kernels]:
            shown, spent = re.sub(r"[|`]", " ", name)[:90], share * self.step_sec * 1e3
            lines.append(f"| `{shown}` | {group_of(name)} | {share:.1%} | {spent:.2f} | {calls} |")
        return "\n".join(lines)


def kernel_shares(step: Callable[[], None], num_steps: int = 3) -> Shares:
    """Profiles `num_steps` calls: a GPU's kernels, or the CPU's operators by the time spent in themselves."""
    is_cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    if is_cuda:
        torch.cuda.synchronize()
    with profile(activities=activities) as prof, torch.profiler.record_function("profiled steps"):
        for _ in range(num_steps):
            step()
        if is_cuda:
            torch.cuda.synchronize()
    events = [event for event in prof.events() if not event.is_user_annotation]
    whole = next(e for e in prof.events() if e.name == "profiled steps" and e.device_type == DeviceType.CPU)
    span = whole.time_range.elapsed_us()
    times: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    if is_cuda:
        events = [event for event in events if event.device_type == DeviceType.CUDA]
        used = busy((event.time_range.start, event.time_range.end) for event in events)
    else:
        events = [event for event in events if event.name != whole.name]
        used = sum(event.self_cpu_time_total for event in events)
    for event in events:
        times[event.name] += event.time_range.elapsed_us() if is_cuda else event.self_cpu_time_total
        calls[event.name] += 1
    groups: dict[str, float] = defaultdict(float, {IDLE: max(0.0, 1 - used / span)})
    for name, spent in times.items():
        groups[group_of(name)] += spent / span
    longest = sorted(times, key=lambda name: -times[name])
    kernels = [(name, times[name] / span, calls[name] // num_steps) for name in longest]
    return Shares(dict(groups), kernels, span / num_steps / 1e6)
