"""What diffusers' own tests ask of a pipeline (PipelineTesterMixin in its test_pipelines_common.py), where it
applies, on a tiny model; docs/diffusers.md has the table.
"""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

import repfusion
from repfusion.diffusion.scheduler import FlowScheduler
from repfusion.pipeline import RepFusionPipeline
from repfusion.runs.checkpoint import save_checkpoint

PROMPTS = ["a red circle", "two blue squares left of a green circle"]
INPUTS = {"num_inference_steps": 3, "output_type": "np"}


@pytest.fixture
def pipe(make_generator) -> RepFusionPipeline:
    model = make_generator()
    return RepFusionPipeline(model, model.load_decoder(), precision="fp32")


@pytest.fixture
def checkpoint(make_generator, tmp_path) -> Path:
    model = make_generator()
    folder = tmp_path / "step_00000001"
    save_checkpoint(folder, model, model.trainable_state(), step=1)
    return folder


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(pipe: RepFusionPipeline, prompt=PROMPTS[0], seed: int = 0, **changes) -> np.ndarray:
    return pipe(prompt, generator=seeded(seed), **{**INPUTS, **changes}).images


@pytest.mark.slow
def test_it_is_imported_from_the_package_which_loads_no_torch_for_it():
    assert repfusion.RepFusionPipeline is RepFusionPipeline
    code = "import sys, repfusion; assert 'torch' not in sys.modules; from repfusion import RepFusionPipeline"
    subprocess.run([sys.executable, "-c", code], cwd=Path(repfusion.__file__).parents[1], check=True)
    with pytest.raises(AttributeError, match="no attribute 'StableDiffusionPipeline'"):
        _ = repfusion.StableDiffusionPipeline


def test_pipeline_call_signature():
    """diffusers asks for these; `latents` and `generator` among the optional ones."""
    named = inspect.signature(RepFusionPipeline.__call__).parameters
    common = {"prompt", "height", "width", "guidance_scale", "negative_prompt", "prompt_embeds"}
    optional = {"num_inference_steps", "num_images_per_prompt", "generator", "latents", "output_type"}
    callbacks = {"callback_on_step_end", "callback_on_step_end_tensor_inputs", "return_dict"}
    assert named.keys() >= common | optional | callbacks | {"negative_prompt_embeds"}


TABLE = Path(__file__).parents[2] / "docs" / "diffusers.md"


def test_the_table_of_the_docs_is_true(pipe):
    """What is said to be taken is there; what is said to be absent is not."""
    taken, absent = TABLE.read_text().split("## What is not there")
    named = set(inspect.signature(RepFusionPipeline.__call__).parameters)
    listed = [name for name in re.findall(r"^\| `(\w+)`", taken, re.M)]
    assert len(listed) > 25
    assert not [name for name in listed if name not in named and not hasattr(pipe, name)]
    gone = re.findall(r"^\| `(\w+)`", absent, re.M)
    assert len(gone) > 8 and not [name for name in gone if name in named or hasattr(pipe, name)]


def test_save_load_local(checkpoint, tmp_path):
    """And again, of what was loaded from the first export."""
    pipe = RepFusionPipeline.from_pretrained(checkpoint)
    pipe.save_pretrained(tmp_path / "a")
    loaded = RepFusionPipeline.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    again = RepFusionPipeline.from_pretrained(tmp_path / "b")
    for one in (loaded, again):
        np.testing.assert_array_equal(drawn(one), drawn(pipe))
    assert (tmp_path / "a" / "export.json").read_bytes() == (tmp_path / "b" / "export.json").read_bytes()
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "mine.txt").touch()
    with pytest.raises(ValueError, match="exists and is no export"):
        loaded.save_pretrained(tmp_path / "c")


def test_a_pipeline_of_parts_has_nothing_to_save(pipe, tmp_path):
    with pytest.raises(ValueError, match="built of parts has nothing to save"):
        pipe.save_pretrained(tmp_path / "a")


def test_inference_batch_single_identical(pipe):
    batch = pipe(PROMPTS, generator=[seeded(0), seeded(1)], **INPUTS).images
    for index, prompt in enumerate(PROMPTS):
        np.testing.assert_allclose(batch[index], drawn(pipe, prompt, seed=index)[0], atol=1e-4)


