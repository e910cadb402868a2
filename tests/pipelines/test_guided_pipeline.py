"""Classifier and CLIP guidance, combined and weighted prompts, and best of n, in the pipeline."""

import functools
import math

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler

from pipelines import DDPMScheduler, TextToImagePipeline
from pipelines.chain.guidance import cut_outs
from pipelines.components.guidance_clip import GuidanceCLIP
from pipelines.components.noisy_classifier import NoisyClassifier
from pipelines.components.noisy_clip import NoisyCLIP
from pipelines.drawing.text import encode_text, encode_weighted_text, split_weights

PROMPT = "a corgi in a party hat"
LABELS = ["animals", "food", "flags"]
NOISED = {"clip_guidance_scale": 40.0}
CLEAN = {"clip_guidance_scale": 40.0, "clip_guidance": "clean", "clip_guidance_cut_outs": 3}
CLASS = {"classifier_guidance_scale": 60.0, "class_labels": "food"}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def guided(make_pipeline, guides) -> TextToImagePipeline:
    return make_pipeline(**guides)


def draw(pipe, **call) -> torch.Tensor:
    call = {"prompt": PROMPT, "output_type": "latent", "generator": seeded(), "guidance_scale": 3.0} | call
    return pipe(**call).images


# ---- against loops by hand


