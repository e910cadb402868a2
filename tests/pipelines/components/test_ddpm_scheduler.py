"""DDPMScheduler against diffusers' class, elementwise, and against float64 closed forms where diffusers errs.

`pytest -s` prints the largest differences found.
"""

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DPMSolverMultistepScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from diffusers import DDPMScheduler as Diffusers

from pipelines.chain import equations as ddpm
from pipelines.components.ddpm_scheduler import DDPMScheduler

SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {"beta_schedule": "linear"},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
    "sigmoid": {"beta_schedule": "sigmoid"},
    "laplace": {"beta_schedule": "laplace"},
    "trained_betas": {"trained_betas": np.geomspace(2e-4, 0.03, 1000).tolist()},
    "zero_snr": {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
}
PREDICTIONS = ("epsilon", "sample", "v_prediction")
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")
SPACINGS = ("linspace", "leading", "trailing")
X0_RULES: tuple[dict[str, Any], ...] = (
    {"clip_sample": True, "clip_sample_range": 1.5},
    {"clip_sample": False},
    {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 2.0},
)
SHAPE = (2, 3, 4, 4)
TOLERANCE = 1e-5  # of max(1, |theirs|), in float32


def gauss(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest |ours - theirs|/max(1, |theirs|); inf if any number is not finite."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    error = ((ours - theirs).abs() / theirs.abs().clamp(min=1)).max().item()
    return error if math.isfinite(error) else math.inf


def model_output(seed: int, variance_type: str) -> torch.Tensor:
    """Noise on SHAPE, and for the learned types v: in [-1, 1], or a log-variance in [-5, -1]."""
    prediction = gauss(*SHAPE, seed=seed)
    v = torch.tanh(gauss(*SHAPE, seed=seed + 1))
    if variance_type == "learned":
        v = 2 * v - 3
    return torch.cat([prediction, v], dim=1) if variance_type.startswith("learned") else prediction


def exact_step(
    abar: torch.Tensor,
    t: int,
    prev: int,
    output: torch.Tensor,
    x: torch.Tensor,
    z: torch.Tensor,
    config: dict,
) -> torch.Tensor:
    """x_prev in float64. The posterior is Bayes' rule itself: precisions add, means are weighted by them."""
    output, x, z = output.double(), x.double(), z.double()
    a_t, a_prev = (
        abar[t].double(),
        abar[prev].double() if prev >= 0 else torch.tensor(1.0, dtype=torch.float64),
    )
    prediction, v = output[:, :3], output[:, 3:]
    x0 = {
        "epsilon": (x - (1 - a_t).sqrt() * prediction) / a_t.clamp(min=2.0**-48).sqrt(),
        "sample": prediction,
        "v_prediction": a_t.sqrt() * x - (1 - a_t).sqrt() * prediction,
    }[config["prediction_type"]]
    if config.get("thresholding"):
        flat = x0.abs().flatten(1)
        s = torch.quantile(flat, config["dynamic_thresholding_ratio"], dim=1).clamp(
            1, config["sample_max_value"]
        )
        s = s[:, None, None, None]
        x0 = x0.clamp(-s, s) / s
    elif config["clip_sample"]:
        x0 = x0.clamp(-config["clip_sample_range"], config["clip_sample_range"])
    if prev < 0:
        return x0
    alpha = a_t / a_prev
    precision = alpha / (1 - alpha) + 1 / (1 - a_prev)
    mean = (alpha.sqrt() * x / (1 - alpha) + a_prev.sqrt() * x0 / (1 - a_prev)) / precision
    log_small, log_large = -precision.log(), (1 - alpha).log()
    log_variance = {
        "fixed_small": log_small,
        "fixed_small_log": log_small,
        "fixed_large": log_large,
        "fixed_large_log": log_large,
        "learned": v,
        "learned_range": (1 + v) / 2 * log_large + (1 - v) / 2 * log_small,
    }[config["variance_type"]]
    return mean + (log_variance / 2).exp() * z


# ------------------------------------------------------------ the grid


def grid_configs(schedule: str, prediction: str) -> list[dict]:
    """Variances x spacings, with the rules for x0 taking turns."""
    configs = []
    for i, variance in enumerate(VARIANCES):
        for j, spacing in enumerate(SPACINGS):
            rule = X0_RULES[(i + j) % 3]
            if schedule == "zero_snr" and prediction == "epsilon":
                rule = X0_RULES[0]  # diffusers gives inf for the others: test_zero_terminal_snr_with_epsilon
            config = {"prediction_type": prediction, "variance_type": variance, "timestep_spacing": spacing}
            configs.append({**SCHEDULES[schedule], "clip_sample": True, **config, **rule})
    return configs


def stand_in(config: dict) -> Diffusers:
    """diffusers' class; for the two variances it gets wrong, with the one the right answer is made of."""
    other = {"fixed_large_log": "fixed_large", "learned": "fixed_small"}
    return Diffusers(
        **{**config, "variance_type": other.get(config["variance_type"], config["variance_type"])}
    )


def compare_step(ours: DDPMScheduler, theirs: Diffusers, t: torch.Tensor, seed: int) -> float:
    """Largest difference in one step from the same random x, both seeded alike."""
    variance = ours.config.variance_type
    output, x = model_output(seed, variance), gauss(*SHAPE, seed=-seed)
    mine: Any = ours.step(output, t, x, generator=torch.Generator().manual_seed(seed))
    given = output if variance == "learned_range" else output[:, :3]
    other: Any = theirs.step(given, t, x, generator=torch.Generator().manual_seed(seed))
    expected = other.prev_sample
    if t == theirs.timesteps[-1] and not variance.startswith("fixed_small"):
        expected = other.pred_original_sample  # the mean of the last step; theirs has noise on it if t > 0
    elif variance == "learned":
        z = gauss(*SHAPE, seed=seed)
        expected = expected - theirs._get_variance(t).sqrt() * z + torch.exp(output[:, 3:] / 2) * z
    x0 = difference(mine.pred_original_sample, other.pred_original_sample)
    return max(difference(mine.prev_sample, expected), x0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_grid_equals_diffusers(schedule: str, prediction: str) -> None:
    """Every variance x spacing x 1, 2, 10, 50, 1000 steps, each step from an x of its own.

    Of the 1000, which are the same under all spacings, each of the 18 configs takes every 36th, in turn.
    """
    worst, where, seed = 0.0, "", 0
    for number, config in enumerate(grid_configs(schedule, prediction)):
        ours, theirs = DDPMScheduler(**config), stand_in(config)
        assert torch.equal(ours.betas, theirs.betas) and torch.equal(
            ours.alphas_cumprod, theirs.alphas_cumprod
        )
        for steps in (1, 2, 10, 50, 1000):
            ours.set_timesteps(steps)
            theirs.set_timesteps(steps)
            assert torch.equal(ours.timesteps, theirs.timesteps)
            part = slice(2 * number, None, 36) if steps == 1000 else slice(-1)
            for t in torch.cat([theirs.timesteps[part], theirs.timesteps[-1:]]):
                seed += 2
                error = compare_step(ours, theirs, t, seed)
                if error > worst:
                    worst, where = error, f"{config} {steps} steps, t = {t}"
    print(f"{schedule:18}{prediction:13} largest difference {worst:.1e}")
    assert worst <= TOLERANCE, where


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_whole_run_equals_diffusers(schedule: str, prediction: str) -> None:
    """All of 1000 and of 50 steps, each class on its own results, one generator for the whole run."""
    number = list(SCHEDULES).index(schedule) + PREDICTIONS.index(prediction)
    variance = ("fixed_small", "fixed_large", "learned_range", "fixed_small_log")[number % 4]
    clip = number % 3 > 0 or schedule == "zero_snr"
    config = {"prediction_type": prediction, "variance_type": variance, "clip_sample": clip}
    ours, theirs = DDPMScheduler(**SCHEDULES[schedule], **config), Diffusers(**SCHEDULES[schedule], **config)
    for steps in (1000, 50):
        ours.set_timesteps(steps)
        theirs.set_timesteps(steps)
        generators = [torch.Generator().manual_seed(0) for _ in range(2)]
        a = b = gauss(*SHAPE, seed=1)
        worst = 0.0
        for i, t in enumerate(theirs.timesteps):
            output = model_output(2 * i, variance)
            a = ours.step(output, t, a, generator=generators[0]).prev_sample
            b = theirs.step(output, t, b, generator=generators[1]).prev_sample
            worst = max(worst, difference(a, b))
        print(f"{schedule:18}{prediction:13}{variance:16}{steps:5} steps in a row: {worst:.1e}")
        assert worst <= TOLERANCE
        assert torch.equal(generators[0].get_state(), generators[1].get_state())


@pytest.mark.parametrize("variance", VARIANCES)
def test_steps_equal_float64_closed_forms(variance: str) -> None:
    """Bayes' rule in float64, for every schedule, prediction and rule; 1e-9 in float64 arithmetic.

    In float32 beta_t = 1 - abar_t/abar_prev loses digits where abar_t is near 1, as in diffusers: hence 1e-3.
    """
    for schedule, settings in SCHEDULES.items():
        for i, prediction in enumerate(PREDICTIONS):
            rule = X0_RULES[0 if (schedule, prediction) == ("zero_snr", "epsilon") else i]
            config = {
                **settings,
                "prediction_type": prediction,
                "variance_type": variance,
                "clip_sample": True,
                **rule,
            }
            scheduler = DDPMScheduler(**config, timestep_spacing="trailing")
            for steps in (1, 2, 10, 50, 1000):
                scheduler.set_timesteps(steps)
                visited = scheduler.timesteps.tolist()
                for k in {0, 1, len(visited) // 2, len(visited) - 2, len(visited) - 1} & set(
                    range(len(visited))
                ):
                    t, prev = visited[k], (*visited, -1)[k + 1]
                    output, x, z = (
                        model_output(k, variance),
                        gauss(*SHAPE, seed=k + 7),
                        gauss(*SHAPE, seed=k + 9),
                    )
                    exact = exact_step(scheduler.alphas_cumprod, t, prev, output, x, z, config)
                    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
                        generator = torch.Generator().manual_seed(k + 9)
                        result = scheduler.step(output, t, x.to(dtype), generator=generator).prev_sample
                        error = difference(result.double(), exact)
                        assert error <= tolerance, (config, steps, t, dtype, error)


def test_every_number_of_steps_spaces_timesteps_as_diffusers_does() -> None:
    for spacing in SPACINGS:
        config = {"timestep_spacing": spacing, "steps_offset": 1}
        ours, theirs = DDPMScheduler(**config), Diffusers(**config)
        for n in range(1, 1000):
            ours.set_timesteps(n)
            theirs.set_timesteps(n)
            expected = theirs.timesteps[:n]  # theirs can append -1 under trailing
            assert torch.equal(ours.timesteps, expected), (spacing, n)
            assert len(set(ours.timesteps.tolist())) == n == ours.num_inference_steps
    ours = DDPMScheduler(num_train_timesteps=49, timestep_spacing="trailing")
    theirs = Diffusers(num_train_timesteps=49, timestep_spacing="trailing")
    appended = []
    for n in range(1, 50):
        ours.set_timesteps(n)
        theirs.set_timesteps(n)
        assert len(ours.timesteps) == n and ours.timesteps[-1] >= 0
        appended += theirs.timesteps[n:].tolist()
    print("timesteps diffusers appends, T = 49:", appended)


# ------------------------------------------------------------ where diffusers errs


@pytest.mark.parametrize("variance", VARIANCES)
def test_last_step_adds_no_noise(variance: str) -> None:
    """Under trailing, with custom timesteps or a steps_offset, the last t is above 0: the result is x0."""
    config = {"variance_type": variance, "steps_offset": 1, "clip_sample": False}
    output, x = model_output(3, variance), gauss(*SHAPE, seed=4)
    chains: tuple[tuple[str, dict[str, Any]], ...] = (
        ("trailing", {"num_inference_steps": 10}),
        ("leading", {"num_inference_steps": 10}),
        ("leading", {"timesteps": [700, 40]}),
        ("leading", {"timesteps": [40]}),
    )
    for spacing, chain in chains:
        ours = DDPMScheduler(**config, timestep_spacing=spacing)
        ours.set_timesteps(**chain)
        t = int(ours.timesteps[-1])
        assert t > 0
        a_t = ours.alphas_cumprod[t]
        x0 = (x - (1 - a_t).sqrt() * output[:, :3]) / a_t.sqrt()
        theirs = Diffusers(**config, timestep_spacing=spacing)
        theirs.set_timesteps(**chain)
        one, other = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
        torch.testing.assert_close(ours.step(output, t, x, one).prev_sample, x0, rtol=1e-5, atol=1e-5)
        noisy = theirs.step(output, t, x, other).prev_sample
        assert torch.equal(one.get_state(), other.get_state())  # drawn all the same, see `step`
        if variance == "fixed_large":  # the error that is the reason for the exception
            assert (noisy - x0).std() > 0.01


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rule", X0_RULES, ids=str)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_less_noise_equals_diffusers_ddim(prediction: str, rule: dict[str, Any], eta: float) -> None:
    """A whole run, noise and all, with eps taken from the clipped x0 (their use_clipped_model_output). In
    float64: their weight of eps at the noisiest step is what is left of 1 - 1."""
    settings = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"} | rule
    ours = DDPMScheduler(prediction_type=prediction, eta=eta, **settings)
    theirs = DDIMScheduler(prediction_type=prediction, **settings)
    theirs.alphas_cumprod = theirs.alphas_cumprod.double()
    theirs.final_alpha_cumprod = theirs.final_alpha_cumprod.double()
    ours.set_timesteps(20)
    theirs.set_timesteps(20)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    x, y = (gauss(*SHAPE, seed=3, dtype=torch.float64) for _ in range(2))
    generators = [torch.Generator().manual_seed(4) for _ in range(2)]
    for i, t in enumerate(ours.timesteps):
        output = torch.tanh(gauss(*SHAPE, seed=10 + i, dtype=torch.float64) + x)
        x = ours.step(output, t, x, generator=generators[0]).prev_sample
        output = torch.tanh(gauss(*SHAPE, seed=10 + i, dtype=torch.float64) + y)
        theirs_step = theirs.step(output, t, y, eta, use_clipped_model_output=True, generator=generators[1])
        y = theirs_step.prev_sample
        assert difference(x, y) < TOLERANCE, i
    if eta < 1:  # ancestral sampling draws on the last step too, as diffusers' DDPM does
        assert torch.equal(generators[0].get_state(), generators[1].get_state())


def test_without_set_timesteps_the_last_step_is_0() -> None:
    ours = DDPMScheduler(variance_type="fixed_large")
    output, x = gauss(*SHAPE, seed=3), gauss(*SHAPE, seed=4)
    first, second = (ours.step(output, 1, x, torch.Generator().manual_seed(s)).prev_sample for s in (0, 1))
    z = gauss(*SHAPE, seed=0) - gauss(*SHAPE, seed=1)
    torch.testing.assert_close(first - second, ours.betas[1].sqrt() * z, rtol=1e-3, atol=1e-6)
    assert torch.equal(
        *(ours.step(output, 0, x, torch.Generator().manual_seed(s)).prev_sample for s in (0, 1))
    )


def test_float16_cosine_step_does_not_overflow() -> None:
    """x0 is 20,000 (x - eps) at the first cosine step: inf in diffusers; here the float64 result, rounded."""
    config = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False, "variance_type": "fixed_small"}
    ours, theirs = DDPMScheduler(**config), Diffusers(**config)
    output, x, z = (gauss(*SHAPE, seed=s, dtype=torch.float16) for s in (1, 2, 3))
    assert not torch.isfinite(theirs.step(output, 999, x, torch.Generator().manual_seed(3)).prev_sample).all()
    exact = exact_step(ours.alphas_cumprod, 999, 998, output, x, z, {**config, "prediction_type": "epsilon"})
    result = ours.step(output, 999, x, torch.Generator().manual_seed(3))
    assert result.prev_sample.dtype == torch.float16
    torch.testing.assert_close(result.prev_sample.double(), exact, rtol=2**-10, atol=1e-3)
    assert result.pred_original_sample.abs().max() == 65504  # saturated


def test_zero_terminal_snr_with_epsilon() -> None:
    """diffusers divides by 0; here the step is finite and that of abar = 2^-48, whatever the rule for x0."""
    for rule in X0_RULES:
        config = {**SCHEDULES["zero_snr"], "timestep_spacing": "trailing", "clip_sample": True, **rule}
        config = {**config, "prediction_type": "epsilon", "variance_type": "fixed_small"}
        ours, theirs = DDPMScheduler(**config), Diffusers(**config)
        assert ours.alphas_cumprod[-1] == 0
        ours.set_timesteps(10)
        theirs.set_timesteps(10)
        output, x, z = (gauss(*SHAPE, seed=s) for s in (1, 2, 3))
        exact = exact_step(ours.alphas_cumprod, 999, 899, output, x, z, config)
        result = ours.step(output, 999, x, torch.Generator().manual_seed(3)).prev_sample
        assert difference(result.double(), exact) < 1e-5
        if rule != X0_RULES[0]:
            assert not torch.isfinite(theirs.step(output, 999, x).prev_sample).all()


# ------------------------------------------------------------ the equations


def test_closed_form_schedules() -> None:
    """abar from float64 closed forms of the papers, not from products of betas."""
    t = np.arange(1000)
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    cosine = (f[1:] / f[0])[:-1]  # the last is capped by beta <= 0.999
    np.testing.assert_allclose(
        DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod[:-1], cosine, 1e-4, 1e-8
    )
    linear = np.cumprod(1 - (1e-4 + (0.02 - 1e-4) * t / 999))
    np.testing.assert_allclose(DDPMScheduler().alphas_cumprod, linear, rtol=2e-5)
    quadratic = np.cumprod(1 - (0.01 + (math.sqrt(0.02) - 0.01) * t / 999) ** 2)
    np.testing.assert_allclose(
        DDPMScheduler(beta_schedule="scaled_linear").alphas_cumprod, quadratic, rtol=2e-5
    )
    sigmoid = np.cumprod(1 - (1e-4 + (0.02 - 1e-4) / (1 + np.exp(6 - 12 * t / 999))))
    np.testing.assert_allclose(DDPMScheduler(beta_schedule="sigmoid").alphas_cumprod, sigmoid, rtol=2e-5)
    root = np.sqrt(linear)
    zero_snr = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    rescaled = DDPMScheduler(rescale_betas_zero_snr=True).alphas_cumprod
    np.testing.assert_allclose(rescaled, zero_snr, rtol=1e-4, atol=1e-7)
    assert rescaled[-1] == 0


def test_posterior_is_bayes_rule_per_sample() -> None:
    """q(x_prev | x_t, x0) as the product of two Gaussians, each sample of a rank-3 batch at its own t."""
    abar_t, abar_prev = (torch.tensor(a, dtype=torch.float64) for a in ([0.9, 0.5, 0.01], [0.95, 0.9, 0.012]))
    x0, x_t = (gauss(3, 5, 2, seed=s, dtype=torch.float64) for s in (0, 1))
    mean, variance = (
        ddpm.posterior_mean(x0, x_t, abar_t, abar_prev),
        ddpm.posterior_variance(abar_t, abar_prev),
    )
    for i in range(3):
        a, p = abar_t[i], abar_prev[i]
        alpha = a / p
        precision = alpha / (1 - alpha) + 1 / (1 - p)
        bayes = (alpha.sqrt() * x_t[i] / (1 - alpha) + p.sqrt() * x0[i] / (1 - p)) / precision
        torch.testing.assert_close(mean[i], bayes, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(variance[i], 1 / precision, rtol=1e-12, atol=0)
        alone = ddpm.posterior_mean(x0[i], x_t[i], float(a), float(p))  # floats, rank 2
        torch.testing.assert_close(mean[i], alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ddpm.posterior_mean(x0, x_t, abar_t, 1.0), x0, rtol=1e-12, atol=1e-12)


def test_mean_from_eps_equals_posterior_mean_of_predicted_x0() -> None:
    """mu = (x_t - beta_t/sqrt(1 - abar_t) eps)/sqrt(alpha_t), Ho 2020, eq. 11."""
    scheduler = DDPMScheduler()
    abar = scheduler.alphas_cumprod.double()
    t = torch.tensor([1, 10, 500, 999])
    x_t, eps = (gauss(4, 3, 4, 4, seed=s, dtype=torch.float64) for s in (0, 1))
    alpha = (abar[t] / abar[t - 1])[:, None, None, None]
    eq11 = (x_t - (1 - alpha) / (1 - abar[t])[:, None, None, None].sqrt() * eps) / alpha.sqrt()
    mean = ddpm.posterior_mean(ddpm.predict_x0(eps, x_t, abar[t]), x_t, abar[t], abar[t - 1])
    torch.testing.assert_close(mean, eq11, rtol=1e-9, atol=1e-9)


def test_predict_x0_undoes_q_sample_for_every_prediction_type() -> None:
    abar = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod.double()[[0, 400, 990]]
    x0, eps = (gauss(3, 3, 4, 4, seed=s, dtype=torch.float64) for s in (0, 1))
    x_t = ddpm.q_sample(x0, eps, abar)
    outputs = {"epsilon": eps, "sample": x0, "v_prediction": ddpm.velocity(x0, eps, abar)}
    for prediction_type, output in outputs.items():
        torch.testing.assert_close(
            ddpm.predict_x0(output, x_t, abar, prediction_type), x0, rtol=1e-9, atol=1e-9
        )


def test_signal_to_noise_ratio_and_dynamic_threshold() -> None:
    snr = ddpm.signal_to_noise_ratio(torch.tensor([0.0, 0.2, 0.5, 0.8, 1.0]))
    torch.testing.assert_close(snr, torch.tensor([0.0, 0.25, 1.0, 4.0, math.inf]))
    x0 = torch.stack([torch.linspace(-4, 4, 101), torch.linspace(-0.5, 0.5, 101)])  # |x0| in even steps
    result = ddpm.dynamic_threshold(x0, ratio=0.5, max_value=3.0)
    torch.testing.assert_close(result[0], x0[0].clamp(-2, 2) / 2)  # the median of |x0| is 2
    torch.testing.assert_close(result[1], x0[1])  # s is never below 1
    torch.testing.assert_close(ddpm.dynamic_threshold(x0, 1.0, 3.0)[0], x0[0].clamp(-3, 3) / 3)


def test_learned_range_spans_the_two_fixed_variances() -> None:
    scheduler = DDPMScheduler(variance_type="learned_range")
    x, eps = gauss(*SHAPE, seed=0), gauss(*SHAPE, seed=1)
    for t in (1, 500, 999):
        for v, kind in ((-1.0, "fixed_small"), (1.0, "fixed_large")):
            output = torch.cat([eps, torch.full_like(eps, v)], dim=1)
            log_variance = scheduler.p_mean_variance(output, t, x).log_variance
            fixed = Diffusers(variance_type=kind)._get_variance(t)
            torch.testing.assert_close(log_variance, fixed.log().expand(SHAPE), rtol=1e-5, atol=1e-5)
    beta, abar = scheduler.betas.double(), scheduler.alphas_cumprod.double()
    output = torch.cat([eps, torch.zeros_like(eps)], dim=1)
    beta_tilde_1 = (1 - abar[0]) / (1 - abar[1]) * beta[1]
    expected = (beta[0].log() + beta_tilde_1.log()) / 2  # never log 0
    log_variance = scheduler.p_mean_variance(output, 0, x.double()).log_variance
    torch.testing.assert_close(log_variance, expected.expand(SHAPE), rtol=1e-4, atol=0)
    scheduler.set_timesteps(timesteps=[600])  # a chain of one step: beta_t = 1 - abar_t is all there is
    log_variance = scheduler.p_mean_variance(output, 600, x.double()).log_variance
    torch.testing.assert_close(log_variance, (1 - abar[600]).log().expand(SHAPE), rtol=1e-9, atol=0)


@pytest.mark.parametrize("variance", VARIANCES)
def test_p_mean_variance_takes_a_timestep_per_sample(variance: str) -> None:
    """A batch at several t equals its samples one by one, in a full chain and a spaced one."""
    scheduler = DDPMScheduler(variance_type=variance, timestep_spacing="trailing")
    for steps in (None, 10):
        if steps:
            scheduler.set_timesteps(steps)
        t = torch.tensor([999, 99])
        output, x = model_output(0, variance), gauss(*SHAPE, seed=1)
        batch = scheduler.p_mean_variance(output, t, x)
        for i in range(2):
            alone = scheduler.p_mean_variance(output[i : i + 1], int(t[i]), x[i : i + 1])
            torch.testing.assert_close(batch.mean[i : i + 1], alone.mean)
            torch.testing.assert_close(batch.pred_x0[i : i + 1], alone.pred_x0)
            log_variance = batch.log_variance.expand(SHAPE)[i : i + 1]
            torch.testing.assert_close(log_variance, alone.log_variance.expand(1, *SHAPE[1:]))
            torch.testing.assert_close(batch.variance.log(), batch.log_variance)
        result = scheduler.step(output, 999, x, torch.Generator().manual_seed(2))
        both = scheduler.p_mean_variance(output, 999, x)
        noise = (result.prev_sample - both.mean) / torch.exp(both.log_variance / 2)
        torch.testing.assert_close(noise, gauss(*SHAPE, seed=2), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(result.pred_original_sample, both.pred_x0)


def test_get_variance_has_diffusers_values_and_units() -> None:
    for variance in VARIANCES:
        ours, theirs = DDPMScheduler(variance_type=variance), Diffusers(variance_type=variance)
        v = torch.tensor([-1.0, 0.3, 1.0])
        for steps in (None, 7):
            if steps:
                ours.set_timesteps(steps)
                theirs.set_timesteps(steps)
            for t in theirs.timesteps[:: 1 if steps else 97]:
                if t > 0 or variance != "learned_range":
                    torch.testing.assert_close(
                        ours._get_variance(t, v), theirs._get_variance(t, v), rtol=1e-5, atol=0
                    )


def test_gradients_reach_the_model_through_mean_variance_and_x0() -> None:
    """Guidance differentiates pred_x0, the hybrid loss the log-variance: both against their closed form."""
    scheduler = DDPMScheduler(variance_type="learned_range", clip_sample=False)
    output = model_output(0, "learned_range").double().requires_grad_()
    x = gauss(*SHAPE, seed=1, dtype=torch.float64).requires_grad_()
    step = scheduler.p_mean_variance(output, 500, x)
    abar = scheduler.alphas_cumprod.double()
    to_x, to_eps = torch.autograd.grad(step.pred_x0.sum(), [x, output], retain_graph=True)
    torch.testing.assert_close(to_x, (1 / abar[500].sqrt()).expand(SHAPE))
    torch.testing.assert_close(to_eps[:, :3], -((1 - abar[500]) / abar[500]).sqrt().expand(SHAPE))
    (to_v,) = torch.autograd.grad(step.log_variance.sum(), output)
    half_span = 0.5 * ((1 - abar[500]) / (1 - abar[499])).log()  # (log beta - log beta~)/2
    torch.testing.assert_close(to_v[:, 3:], half_span.expand(SHAPE))


# ------------------------------------------------------------ add_noise, get_velocity


@pytest.mark.parametrize("shape", [(4,), (4, 7), (4, 3, 5), (4, 3, 8, 8), (4, 3, 2, 4, 4)])
def test_add_noise_and_velocity_equal_diffusers_at_any_rank(shape: tuple[int, ...]) -> None:
    t = torch.tensor([0, 17, 500, 999])
    x0, eps = gauss(*shape, seed=0), gauss(*shape, seed=1)
    for settings in SCHEDULES.values():
        ours, theirs = DDPMScheduler(**settings), Diffusers(**settings)
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
            a, b = x0.to(dtype), eps.to(dtype)
            assert difference(ours.add_noise(a, b, t), theirs.add_noise(a, b, t)) <= tolerance
            assert difference(ours.get_velocity(a, b, t), theirs.get_velocity(a, b, t)) <= tolerance
            one = torch.tensor(600)  # one timestep for all
            assert difference(ours.add_noise(a, b, one), theirs.add_noise(a, b, one)) <= tolerance


@pytest.mark.parametrize(("dtype", "digit"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_half_precision_noising_is_the_float64_result_rounded(dtype: torch.dtype, digit: float) -> None:
    """diffusers rounds abar itself to half, and with it loses the noise at small t."""
    scheduler = DDPMScheduler()
    t = torch.tensor([0, 3, 500, 999])
    x0, eps = (gauss(4, 3, 8, 8, seed=s).to(dtype) for s in (0, 1))
    abar = scheduler.alphas_cumprod.double()[t][:, None, None, None]
    noisy = abar.sqrt() * x0.double() + (1 - abar).sqrt() * eps.double()
    v = abar.sqrt() * eps.double() - (1 - abar).sqrt() * x0.double()
    for result, exact in ((scheduler.add_noise(x0, eps, t), noisy), (scheduler.get_velocity(x0, eps, t), v)):
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), exact, rtol=digit, atol=1e-5)


def test_one_picture_with_many_noises() -> None:
    scheduler, t = DDPMScheduler(), torch.tensor([5, 400, 900])
    x0, eps = gauss(1, 3, 4, 4, seed=0), gauss(3, 3, 4, 4, seed=1)
    together = scheduler.add_noise(x0, eps, t)
    for i in range(3):
        torch.testing.assert_close(together[i], scheduler.add_noise(x0[0], eps[i], t[i]))


# ------------------------------------------------------------ generators


@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
def test_noise_of_an_image_depends_on_its_generator_alone(variance: str) -> None:
    """Eight images in one batch, each with its generator, are bit for bit those drawn one at a time."""
    scheduler = DDPMScheduler(variance_type=variance, timestep_spacing="trailing")
    scheduler.set_timesteps(5)
    channels = 6 if variance == "learned_range" else 3
    start, outputs = gauss(8, 3, 4, 4, seed=0), gauss(5, 8, channels, 4, 4, seed=1)

    def run(images: slice, generator: list[torch.Generator]) -> torch.Tensor:
        x = start[images]
        for output, t in zip(outputs, scheduler.timesteps, strict=True):
            x = scheduler.step(output[images], t, x, generator=generator).prev_sample
        return x

    together = run(slice(8), [torch.Generator().manual_seed(s) for s in range(8)])
    for i in range(8):
        assert torch.equal(together[i : i + 1], run(slice(i, i + 1), [torch.Generator().manual_seed(i)]))
    other = run(slice(8), [torch.Generator().manual_seed(s + (s == 3) * 100) for s in range(8)])
    assert [bool((a == b).all()) for a, b in zip(together, other, strict=True)] == [i != 3 for i in range(8)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_noise_is_drawn_in_the_models_dtype(dtype: torch.dtype) -> None:
    """As in diffusers: a seed gives float64 models other noise than float32 ones."""
    output, x = (gauss(*SHAPE, seed=s).to(dtype) for s in (0, 1))
    a, b = (
        cls(variance_type="fixed_large").step(output, 900, x, torch.Generator().manual_seed(2)).prev_sample
        for cls in (DDPMScheduler, Diffusers)
    )
    assert a.dtype == b.dtype == dtype
    torch.testing.assert_close(a, b, rtol=4 * torch.finfo(dtype).eps, atol=max(1e-5, torch.finfo(dtype).eps))


def test_generators_must_match_the_batch() -> None:
    x = gauss(*SHAPE, seed=0)
    for count in (0, 1, 3):
        with pytest.raises(ValueError, match=f"number of generators={count}: must be 2"):
            DDPMScheduler().step(x, 500, x, generator=[torch.Generator() for _ in range(count)])


# ------------------------------------------------------------ the contract with diffusers


@pytest.mark.parametrize(
    "other", [DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler, Diffusers]
)
def test_from_config_both_ways(other: Any) -> None:
    settings = {
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
    }
    ours = DDPMScheduler(num_train_timesteps=500, clip_sample_range=2.0, **settings)
    theirs = other.from_config(ours.config)
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    assert {k: theirs.config[k] for k in settings} == settings
    back = DDPMScheduler.from_config(theirs.config)
    assert dict(back.config) == dict(ours.config) | {
        k: v for k, v in back.config.items() if k not in ours.config
    }
    native = other(num_train_timesteps=300, beta_schedule="scaled_linear", prediction_type="sample")
    adopted = DDPMScheduler.from_config(native.config)
    assert torch.equal(adopted.alphas_cumprod, native.alphas_cumprod)
    assert adopted.config.prediction_type == "sample" and len(adopted) == 300
    assert other in ours.compatibles


def test_config_keys_and_defaults_are_diffusers() -> None:
    config, theirs = (
        {k: v for k, v in cls().config.items() if k[0] != "_"} for cls in (DDPMScheduler, Diffusers)
    )
    assert config == theirs | {"eta": 1.0}
    ours, theirs = DDPMScheduler(), Diffusers()
    for name in ("betas", "alphas", "alphas_cumprod", "one", "timesteps"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    for name in ("order", "init_noise_sigma", "num_inference_steps", "custom_timesteps", "_compatibles"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert len(ours) == len(theirs) == 1000
    x = gauss(*SHAPE, seed=0)
    assert ours.scale_model_input(x, 3) is x


def test_saved_folders_load_in_both_classes(tmp_path) -> None:
    ours = DDPMScheduler(
        trained_betas=np.array([0.1, 0.3, 0.2]), num_train_timesteps=3, variance_type="learned_range"
    )
    ours.save_pretrained(str(tmp_path / "ours"))
    for cls in (DDPMScheduler, Diffusers):
        loaded = cls.from_pretrained(str(tmp_path / "ours"))
        assert torch.equal(loaded.betas, torch.tensor([0.1, 0.3, 0.2]))
        assert loaded.config.variance_type == "learned_range"
    Diffusers(beta_schedule="sigmoid", steps_offset=1).save_pretrained(str(tmp_path / "theirs"))
    loaded = DDPMScheduler.from_pretrained(str(tmp_path / "theirs"))
    assert loaded.config.beta_schedule == "sigmoid" and loaded.config.steps_offset == 1


def test_no_variance_type_is_fixed_small() -> None:
    """DPM-Solver's configs say variance_type None."""
    x, eps = gauss(*SHAPE, seed=0), gauss(*SHAPE, seed=1)
    none, small = (
        DDPMScheduler(variance_type=kind).step(
            eps, 500, x, torch.Generator().manual_seed(0), return_dict=False
        )
        for kind in (None, "fixed_small")
    )
    assert isinstance(none, tuple) and torch.equal(none[0], small[0]) and torch.equal(none[1], small[1])


def test_previous_timestep_and_custom_timesteps() -> None:
    ours, theirs = DDPMScheduler(), Diffusers()
    assert ours.previous_timestep(7) == theirs.previous_timestep(7) == 6
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(timesteps=[100, 87, 50, 1, 0])
        assert scheduler.custom_timesteps
    for t in theirs.timesteps:
        assert ours.previous_timestep(t).item() == theirs.previous_timestep(t).item()
    assert ours.previous_timestep(torch.tensor([50, 0, 100])).tolist() == [1, -1, 87]
    x = gauss(*SHAPE, seed=0)
    for t in theirs.timesteps:
        a, b = (s.step(x, t, x, torch.Generator().manual_seed(1)).prev_sample for s in (ours, theirs))
        assert difference(a, b) <= TOLERANCE
    ours.set_timesteps(10)
    assert not ours.custom_timesteps and ours.timesteps.tolist() == list(range(900, -1, -100))


def test_diffusers_pipeline_draws_the_same_picture() -> None:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, **blocks
    )
    pictures = []
    for cls in (DDPMScheduler, Diffusers):
        pipe = DDPMPipeline(unet, cls(beta_schedule="squaredcos_cap_v2"))
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(3)
        pictures.append(
            pipe(batch_size=2, generator=generator, num_inference_steps=6, output_type="np").images
        )
    np.testing.assert_allclose(pictures[0], pictures[1], atol=1e-5)
    assert pictures[0].std() > 0.1


# ------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    "wrong",
    [
        {"beta_schedule": "cosine"},
        {"prediction_type": "eps"},
        {"variance_type": "fixed"},
        {"timestep_spacing": "even"},
        {"num_train_timesteps": 0},
        {"beta_start": 0.0},
        {"beta_end": 2.0},
        {"beta_end": 1.0},
        {"steps_offset": -1},
        {"clip_sample_range": 0.0},
        {"dynamic_thresholding_ratio": 1.5},
        {"sample_max_value": -1.0},
        {"eta": 1.5},
        {"eta": -0.1},
    ],
)
def test_wrong_config_is_named(wrong: dict) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"{name}={value!r}: must be "):
        DDPMScheduler(**wrong)


@pytest.mark.parametrize(
    "betas", [[0.1, 1.2], [0.0, 0.1], [-0.1, 0.1], [[0.1, 0.2]], [], [float("nan"), 0.1]]
)
def test_wrong_trained_betas_are_named(betas: list) -> None:
    with pytest.raises(ValueError, match="trained_betas=.*: must be "):
        DDPMScheduler(trained_betas=betas)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "pass one of"),
        ({"num_inference_steps": 5, "timesteps": [4, 0]}, "pass one of"),
        ({"num_inference_steps": 0}, "num_inference_steps=0: must be an integer in 1 .. 1000"),
        ({"num_inference_steps": 1001}, "num_inference_steps=1001: must be an integer in 1 .. 1000"),
        ({"num_inference_steps": 2.5}, "num_inference_steps=2.5: must be an integer in 1 .. 1000"),
        (
            {"num_inference_steps": 1000},
            "steps_offset included",
        ),  # leading with an offset of 1 starts at t = 1000
        ({"timesteps": [10, 20]}, r"timesteps=\[10, 20\]: must be integers in descending order"),
        ({"timesteps": [10, 10]}, r"timesteps=\[10, 10\]: must be integers in descending order"),
        ({"timesteps": []}, r"timesteps=\[\]: must be integers"),
        ({"timesteps": [10.5, 0.5]}, "must be integers"),
        ({"timesteps": [1000, 5]}, "timesteps='1000 .. 5': must be in 0 .. 999"),
        ({"timesteps": [5, -1]}, "timesteps='5 .. -1': must be in 0 .. 999"),
    ],
)
def test_wrong_timesteps_are_named(arguments: dict, message: str) -> None:
    scheduler = DDPMScheduler(steps_offset=1)
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(**arguments)
    assert scheduler.num_inference_steps is None and len(scheduler.timesteps) == 1000


