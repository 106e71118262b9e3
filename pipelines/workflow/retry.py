"""Samples that failed for a reason that may have passed, such as a timeout: tried again, those alone."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from pipelines.dag import ShardStage, Stage
from pipelines.runtime.pool import ActorPool
from pipelines.runtime.session import RayConfig
from pipelines.sources.web.downloads import is_transient
from pipelines.workflow.inspection import states
from pipelines.workflow.run import run


def retry(
    stages: Sequence[Stage],
    root: Path,
    ray: RayConfig,
    reasons: Sequence[str] | None = None,
    say: Callable[[str], None] = print,
    pool: ActorPool | None = None,
) -> int:
    """Downloads again what `ingest` dropped for one of the `reasons` (None: the transient ones), and brings
    the data stages up to date: only the shards that gained samples change. Returns how many samples were
    regained.

    Raises:
        ValueError: where ingest is not complete, or another run holds the root.
    """
    data = [stage for stage in stages if isinstance(stage, ShardStage)]
    output = states(data)["ingest"].output
    if output is None:
        raise ValueError(
            "ingest is not complete; 'run' goes on where it stopped, then there is something to retry"
        )
    redo: dict[str, dict[str, list[str]]] = {}
    before: Counter[str] = Counter()
    for name, text in zip(output.shards.names, output.shards.column("drops"), strict=True):
        drops: dict[str, int] = json.loads(text)
        chosen = [reason for reason in drops if (reason in reasons if reasons else is_transient(reason))]
        if chosen:
            redo[name] = {"retry": chosen}
            before.update({reason: drops[reason] for reason in chosen})
    if not redo:
        listed = ", ".join(f"{reason} {number}" for reason, number in output.manifest.drops.items())
        say(f"nothing to retry; ingest dropped: {listed or 'nothing'}")
        return 0
    total = ", ".join(f"{reason} {number}" for reason, number in sorted(before.items()))
    say(f"retrying {sum(before.values())} samples in {len(redo)} shards: {total}")
    results = run(data, root, ray, say, pool, redo={"ingest": redo})
    after = next(result.manifest for result in results if result.name == "ingest")
    regained = after.samples - output.manifest.samples
    say(f"regained {regained} of {sum(before.values())} samples")
    return regained
