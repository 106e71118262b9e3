"""How long a checkpoint stops the training, against writing the same bytes with safetensors: `python
benchmarks/checkpoint_stall.py` (target: below 2).

One rank. In alternating rounds: `snapshot` as the training calls it, with sha256 and flushing to the disk,
and one `save_file` of as many bytes of tensors, already in memory, flushed. Then what comparing all of it
with its sha256 takes, as before a resume, from memory.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
from tiny_training import make_columns, make_foundation, tiny_data, tiny_model

from repfusion.data.mixture import Mixture
from repfusion.files import flush
from repfusion.model.build import columns_of
from repfusion.model.dit import DiTConfig
from repfusion.runs.checkpoint import frozen_digests
from repfusion.runs.completion import check_all
from repfusion.train import TrainConfig, build_trainable, loop_state
from repfusion.training.distributed import shut_down
from repfusion.training.ema import EMA
from repfusion.training.engine import Engine, EngineConfig
from repfusion.training.snapshot import snapshot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--zero-stage", type=int, default=2, choices=(0, 1, 2, 3))
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder unless given")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        root = Path(temporary)
        foundation, columns = make_foundation(root), make_columns(root / "data")
        dit = DiTConfig(hidden_size=args.hidden_size, depth=args.depth, num_heads=args.hidden_size // 64)
        config = TrainConfig(
            output_dir=root / "out",
            data=tiny_data(columns),
            model=tiny_model(foundation).model_copy(update={"dit": dit}),
            engine=EngineConfig(micro_batch_size=8, zero_stage=args.zero_stage),
        )
        dataset = Mixture.open(config.data, columns_of(config.model))
        model = build_trainable(config, dataset)
        digests = frozen_digests(model)
        engine = Engine(model, config.engine, 8, 100, model.frozen_parts())
        ema = EMA(engine.partition.masters, 0.999)
        state = loop_state(config, dataset)
        for master in engine.partition.masters:  # as after a step
            moments = {name: torch.rand_like(master) for name in ("exp_avg", "exp_avg_sq")}
            engine.partition.adamw.state[master] = {"step": torch.tensor(1.0), **moments}
        ours, plain, compared, num_bytes = [], [], [], 0
        for step in range(args.rounds + 1):
            started = time.perf_counter()
            folder = snapshot(root / "out", step, model, ema, engine, digests, state, {})
            ours.append(time.perf_counter() - started)
            num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            started = time.perf_counter()
            check_all(folder)
            compared.append(time.perf_counter() - started)
            shutil.rmtree(folder)
            tensors = {f"{i}": torch.rand(num_bytes // 16) for i in range(4)}
            started = time.perf_counter()
            save_file(tensors, str(root / "plain.safetensors"))
            flush(root / "plain.safetensors")
            plain.append(time.perf_counter() - started)
            (root / "plain.safetensors").unlink()
        dataset.close()
    shut_down()
    result = {
        "ratio": median(a / b for a, b in zip(ours[1:], plain[1:], strict=True)),
        "snapshot_sec": median(ours[1:]),
        "safetensors_sec": median(plain[1:]),
        "compare_sec": median(compared[1:]),
        "compare_gb_per_sec": num_bytes / median(compared[1:]) / 1e9,
        "mib": num_bytes / 2**20,
    }
    print(json.dumps({key: round(value, 3) for key, value in result.items()}))


if __name__ == "__main__":
    main()
