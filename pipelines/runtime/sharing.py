"""The cluster's processors -> actors of several stages at a time: none holds what another has work for."""

from collections.abc import Mapping, Sequence

from pipelines.runtime.pool import ShardRun

WORTH_SHARDS = 8
"""Shards that have to wait before a stage takes over an actor that will be wanted again where it is: the
models of another stage are loaded in it.
"""


def share_out(runs: Sequence[ShardRun], resources: Mapping[str, float]) -> None:
    """Starts actors for shards that wait, those of the last stages first, as far as there is room; one for
    every GPU at once, so that models are loaded when the first shards come. What those need is left free.

    Where there is no room, an idle actor of another stage is given up for it: of an earlier one that has
    nothing to do, or one of several; of a later one that has nothing to do.

    Args:
        runs: the stages at work, in their order.
        resources: CPUs and GPUs of the whole cluster, by Ray's names.
    """
    for run in reversed(runs):
        while len(run.slots) < _gpu_share(run, runs) and _fits(run, runs, resources):
            run.start_actor()
    for run in reversed(runs):
        while run.wants_actor and _makes_room(run, runs, resources):
            run.start_actor()


def _gpu_share(run: ShardRun, runs: Sequence[ShardRun]) -> int:
    """Actors that a stage on GPUs has without any shard that waits; 0 of others."""
    if not run.actors.num_gpus:
        return 0
    return max(1, run.most_actors // sum(bool(one.actors.num_gpus) for one in runs))


def _fits(run: ShardRun, runs: Sequence[ShardRun], resources: Mapping[str, float]) -> bool:
    num_actors = {id(one): max(len(one.slots), _gpu_share(one, runs)) for one in runs}
    num_actors[id(run)] = len(run.slots) + 1
    cpus = sum(num_actors[id(one)] * one.actors.num_cpus for one in runs)
    gpus = sum(len(one.slots) * one.actors.num_gpus for one in runs) + run.actors.num_gpus
    return cpus <= resources.get("CPU", 0) and (not run.actors.num_gpus or gpus <= resources.get("GPU", 0))


def _makes_room(run: ShardRun, runs: Sequence[ShardRun], resources: Mapping[str, float]) -> bool:
    while not _fits(run, runs, resources):
        if not any(_may_take(run, one, runs) and one.release_idle() for one in runs if one is not run):
            return False
    return True


def _may_take(run: ShardRun, other: ShardRun, runs: Sequence[ShardRun]) -> bool:
    """Whether an idle actor of another stage is of more use in this one."""
    is_starving, is_one_of_several = not run.slots, len(other.slots) > 1
    is_worth = run.num_waiting >= WORTH_SHARDS or not any(one.num_busy for one in runs)
    if runs.index(other) < runs.index(run):
        return not other.num_waiting or (is_one_of_several and (is_starving or is_worth))
    return is_worth and (not other.num_waiting or (is_one_of_several and is_starving))
