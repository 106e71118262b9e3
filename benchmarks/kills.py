"""A data workflow, killed at random moments: does every byte come out as in a run that nobody disturbed?

Each round runs scenes to features on a fresh root and kills, by SIGKILL, the driver, an actor or the raylet;
what died is run again until it ends well. Files, processes and sockets are compared with those of an
uninterrupted run. A row for each round, then a summary as JSON; exit status 1 where a round went wrong.

    python benchmarks/kills.py [--rounds 20] [--seed 0] [--root FOLDER]
"""

import argparse
import json
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
from killing import Round, reference, run_round

DEMO = Path(__file__).parents[1] / "pipelines" / "configs" / "demo.yaml"


def write_config(folder: Path, num_samples: int, num_shards: int) -> Path:
    """The demo's data, fewer and in smaller shards."""
    values = yaml.safe_load(DEMO.read_text())
    values["last_stage"] = "prompt_features"
    values["trainings"]["train"]["model"] = {"conditioning": "text_embed"}  # what reads them
    values["source"]["shard_size"] = -(-num_samples // num_shards)
    values["source"]["num_samples"] = num_samples
    values["ray"] = {"num_cpus": 2, "object_store_mib": 80}
    path = folder / "workflow.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def row(number: int, done: Round) -> str:
    kills = [
        f"{one.killed} at {one.at_sec} s in {one.stage} ({one.num_complete} shards)" if one.killed else "none"
        for one in done.attempts
    ]
    codes = ",".join(str(one.exit_code) for one in done.attempts)
    seconds = ",".join(f"{one.seconds:g}" for one in done.attempts)
    verdict = "equal" if not done.problems else "; ".join(done.problems)[:500]
    gone = f"gone in {done.lingered_sec} s"
    return f"{number:3d}  {' | '.join(kills)}  exit {codes}  {seconds} s  {gone}  {verdict}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-samples", type=int, default=600)
    parser.add_argument("--num-shards", type=int, default=12)
    parser.add_argument("--root", type=Path, help="keep everything here")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="kills-") as scratch:
        folder = args.root or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        config = write_config(folder, args.num_samples, args.num_shards)
        expected, duration_sec = reference(config, folder / "reference", folder / "reference.log")
        print(f"reference: {len(expected)} files in {duration_sec:.1f} s", flush=True)
        rounds = []
        for number in range(args.rounds):
            done = run_round(config, folder / f"round{number:02d}", expected, rng)
            print(row(number, done), flush=True)
            rounds.append(done)
    killed = Counter(one.killed for done in rounds for one in done.attempts if one.killed)
    bad = sum(bool(done.problems) for done in rounds)
    print(
        json.dumps(
            {
                "rounds": len(rounds),
                "wrong": bad,
                "files": len(expected),
                "reference_sec": round(duration_sec, 1),
                "killed": killed,
                "max_lingered_sec": max((done.lingered_sec for done in rounds), default=0),
                "by_round": [done.to_json() for done in rounds],
            }
        )
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
