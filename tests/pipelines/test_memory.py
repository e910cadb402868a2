"""The helpers for memory and speed that diffusers' users call: the same pictures with and without."""

import shutil
from collections.abc import Iterator
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from accelerate import disk_offload
from accelerate.hooks import CpuOffload
from diffusers.utils.torch_utils import get_device

from pipelines import ConditionalUNet

PROMPT = "a corgi in a party hat"


def draw(pipe: Any, **arguments: Any) -> np.ndarray:
    call = {"num_inference_steps": 3, "output_type": "np"} | arguments
    return pipe(PROMPT, generator=torch.Generator().manual_seed(0), **call).images


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(np.float64) - other).max())


# ---------------------------------------------------------------- memory


def test_attention_slicing_changes_nothing(both):
    """Our U-Net's attention never holds the matrix that slicing would cut up, so it has nothing to slice."""
    theirs, ours = both
    before = draw(ours)
    for size in ("auto", "max", 1):
        for pipe in both:
            pipe.enable_attention_slicing(size)
        assert np.array_equal(draw(ours), before)
        assert difference(draw(theirs), before) < 1e-4
    ours.disable_attention_slicing()
    assert np.array_equal(draw(ours), before)


def test_vae_slicing_decodes_one_picture_at_a_time(both):
    theirs, ours = both
    before = draw(ours, num_images_per_prompt=3)
    rows: list[int] = []
    ours.vae.decoder.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    for pipe in both:
        pipe.vae.enable_slicing()
    drawn = draw(ours, num_images_per_prompt=3)
    assert rows == [1, 1, 1]
    assert difference(drawn, before) < 1e-5
    assert difference(drawn, draw(theirs, num_images_per_prompt=3)) < 1e-4
    ours.vae.disable_slicing()
    draw(ours, num_images_per_prompt=3)
    assert rows == [1, 1, 1, 3]


def test_vae_tiling_equals_stable_diffusions(both):
    """Tiles of 32 pixels, blended where they overlap: near the whole picture, and not it."""
    theirs, ours = both
    size = {"height": 64, "width": 80}
    whole = draw(ours, **size)
    for pipe in both:
        assert pipe.vae.tile_sample_min_size == 32
        pipe.vae.enable_tiling()
    tiled = draw(ours, **size)
    assert tiled.shape == (1, 64, 80, 3)
    assert difference(tiled, draw(theirs, **size)) < 1e-4 < difference(tiled, whole)
    assert np.abs(tiled - whole).mean() < 0.05
    ours.vae.disable_tiling()
    assert np.array_equal(draw(ours, **size), whole)


OFFLOADS = ("enable_model_cpu_offload", "enable_sequential_cpu_offload")
MODELS = ("text_encoder", "unet", "vae")


@pytest.mark.skipif(get_device() != "cpu", reason="this machine has an accelerator")
@pytest.mark.parametrize("offload", OFFLOADS)
def test_offload_without_an_accelerator_says_so(both, offload):
    """diffusers' own error, and the pipeline goes on as before."""
    _, ours = both
    before = draw(ours)
    with pytest.raises(RuntimeError, match=f"`{offload}` requires accelerator, but not found"):
        getattr(ours, offload)()
    assert np.array_equal(draw(ours), before)


@pytest.mark.skipif(get_device() == "cpu", reason="no accelerator (GPU)")
@pytest.mark.parametrize("offload", OFFLOADS)
def test_offload_draws_the_same_on_an_accelerator(both, offload):
    _, ours = both
    before = draw(ours)
    getattr(ours, offload)()
    assert difference(draw(ours), before) < 1e-2
    assert {p.device.type for p in ours.vae.parameters()} <= {"cpu", "meta"}


def guided_by_an_input(pipe: Any, make_unet: Any) -> Any:
    """The same pipeline with a U-Net that takes the guidance scale as an input."""
    unet = make_unet(in_channels=4, out_channels=4, time_cond_proj_dim=8)
    pipe = type(pipe)(**(pipe.components | {"unet": unet}))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    return pipe


def test_model_offload_with_the_cpu_as_the_device(both, make_unet):
    """The hooks that move whole models in and out, on the device that is always there."""
    ours = guided_by_an_input(both[1], make_unet)
    before = draw(ours, clip_skip=1)
    ours.enable_model_cpu_offload(device="cpu")
    assert all(isinstance(ours.components[name]._hf_hook, CpuOffload) for name in MODELS)
    for _ in range(2):
        assert np.array_equal(draw(ours, clip_skip=1), before)
    ours.remove_all_hooks()
    assert np.array_equal(draw(ours, clip_skip=1), before)


def test_models_whose_weights_are_elsewhere_draw_the_same(both, make_unet, tmp_path):
    """As after sequential offload: a module has its weights while it runs and else none, so that nothing in
    the pipeline may ask a module where to compute. (With the CPU as its device that helper fails in
    accelerate itself; from the disk its hooks work.)"""
    ours = guided_by_an_input(both[1], make_unet)
    before = draw(ours, clip_skip=1)
    for name in MODELS:
        disk_offload(ours.components[name], str(tmp_path / name), torch.device("cpu"))
        assert {p.device.type for p in ours.components[name].parameters()} == {"meta"}
    for _ in range(2):
        assert np.array_equal(draw(ours, clip_skip=1), before)


