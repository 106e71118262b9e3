"""The full-size benchmark on a CPU, at a small geometry: what it says follows from what it measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from repfusion.diffusion.sampler import SamplerConfig
from repfusion.flops import sample_flops, train_flops

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """They lie beside each other and import each other so."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def full_size(*arguments: str) -> tuple[dict, list[str]]:
    """What the last line says, and the lines above it."""
    command = [sys.executable, str(BENCHMARKS / "full_size.py"), *arguments, "--geometry", "small"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    *above, last = done.stdout.splitlines()
    return json.loads(last), above


def check_rates(said: dict, flops: float, seconds: float) -> None:
    assert said["device"] == "cpu" and said["mfu"] is None and said["peak_tflops"] is None
    assert said["tflops"] == pytest.approx(flops / seconds / 1e12)
    assert said["of_matrix_rate"] == pytest.approx(said["tflops"] / said["matrix_tflops"])
    assert 0 < said["of_matrix_rate"] < 1
    assert 0 < said["memory_gib"] < 8


@pytest.mark.slow
@pytest.mark.usefixtures("benchmarks")
def test_a_training_step_is_measured_and_profiled(tmp_path: Path):
    from random_model import small

    path = tmp_path / "profile.md"
    batch = ("--micro-batch", "2", "--grad-accum-steps", "2", "--warmup", "1", "--steps", "2")
    said, _ = full_size("train", *batch, "--profile", str(path))
    # one caption in ten is dropped and leaves its begin token
    assert said["flops_per_sample"] == train_flops(small(), 0.9 * said["text_tokens"] + 0.1)
    assert said["samples_per_sec"] == pytest.approx(4 / said["step_sec"])
    check_rates(said, 4 * said["flops_per_sample"], said["step_sec"])
    assert said["profile"]["optimizer"] > 0 and said["profile"]["matmul"] > 0
    assert 0.95 < sum(said["profile"].values()) < 1.2
    assert "| matmul |" in path.read_text() and "| `aten::mm` | matmul |" in path.read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("benchmarks")
def test_sampling_is_measured():
    from random_model import small

    said, _ = full_size("sample", "--micro-batch", "3", "--num-steps", "4", "--warmup", "1", "--steps", "2")
    config = SamplerConfig(num_steps=4, guidance_scale=said["guidance_scale"])
    assert said["guidance_scale"] > 1
    assert said["flops_per_image"] == sample_flops(small(), said["text_tokens"], config)
    assert said["images_per_sec"] == pytest.approx(3 / said["batch_sec"])
    check_rates(said, 3 * said["flops_per_image"], said["batch_sec"])


@pytest.mark.slow
def test_the_largest_micro_batch_is_looked_for_in_processes_of_their_own():
    batch = ("--micro-batch", "auto", "--first", "1", "--limit", "2", "--warmup", "1", "--steps", "1")
    said, above = full_size("train", *batch)
    assert above == ["micro-batch 1: fits", "micro-batch 2: fits"]
    assert said["micro_batch"] == 2


@pytest.mark.usefixtures("benchmarks")
@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 11, 31, 32, 100])
@pytest.mark.parametrize("first", [1, 4, 16])
def test_the_search_ends_at_the_largest_that_fits(size, first):
    from full_size import largest

    tried = []

    def fits(one: int) -> bool:
        tried.append(one)
        return one <= size

    assert largest(fits, first, limit=32) == min(size, 32)
    assert len(tried) == len(set(tried)) <= 11 and all(1 <= one <= 32 for one in tried)


@pytest.mark.usefixtures("benchmarks")
@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT", "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matmul"),
        ("triton_tem_fused_mm_3", "matmul"),
        ("void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4>>", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention)", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7", "attention"),
        ("triton_red_fused__to_copy_add_mean_mm_mul_pow_rsqrt_4", "norm, elementwise"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", None),
        (
            "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>",
            "optimizer",
        ),
        ("void at::native::unrolled_elementwise_kernel<direct_copy_kernel_cuda(...)>", "copies"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
    ],
)
def test_kernels_are_grouped_by_their_names(name, group):
    from kernel_shares import OTHER, group_of

    assert group_of(name) == (group or OTHER)


@pytest.mark.usefixtures("benchmarks")
def test_time_is_busy_once_where_kernels_overlap():
    from kernel_shares import busy

    assert busy([(5, 7), (0, 2), (1, 3), (1, 2), (7, 8)]) == 6
    assert busy([]) == 0


@pytest.mark.usefixtures("benchmarks")
def test_every_part_for_a_gpu_names_a_program_and_arguments_that_it_takes(tmp_path: Path):
    """Each program's own parser reads what the parts give it, at either size."""
    import encoding
    import gpu
    from full_size import parse

    for part in gpu.PARTS:
        for geometry in ("published", "small"):
            _, program, *arguments = gpu.command_of(part, geometry, tmp_path)
            if program.endswith("full_size.py"):
                args = parse(arguments)
                assert args.geometry == geometry and int(args.micro_batch) > 0
            else:
                assert Path(program).is_file()
    assert set(encoding.GEOMETRIES) == {"published", "small"}
    assert {part for _, part, _, _ in gpu.RATIOS} <= gpu.PARTS.keys()


@pytest.mark.usefixtures("benchmarks")
def test_parts_are_done_once_and_failures_are_told(tmp_path: Path, monkeypatch, capsys):
    """With programs of the test's own in the place of those that take minutes."""
    import gpu

    (tmp_path / "good.py").write_text("print('{\"mfu\": 0.61}')")
    (tmp_path / "bad.py").write_text("raise SystemExit('no such kernel')")
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    monkeypatch.setattr(gpu, "SMALL", {"good.py": (), "bad.py": ()})
    monkeypatch.setattr(gpu, "PARTS", {"train_compiled_32": ("good.py",), "sample_8": ("bad.py",)})
    arguments = ["--geometry", "small", "--out", str(tmp_path / "out"), "--parts"]
    gpu.main([*arguments, "train_compiled_32"])
    assert "| training, MFU | 0.610 | 0.6 |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        gpu.main([*arguments, "train_compiled_32", "sample_8"])
    said = capsys.readouterr().out
    assert "train_compiled_32 ..." not in said and "sample_8: no such kernel" in said
    assert "| sampling, batch 8, of the matrix rate | failed | 0.75 |" in said
    kept = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert kept["parts"]["train_compiled_32"]["mfu"] == 0.61 and "error" in kept["parts"]["sample_8"]
    assert kept["device"] and kept["versions"]["torch"]
    (tmp_path / "bad.py").write_text("print('{}')")
    gpu.main([*arguments, "train_compiled_32", "sample_8", "--again"])
    assert "all parts are done" in capsys.readouterr().out
