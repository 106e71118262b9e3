"""What each command of `python -m pipelines` does (arguments.py has their options), and its exit status."""

import math
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from pipelines.arguments import parse_arguments, program
from pipelines.build import build_stages, data_stages, kept_stages, probe_stages, source_entries
from pipelines.config import WorkflowConfig
from pipelines.dag import ShardStage
from pipelines.runtime.session import StageError
from pipelines.shards.digests import flatten
from pipelines.workflow.inspection import contents, states
from pipelines.workflow.locks import LOCK
from pipelines.workflow.run import run
from pipelines.workflow.summary import write_summary
from pipelines.workflow.trained import how_far, saved_step
from repfusion.config import load_config, to_yaml
from repfusion.display.redaction import redact_text
from repfusion.display.terminal import printable_lines
from repfusion.files import is_store_error, write_text
from repfusion.locks import at_work
from repfusion.tracking import StoreError, sqlite_path

if TYPE_CHECKING:
    from pipelines.workflow.collect import Garbage


def run_workflow(config: WorkflowConfig, started: float) -> None:
    """Brings the workflow up to date, and says per stage what was done and in the end where the outputs
    are.
    """
    config.root.mkdir(parents=True, exist_ok=True)
    stages = build_stages(config, started)
    results = run(stages, config.root, config.ray, overlap=config.overlap)
    total_sec = time.perf_counter() - started
    summary = config.root / "summary.json"
    if all(result.skipped for result in results) and summary.is_file():
        print(f"nothing to do: all {len(results)} stages are fresh ({total_sec:.1f} s)")
    else:
        write_text(config.root / "config.yaml", to_yaml(config), mode=0o600)
        manifests = {result.name: result.manifest for result in results}
        write_summary(config.root, manifests, config.scored, total_sec)
        print(f"total: {total_sec:.1f} s")
    print("\n".join(to_open(config)))


def to_open(config: WorkflowConfig) -> list[str]:
    """What a run left for people, a line each: files, and the command that shows its tracked trainings."""
    found = [
        f"{name:<12} {config.root / name}"
        for name in ("summary.json", "gallery.png", "report.html")
        if (config.root / name).is_file()
    ]
    training = config.training(config.scored)
    if training.tracking.uri is None or saved_step(training) is None:
        return found
    return [*found, f"{'tracked':<12} {shown_by(config.root, training.tracking.uri)}"]


def shown_by(root: Path, uri: str) -> str:
    """The command, or the address, that shows tracked runs."""
    database = sqlite_path(uri)
    if database is None:
        return redact_text(uri)
    is_usual = database.resolve() == Path("runs/mlflow.db").resolve()
    return "make mlflow" if is_usual else f"make mlflow ROOT={shlex.quote(str(root))}"


def print_status(config: WorkflowConfig) -> None:
    """A line per stage: fresh, partial, stale or missing, and why, of a training at which step; before them
    who is at work here, and since when.
    """
    found = states(build_stages(config))
    workers = at_work(config.root / LOCK)
    for one in workers:
        print(f"at work: {one}")
    width = max(map(len, found), default=0)
    for name, state in found.items():
        output = state.output if state.status == "fresh" else None
        text = state.reason if output is None else contents(output.manifest)
        if name in config.trainings and state.status == "partial":
            text = how_far(config.training(name), bool(workers)) or text
        print(f"{name:<{width}} {state.status:<8} {text}")


def print_stopped(config: WorkflowConfig | None, words: Sequence[str], number: int) -> None:
    """What is kept of a run that was stopped, and the command that goes on."""
    print(f"stopped by {signal.Signals(number).name}; the finished shards are kept", file=sys.stderr)
    trainings = {} if config is None else {name: config.training(name) for name in config.trainings}
    for name, training in trainings.items():
        if (step := saved_step(training)) is not None and step < training.num_steps:
            print(f"{name}: step {step} of {training.num_steps} is saved", file=sys.stderr)
    command = f"{program()} {shlex.join(words)}"
    print(printable_lines(redact_text(f"go on: {command}")), file=sys.stderr)


def print_plan(config: WorkflowConfig, num_samples: int, rates: Sequence[str]) -> None:
    """The table of the data stages."""
    from pipelines.workflow.plan import plan, table

    given: dict[str, float] = {}
    for stage in build_stages(config):
        stage.check()
    stages = data_stages(config)
    names = [stage.name for stage in stages]
    for rate in rates:
        name, _, value = rate.partition("=")
        try:
            given[name] = float(value)
        except ValueError:
            given[name] = 0
        if name not in names or not 0 < given[name] < math.inf:
            raise ValueError(f"--rate {rate}: expected STAGE=SAMPLES_PER_SEC of one actor, STAGE of {names}")
    for stage in build_stages(config):
        if isinstance(stage, ShardStage) and stage.made_by:
            print(f"{stage.name}: not planned, it is made once {', '.join(stage.made_by)} is there")
    print(table(plan(stages, lambda: source_entries(config), probe_stages(config), num_samples, given)))