def test_model_offload_follows_stable_diffusions_order(both):
    theirs, ours = both
    assert ours.model_cpu_offload_seq == theirs.model_cpu_offload_seq
    assert ours._exclude_from_cpu_offload == theirs._exclude_from_cpu_offload


# ---------------------------------------------------------------- precision and layout


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_to_dtype(both, dtype):
    """In half precision both pipelines lose the same digits; back in single, the weights stay rounded."""
    theirs, ours = both
    before = draw(ours)
    for pipe in both:
        pipe.to(dtype)
    models = (ours.unet, ours.vae, ours.text_encoder)
    assert {p.dtype for model in models for p in model.parameters()} == {dtype} == {ours.dtype}
    half = draw(ours)
    lost = difference(half, before)
    print(f"{dtype}: {lost:.1e} from single precision, {difference(half, draw(theirs)):.1e} from theirs")
    assert half.dtype == np.float32 and 1e-4 < lost < 0.2
    assert difference(half, draw(theirs)) <= lost
    for pipe in both:
        pipe.to(torch.float32)
    assert difference(draw(ours), draw(theirs)) < 1e-4


def test_channels_last_draws_the_same(both):
    _, ours = both
    before = draw(ours)
    ours.unet.to(memory_format=torch.channels_last)
    ours.vae.to(memory_format=torch.channels_last)
    weight = ours.unet.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    assert difference(draw(ours), before) < 1e-4


def test_progress_bar_settings(both, capsys):
    _, ours = both
    ours.set_progress_bar_config(disable=False, desc="drawing a corgi")
    draw(ours)
    assert "drawing a corgi" in (shown := capsys.readouterr().err) and "3/3" in shown
    ours.set_progress_bar_config(disable=True)
    draw(ours)
    assert "drawing" not in capsys.readouterr().err


# ---------------------------------------------------------------- FreeU and fused projections


def test_freeu_equals_stable_diffusions(both):
    theirs, ours = both
    before = draw(ours)
    factors = {"s1": 0.9, "s2": 0.2, "b1": 1.2, "b2": 1.4}
    for pipe in both:
        pipe.enable_freeu(**factors)
    drawn = draw(ours)
    assert difference(drawn, draw(theirs)) < 1e-4 and difference(drawn, before) > 1e-2
    for pipe in both:
        pipe.enable_freeu(**(factors | {"s1": 0.5, "b2": 1.1}))
    assert difference(draw(ours), draw(theirs)) < 1e-4 < difference(draw(ours), drawn)
    ours.disable_freeu()
    assert np.array_equal(draw(ours), before)


def test_only_the_vaes_projections_can_be_fused(both):
    _, ours = both
    before = draw(ours)
    with pytest.raises(NotImplementedError, match=r"`unet` must be False: ConditionalUNet.*unet=False"):
        ours.fuse_qkv_projections()
    assert np.array_equal(draw(ours), before)
    ours.fuse_qkv_projections(unet=False)
    assert any(hasattr(module, "to_qkv") for module in ours.vae.modules())
    assert difference(draw(ours), before) < 1e-4
    ours.unfuse_qkv_projections(unet=False)
    assert difference(draw(ours), before) < 1e-4


# ---------------------------------------------------------------- compiling


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """What was compiled for other models would count as compiled before, here and in the tests to come."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compile_whole(pipe: Any, backend: str) -> None:
    pipe.unet = torch.compile(pipe.unet, fullgraph=True, backend=backend)


def compile_in_place(pipe: Any, backend: str) -> None:
    pipe.unet.compile(fullgraph=True, backend=backend)


def compile_blocks(pipe: Any, backend: str) -> None:
    pipe.unet.compile_repeated_blocks(fullgraph=True, backend=backend)


def compiled_pictures(pipe: Any, how: Any, backend: str) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Pictures before and after, and the sizes of the graphs that were made."""
    before, sizes = draw(pipe), []

    def counting(graph: Any, inputs: Any) -> Any:
        sizes.append(len(graph.graph.nodes))
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    how(pipe, counting)
    with torch._dynamo.config.patch(error_on_recompile=True):
        after = draw(pipe)
        draw(pipe, num_inference_steps=4)
    return before, after, sizes


@pytest.mark.parametrize(
    "how, backend",
    [(compile_whole, "eager"), (compile_in_place, "aot_eager"), (compile_blocks, "eager")],
)
def test_compiled_unet_draws_the_same(both, fresh_compiler, how, backend):
    """One graph without breaks, made once for all steps and, by blocks, for all blocks. These backends run
    the graph as it is, so no compiler is needed."""
    _, ours = both
    before, after, sizes = compiled_pictures(ours, how, backend)
    assert difference(before, after) < 1e-5
    assert len(sizes) == 1 and sizes[0] > 10


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
def test_unet_compiled_to_machine_code_draws_the_same(both, fresh_compiler):
    _, ours = both
    assert isinstance(ours.unet, ConditionalUNet)
    before, after, sizes = compiled_pictures(ours, compile_whole, "inductor")
    assert difference(before, after) < 1e-4 and len(sizes) == 1