def test_dict_tuple_outputs_equivalent(pipe):
    (images,) = pipe(PROMPTS[0], generator=seeded(), return_dict=False, **INPUTS)
    np.testing.assert_array_equal(images, drawn(pipe))


def test_components_function(pipe):
    assert set(inspect.signature(RepFusionPipeline.__init__).parameters) - {"self"} == pipe.components.keys()
    again = RepFusionPipeline(**pipe.components)
    assert again.model is pipe.model
    np.testing.assert_array_equal(drawn(again), drawn(pipe))


def test_num_images_per_prompt(pipe):
    for num_images in (1, 2):
        for prompt, number in ((PROMPTS[0], 1), (PROMPTS, 2)):
            assert len(drawn(pipe, prompt, num_images_per_prompt=num_images)) == number * num_images


def test_cfg(pipe):
    """1 and less are off, and one evaluation; more changes the image, not its shape."""
    off = drawn(pipe, guidance_scale=1.0)
    assert not pipe.do_classifier_free_guidance
    np.testing.assert_array_equal(drawn(pipe, guidance_scale=0.0), off)
    on = drawn(pipe, guidance_scale=7.5)
    assert pipe.do_classifier_free_guidance and (pipe.guidance_scale, pipe.num_timesteps) == (7.5, 3)
    assert on.shape == off.shape and np.abs(on - off).max() > 1e-3
    with pytest.raises(ValueError, match="guidance_scale nan: expected a finite number"):
        drawn(pipe, guidance_scale=float("nan"))


def test_negative_prompt(pipe):
    """The empty one is guidance away from what it reads; the prompt itself is no guidance at all."""
    plain = drawn(pipe)
    other = drawn(pipe, negative_prompt="a blue square")
    assert np.abs(other - plain).max() > 1e-3
    same = drawn(pipe, negative_prompt=PROMPTS[0])
    np.testing.assert_allclose(same, drawn(pipe, guidance_scale=1.0), atol=1e-4)
    np.testing.assert_array_equal(
        drawn(pipe, PROMPTS, negative_prompt="a"), drawn(pipe, PROMPTS, negative_prompt=["a", "a"])
    )
    np.testing.assert_array_equal(
        drawn(pipe, negative_prompt="a", guidance_scale=1), drawn(pipe, guidance_scale=1)
    )
    with pytest.raises(ValueError, match="1 negative prompts for 2 prompts"):
        drawn(pipe, PROMPTS, negative_prompt=["a"])


def test_prompt_embeds_of_a_method_that_reads_them(make_generator):
    from repfusion.conditioning.text_embed import encode_text

    model = make_generator("text_embed")
    pipe = RepFusionPipeline(model, model.load_decoder(), precision="fp32")
    llm = model.conditioner.llm
    embeds, (negative,) = encode_text(llm, llm.tokenise(PROMPTS)), encode_text(llm, llm.tokenise(["a"]))
    expected = drawn(pipe, PROMPTS, negative_prompt="a")
    made = drawn(pipe, None, prompt_embeds=embeds, negative_prompt_embeds=[negative, negative])
    np.testing.assert_allclose(made, expected, atol=1e-5)
    with pytest.raises(ValueError, match="both prompt and prompt_embeds"):
        drawn(pipe, PROMPTS, prompt_embeds=embeds)


def test_prompt_embeds_of_a_method_that_reads_the_latents_raise(pipe):
    with pytest.raises(ValueError, match="prompt_embeds: the method 'noisy_latents' reads a prompt anew"):
        drawn(pipe, None, prompt_embeds=torch.zeros(1, 4, 32))


def test_callback_inputs(pipe):
    def check(pipe, step, level, tensors):
        assert set(tensors) <= set(pipe._callback_tensor_inputs)
        return tensors

    drawn(pipe, callback_on_step_end=check, callback_on_step_end_tensor_inputs=["latents"])
    drawn(pipe, callback_on_step_end=check, callback_on_step_end_tensor_inputs=[])

    def zero_at_the_end(pipe, step, level, tensors):
        is_last = step == pipe.num_timesteps - 1
        return {"latents": torch.zeros_like(tensors["latents"])} if is_last else tensors

    made = drawn(pipe, callback_on_step_end=zero_at_the_end, output_type="latent")
    assert made.abs().sum() == 0
    with pytest.raises(ValueError, match=r"tensor_inputs \['prompt_embeds'\]: expected of \['latents'\]"):
        drawn(pipe, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])