def verify_data(config: WorkflowConfig, repair: bool) -> int:
    """Exit status 1 where something is broken and stays so."""
    from pipelines.workflow.verify import verify

    broken = verify(kept_stages(config), config.root, config.ray, repair)
    return 1 if broken and not repair else 0


def collect_garbage(configs: Sequence[WorkflowConfig], delete: bool, trainings: bool = False) -> int:
    """Lists, and deletes if asked, under the locks of all roots and of their data folders; trainings too only
    where they are asked for. Exit status 1 where something could not be removed.
    """
    from pipelines.workflow.collect import find_garbage
    from pipelines.workflow.locks import DataLocks, locked_roots

    roots = {config.root for config in configs}
    with locked_roots(*roots):
        workflows = [build_stages(config) for config in configs]
        with DataLocks(stage for workflow in workflows for stage in workflow) as data:
            data.write() if delete else data.read()
            every = find_garbage(workflows, roots)
            found = [one for one in every if trainings or not one.is_training]
            for one in found:
                print(one)
            if left := [one for one in every if one not in found]:
                total = sum(one.bytes for one in left)
                print(f"{len(left)} trainings, {total:,} bytes, are left alone; --trainings lists them too")
            return _delete(found) if delete and found else _count(found)


def _count(found: "Sequence[Garbage]") -> int:
    total = sum(one.bytes for one in found)
    print(
        f"{len(found)} items, {total:,} bytes; run again with --delete to remove them"
        if found
        else "nothing to collect"
    )
    return 0


def _delete(found: "Sequence[Garbage]") -> int:
    removed = [one.delete() for one in found]
    whole, total = sum(not one.problems for one in removed), sum(one.bytes for one in removed)
    print(f"removed {whole} of {len(found)} items, {total:,} bytes")
    problems = [problem for one in removed for problem in one.problems]
    for problem in problems:
        print(f"could not remove {problem}", file=sys.stderr)
    return 1 if problems else 0


def main() -> int:
    started = time.perf_counter()
    args = parse_arguments(sys.argv[1:])
    config: WorkflowConfig | None = None
    try:
        if args.command == "evaluate" and not args.dry_run:
            from pipelines.evaluate import evaluate_now

            evaluate_now(args.config, args.step, args.overrides, args.urgent)
            return 0
        config = load_config(WorkflowConfig, args.config, args.overrides)
        if args.dry_run:
            print(to_yaml(config), end="")
            return 0
        match args.command:
            case "run":
                run_workflow(config, started)
            case "status":
                print_status(config)
            case "plan":
                print_plan(config, args.probe, args.rate)
            case "verify":
                return verify_data(config, repair=not args.report_only)
            case "retry":
                from pipelines.workflow.retry import retry

                retry(kept_stages(config), config.root, config.ray, args.reason)
            case "gc":
                others = [load_config(WorkflowConfig, path) for path in args.others]
                return collect_garbage([config, *others], args.delete, args.trainings)
    except (ValueError, StageError, StoreError, OSError) as error:
        print(printable_lines(redact_text(f"error: {error}")), file=sys.stderr)
        return 1
    # the clients of remote stores have no common class of errors: those become a line, all others are ours
    except Exception as error:
        if not is_store_error(error):
            raise
        place = args.config if config is None else " or ".join(stores(config))
        text = redact_text(f"error: {place}: {type(error).__name__}: {error}")
        print(printable_lines(text), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        number = terminated_by[0] if terminated_by else signal.SIGINT
        print_stopped(config, sys.argv[1:], number)
        return 128 + number
    return 0


def stores(config: WorkflowConfig) -> list[str]:
    """Places at stores that a workflow names, each with its key; without any, the folder of its data."""
    values = flatten(config.model_dump(mode="json", exclude={"trainings", "storage_options"}), "")
    named = [f"{key}: {url}" for key, url in values.items() if isinstance(url, str) and "://" in url]
    return named or [str(config.data_folder)]


terminated_by: list[signal.Signals] = []


def terminate(number: int, frame: object) -> NoReturn:
    """Ends the process as Ctrl-C does, so that Ray and the servers are stopped; a repeated signal does not
    cut that short.
    """
    signal.signal(number, signal.SIG_IGN)
    terminated_by.append(signal.Signals(number))
    # Ray lets no other exception through as it is, where it waits
    raise KeyboardInterrupt
