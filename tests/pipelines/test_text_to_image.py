"""The pipeline against StableDiffusionPipeline, against loops by hand, and against its own promises."""

import copy
import inspect
import logging

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPImageProcessor

from pipelines import ConditionalUNet, DDPMScheduler, TextToImagePipeline
from pipelines.chain.guidance import guide
from pipelines.drawing.text import encode_text

PROMPT = "a corgi in a party hat"
LONG = " ".join(
    f"{word} corgi" for word in "red green blue white black brown pink grey gold tan big old new".split() * 2
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def count_rows(model: torch.nn.Module) -> list[int]:
    """Grows by the batch size of every forward pass."""
    rows: list[int] = []
    model.register_forward_hook(lambda _, inputs, output: rows.append(len(inputs[0])))
    return rows


def by_hand(
    pipe, prompts, *, scheduler, steps, scale, generator=None, interval=None, negative="", extra=None
):
    """Guided sampling written out, two separate U-Net passes, by `scheduler`. Returns latents."""

    def encode(texts):
        tokens = pipe.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        output = pipe.text_encoder(tokens.input_ids)
        return output.last_hidden_state, output.text_embeds

    extra = extra or (lambda pooled: None)
    cond, pooled = encode(prompts)
    uncond, negative_pooled = encode([negative] * len(prompts))
    scheduler.set_timesteps(steps)
    channels, size = pipe.unet.config.in_channels, pipe.unet.config.sample_size
    x = torch.randn(len(prompts), channels, size, size, generator=generator) * scheduler.init_noise_sigma
    kwargs = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    if isinstance(scheduler, diffusers.DDIMScheduler):
        kwargs["use_clipped_model_output"] = True  # pixels: eps of the x0 that was clipped
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        output = pipe.unet(scaled, t, cond, added_cond_kwargs=extra(pooled)).sample
        abar = scheduler.alphas_cumprod[int(t)].item()
        if scale != 1 and (interval is None or interval[0] < ((1 - abar) / abar) ** 0.5 <= interval[1]):
            without = pipe.unet(scaled, t, uncond, added_cond_kwargs=extra(negative_pooled)).sample
            output = (1 - scale) * without + scale * output
        x = scheduler.step(output, t, x, **kwargs).prev_sample
    return x


# ---------------------------------------------------------------- Stable Diffusion


CALLS = [
    ("PNDMScheduler", {}),
    ("PNDMScheduler", {"guidance_scale": 1.0}),
    ("DDIMScheduler", {"eta": 0.6, "num_images_per_prompt": 2}),
    ("DDIMScheduler", {"prompt": [PROMPT, "a cat"], "negative_prompt": ["blue", "a dog"], "eta": 1.0}),
    ("DDPMScheduler", {"guidance_rescale": 0.7, "prompt": [PROMPT, "a cat"]}),
    ("DDPMScheduler", {"timesteps": [900, 500, 100, 3]}),
    ("DPMSolverMultistepScheduler", {"negative_prompt": "blue", "height": 24, "width": 40}),
    ("UniPCMultistepScheduler", {"prompt": LONG}),
    ("EulerDiscreteScheduler", {"sigmas": [12.0, 4.0, 1.0, 0.2, 0.0]}),
    ("EulerAncestralDiscreteScheduler", {"num_images_per_prompt": 2, "generator": [1, 2]}),
    ("HeunDiscreteScheduler", {}),
    ("LCMScheduler", {}),
]


@pytest.mark.parametrize(
    "name, arguments", CALLS, ids=lambda value: value if isinstance(value, str) else str(list(value))
)
def test_pictures_equal_stable_diffusions(both, name, arguments):
    images = []
    for pipe in both:
        settings = {
            "prompt": PROMPT,
            "num_inference_steps": 5,
            "guidance_scale": 7.5,
            "generator": 0,
        } | arguments
        seeds = settings.pop("generator")
        settings["generator"] = [seeded(seed) for seed in seeds] if isinstance(seeds, list) else seeded(seeds)
        if "timesteps" in settings or "sigmas" in settings:
            del settings["num_inference_steps"]
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
        images.append(pipe(**settings, output_type="np").images)
    difference = np.abs(images[0] - images[1]).max()
    print(f"{name} {arguments}: {difference:.1e}")
    assert images[0].std() > 0.05 and images[0].shape == images[1].shape
    assert difference < 1e-4


def test_given_latents_and_embeddings_equal_stable_diffusions(both):
    latents = torch.randn(2, 4, 16, 16, generator=seeded(5))
    images = []
    for pipe in both:
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
        embeds, negative = pipe.encode_prompt(
            ["a cat", "a dog"], "cpu", 1, True, negative_prompt=["blue", "red"]
        )
        call = {"latents": latents, "prompt_embeds": embeds, "num_inference_steps": 4}
        images.append(pipe(**call, negative_prompt_embeds=negative, output_type="np").images)
        images.append(pipe(**call, output_type="np").images)  # the null prompt is the other side
    assert np.abs(images[0] - images[2]).max() < 1e-4 and np.abs(images[1] - images[3]).max() < 1e-4
    assert np.abs(images[0] - images[1]).max() > 1e-3


def test_model_that_takes_the_guidance_scale_as_input(both, make_unet):
    """Latent consistency models: one pass a step, the scale embedded (time_cond_proj_dim)."""
    state = make_unet(UNet2DConditionModel, in_channels=4, out_channels=4, time_cond_proj_dim=8).state_dict()
    images = {}
    for pipe, cls in zip(both, (UNet2DConditionModel, ConditionalUNet), strict=True):
        unet = make_unet(cls, in_channels=4, out_channels=4, time_cond_proj_dim=8)
        unet.load_state_dict(state)
        pipe = type(pipe)(**(pipe.components | {"unet": unet}), requires_safety_checker=False)
        pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
        rows = count_rows(unet)
        for scale in (1.5, 8.0):
            call = {"guidance_scale": scale, "generator": seeded(), "output_type": "np"}
            images[cls, scale] = pipe(PROMPT, num_inference_steps=4, **call).images
        assert rows == [1] * 8
    for scale in (1.5, 8.0):
        assert np.abs(images[ConditionalUNet, scale] - images[UNet2DConditionModel, scale]).max() < 1e-4
    assert np.abs(images[ConditionalUNet, 1.5] - images[ConditionalUNet, 8.0]).max() > 1e-4


def test_safety_checker_blackens_what_it_flags(both):
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config=vision | {"image_size": 16, "patch_size": 8}, projection_dim=8)
    checker = StableDiffusionSafetyChecker(config).eval()
    checker.concept_embeds.data.normal_()
    checker.special_care_embeds.data.normal_()
    extractor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    theirs, ours = (
        type(pipe)(**(pipe.components | {"safety_checker": checker, "feature_extractor": extractor}))
        for pipe in both
    )
    for threshold, flagged in ((-2.0, [True, True]), (2.0, [False, False])):
        checker.concept_embeds_weights.data.fill_(threshold)
        checker.special_care_embeds_weights.data.fill_(2.0)
        call = {"num_inference_steps": 2, "num_images_per_prompt": 2, "output_type": "np"}
        a, b = theirs(PROMPT, generator=seeded(), **call), ours(PROMPT, generator=seeded(), **call)
        assert a.nsfw_content_detected == b.nsfw_content_detected == flagged
        assert np.abs(a.images - b.images).max() < 1e-4
        assert (b.images.max() == 0) == flagged[0]
    with pytest.raises(ValueError, match="feature_extractor"):
        TextToImagePipeline(**(both[1].components | {"safety_checker": checker}))