def test_interrupt(pipe):
    """The latents of the step in which it was set are drawn; the next call begins without it."""
    seen = []

    def stop(pipe, step, level, tensors):
        seen.append(tensors["latents"])
        pipe._interrupt = step == 1

    made = drawn(pipe, num_inference_steps=5, callback_on_step_end=stop, output_type="latent")
    assert len(seen) == 2 and torch.equal(made, seen[1]) and pipe.interrupt
    drawn(pipe)
    assert not pipe.interrupt


def test_to_device_and_dtype(pipe):
    assert pipe.to("cpu", torch.bfloat16) is pipe
    assert (pipe.device.type, pipe.dtype, pipe.precision) == ("cpu", torch.bfloat16, "bf16")
    assert pipe.to(torch.float32).dtype == torch.float32 and pipe.precision == "fp32"
    assert pipe.to(device="cpu", dtype=torch.bfloat16).dtype == torch.bfloat16
    assert np.isfinite(drawn(pipe)).all()
    for wrong, message in (
        ((torch.float16,), "dtype torch.float16: expected torch.float32 or torch.bfloat16"),
        (("cuda:99", torch.float32), "device 'cuda:99'"),
        (("meta",), "it holds no values"),
        (("cpu", "cuda"), "two values of device"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.to(*wrong)
        assert pipe.dtype == torch.bfloat16  # nothing was changed


def test_the_dtype_is_taken_by_both_of_its_names(checkpoint):
    for name in ("dtype", "torch_dtype"):
        pipe = RepFusionPipeline.from_pretrained(checkpoint, **{name: torch.bfloat16})
        assert pipe.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="two values of dtype"):
        RepFusionPipeline.from_pretrained(checkpoint, torch_dtype=torch.bfloat16, dtype=torch.float32)


def test_height_and_width(pipe):
    assert drawn(pipe, height=32, width=32).shape == (1, 32, 32, 3)
    with pytest.raises(ValueError, match="width 64: this model draws 32 x 32 px alone"):
        drawn(pipe, height=32, width=64)


def test_the_scheduler_may_be_swapped(pipe):
    steps = {"num_inference_steps": 5}  # with three, dpm's steps are all of first order
    euler = drawn(pipe, **steps)
    for name, solver in (("FlowMatchHeunDiscreteScheduler", "heun"), ("DPMSolverMultistepScheduler", "dpm")):
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
        assert pipe.scheduler == FlowScheduler(solver, pipe.model.shift)
        swapped = drawn(pipe, **steps)
        assert np.abs(swapped - euler).max() > 1e-4
        np.testing.assert_array_equal(drawn(pipe, solver="euler", **steps), euler)
        assert pipe.components["scheduler"].solver == solver
    pipe.scheduler = FlowScheduler.from_config(pipe.scheduler.config, solver="euler")
    np.testing.assert_array_equal(drawn(pipe, **steps), euler)
    with pytest.raises(ValueError, match="a DDIMScheduler as scheduler"):
        pipe.scheduler = diffusers.DDIMScheduler()


def test_progress_bar(pipe, capsys):
    drawn(pipe)
    assert "3/3" not in capsys.readouterr().err  # no terminal
    pipe.set_progress_bar_config(disable=False, desc="drawing")
    drawn(pipe)
    said = capsys.readouterr().err
    assert "drawing" in said and "3/3" in said
    pipe.set_progress_bar_config(disable=True)
    drawn(pipe)
    assert capsys.readouterr().err == ""


def test_model_cpu_offload_forward_pass(pipe):
    """On the CPU its own device, so that the parts come and go; a GPU is asked for where there is none."""
    expected = drawn(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    np.testing.assert_array_equal(drawn(pipe), expected)
    with pytest.raises(ValueError, match="the pipeline is offloaded"):
        pipe.to("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device 'cuda"):
            pipe.enable_model_cpu_offload()


@pytest.mark.gpu
def test_an_offloaded_pipeline_leaves_the_gpu_empty(pipe):
    expected = drawn(pipe)
    pipe.enable_model_cpu_offload()
    np.testing.assert_allclose(drawn(pipe), expected, atol=2e-2)
    assert {one.device.type for one in (*pipe.model.parameters(), *pipe.decoder.parameters())} == {"cpu"}
    assert pipe.device.type == "cuda"