def by_hand(pipe, scheduler, score, scale=3.0, steps=5, ancestral=True, prompt=PROMPT):
    """Guided sampling written out; `score` (x_t, t, eps of CFG as a function of x_t) -> summed s * score."""
    with torch.no_grad():
        cond, uncond = pipe.encode_prompt(prompt)
    scheduler.set_timesteps(steps)
    generator = seeded()
    channels = pipe.unet.config.in_channels
    latents = torch.randn(1, channels, 16, 16, generator=generator) * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.scale_model_input(latents, t).clone().requires_grad_()

        def eps_of(x, t=t):
            return scale * pipe.unet(x, t, cond).sample + (1 - scale) * pipe.unet(x, t, uncond).sample

        abar = scheduler.alphas_cumprod[int(t)] if not hasattr(scheduler, "sigmas") else None
        if abar is None:
            abar = 1 / (1 + scheduler.sigmas[i] ** 2)
        (gradient,) = torch.autograd.grad(score(x, t, eps_of, float(abar)), x)
        with torch.no_grad():
            eps = eps_of(x)
            if not ancestral:
                eps = eps - (1 - abar).sqrt() * gradient
                clips = {"use_clipped_model_output": True} if type(scheduler) is DDIMScheduler else {}
                latents = scheduler.step(eps, t, latents, **clips).prev_sample
                continue
            if type(scheduler) is DDIMScheduler:  # the prediction's own step, then DDPM's shift
                variance = scheduler._get_variance(t, t - 1000 // steps)
                latents = scheduler.step(eps, t, latents, use_clipped_model_output=True).prev_sample
                latents = latents + variance * gradient
                continue
            variance = scheduler._get_variance(t) if i < steps - 1 else 0.0
            latents = scheduler.step(eps, t, latents, generator=generator).prev_sample + variance * gradient
    return latents


def clip_score_of(pipe, scale):
    with torch.no_grad():
        text = F.normalize(encode_text(pipe.tokenizer, pipe.text_encoder, [PROMPT])[1], dim=-1)
    return lambda x, t: scale * (pipe.noisy_clip(x, t) * text).sum() * pipe.noisy_clip.logit_scale.exp()


def class_score_of(pipe, scale):
    return lambda x, t: scale * F.log_softmax(pipe.noisy_classifier(x, t), dim=-1)[0, 1]


SCHEDULERS = {
    "ours": (DDPMScheduler, diffusers.DDPMScheduler, True),
    "ours without noise": (functools.partial(DDPMScheduler, eta=0.0), DDIMScheduler, True),
    "DDIM": (DDIMScheduler, DDIMScheduler, False),
    "Euler": (EulerDiscreteScheduler, EulerDiscreteScheduler, False),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_noised_clip_and_classifier_guidance_together_equal_a_loop_by_hand(guided, name):
    cls, reference, ancestral = SCHEDULERS[name]
    settings = {
        "timestep_spacing": "trailing"
    }  # with the cosine's, Euler starts at 20,000 times unit variance
    guided.scheduler = cls(**settings)
    drawn = draw(guided, **NOISED, **CLASS)
    clip, classify = clip_score_of(guided, 40.0), class_score_of(guided, 60.0)
    hand = by_hand(
        guided, reference(**settings), lambda x, t, *_: clip(x, t) + classify(x, t), ancestral=ancestral
    )
    assert (drawn - draw(guided)).abs().max() > 0.01
    torch.testing.assert_close(drawn, hand, atol=2e-4, rtol=1e-3)


def two_questions(guided, **settings) -> tuple[NoisyClassifier, NoisyClassifier]:
    """A classifier of three groups and of two styles, and one without sets that has its weights."""
    torch.manual_seed(6)
    shared = {
        "labels": ["cat", "dog", "owl", "flat", "round"], "sample_size": 16, "patch_size": 2,
        "block_out_channels": (8, 16), "norm_num_groups": 4, "heads": 2,
    }  # fmt: skip
    plain = NoisyClassifier(**shared)
    for parameter in plain.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    both = NoisyClassifier(**shared, label_sets=[3, 2], **settings)
    both.load_state_dict(plain.state_dict())
    return both.eval(), plain.eval()


def test_each_set_of_labels_has_probabilities_of_its_own(guided, tmp_path):
    both, plain = two_questions(guided, timestep_limits=[1000, 400])
    x, t = torch.randn(4, 3, 16, 16, generator=seeded()), torch.tensor([0, 399, 400, 999])
    with torch.no_grad():
        found, logits = both(x, t).exp(), plain(x, t)
    torch.testing.assert_close(found[:, :3], logits[:, :3].softmax(1))
    torch.testing.assert_close(found[:2, 3:], logits[:2, 3:].softmax(1))
    torch.testing.assert_close(found[2:, 3:], torch.full((2, 2), 0.5))
    both.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(NoisyClassifier.from_pretrained(tmp_path)(x, t).exp(), found)
    for settings, message in (
        ({"label_sets": [3, 1]}, r"label_sets must sum to 2, the labels, got \(3, 1\)"),
        ({"timestep_limits": [3, 1]}, r"timestep_limits must be one for each set, got \(3, 1\)"),
        ({"ensemble": 0}, "ensemble must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            NoisyClassifier(labels=["a", "b"], **settings)


def test_an_ensemble_answers_each_question_with_the_geometric_mean(guided, tmp_path):
    """Of its networks' own probabilities, set by set; the gradient of log p(flat) too; and it comes back."""
    both, _ = two_questions(guided, timestep_limits=[1000, 400])
    settings = {key: value for key, value in both.config.items() if key[0] != "_"}
    joined = NoisyClassifier(**{**settings, "ensemble": 2}).eval()
    joined.load_state_dict(both.state_dict(), strict=False)
    second = NoisyClassifier(**settings).eval()
    second.load_state_dict(joined.others[0].state_dict())
    x, t = torch.randn(4, 3, 16, 16, generator=seeded()), torch.tensor([0, 399, 400, 999])
    a, b = (x.clone().requires_grad_(), x.clone().requires_grad_())
    found = joined(a, t)
    root = ((both(b, t) + second(b, t)) / 2).exp()
    parts = torch.cat([root[:, :3] / root[:, :3].sum(1, True), root[:, 3:] / root[:, 3:].sum(1, True)], dim=1)
    assert (both(x, t).exp() - second(x, t).exp()).abs().max() > 0.05
    torch.testing.assert_close(found.exp(), parts)
    found[:, 3].sum().backward()
    parts[:, 3].log().sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    assert a.grad[:2].abs().min(0).values.max() > 0 and not a.grad[2:].any()
    joined.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(NoisyClassifier.from_pretrained(tmp_path).eval()(x, t), found)


@pytest.mark.parametrize(("label", "among"), [("dog", slice(0, 3)), ("round", slice(3, 5))])
def test_guidance_to_a_class_of_a_set(guided, label, among):
    """Against a loop by hand that knows the labels of that set alone, and, of styles, t below 400 alone."""
    both, plain = two_questions(guided, timestep_limits=[1000, 400])
    guided.register_modules(noisy_classifier=both)
    place = both.config.labels[among].index(label)

    def classify(x, t, *_):
        if label == "round" and int(t) >= 400:
            return 0 * x.sum((1, 2, 3))
        return 60.0 * plain(x, t)[:, among].log_softmax(1)[:, place]

    cls, reference, ancestral = SCHEDULERS["ours without noise"]
    guided.scheduler = cls(timestep_spacing="trailing")
    drawn = draw(guided, classifier_guidance_scale=60.0, class_labels=label)
    assert (drawn - draw(guided)).abs().max() > 0.01
    hand = by_hand(guided, reference(timestep_spacing="trailing"), classify, ancestral=ancestral)
    torch.testing.assert_close(drawn, hand, atol=2e-4, rtol=1e-3)


def test_a_classifier_moves_the_predicted_noise_by_no_more_than_its_limit(guided):
    """By hand, with the limit on eps, by deterministic steps of diffusers, whose place for it is eps."""
    both, plain = two_questions(guided)
    limited, _ = two_questions(guided, guidance_limit=0.6)
    guided.scheduler = DDIMScheduler(timestep_spacing="trailing")
    sizes = []

    def classify(x, t, *_):
        abar = float(guided.scheduler.alphas_cumprod[int(t)])
        score = 300.0 * plain(x, t)[:, :3].log_softmax(1)[:, 1]
        (gradient,) = torch.autograd.grad(score.sum(), x, retain_graph=True)
        size = (1 - abar) ** 0.5 * gradient.square().mean((1, 2, 3)).sqrt()
        sizes.extend(size.tolist())
        return score * (0.6 / size).clamp(max=1.0).detach()

    call = {"classifier_guidance_scale": 300.0, "class_labels": "dog"}
    guided.register_modules(noisy_classifier=limited)
    drawn = draw(guided, **call)
    hand = by_hand(guided, DDIMScheduler(timestep_spacing="trailing"), classify, ancestral=False)
    torch.testing.assert_close(drawn, hand, atol=5e-4, rtol=1e-3)
    assert min(sizes) < 0.6 < max(sizes)
    guided.register_modules(noisy_classifier=both)
    assert (draw(guided, **call) - drawn).abs().max() > 0.1


def test_the_folders_own_clip_guidance(make_pipeline, guides, tmp_path):
    """It is on where neither scale is said, there is a noised CLIP, and that sees what is drawn."""
    make_pipeline(default_clip_guidance_scale=40.0, **guides).save_pretrained(tmp_path)
    pipe = TextToImagePipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)

    def drawn(**call):
        call = {"prompt": PROMPT, "output_type": "latent", "generator": seeded()} | call
        return pipe(**call).images, pipe.clip_guidance_scale

    own, both, plain = drawn(), drawn(guidance_scale=3.0, **NOISED), drawn(clip_guidance_scale=0.0)
    assert torch.equal(own[0], both[0]) and own[1] == both[1] == 40.0
    assert (own[0] - plain[0]).abs().max() > 0.01 and plain[1] == 0.0
    assert torch.equal(drawn(guidance_scale=3.0)[0], plain[0])
    assert torch.equal(drawn(clip_guidance="clean")[0], plain[0])
    large = {"height": 20, "width": 20}
    assert torch.equal(drawn(**large)[0], drawn(clip_guidance_scale=0.0, **large)[0])
    embeds, negative = pipe.encode_prompt(PROMPT)
    ready = {"prompt": None, "prompt_embeds": embeds, "negative_prompt_embeds": negative}
    assert drawn(**ready)[1] == 0.0
    pipe.register_modules(noisy_clip=None)
    assert torch.equal(drawn()[0], plain[0])


def clean_score_of(pipe, scale, through, decode):
    clip = pipe.clip_guidance_model
    text = clip.embed_texts([PROMPT])

    def score(x, t, eps_of, abar):
        eps = eps_of(x) if through else eps_of(x).detach()
        x0 = (x - (1 - abar) ** 0.5 * eps) / abar**0.5
        if not through:
            x0 = x0.detach() + abar**0.5 * (x - x.detach())
        pixels = decode(x0)
        pixels = pixels + (pixels.clamp(-1, 1) - pixels).detach()
        views = cut_outs(pixels, 3, 8, int(t))
        own = [clip.model.get_image_features(pixel_values=v).pooler_output for v in views]
        similar = sum((F.normalize(view, dim=-1) * text).sum() for view in own) / 3
        return scale * clip.model.logit_scale.exp() * similar

    return score


@pytest.mark.parametrize("through", [False, True])
def test_clean_clip_guidance_equals_a_loop_by_hand(guided, through):
    settings = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"}
    drawn = draw(guided, **CLEAN, clip_guidance_through_unet=through)
    score = clean_score_of(guided, 40.0, through, lambda x0: x0)
    hand = by_hand(guided, diffusers.DDPMScheduler(**settings), score)
    assert (drawn - draw(guided)).abs().max() > 1e-3
    torch.testing.assert_close(drawn, hand, atol=5e-4, rtol=1e-3)


def test_in_latents_the_clean_clip_sees_what_the_vae_decodes(make_pipeline, make_unet, guides):
    torch.manual_seed(3)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, scaling_factor=0.5,
    ).eval()  # fmt: skip
    settings = {"clip_sample": False, "timestep_spacing": "trailing"}
    parts = {"unet": make_unet(in_channels=4, out_channels=4), "scheduler": DDPMScheduler(**settings)}
    pipe = make_pipeline(vae=vae, clip_guidance_model=guides["clip_guidance_model"], **parts)
    drawn = draw(pipe, **(CLEAN | {"clip_guidance_scale": 1e4}))
    score = clean_score_of(pipe, 1e4, False, lambda x0: vae.decode(x0 / 0.5).sample)
    hand = by_hand(pipe, diffusers.DDPMScheduler(**settings), score)
    assert (drawn - draw(pipe)).abs().max() > 0.1
    torch.testing.assert_close(drawn, hand, atol=1e-2, rtol=1e-2)


def test_cut_outs_are_squares_of_the_picture():
    ramp = torch.arange(24.0).expand(2, 3, 16, 24).clone()  # value = column
    views = cut_outs(ramp, 40, 8, seed=3)
    assert views.shape == (40, 2, 3, 8, 8) and torch.equal(views, cut_outs(ramp, 40, 8, seed=3))
    assert not torch.equal(views, cut_outs(ramp, 40, 8, seed=4))
    torch.testing.assert_close(
        views[0], F.interpolate(ramp, (8, 8), mode="bilinear", antialias=True)
    )  # the whole
    slopes = (views[1:, 0, 0, 0, 5] - views[1:, 0, 0, 0, 2]) / 3 * 8  # columns seen by a view
    assert (
        slopes.min() > 7 and slopes.max() < 17 and slopes.std() > 1
    )  # between half the height and all of it
    left = views[1:, 0, 0, 0, 0]
    assert left.min() < 3 and left.max() > 8


# ---- batches, precision, passes


def test_a_guided_picture_depends_on_its_own_seed_alone(guided):
    prompts, labels = [PROMPT, "a cat", "the moon"], ["food", 0, "flags"]
    for form in (NOISED | {"classifier_guidance_scale": 60.0}, CLEAN | {"classifier_guidance_scale": 60.0}):
        generators = [seeded(i) for i in range(3)]
        together = draw(guided, prompt=prompts, class_labels=labels, generator=generators, **form)
        for i, prompt in enumerate(prompts):
            alone = draw(guided, prompt=prompt, class_labels=labels[i], generator=[seeded(i)], **form)
            torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("form", [NOISED, CLEAN, CLASS], ids=["noised", "clean", "class"])
def test_all_pictures_of_a_prompt_are_guided_by_its_own_words_and_class(guided, form):
    labels = ["food", "flags"] if form == CLASS else [None, None]
    call = form | {"num_images_per_prompt": 2, "num_inference_steps": 2}
    generators, prompts = [seeded(i) for i in range(4)], [PROMPT, "a cat"]
    given = {"class_labels": labels} if form == CLASS else {}
    together = draw(guided, prompt=prompts, generator=generators, **(call | given))
    for i, prompt in enumerate(prompts):
        pair = [seeded(2 * i), seeded(2 * i + 1)]
        alone = draw(guided, prompt=prompt, generator=pair, **(call | {"class_labels": labels[i]}))
        torch.testing.assert_close(together[2 * i : 2 * i + 2], alone, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("form", [NOISED, CLEAN | {"clip_guidance_through_unet": True}, CLASS], ids=str)
def test_autocast_draws_about_the_same(guided, form):
    exact, plain = draw(guided, **form), draw(guided)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = draw(guided, **form)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).abs().mean() < 0.2 * (exact - plain).abs().mean() + 0.02


@pytest.mark.parametrize(
    ("call", "rows"),
    [
        ({"guidance_scale": 1.0} | NOISED, [1]),
        (NOISED | CLASS, [2]),
        (CLEAN, [2]),
        ({"guidance_scale": 1.0} | CLEAN | {"clip_guidance_through_unet": True}, [1]),
        ({"combined_prompts": {"a cat": 0.5, "blue": -1.0}}, [4]),
        ({"num_candidates": 3}, [6]),
        ({}, [2]),
        ({"guidance_scale": 1.0}, [1]),
    ],
)
def test_each_step_runs_one_unet_pass(guided, make_unet, call, rows):
    guided.unet = make_unet()
    seen: list[int] = []
    guided.unet.register_forward_hook(lambda _, inputs, output: seen.append(len(inputs[0])))
    draw(guided, **call)
    assert seen == rows * 5


def test_the_interval_holds_for_gradients_too(guided):
    calls = []
    hook = guided.noisy_clip.register_forward_hook(lambda *_: calls.append(1))
    outside = draw(guided, **NOISED, guidance_interval=(1e6, 1e7))
    assert torch.equal(outside, draw(guided, guidance_scale=1.0)) and not calls
    draw(guided, **NOISED, guidance_interval=(0.5, 5.0))
    hook.remove()
    assert 0 < len(calls) < 5


def test_dynamic_thresholding_is_the_schedulers(make_pipeline):
    """Imagen's, by diffusers' own class; sample_max_value is 1 by default, which is plain clipping."""
    settings = {"prediction_type": "sample", "thresholding": True, "sample_max_value": 50.0}
    images = []
    for cls in (DDPMScheduler, diffusers.DDPMScheduler):
        pipe = make_pipeline(scheduler=cls(**settings))
        images.append(draw(pipe, guidance_scale=30.0, generator=seeded()))
        settings = settings | {}
    torch.testing.assert_close(images[0], images[1], atol=1e-4, rtol=1e-3)
    clipped = draw(
        make_pipeline(scheduler=DDPMScheduler(**(settings | {"sample_max_value": 1.0}))), guidance_scale=30.0
    )
    assert (images[0] - clipped).abs().max() > 0.05


# ---- text


def test_combined_prompts_are_a_weighted_sum(make_pipeline, make_unet):
    pipe = make_pipeline(unet=make_unet(pooled_text_time_embedding=True, pooled_text_dim=24))
    further = {"a cat": 0.6, "blue": -0.4}
    drawn = draw(pipe, prompt=[PROMPT, "the moon"], combined_prompts=further, num_inference_steps=3)
    with torch.no_grad():
        texts = {
            t: encode_text(pipe.tokenizer, pipe.text_encoder, [t]) for t in ("", PROMPT, "the moon", *further)
        }

        def predict(text, x, t):
            states, pooled, _ = texts[text]
            return pipe.unet(x, t, states, added_cond_kwargs={"pooled_text": pooled}).sample

        scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
        scheduler.set_timesteps(3)
        generator = seeded()
        x = torch.randn(2, 3, 16, 16, generator=generator)
        for t in scheduler.timesteps:
            rows = []
            for row, prompt in zip(x[:, None], (PROMPT, "the moon"), strict=True):
                uncond = predict("", row, t)
                weights = {prompt: 1.0} | further
                rows.append(uncond + 3.0 * sum(w * (predict(k, row, t) - uncond) for k, w in weights.items()))
            x = scheduler.step(torch.cat(rows), t, x, generator=generator).prev_sample
    torch.testing.assert_close(drawn, x, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("prompt", "plain", "spans"),
    [
        ("a (red:1.3) heart", "a red heart", [("red", 1.3)]),
        ("(a big dog:0) and (cat:-0.5)", "a big dog and cat", [("a big dog", 0.0), ("cat", -0.5)]),
        ("ab button (blood type)", "ab button (blood type)", []),
        ("clock (12:30)", "clock (12:30)", []),
        ("((red:2) heart:1.5)", "(red heart:1.5)", [("red", 2.0)]),
        ("3:2 (a:b)", "3:2 (a:b)", []),
    ],
)
def test_weights_are_read(prompt, plain, spans):
    text, found = split_weights(prompt)
    assert text == plain and [(text[a:b], w) for a, b, w in found] == spans


@torch.no_grad()
def test_weights_go_from_the_prompt_without_the_words_through_it_and_beyond(tokenizer, make_text_encoder):
    tower = make_text_encoder()

    def encode(prompts, **options):
        return encode_weighted_text(tokenizer, tower, prompts, **options)

    plain = encode_text(tokenizer, tower, ["a red heart"])[:2]
    ids = tokenizer(["a red heart"], padding="max_length", return_tensors="pt").input_ids
    start = len(tokenizer("a").input_ids) - 1
    stop = len(tokenizer("a red").input_ids) - 1
    mask = torch.ones_like(ids)
    mask[:, start:stop] = 0
    hidden = tower(ids, attention_mask=mask)
    for weight in (0.0, 1.0, 1.7):
        states, pooled = encode([f"a (red:{weight}) heart", "a red heart"])
        expected = weight * plain[0] + (1 - weight) * hidden.last_hidden_state
        torch.testing.assert_close(states, torch.cat([expected, plain[0]]), atol=1e-4, rtol=1e-4)
        place = len(tokenizer("a red heart").input_ids) - 1  # of the end of text
        own = weight * plain[1] + (1 - weight) * tower.text_projection(hidden.last_hidden_state[:, place])
        torch.testing.assert_close(pooled, torch.cat([own, plain[1]]), atol=1e-4, rtol=1e-4)
    assert (plain[0] - hidden.last_hidden_state)[0, stop:].abs().max() > 0.05  # later tokens saw it


# ---- best of n


@pytest.mark.parametrize("by", ["clip_guidance_model", "noisy_clip"])
def test_best_of_n_keeps_what_clip_likes_best(make_pipeline, guides, by):
    pipe = make_pipeline(**{by: guides[by]})
    prompts = [PROMPT, "a cat"]
    call = {"prompt": prompts, "num_images_per_prompt": 2}
    generators = [seeded(i) for i in range(12)]
    best = draw(pipe, **call, num_candidates=3, generator=generators)
    generators = [seeded(i) for i in range(12)]
    drawn = draw(pipe, **(call | {"num_images_per_prompt": 6}), generator=generators)
    with torch.no_grad():
        if by == "noisy_clip":
            text = encode_text(pipe.tokenizer, pipe.text_encoder, prompts)[1]
            images = pipe.noisy_clip(drawn, 0)
        else:
            clip = pipe.clip_guidance_model
            text = clip.embed_texts(prompts)
            images = clip.embed_images(
                F.interpolate(drawn.clamp(-1, 1), (8, 8), mode="bilinear", antialias=True)
            )
    scores = F.cosine_similarity(images, text.repeat_interleave(6, dim=0))
    order = scores.unflatten(0, (2, 6)).argsort(dim=1, descending=True)
    expected = [6 * prompt + int(i) for prompt in range(2) for i in order[prompt, :2]]
    torch.testing.assert_close(best, drawn[expected])


@pytest.mark.parametrize("clip", [NOISED, CLEAN, {}], ids=["noised", "clean", "none"])
def test_best_of_n_of_a_class_is_by_what_guides(make_pipeline, guides, clip):
    """s_class log p(y | x_0) + s_clip l f . g; by the class alone where no CLIP guides."""
    pipe = make_pipeline(**(guides if clip else {"noisy_classifier": guides["noisy_classifier"]}))
    prompts, labels = [PROMPT, "a cat"], ["food", "animals"]
    call = {"prompt": prompts, "classifier_guidance_scale": 60.0, "class_labels": labels, **clip}
    generators = [seeded(i) for i in range(12)]
    best = draw(pipe, **call, num_images_per_prompt=2, num_candidates=3, generator=generators)
    generators = [seeded(i) for i in range(12)]
    drawn = draw(pipe, **call, num_images_per_prompt=6, generator=generators)
    with torch.no_grad():
        rows = torch.tensor([LABELS.index(one) for one in labels]).repeat_interleave(6)
        by_class = -60 * F.cross_entropy(pipe.noisy_classifier(drawn, 0), rows, reduction="none")
        by_clip = torch.zeros(12)
        if clip == NOISED:
            text = encode_text(pipe.tokenizer, pipe.text_encoder, prompts)[1]
            images, scale = pipe.noisy_clip(drawn, 0), pipe.noisy_clip.scale
        elif clip == CLEAN:
            text, scale = pipe.clip_guidance_model.embed_texts(prompts), pipe.clip_guidance_model.scale
            small = F.interpolate(drawn.clamp(-1, 1), (8, 8), mode="bilinear", antialias=True)
            images = pipe.clip_guidance_model.embed_images(small)
        if clip:
            by_clip = 40 * scale * F.cosine_similarity(images, text.repeat_interleave(6, dim=0))

    def order(scores: torch.Tensor) -> list[int]:
        first = scores.unflatten(0, (2, 6)).argsort(dim=1, descending=True)[:, :2]
        return [6 * prompt + int(i) for prompt in range(2) for i in first[prompt]]

    torch.testing.assert_close(best, drawn[order(by_class + by_clip)])
    if clip:  # and by no less than both
        assert order(by_class + by_clip) not in (order(by_class), order(by_clip))


def test_best_of_n_of_two_prompts_that_come_as_embeddings(guided):
    prompts, count = [PROMPT, "a cat"], 6
    encoded = [encode_text(guided.tokenizer, guided.text_encoder, one) for one in (prompts, [""] * 2)]
    (states, pooled, _), (none, none_pooled, _) = encoded
    call = {"guidance_scale": 3.0, "output_type": "latent", "num_candidates": 3}
    ready = {"prompt_embeds": states, "pooled_prompt_embeds": pooled}
    ready |= {"negative_prompt_embeds": none, "negative_pooled_prompt_embeds": none_pooled}
    guided.clip_guidance_model, kept = None, guided.clip_guidance_model  # which would read the words
    expected = guided(prompts, generator=[seeded(i) for i in range(count)], **call).images
    found = guided(generator=[seeded(i) for i in range(count)], **ready, **call).images
    guided.clip_guidance_model = kept
    assert len(found) == 2
    torch.testing.assert_close(found, expected)


# ---- the components


def test_guides_travel_with_the_pipeline(guided, tmp_path):
    call = {"num_inference_steps": 3, **CLASS}
    expected = [draw(guided, **call, **form) for form in (NOISED, CLEAN)]
    guided.save_pretrained(tmp_path)
    for name, file in (("noisy_clip", "noisy_clip.py"), ("clip_guidance_model", "guidance_clip.py")):
        assert (tmp_path / name / file).is_file()
    ours = TextToImagePipeline.from_pretrained(tmp_path)
    theirs = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(ours.noisy_clip) is NoisyCLIP and type(theirs.noisy_clip) is not NoisyCLIP
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
        for form, latents in zip((NOISED, CLEAN), expected, strict=True):
            torch.testing.assert_close(draw(pipe, **call, **form), latents, atol=1e-5, rtol=1e-4)
    ours.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    assert (
        "noisy_classifier"
        in TextToImagePipeline.from_pretrained(tmp_path / "half", variant="fp16").components
    )


def test_a_folder_without_guides_takes_them(pipeline, guides, tmp_path):
    pipeline.save_pretrained(tmp_path / "plain")
    clip = guides["clip_guidance_model"]
    clip.model.save_pretrained(tmp_path / "clip")
    clip.tokenizer.save_pretrained(tmp_path / "clip")
    pipe = TextToImagePipeline.from_pretrained(
        tmp_path / "plain", noisy_clip=guides["noisy_clip"], clip_guidance_model=str(tmp_path / "clip")
    )
    pipe.set_progress_bar_config(disable=True)
    assert pipe.noisy_clip is guides["noisy_clip"] and pipe.noisy_classifier is None
    reference = TextToImagePipeline(**(pipeline.components | guides))
    reference.set_progress_bar_config(disable=True)
    torch.testing.assert_close(
        draw(pipe, num_inference_steps=2, **CLEAN), draw(reference, num_inference_steps=2, **CLEAN)
    )
    assert str(tmp_path) not in str(pipe.clip_guidance_model.config)
    with pytest.raises(ValueError, match="clip_guidance_model must be a folder"):
        TextToImagePipeline.from_pretrained(tmp_path / "plain", clip_guidance_model="nowhere")


def test_a_folder_of_guides_alone_is_taken(pipeline, guides, tmp_path):
    for name in ("noisy_clip", "noisy_classifier"):
        guides[name].save_pretrained(tmp_path / "guides" / name)
    reference = TextToImagePipeline(**(pipeline.components | guides))
    reference.set_progress_bar_config(disable=True)
    pipeline.load_guides(tmp_path / "guides")
    call = {"num_inference_steps": 2, **NOISED, **CLASS}
    torch.testing.assert_close(draw(pipeline, **call), draw(reference, **call))
    with pytest.raises(OSError, match="has neither a folder noisy_clip nor one noisy_classifier"):
        pipeline.load_guides(tmp_path)
    (tmp_path / "other/noisy_clip").mkdir(parents=True)
    (tmp_path / "other/noisy_clip/config.json").write_text('{"_class_name": "UNet1DModel"}')
    with pytest.raises(OSError, match="holds no model that guides"):
        pipeline.load_guides(tmp_path / "other")


def test_open_clip_models_guide_as_open_clip_computes(tmp_path):
    import json

    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(0)
    tower = {"width": 16, "layers": 1, "heads": 2}
    vision = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
    config = {
        "embed_dim": 12,
        "vision_cfg": vision,
        "text_cfg": tower | {"context_length": 12, "vocab_size": 49408},
    }
    model = open_clip.model.CLIP(**config).eval()
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {"mean": mean, "std": std}})
    )
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    clip = GuidanceCLIP.load(tmp_path)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    normalised = (images / 2 + 0.5 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    clip.save_pretrained(tmp_path / "saved")
    for one in (clip, GuidanceCLIP.from_pretrained(tmp_path / "saved")):
        with torch.no_grad():
            expected = model.encode_image(normalised, normalize=True)
            text = model.encode_text(
                open_clip.tokenizer.SimpleTokenizer(context_length=12)(["a dog"]), normalize=True
            )
            torch.testing.assert_close(one.embed_images(images), expected)
            torch.testing.assert_close(one.embed_texts(["a dog"]), text)
        assert one.image_size == 16 and float(one.scale.detach()) == pytest.approx(1 / 0.07, rel=1e-4)


@pytest.mark.parametrize("learned, scale", [(20.0, 20.0), (500.0, 100.0)])
def test_a_learned_logit_scale_is_at_most_clips_100(learned, scale):
    tower = NoisyCLIP(sample_size=8, patch_size=4, width=8, layers=1, heads=2, projection_dim=4)
    tower.logit_scale.data.fill_(math.log(learned))
    assert float(tower.scale.detach()) == pytest.approx(scale, rel=1e-5)


@torch.no_grad()
def test_noisy_towers_tell_noise_levels_apart_and_rows_do_not_mix(guides):
    x = torch.randn(3, 3, 16, 16)
    for name in ("noisy_clip", "noisy_classifier"):
        model = guides[name]
        t = torch.tensor([10, 500, 10])
        rows = model(x, t)
        for i in range(3):
            torch.testing.assert_close(model(x[i : i + 1], int(t[i])), rows[i : i + 1], atol=1e-5, rtol=1e-4)
        assert (model(x[:1], 10) - model(x[:1], 500)).abs().max() > 1e-3
    assert torch.allclose(guides["noisy_clip"](x, 5).norm(dim=-1), torch.ones(3))


REFUSED = [
    ({"clip_guidance_scale": 3.0}, {}, "noisy_clip"),
    ({"clip_guidance_scale": 3.0, "clip_guidance": "clean"}, {}, "clip_guidance_model"),
    ({"classifier_guidance_scale": 3.0, "class_labels": 1}, {}, "noisy_classifier"),
    ({"num_candidates": 2}, {}, "num_candidates"),
    ({"num_candidates": 0}, {}, "num_candidates"),
    ({"clip_guidance": "blurred"}, {}, "clip_guidance"),
    ({"clip_guidance_scale": -1.0}, "all", "clip_guidance_scale"),
    ({"clip_guidance_scale": math.inf}, "all", "clip_guidance_scale"),
    ({"classifier_guidance_scale": 3.0}, "all", "class_labels"),
    ({"classifier_guidance_scale": 3.0, "class_labels": "cars"}, "all", "animals"),
    ({"classifier_guidance_scale": 3.0, "class_labels": 3}, "all", "class_labels"),
    ({"classifier_guidance_scale": 3.0, "class_labels": [0, 1]}, "all", "class_labels"),
    ({"class_labels": 1}, "all", "classifier_guidance_scale"),
    ({"clip_guidance_cut_outs": 0}, "all", "clip_guidance_cut_outs"),
    ({"clip_guidance_scale": 3.0, "height": 32}, "all", "16 x 16"),
    ({"combined_prompts": {"a cat": 1.0}, "guidance_scale": 1.0}, {}, "guidance_scale above 1"),
    ({"combined_prompts": {}}, {}, "combined_prompts"),
    ({"combined_prompts": {"a cat": "much"}}, {}, "combined_prompts"),
    ({"combined_prompts": ["a cat"]}, {}, "combined_prompts"),
    ({"clip_guidance_scale": 3.0, "prompt": None, "prompt_embeds": torch.zeros(1, 32, 32)}, "all", "pooled"),
]


@pytest.mark.parametrize(("call", "parts", "named"), REFUSED, ids=lambda value: str(value)[:40])
def test_guidance_that_cannot_be_is_refused_before_any_work(
    make_pipeline, make_unet, guides, call, parts, named
):
    pipe = make_pipeline(unet=make_unet(), **(guides if parts == "all" else parts))
    passes = []
    pipe.unet.register_forward_hook(lambda *_: passes.append(1))
    with pytest.raises(ValueError, match=named) as refusal:
        pipe(**({"prompt": PROMPT} | call))
    assert not passes and len(str(refusal.value)) < 400


# ---- the command line


def test_the_command_line_guides_and_keeps_the_best(guided, tmp_path, capsys):
    from PIL import Image

    from pipelines.__main__ import main
    from pipelines.drawing.images import to_tensor

    guided.save_pretrained(tmp_path / "model")
    arguments = ["a cat", "--model", str(tmp_path / "model"), "--out", str(tmp_path), "--seed", "5"]
    options = [
        "--clip-guidance-scale",
        "40",
        "--classifier-guidance-scale",
        "60",
        "--class-labels",
        "food",
        "--num-candidates",
        "3",
    ]
    main([*arguments, *options, "--num-images", "2"])
    call = {"prompt": "a cat", "output_type": "pt", **NOISED, **CLASS, "num_candidates": 3}
    for seed in (5, 6):
        image = Image.open(tmp_path / f"a-cat_seed{seed}.png")
        expected = guided(generator=seeded(seed), **call).images
        assert (to_tensor(image) / 2 + 0.5 - expected).abs().max() < 1 / 255
        said = {"clip_guidance_scale": "40.0", "class_labels": "food", "num_candidates": "3"}
        assert said.items() <= image.text.items()
    for wrong, named in (
        (["--class-labels", "food"], "go together"),
        (["--num-candidates", "0"], "--num-candidates must be a whole number above 0"),
        (["--clip-guidance-scale", "-1"], "--clip-guidance-scale must be 0 (off) or more"),
        (["--classifier-guidance-scale", "2", "--class-labels", "cars"], "--class-labels must be one"),
    ):
        with pytest.raises(SystemExit):
            main([*arguments, *wrong])
        assert named in capsys.readouterr().err