def test_textual_inversion_equals_stable_diffusions(stable_diffusion_folder):
    """A learned word of two vectors takes two tokens' places."""
    images = []
    for cls in (StableDiffusionPipeline, TextToImagePipeline):
        pipe = cls.from_pretrained(stable_diffusion_folder)
        pipe.load_textual_inversion({"<corgi>": torch.randn(2, 32, generator=seeded())})
        for prompt in ("a <corgi> in a hat", "a corgi in a hat"):
            images.append(pipe(prompt, num_inference_steps=3, generator=seeded(), output_type="np").images)
    assert np.abs(images[0] - images[2]).max() < 1e-4 and np.abs(images[0] - images[1]).max() > 1e-3


# ---------------------------------------------------------------- pixels, against a loop by hand


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_pixels_equal_a_loop_by_hand(make_pipeline, scale):
    settings = {
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
    }
    pipe = make_pipeline(scheduler=DDPMScheduler(**settings))
    prompts = [PROMPT, "a cat", "the moon"]
    with torch.no_grad():
        reference = diffusers.DDPMScheduler(**settings)
        expected = by_hand(pipe, prompts, scheduler=reference, steps=6, scale=scale, generator=seeded())
    latents = pipe(
        prompts, guidance_scale=scale, num_inference_steps=6, generator=seeded(), output_type="latent"
    ).images
    assert torch.allclose(latents, expected, atol=1e-4), (latents - expected).abs().max()
    unit = (expected / 2 + 0.5).clamp(0, 1)
    outputs = {
        kind: pipe(
            prompts, guidance_scale=scale, num_inference_steps=6, generator=seeded(), output_type=kind
        ).images
        for kind in ("pt", "np", "pil")
    }
    torch.testing.assert_close(outputs["pt"], unit, atol=1e-4, rtol=0)
    np.testing.assert_allclose(outputs["np"], unit.permute(0, 2, 3, 1).numpy(), atol=1e-4)
    for image, pixels in zip(outputs["pil"], unit, strict=True):
        assert image.size == (16, 16)
        assert np.abs(np.array(image) - pixels.permute(1, 2, 0).numpy() * 255).max() < 0.55


