"""LoRA and textual inversion in the pipeline: against StableDiffusionPipeline, and against weights changed by
hand, W + alpha/r B A."""

import copy
from typing import Any

import numpy as np
import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pipelines import TextToImagePipeline
from pipelines.components.lora import lora_scaled

PROMPT = "a corgi in a party hat"
RANK = 2
PARTS = ("unet", "text_encoder")
UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")

Lora = dict[str, dict[str, tuple[Tensor, Tensor]]]  # component -> layer -> A (r, in, ...), B (out, r, ...)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(pipe: Any, **arguments: Any) -> np.ndarray:
    call = {"num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "np"} | arguments
    return pipe(PROMPT, generator=seeded(), **call).images


def close(one: np.ndarray, other: np.ndarray) -> bool:
    return float(np.abs(one - other).max()) < 1e-4


def random_lora(pipe: Any, seed: int) -> Lora:
    """Factors for the layers that community LoRAs have, Linear and 1x1 convolution."""
    generator, lora = seeded(seed), {}
    for component, targets in (("unet", UNET_TARGETS), ("text_encoder", TEXT_TARGETS)):
        layers = {n: m.weight for n, m in getattr(pipe, component).named_modules() if n.endswith(targets)}
        lora[component] = {
            name: (
                0.15 * torch.randn(RANK, weight.shape[1], *weight.shape[2:], generator=generator),
                0.15 * torch.randn(weight.shape[0], RANK, *weight.shape[2:], generator=generator),
            )
            for name, weight in layers.items()
        }
    return lora


def merged(pipe: Any, *loras: tuple[Lora, float | dict[str, float]]) -> Any:
    """A copy of `pipe` with s B A added to its weights by hand, s one number or one for each component."""
    parts = {name: copy.deepcopy(getattr(pipe, name)) for name in PARTS}
    for lora, scale in loras:
        for component, layers in lora.items():
            s = scale[component] if isinstance(scale, dict) else scale
            for name, (a, b) in layers.items():
                weight = parts[component].get_submodule(name).weight
                weight.data += s * (b.flatten(1) @ a.flatten(1)).reshape(weight.shape)
    pipe = type(pipe)(**(pipe.components | parts), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ---------------------------------------------------------------- the formats LoRAs come in


def peft_format(lora: Lora) -> dict[str, Tensor]:
    state = {}
    for component, layers in lora.items():
        for name, (a, b) in layers.items():
            state[f"{component}.{name}.lora_A.weight"] = a
            state[f"{component}.{name}.lora_B.weight"] = b
    return state


def diffusers_format(lora: Lora) -> dict[str, Tensor]:
    """diffusers' before peft: attention processors hold the layers, and the tower has its old prefix."""
    state = {}
    for component, layers in lora.items():
        for name, (a, b) in layers.items():
            head, _, tail = name.rpartition(".to_")
            if component == "text_encoder":
                key = f"text_model.{name}.lora_linear_layer"
            elif head:
                key = f"{head}.processor.to_{tail.split('.')[0]}_lora"
            else:
                key = f"{name}.lora"
            state[f"{component}.{key}.down.weight"], state[f"{component}.{key}.up.weight"] = a, b
    return state


def kohya_format(lora: Lora, alpha: float = RANK) -> dict[str, Tensor]:
    """sd-scripts': underscores for dots, and alpha, so that the weights change by alpha/r B A."""
    state = {}
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
    for component, layers in lora.items():
        for name, (a, b) in layers.items():
            key = prefixes[component] + name.replace(".", "_")
            state[f"{key}.lora_down.weight"], state[f"{key}.lora_up.weight"] = a, b
            state[f"{key}.alpha"] = torch.tensor(float(alpha))
    return state


def test_a_lora_that_is_nowhere_is_named(both):
    before = draw(both[1])
    with pytest.raises(
        OSError, match="'runs/nothing' is no folder or file here, and the Hub does not give it"
    ):
        both[1].load_lora_weights("runs/nothing")
    assert np.array_equal(draw(both[1]), before)


FORMATS = {
    "peft": (peft_format, 1.0),
    "diffusers": (diffusers_format, 1.0),
    "kohya": (kohya_format, 1.0),
    "kohya, alpha half of r": (lambda lora: kohya_format(lora, RANK / 2), 0.5),
}


@pytest.mark.parametrize("name", FORMATS)
def test_format_draws_the_same_as_stable_diffusion_and_as_by_hand(both, tmp_path, name):
    convert, scale = FORMATS[name]
    lora = random_lora(both[0], 1)
    save_file(convert(lora), tmp_path / "style.safetensors")
    base, expected = draw(both[0]), draw(merged(both[0], (lora, scale)))
    unet_only = draw(merged(both[0], (lora, {"unet": scale, "text_encoder": 0.0})))
    assert np.abs(expected - base).max() > 0.01 and np.abs(expected - unet_only).max() > 0.01
    for pipe, source in ((both[0], tmp_path), (both[1], tmp_path / "style.safetensors")):
        pipe.load_lora_weights(source, adapter_name="style")
        assert pipe.get_list_adapters() == {"unet": ["style"], "text_encoder": ["style"]}
        assert close(draw(pipe), expected)
    print(f"{name}: {np.abs(draw(both[1]) - draw(both[0])).max():.1e}")


# ---------------------------------------------------------------- a life of two


def test_two_at_once_with_weights_from_loading_to_unloading(both):
    theirs, ours = both
    one, other = random_lora(theirs, 1), random_lora(theirs, 2)
    second = draw(merged(theirs, (other, 1.0)))
    weighted = draw(merged(theirs, (one, 0.7), (other, 0.2)))
    halved = draw(merged(theirs, (one, 0.35), (other, 0.1)))
    base, names = draw(ours), set(ours.unet.state_dict())
    for pipe in both:
        pipe.load_lora_weights(peft_format(one), adapter_name="one")
        pipe.load_lora_weights(kohya_format(other), adapter_name="other")
        pipe.set_adapters(["one", "other"], [0.7, 0.2])
        assert close(draw(pipe), weighted)
    assert np.abs(weighted - base).max() > 0.01 and np.abs(weighted - halved).max() > 0.01

    assert close(draw(ours, cross_attention_kwargs={"scale": 0.5}), halved)
    assert close(draw(theirs, cross_attention_kwargs={"scale": 0.5}), halved)
    assert close(draw(ours, cross_attention_kwargs={"scale": 0.0}), base)
    assert np.array_equal(draw(ours), draw(ours)) and close(draw(ours), weighted)

    ours.fuse_lora(adapter_names=["one", "other"])
    assert ours.fused_loras == {"one", "other"} and close(draw(ours), weighted)
    ours.disable_lora()  # unmerges what is merged
    assert close(draw(ours), base)
    ours.enable_lora()
    assert close(draw(ours), weighted)
    ours.fuse_lora(lora_scale=0.5)
    assert close(draw(ours), halved)
    ours.unfuse_lora(list(PARTS))
    ours.set_adapters("other")
    assert ours.get_active_adapters() == ["other"]
    assert close(draw(ours), second)

    ours.delete_adapters("one")
    assert ours.get_list_adapters() == {"unet": ["other"], "text_encoder": ["other"]}
    ours.unload_lora_weights()
    assert set(ours.unet.state_dict()) == names and close(draw(ours), base)


def test_fused_weights_are_the_weights_by_hand(both):
    """Fused and unloaded, the pipeline is a plain one: it can be saved, or handed on."""
    theirs, ours = both
    lora = random_lora(theirs, 1)
    by_hand = merged(ours, (lora, 0.6))
    ours.load_lora_weights(diffusers_format(lora))
    ours.fuse_lora(lora_scale=0.6)
    ours.unload_lora_weights()
    for part in PARTS:
        expected = getattr(by_hand, part).state_dict()
        for name, tensor in getattr(ours, part).state_dict().items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=name)
    assert close(draw(TextToImagePipeline.from_pipe(ours)), draw(by_hand))


@pytest.mark.parametrize(
    "weights",
    [
        {"unet": {"down": 0.5, "mid": 0.0, "up": {"block_0": [0.2, 1.3]}}, "text_encoder": 0.3},
        {"unet": {"up": 0.1}},
        {"text_encoder": 0.0},
    ],
    ids=str,
)
def test_weights_by_block_equal_stable_diffusions(both, weights):
    lora, pictures = random_lora(both[0], 1), []
    for pipe in both:
        pipe.load_lora_weights(peft_format(lora), adapter_name="style")
        plain = draw(pipe)
        pipe.set_adapters("style", weights)
        pictures.append(draw(pipe))
    assert close(*pictures) and np.abs(plain - pictures[1]).max() > 1e-3


def test_weights_need_no_common_number_of_layers(make_pipeline, make_unet):
    """Per-level `layers_per_block` is a key that adapters with one weight each must not stumble over."""
    pipe = make_pipeline(unet=make_unet(layers_per_block=[1, 2]))
    lora = {"unet": random_lora(pipe, 1)["unet"]}
    expected = draw(merged(pipe, (lora, 0.4)))
    pipe.load_lora_weights(peft_format(lora), adapter_name="style")
    pipe.set_adapters("style", 0.4)
    assert close(draw(pipe), expected)


def test_saved_lora_loads_in_both(both, tmp_path):
    theirs, ours = both
    ours.load_lora_weights(kohya_format(random_lora(ours, 1)))
    drawn = draw(ours)
    layers = {
        part: get_peft_model_state_dict(getattr(ours, part), adapter_name="default_0") for part in PARTS
    }
    TextToImagePipeline.save_lora_weights(tmp_path, layers["unet"], layers["text_encoder"])
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    ours.unload_lora_weights()
    for pipe in both:
        assert not close(draw(pipe), drawn)
        pipe.load_lora_weights(tmp_path)
        assert close(draw(pipe), drawn)


# ---------------------------------------------------------------- textual inversion


def test_textual_inversion_from_a_file_equals_stable_diffusions(both, tmp_path):
    vectors = torch.randn(3, 32, generator=seeded(4))
    save_file({"<corgi>": vectors}, tmp_path / "learned_embeds.safetensors")
    pictures = []
    for pipe in both:
        pipe.load_textual_inversion(tmp_path)
        call = {"num_inference_steps": 3, "output_type": "np", "negative_prompt": "<corgi>"}
        pictures.append(pipe("a <corgi> in a <corgi>", generator=seeded(), **call).images)
        pictures.append(pipe("a cat", generator=seeded(), **call | {"negative_prompt": None}).images)
    assert close(pictures[0], pictures[2]) and close(pictures[1], pictures[3])


def test_textual_inversion_of_known_words_is_those_words(
    make_pipeline, make_text_encoder, tokenizer, tmp_path
):
    """In pixels and a vocabulary of our own: a learned word whose vectors are those of two others."""
    pipe = make_pipeline(tokenizer=copy.deepcopy(tokenizer), text_encoder=make_text_encoder())
    words = [tokenizer(word).input_ids[1:-1] for word in ("old", "man")]
    assert [len(ids) for ids in words] == [1, 1]
    size = len(pipe.tokenizer)
    expected = pipe("an old man", generator=seeded(), output_type="np").images
    table = pipe.text_encoder.get_input_embeddings().weight
    learned = torch.stack([table[ids[0]].detach() for ids in words])
    pipe.load_textual_inversion({"<them>": learned})
    assert len(pipe.tokenizer) == size + 2
    drawn = pipe("an <them>", generator=seeded(), output_type="np").images
    assert close(drawn, expected)
    pipe.unload_textual_inversion()  # by name it leaves what diffusers calls <them>_1, the second vector
    assert len(pipe.tokenizer) == size
    assert not close(pipe("an <them>", generator=seeded(), output_type="np").images, expected)
    assert close(pipe("an old man", generator=seeded(), output_type="np").images, expected)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("load", ["load_lora_weights", "load_textual_inversion"])
def test_pickles_are_refused(pipeline, tmp_path, load):
    torch.save({"<corgi>": torch.zeros(32)}, tmp_path / "style.bin")
    for source, options in (
        (tmp_path, {}),
        (tmp_path, {"weight_name": "style.bin"}),
        (str(tmp_path / "style.bin"), {}),
        (str(tmp_path / "style.pt"), {}),
        (str(tmp_path.parent), {"subfolder": tmp_path.name}),
    ):
        with pytest.raises(ValueError, match=r"is a pickle.*save_file"):
            getattr(pipeline, load)(source, **options)
    with pytest.raises(ValueError, match="use_safetensors"):
        getattr(pipeline, load)(tmp_path, use_safetensors=False)


def test_pickle_beside_safetensors_is_not_read(both, tmp_path):
    """Nor where the safetensors file is damaged, which is when diffusers turns to the pickle."""
    lora, file = random_lora(both[1], 1), tmp_path / "pytorch_lora_weights.safetensors"
    torch.save(peft_format(random_lora(both[1], 2)), file.with_suffix(".bin"))
    save_file(peft_format(lora), file)
    expected = draw(merged(both[0], (lora, 1.0)))
    both[1].load_lora_weights(tmp_path)
    assert close(draw(both[1]), expected)
    both[1].unload_lora_weights()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(SafetensorError):
        both[1].load_lora_weights(tmp_path)
    assert both[1].get_list_adapters() == {}


def test_ip_adapter_is_refused_by_name(pipeline):
    with pytest.raises(NotImplementedError, match=r"load_ip_adapter.*StableDiffusionPipeline"):
        pipeline.load_ip_adapter("folder", subfolder="models", weight_name="ip-adapter.safetensors")
    for name in ("ip_adapter_image", "ip_adapter_image_embeds"):
        with pytest.raises(ValueError, match=rf"`{name}` is not supported"):
            pipeline(PROMPT, **{name: torch.zeros(1, 3, 8, 8)})


def test_adapters_are_not_carried_into_another_class(both):
    theirs, _ = both
    theirs.load_lora_weights(peft_format(random_lora(theirs, 1)), adapter_name="style")
    with pytest.raises(ValueError, match=r"\['style'\].*unload_lora_weights"):
        TextToImagePipeline.from_pipe(theirs)
    theirs.unload_lora_weights()
    assert isinstance(StableDiffusionPipeline.from_pipe(theirs), StableDiffusionPipeline)
    assert close(draw(TextToImagePipeline.from_pipe(theirs)), draw(theirs))


@pytest.mark.parametrize("scale", [0.5, 0.0])
def test_a_calls_scale_holds_for_that_call_alone(scale):
    """Also after an error, and after 0, by which nothing can be divided back."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0"]), model)
    with pytest.raises(RuntimeError, match="midway"), lora_scaled(model, scale):
        assert model[0].scaling == {"default": 3 * scale}
        raise RuntimeError("midway")
    assert model[0].scaling == {"default": 3.0}
    with lora_scaled(model, scale):
        assert model[0].scaling == {"default": 3 * scale}
    assert model[0].scaling == {"default": 3.0}