def test_wrong_tensors_are_named() -> None:
    x, wide = gauss(*SHAPE, seed=0), gauss(2, 6, 4, 4, seed=0)
    with pytest.raises(ValueError, match=r"model_output shape=\[2, 3, 4, 4\]: must be \[2, 6, 4, 4\]"):
        DDPMScheduler(variance_type="learned").step(x, 500, x)
    with pytest.raises(ValueError, match=r"model_output shape=\[2, 6, 4, 4\]: must be \[2, 3, 4, 4\]"):
        DDPMScheduler().step(wide, 500, x)
    for t in (1000, -1, 3.0, torch.tensor([3, 4])):
        with pytest.raises(ValueError, match="timestep=.*: must be one integer in 0 .. 999"):
            DDPMScheduler().step(x, t, x)
    spaced = DDPMScheduler()
    spaced.set_timesteps(10)
    with pytest.raises(ValueError, match="timestep=901: must be one that scheduler.timesteps holds"):
        spaced.step(x, 901, x)
    with pytest.raises(ValueError, match="noise shape"):
        spaced.add_noise(x, x[:, :2], torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="number of timesteps=3: must be 1 or 2"):
        spaced.add_noise(x, x, torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="timesteps=torch.float32: must be integers"):
        spaced.get_velocity(x, x, torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="dtype=torch.uint8: must be floating point"):
        ddpm.q_sample(x.to(torch.uint8), x, 0.5)
    with pytest.raises(ValueError, match=r"coefficient shape=\(3, 1, 1, 1\): must be broadcastable"):
        ddpm.q_sample(x, x, torch.tensor([0.1, 0.2, 0.3]))
    with pytest.raises(ValueError, match="predicted_variance=None"):
        ddpm.reverse_variance("learned_range", *torch.tensor([[0.5], [0.6], [0.1]]))
    for call in (lambda: ddpm.predict_x0(x, x, 0.5, "eps"), lambda: ddpm.spaced_timesteps("even", 10, 2)):
        with pytest.raises(ValueError, match="must be one of"):
            call()


@pytest.mark.parametrize(
    "config", [{}, {"eta": 0.3}, {"variance_type": "learned_range", "thresholding": True}]
)
def test_a_step_and_a_noising_are_one_call_into_the_equations(config: dict[str, Any]) -> None:
    """What a picture's path through the files costs: calls from the scheduler's file into the equations'."""
    scheduler = DDPMScheduler(**config)
    scheduler.set_timesteps(10)
    channels = 6 if "variance_type" in config else 3
    output, x_t, t = torch.zeros(2, channels, 4, 4), torch.ones(2, 3, 4, 4), int(scheduler.timesteps[3])
    calls: list[str] = []

    def watch(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.endswith("equations.py"):
            if frame.f_back.f_code.co_filename.endswith("ddpm_scheduler.py"):
                calls.append(frame.f_code.co_name)

    sys.setprofile(watch)
    try:
        scheduler.step(output, t, x_t, torch.Generator())
        scheduler.add_noise(x_t, x_t, torch.tensor([3, 5]))
    finally:
        sys.setprofile(None)
    assert calls == ["p_mean_variance", "q_sample"]