def test_guidance_interval_skips_the_unconditional_pass(make_pipeline):
    pipe = make_pipeline()
    scheduler = diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
    pipe.scheduler = copy.deepcopy(scheduler)
    rows = count_rows(pipe.unet)
    call = {"num_inference_steps": 8, "guidance_scale": 5.0, "output_type": "latent"}
    inside = pipe(PROMPT, guidance_interval=(0.3, 3.0), generator=seeded(), **call).images
    seen = rows.copy()
    abar = scheduler.alphas_cumprod[[999, 874, 749, 624, 499, 374, 249, 124]]
    sigma = ((1 - abar) / abar).sqrt()
    assert seen == [2 if 0.3 < level <= 3.0 else 1 for level in sigma.tolist()] and 1 < seen.count(2) < 7
    with torch.no_grad():
        hand = by_hand(
            pipe, [PROMPT], scheduler=scheduler, steps=8, scale=5.0, generator=seeded(), interval=(0.3, 3.0)
        )
    assert torch.allclose(inside, hand, atol=1e-4)
    everywhere = pipe(PROMPT, guidance_interval=(0.0, float("inf")), generator=seeded(), **call).images
    assert torch.equal(everywhere, pipe(PROMPT, generator=seeded(), **call).images)
    assert (everywhere - inside).abs().max() > 1e-3


@pytest.mark.parametrize("scale, copies", [(0.0, 1), (1.0, 1), (1.01, 2), (7.5, 2)])
def test_guidance_off_is_one_pass(pipeline, make_unet, scale, copies):
    pipeline.unet = make_unet()
    rows = count_rows(pipeline.unet)
    pipeline([PROMPT, "a cat"], guidance_scale=scale, num_inference_steps=3)
    assert rows == [2 * copies] * 3


def test_folder_sets_the_defaults(pipeline):
    explicit = pipeline(
        PROMPT, num_inference_steps=5, guidance_scale=3.0, generator=seeded(), output_type="pt"
    ).images
    assert torch.equal(pipeline(PROMPT, generator=seeded(), output_type="pt").images, explicit)
    assert (
        pipeline.num_timesteps == 5
        and pipeline.guidance_scale == 3.0
        and pipeline.do_classifier_free_guidance
    )
    plain = inspect.signature(TextToImagePipeline.__init__).parameters
    assert (
        plain["default_guidance_scale"].default == 7.5 and plain["default_num_inference_steps"].default == 50
    )


# ---------------------------------------------------------------- seeds


@pytest.mark.parametrize(
    "scheduler", ["ours", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler"]
)
def test_a_seed_draws_the_same_picture_alone_and_among_eight(pipeline, scheduler):
    settings = {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    pipeline.scheduler = (DDPMScheduler if scheduler == "ours" else getattr(diffusers, scheduler))(**settings)
    prompts = [f"{animal} number {i}" for i, animal in enumerate("corgi cat owl fox bee ant cow pig".split())]
    call = {"num_inference_steps": 6, "output_type": "latent"}
    together = pipeline(prompts, generator=[seeded(10 + i) for i in range(8)], **call).images
    for i, prompt in enumerate(prompts):
        alone = pipeline(prompt, generator=seeded(10 + i), **call).images
        difference = (alone[0] - together[i]).abs().max().item()
        assert difference < 1e-4
    print(f"{scheduler}: {difference:.1e}")
    assert (together[0] - together[1]).abs().max() > 0.1


def test_pictures_of_a_prompt_stay_together(pipeline):
    call = {"num_inference_steps": 3, "output_type": "latent"}
    generators = [seeded(i) for i in range(4)]
    grid = pipeline(["a cat", "a dog"], num_images_per_prompt=2, generator=generators, **call).images
    for i, prompt in enumerate(["a cat", "a cat", "a dog", "a dog"]):
        alone = pipeline(prompt, generator=seeded(i), **call).images[0]
        assert torch.allclose(grid[i], alone, atol=1e-4)


# ---------------------------------------------------------------- models of our own


@pytest.mark.parametrize("feature", [{"pooled_text_time_embedding": True}, {"text_concat_channels": 4}])
def test_pooled_text_reaches_the_unet(make_pipeline, make_unet, feature):
    pipe = make_pipeline(unet=make_unet(pooled_text_dim=24, **feature))
    assert pipe.requires_pooled_text and not make_pipeline().requires_pooled_text
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing", prediction_type="v_prediction")
    pipe.scheduler = copy.deepcopy(scheduler)
    prompts = [PROMPT, "a cat"]
    with torch.no_grad():
        hand = by_hand(
            pipe,
            prompts,
            scheduler=scheduler,
            steps=4,
            scale=3.0,
            generator=seeded(),
            negative="blue",
            extra=lambda pooled: {"pooled_text": pooled},
        )
        states, pooled, _ = encode_text(pipe.tokenizer, pipe.text_encoder, prompts)
        negative, negative_pooled, _ = encode_text(pipe.tokenizer, pipe.text_encoder, ["blue"] * 2)
    call = {"num_inference_steps": 4, "output_type": "latent"}
    drawn = pipe(prompts, negative_prompt="blue", generator=seeded(), **call).images
    assert torch.allclose(drawn, hand, atol=1e-4)
    ready = {"prompt_embeds": states, "negative_prompt_embeds": negative}
    ready_pooled = {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": negative_pooled}
    assert torch.equal(pipe(**ready, **ready_pooled, generator=seeded(), **call).images, drawn)
    swapped = ready_pooled | {"pooled_prompt_embeds": pooled.flip(0)}
    assert (pipe(**ready, **swapped, generator=seeded(), **call).images - drawn).abs().max() > 1e-4
    for missing in ready_pooled:
        with pytest.raises(ValueError, match=missing):
            pipe(**ready, **(ready_pooled | {missing: None}))


def test_learned_variance_is_the_prompts_own(make_pipeline, make_unet):
    settings = {
        "variance_type": "learned_range",
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
    }
    pipe = make_pipeline(unet=make_unet(out_channels=6), scheduler=DDPMScheduler(**settings))
    drawn = pipe(
        PROMPT, guidance_scale=4.0, num_inference_steps=4, generator=seeded(), output_type="latent"
    ).images
    with torch.no_grad():
        cond, uncond = pipe.encode_prompt(PROMPT)
        scheduler, generator = DDPMScheduler(**settings), seeded()
        scheduler.set_timesteps(4)
        x = torch.randn(1, 3, 16, 16, generator=generator)
        for t in scheduler.timesteps:
            output, without = pipe.unet(x, t, cond).sample, pipe.unet(x, t, uncond).sample
            output = torch.cat([without[:, :3] + 4 * (output[:, :3] - without[:, :3]), output[:, 3:]], dim=1)
            x = scheduler.step(output, t, x, generator=generator).prev_sample
    assert torch.allclose(drawn, x, atol=1e-4)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
def test_schedulers_without_learned_variance_get_the_mean_alone(make_pipeline, make_unet, name):
    """`from_config` hands them variance_type = learned_range all the same."""
    learned = DDPMScheduler(
        variance_type="learned_range", timestep_spacing="trailing", prediction_type="v_prediction"
    )
    pipe = make_pipeline(unet=make_unet(out_channels=6))
    pipe.scheduler = getattr(diffusers, name).from_config(learned.config)
    call = {"num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "latent"}
    drawn = pipe(PROMPT, generator=seeded(), **call).images
    mean_only = make_unet()  # the same weights but for the last layer's variance rows
    state = pipe.unet.state_dict()
    mean_only.load_state_dict(state | {key: state[key][:3] for key in ("conv_out.weight", "conv_out.bias")})
    plain = make_pipeline(unet=mean_only)
    config = dict(learned.config) | {"variance_type": None}
    plain.scheduler = getattr(diffusers, name).from_config(config)
    assert torch.allclose(drawn, plain(PROMPT, generator=seeded(), **call).images, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "LCMScheduler"]
)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_self_conditioning_feeds_back_the_last_x0(make_pipeline, make_unet, name, kind):
    """Zeros first, then x0 computed here from the output at the noise level add_noise gives."""
    make_scheduler = getattr(diffusers, name)
    settings = {"timestep_spacing": "trailing", "prediction_type": kind}
    if "clip_sample" in inspect.signature(make_scheduler.__init__).parameters:
        settings["clip_sample"] = False
    pipe = make_pipeline(unet=make_unet(self_conditioning=True), scheduler=make_scheduler(**settings))
    seen: list[torch.Tensor] = []
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []

    def record(module, args, kwargs, output):
        seen.append(kwargs["added_cond_kwargs"]["x0_self"].clone())
        inputs.append(args[0])
        outputs.append(output[0])

    pipe.unet.register_forward_hook(record, with_kwargs=True)
    pipe(PROMPT, num_inference_steps=4, guidance_scale=3.0, generator=seeded())
    scheduler = make_scheduler(**settings)
    scheduler.set_timesteps(4)
    assert not seen[0].any() and len(seen) == 4
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for i in range(3):
        t = scheduler.timesteps[i]
        scale, noise = (scheduler.add_noise(*pair, t[None]).item() for pair in ((one, zero), (zero, one)))
        root_abar, root_rest = scale / (scale**2 + noise**2) ** 0.5, noise / (scale**2 + noise**2) ** 0.5
        x = inputs[i][:1]  # as the U-Net sees it: unit variance in every scheduler
        output = outputs[i][:1] + 3 * (outputs[i][1:] - outputs[i][:1])
        x0 = {
            "epsilon": (x - root_rest * output) / root_abar,
            "v_prediction": root_abar * x - root_rest * output,
            "sample": output,
        }[kind]
        if name == "LCMScheduler":  # its boundary conditions mix x0 with x (Luo et al. 2023)
            out = 0.25 / ((t * 10) ** 2 + 0.25), (t * 10) / ((t * 10) ** 2 + 0.25) ** 0.5
            x0 = out[0] * x + out[1] * x0
        assert torch.equal(seen[i + 1][0], seen[i + 1][1])
        torch.testing.assert_close(seen[i + 1][:1], x0.float(), atol=1e-4, rtol=1e-3)


# ---------------------------------------------------------------- diffusers' contracts


def test_a_long_prompt_is_cut_with_a_warning_that_shows_the_cut(pipeline, tokenizer, caplog):
    ids = tokenizer(LONG).input_ids
    kept, cut = tokenizer.decode(ids[1:31]), tokenizer.decode(ids[31:-1])
    assert len(cut) > 20 and LONG == f"{kept} {cut}"
    caplog.clear()  # of transformers' warning to us for not cutting
    with caplog.at_level(logging.WARNING):
        long = pipeline(LONG, generator=seeded(), output_type="pt").images
    assert len(caplog.records) == 1 and repr(cut) in caplog.text and "32 tokens" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        short = pipeline(kept, generator=seeded(), output_type="pt").images
    assert torch.equal(long, short) and not caplog.records


def test_encode_prompt_works_in_isolation(make_pipeline):
    """As diffusers' common test asks: encode with a text-only pipeline, draw with one that has no text."""
    full = make_pipeline()
    text_only = TextToImagePipeline(full.tokenizer, full.text_encoder, None, None)
    blind = make_pipeline(tokenizer=None, text_encoder=None)
    source = inspect.getsource(TextToImagePipeline.encode_prompt)
    assert source.rstrip().endswith("return prompt_embeds, negative_prompt_embeds")
    with torch.no_grad():
        embeds, negative = text_only.encode_prompt([PROMPT, "a cat"], "cpu", 1, True, negative_prompt="blue")
    given = blind(
        prompt_embeds=embeds,
        negative_prompt_embeds=negative,
        num_images_per_prompt=2,
        generator=seeded(),
        output_type="pt",
    ).images
    call = {"negative_prompt": "blue", "num_images_per_prompt": 2, "output_type": "pt"}
    assert torch.equal(given, full([PROMPT, "a cat"], generator=seeded(), **call).images)
    with pytest.raises(ValueError, match="text encoder"):
        blind(PROMPT)
    with pytest.raises(ValueError, match="text encoder"):
        blind(prompt_embeds=embeds)


def test_arguments_come_in_stable_diffusions_order():
    theirs = list(inspect.signature(StableDiffusionPipeline.__call__).parameters)
    ours = list(inspect.signature(TextToImagePipeline.__call__).parameters)
    theirs.remove("kwargs")
    assert ours[: len(theirs)] == theirs
    assert ours[len(theirs) :] == [
        "guidance_interval",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
        "clip_guidance_scale",
        "clip_guidance",
        "clip_guidance_cut_outs",
        "clip_guidance_through_unet",
        "classifier_guidance_scale",
        "class_labels",
        "combined_prompts",
        "num_candidates",
    ]
    assert TextToImagePipeline._callback_tensor_inputs == StableDiffusionPipeline._callback_tensor_inputs
    assert list(inspect.signature(TextToImagePipeline.encode_prompt).parameters) == list(
        inspect.signature(StableDiffusionPipeline.encode_prompt).parameters
    )


def test_callback_sees_and_replaces_tensors(pipeline):
    names = TextToImagePipeline._callback_tensor_inputs
    calls = []

    def callback(pipe, i, t, tensors):
        calls.append((i, int(t), sorted(tensors), tensors["prompt_embeds"].shape[0]))
        return {"latents": torch.zeros_like(tensors["latents"])} if i == 4 else tensors

    result = pipeline(
        PROMPT, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names, output_type="latent"
    )
    assert calls == [(i, t, sorted(names), 2) for i, t in enumerate([999, 799, 599, 399, 199])]
    assert not result.images.any() and result.nsfw_content_detected is None
    images, flagged = pipeline(PROMPT, return_dict=False, output_type="np")
    assert images.shape == (1, 16, 16, 3) and flagged is None


def test_callback_may_switch_guidance_off_midway(pipeline, make_unet):
    """The idiom of diffusers' own documentation: keep the prompt's half of the embeddings."""
    pipeline.unet = make_unet()
    rows = count_rows(pipeline.unet)

    def switch_off(pipe, i, t, tensors):
        if i == 1:
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
            pipe._guidance_scale = 0.0
        return tensors

    call = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"], "output_type": "latent"}
    drawn = pipeline(PROMPT, callback_on_step_end=switch_off, generator=seeded(), **call).images
    assert rows == [2, 2, 1, 1, 1]
    pipeline.scheduler.set_timesteps(5)
    abar = pipeline.scheduler.alphas_cumprod[
        [799, 599]
    ]  # an interval that ends between the two says the same
    lo = ((1 - abar) / abar).sqrt().mean().item()
    same = pipeline(
        PROMPT, guidance_interval=(lo, float("inf")), generator=seeded(), output_type="latent"
    ).images
    assert torch.equal(drawn, same)


def test_a_callbacks_text_is_read_from_the_next_step_on(pipeline, make_unet):
    pipeline.unet, read = make_unet(), []
    hook = lambda module, args, kwargs: read.append(kwargs["encoder_hidden_states"].clone())  # noqa: E731
    pipeline.unet.register_forward_pre_hook(hook, with_kwargs=True)
    own, other = (torch.cat(pipeline.encode_prompt(prompt)[::-1]) for prompt in (PROMPT, "a cat"))

    def replace(pipe, i, t, tensors):
        return {"prompt_embeds": other} if i == 2 else {}

    pipeline(PROMPT, callback_on_step_end=replace, output_type="latent")
    expected = [own, own, own, other, other]
    for step, (rows, wanted) in enumerate(zip(read, expected, strict=True)):
        torch.testing.assert_close(rows, wanted, msg=f"step {step}")


def test_a_callback_may_rescale_the_steps_that_follow(make_pipeline):
    pipe, kept = make_pipeline(scheduler=diffusers.DDIMScheduler(clip_sample=False)), {}

    def change(pipe, i, t, tensors):
        kept[i] = t, tensors["latents"]
        pipe._guidance_rescale = 0.7
        return {}

    call = {"num_inference_steps": 2, "guidance_scale": 300.0, "generator": seeded(), "output_type": "latent"}
    drawn = pipe(PROMPT, callback_on_step_end=change, **call).images
    states, negative = pipe.encode_prompt(PROMPT)
    (_, x), (t, _) = kept[0], kept[1]
    with torch.no_grad():
        output = pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=torch.cat([negative, states])).sample
    plain, rescaled = (guide(output, 3, 300.0, phi) for phi in (0.0, 0.7))
    torch.testing.assert_close(drawn, pipe.scheduler.step(rescaled, t, x).prev_sample, atol=1e-4, rtol=1e-4)
    assert (plain - rescaled).abs().max() > 0.01  # or this shows nothing


def test_interrupt_stops_the_loop(pipeline, make_unet):
    pipeline.unet = make_unet()
    rows = count_rows(pipeline.unet)
    kept = {}

    def stop(pipe, i, t, tensors):
        kept[i] = tensors["latents"].clone()
        pipe._interrupt = i == 2
        return tensors

    drawn = pipeline(PROMPT, callback_on_step_end=stop, output_type="latent").images
    assert len(rows) == 3 and torch.equal(drawn, kept[2])


def test_progress_bar_counts_the_steps(pipeline, capsys):
    for name, steps in (("DDIMScheduler", 7), ("HeunDiscreteScheduler", 4)):
        pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=False)
        pipeline(PROMPT, num_inference_steps=steps)
        assert f"{steps}/{steps}" in capsys.readouterr().err


def embeds(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


BAD = {
    "nothing to draw": {"prompt": None},
    "prompt and embeddings": {"prompt_embeds": embeds(1, 32, 32)},
    "prompt of another type": {"prompt": 3},
    "no prompts": {"prompt": []},
    "prompts of another type": {"prompt": ["a", None]},
    "negative of another type": {"negative_prompt": ("a",)},
    "two negatives": {"negative_prompt": "a", "negative_prompt_embeds": embeds(1, 32, 32)},
    "too few negatives": {"prompt": ["a", "b"], "negative_prompt": ["c"]},
    "embeddings of rank 2": {"prompt": None, "prompt_embeds": embeds(1, 32)},
    "embeddings of another shape": {
        "prompt": None,
        "prompt_embeds": embeds(1, 32, 32),
        "negative_prompt_embeds": embeds(1, 31, 32),
    },
    "embeddings longer than the null prompt can be": {"prompt": None, "prompt_embeds": embeds(1, 40, 32)},
    "negative embeddings shorter than the prompt": {"negative_prompt_embeds": embeds(1, 8, 32)},
    "negative embeddings for other prompts": {"negative_prompt_embeds": embeds(3, 32, 32)},
    "embeddings of no prompt": {"prompt": None, "prompt_embeds": embeds(0, 32, 32)},
    "pooled of rank 3": {"pooled_prompt_embeds": embeds(1, 1, 24)},
    "height 0": {"height": 0},
    "height not in patches": {"height": 17},
    "width not whole": {"width": 16.0},
    "steps 0": {"num_inference_steps": 0},
    "steps negative": {"num_inference_steps": -3},
    "steps not whole": {"num_inference_steps": 2.5},
    "steps beyond training": {"num_inference_steps": 1001},
    "timesteps and sigmas": {"timesteps": [9, 3], "sigmas": [2.0, 1.0]},
    "timesteps ascending": {"timesteps": [3, 9]},
    "sigmas to a scheduler of timesteps": {"sigmas": [2.0, 1.0]},
    "guidance negative": {"guidance_scale": -1.0},
    "guidance nan": {"guidance_scale": float("nan")},
    "guidance infinite": {"guidance_scale": float("inf")},
    "guidance of another type": {"guidance_scale": "7"},
    "no pictures": {"num_images_per_prompt": 0},
    "eta above 1": {"eta": 1.5},
    "rescale negative": {"guidance_rescale": -0.1},
    "generators for other pictures": {"generator": [seeded(), seeded()]},
    "a seed for a generator": {"generator": 3},
    "latents of another shape": {"latents": embeds(1, 3, 8, 8)},
    "latents of another batch": {"latents": embeds(2, 3, 16, 16)},
    "output type unknown": {"output_type": "jpeg"},
    "attention arguments of another type": {"cross_attention_kwargs": [1]},
    "attention arguments unknown": {"cross_attention_kwargs": {"scale": 1.0, "gligen": {}}},
    "strength of LoRAs not a number": {"cross_attention_kwargs": {"scale": "0.5"}},
    "picture prompt": {"ip_adapter_image": embeds(1, 3, 16, 16)},
    "clip_skip negative": {"clip_skip": -1},
    "clip_skip beyond the layers": {"clip_skip": 4},
    "callback not callable": {"callback_on_step_end": 3},
    "callback tensor unknown": {"callback_on_step_end_tensor_inputs": ["latents", "noise"]},
    "interval of one": {"guidance_interval": (1.0,)},
    "interval backwards": {"guidance_interval": (2.0, 1.0)},
    "interval below 0": {"guidance_interval": (-1.0, 1.0)},
}


@pytest.mark.parametrize("arguments", BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_refused_before_any_work(make_pipeline, make_unet, make_text_encoder, arguments):
    pipe = make_pipeline(unet=make_unet(patch_size=2), text_encoder=make_text_encoder())
    passes = count_rows(pipe.unet), count_rows(pipe.text_encoder)
    state = torch.get_rng_state()
    with pytest.raises(ValueError) as refusal:
        pipe(**({"prompt": PROMPT} | arguments))
    assert passes == ([], []) and torch.equal(torch.get_rng_state(), state)
    assert 10 < len(str(refusal.value)) < 400


def test_a_unet_of_another_task_is_refused(make_pipeline, make_unet):
    inpainting = make_pipeline(unet=make_unet(in_channels=7))
    with pytest.raises(ValueError, match="7 to 3 channels"):
        inpainting(PROMPT)


def test_latents_have_the_vaes_size(both):
    _, ours = both
    assert ours.vae_scale_factor == 2 and isinstance(ours.vae, AutoencoderKL)
    drawn = ours(PROMPT, num_inference_steps=1, height=20, width=36, output_type="latent").images
    assert drawn.shape == (1, 4, 10, 18)
    with pytest.raises(ValueError, match="a positive multiple of 2; the nearest is 20, got 21"):
        ours(PROMPT, height=21)
