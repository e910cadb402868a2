"""Training losses against their papers' formulas, torch, diffusers' SNR and open_clip's loss."""

import math

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler as DiffusersDDPM
from diffusers.training_utils import compute_snr
from torch.distributions import Normal, kl_divergence

from pipelines import DDPMScheduler
from pipelines.coding.likelihood import prior_term, vlb_terms
from training.objectives.losses import (
    DiffusionLoss,
    LossAwareTimesteps,
    detail_loss,
    min_snr_weight,
    simple_loss,
)

T = torch.tensor([3, 40, 200, 500, 800, 950, 990])


@pytest.fixture(scope="module")
def theirs() -> DiffusersDDPM:
    return DiffusersDDPM(beta_schedule="squaredcos_cap_v2")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------ min-SNR weights


@pytest.mark.parametrize(
    "prediction_type, expected",
    [
        ("epsilon", [1.0, 1.0, 0.25]),
        ("v_prediction", [1 / 3, 5 / 6, 5 / 21]),
        ("sample", [0.5, 5.0, 5.0]),
    ],
)
def test_min_snr_weights_by_hand(prediction_type, expected):
    weights = min_snr_weight(torch.tensor([0.5, 5.0, 20.0]), prediction_type, gamma=5.0)
    torch.testing.assert_close(weights, torch.tensor(expected))


@pytest.mark.parametrize(
    "prediction_type, expected",
    [
        ("epsilon", [2.0, 1.0, 0.25]),
        ("v_prediction", [2 / 3, 5 / 6, 5 / 21]),
        ("sample", [1.0, 5.0, 5.0]),
    ],
)
def test_a_floor_lifts_the_weight_of_the_noisiest_by_hand(prediction_type, expected):
    weights = min_snr_weight(torch.tensor([0.5, 5.0, 20.0]), prediction_type, gamma=5.0, floor=1.0)
    torch.testing.assert_close(weights, torch.tensor(expected))


@pytest.mark.parametrize("floor", [-0.1, 5.1])
def test_a_floor_outside_zero_to_gamma_is_refused(floor):
    with pytest.raises(ValueError, match=f"floor must be in .0, gamma. .*got {floor}"):
        min_snr_weight(torch.ones(2), "sample", 5.0, floor)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_over_a_schedule(theirs, gamma):
    """Hang 2023: w_x0 = min(SNR, g), and the others are it over SNR and SNR + 1; SNR as diffusers has it."""
    snr = compute_snr(theirs, torch.arange(1000))
    abar = theirs.alphas_cumprod.double()
    exact = abar / (1 - abar)
    for prediction_type, divisor in (("epsilon", exact), ("v_prediction", exact + 1), ("sample", 1.0)):
        expected = torch.minimum(exact, torch.tensor(gamma).double()) / divisor
        weights = min_snr_weight(snr, prediction_type, gamma)
        torch.testing.assert_close(weights.double(), expected, rtol=1e-3, atol=1e-9)


def test_the_weighted_loss_does_not_depend_on_the_parametrisation(theirs):
    """One estimate of x0, read as eps, v or x0, costs the same: that is what the three weights are for."""
    abar = theirs.alphas_cumprod[T].double().reshape(-1, 1, 1, 1)
    x0, eps, guess = (randn(len(T), 3, 8, 8, seed=seed).double() for seed in range(3))
    x_t = abar.sqrt() * x0 + (1 - abar).sqrt() * eps
    eps_guess = (x_t - abar.sqrt() * guess) / (1 - abar).sqrt()
    pairs = {
        "sample": (guess, x0),
        "epsilon": (eps_guess, eps),
        "v_prediction": (
            abar.sqrt() * eps_guess - (1 - abar).sqrt() * guess,
            abar.sqrt() * eps - (1 - abar).sqrt() * x0,
        ),
    }
    snr = compute_snr(theirs, T)
    losses = {kind: simple_loss(*pair, min_snr_weight(snr, kind, 5.0)) for kind, pair in pairs.items()}
    torch.testing.assert_close(losses["epsilon"], losses["sample"], rtol=1e-3, atol=0)
    torch.testing.assert_close(losses["v_prediction"], losses["sample"], rtol=1e-3, atol=0)
    plain = simple_loss(*pairs["sample"])
    assert losses["sample"][-1] < 0.01 * plain[-1]  # weights at work: hardly anything at almost pure noise


@pytest.mark.parametrize("gamma", [0, -1.0])
def test_gamma_must_be_positive(gamma):
    with pytest.raises(ValueError, match=f"gamma must be above 0, got {gamma}"):
        min_snr_weight(torch.ones(2), "epsilon", gamma)


def test_unknown_prediction_type():
    with pytest.raises(ValueError, match="prediction_type .* got 'x0'"):
        min_snr_weight(torch.ones(2), "x0", 5.0)


# ------------------------------------------------------------ simple loss


@pytest.mark.parametrize("shape", [(5, 3, 4, 6), (5, 7), (5, 2, 3, 4, 2)])
def test_simple_loss_is_the_mean_squared_error_of_each_sample(shape):
    output, target = randn(*shape), randn(*shape, seed=1)
    weight = torch.tensor([0.0, 0.5, 1.0, 2.0, 10.0])
    expected = torch.stack([F.mse_loss(a, b) for a, b in zip(output, target, strict=True)])
    torch.testing.assert_close(simple_loss(output, target), expected)
    torch.testing.assert_close(simple_loss(output, target, weight), weight * expected)


def test_simple_loss_gradient():
    """d/d output of the batch mean: 2 w_i (output - target) / (B n)."""
    output, target, weight = randn(4, 3, 5).requires_grad_(), randn(4, 3, 5, seed=1), torch.arange(1.0, 5)
    simple_loss(output, target, weight).mean().backward()
    expected = 2 * weight.reshape(-1, 1, 1) * (output - target).detach() / (4 * 15)
    torch.testing.assert_close(output.grad, expected)


def test_detail_loss_by_hand():
    """|errors| of 1, 2, 3, 6 have the mean 3, at the bound and above it; just below it nothing counts."""
    x0_hat = torch.tensor([[1.0, -2.0, 3.0, -6.0]]).repeat(3, 1).requires_grad_()
    losses = detail_loss(x0_hat, torch.zeros(3, 4), torch.tensor([4.99, 5.0, 80.0]), least=5.0)
    assert losses.tolist() == [0.0, 3.0, 3.0]
    losses.sum().backward()
    assert x0_hat.grad.tolist() == [[0.0] * 4] + [[0.25, -0.25, 0.25, -0.25]] * 2
    assert detail_loss(x0_hat.bfloat16(), torch.zeros(3, 4), torch.ones(3), 0.0).dtype == torch.float32
    with pytest.raises(ValueError, match=r"\(3, 4\) and x0 \(3, 1\)"):
        detail_loss(x0_hat, torch.zeros(3, 1), torch.ones(3), 0.0)


def test_simple_loss_is_computed_in_float32():
    """300^2 is no number in float16, and bfloat16 would round 1.01^2."""
    large = torch.full((1, 4), 300.0, dtype=torch.float16)
    assert simple_loss(large, torch.zeros_like(large)).tolist() == [90000.0]
    output = randn(2, 100).to(torch.bfloat16)
    loss = simple_loss(output, torch.zeros_like(output))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, output.float().square().mean(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(4, 1, 8, 8), (1, 3, 8, 8), (4, 3, 8), (4, 6, 8, 8), (3, 8, 8)])
def test_shapes_that_would_broadcast_are_refused(shape):
    with pytest.raises(ValueError, match="differ in shape"):
        simple_loss(torch.zeros(4, 3, 8, 8), torch.zeros(shape))


# ------------------------------------------------------------ the bound as a loss


def chain(T: int = 1000, **config) -> DDPMScheduler:
    settings = {
        "beta_schedule": "squaredcos_cap_v2",
        "variance_type": "learned_range",
        "num_train_timesteps": T,
    }
    return DDPMScheduler(**(settings | config))


def noised(
    scheduler: DDPMScheduler, t: list[int], shape: tuple[int, ...] = (2, 3, 3)
) -> dict[str, torch.Tensor]:
    """x0 of 256 levels, x_t, the target and an output near it with v in [-1, 1], float64, one for each t."""
    steps = torch.tensor(t)
    levels = torch.randint(0, 256, (len(t), *shape), generator=torch.Generator().manual_seed(0))
    x0, eps, error, v = levels / 127.5 - 1.0, *(randn(len(t), *shape, seed=seed) for seed in (1, 2, 3))
    x0, eps, error, v = (x.double() for x in (x0, eps, error, v.tanh()))
    kind = scheduler.config.prediction_type
    target = {"epsilon": eps, "sample": x0, "v_prediction": scheduler.get_velocity(x0, eps, steps)}[kind]
    size = 0.003 if kind == "sample" else 0.1  # at t = 0 a twelfth of x0 is already 13 deviations
    output = torch.cat([target + size * error, v], dim=1)
    return {
        "model_output": output,
        "target": target,
        "x0": x0,
        "x_t": scheduler.add_noise(x0, eps, steps),
        "t": steps,
    }


def term_by_hand(scheduler: DDPMScheduler, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """L_t in bits per dimension: KL of torch.distributions between Ho 2020's eq. 7 and eq. 11 with Nichol
    2021's eq. 15, and for t = 0 the mass of the level, from Normal.cdf."""
    betas = 1 - scheduler.alphas_cumprod[1:].double() / scheduler.alphas_cumprod[:-1].double()
    abars = scheduler.alphas_cumprod.double().tolist()
    betas = [1 - abars[0], *betas.tolist()]
    terms = []
    for row, t in enumerate(batch["t"].tolist()):
        x0, x_t = batch["x0"][row], batch["x_t"][row]
        prediction, v = batch["model_output"][row].chunk(2)
        a, beta, previous = abars[t], betas[t], abars[t - 1] if t else 1.0
        if scheduler.config.prediction_type == "sample":
            eps = (x_t - a**0.5 * prediction) / (1 - a) ** 0.5
        elif scheduler.config.prediction_type == "v_prediction":
            eps = (1 - a) ** 0.5 * x_t + a**0.5 * prediction
        else:
            eps = prediction
        mean = (x_t - beta / (1 - a) ** 0.5 * eps) / (1 - beta) ** 0.5
        small = beta * (1 - previous) / (1 - a) if t else betas[1] * (1 - abars[0]) / (1 - abars[1])
        f = (v + 1) / 2
        sigma = (0.5 * (f * math.log(beta) + (1 - f) * math.log(small))).exp()
        if t == 0:
            p = Normal(mean, sigma)
            low = torch.where(x0 < -0.999, torch.zeros_like(x0), p.cdf(x0 - 1 / 255))
            high = torch.where(x0 > 0.999, torch.ones_like(x0), p.cdf(x0 + 1 / 255))
            terms.append(-(high - low).log2().mean())
        else:
            true = previous**0.5 * beta * x0 + (1 - beta) ** 0.5 * (1 - previous) * x_t
            q = Normal(true / (1 - a), torch.full_like(x0, small).sqrt())
            terms.append(kl_divergence(q, Normal(mean, sigma)).mean() / math.log(2))
    return torch.stack(terms)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("T", [1000, 50])
def test_vlb_and_hybrid_by_hand(kind, T):
    """vlb is T L_t; hybrid is the weighted squared error of the first C channels + 0.001 T L_t: 1 of L_t for
    T = 1000, 0.05 for T = 50, and never 0.001 of it."""
    scheduler = chain(T, prediction_type=kind)
    batch = noised(scheduler, [0, 1, T // 2, T - 1])
    terms = term_by_hand(scheduler, batch)
    vlb = DiffusionLoss("vlb", scheduler)(**batch)
    torch.testing.assert_close(vlb, T * terms, rtol=1e-6, atol=0)
    weight = torch.tensor([0.5, 1.0, 2.0, 0.1]).double()
    squared = (batch["model_output"][:, :2] - batch["target"]).square().mean(dim=(1, 2, 3))
    hybrid = DiffusionLoss("hybrid", scheduler)(**batch, weight=weight)
    torch.testing.assert_close(hybrid, weight * squared + 0.001 * T * terms, rtol=1e-5, atol=0)
    stronger = DiffusionLoss("hybrid", scheduler, vlb_weight=0.1)(**batch)
    torch.testing.assert_close(stronger, squared + 0.1 * T * terms, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_the_variance_part_of_hybrid_has_no_gradient_to_the_mean(kind):
    """Exactly none: with it the prediction's gradient is that of the simple loss, bit for bit. The variance's
    is that of 0.001 T L_t."""
    scheduler = chain(prediction_type=kind)
    batch = noised(scheduler, [0, 1, 5, 400, 999])
    output = batch.pop("model_output").requires_grad_()

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss.sum(), output)[0]

    of_hybrid = gradient(DiffusionLoss("hybrid", scheduler)(output, **batch))
    of_simple = gradient(simple_loss(output[:, :2], batch["target"]))
    of_vlb = gradient(DiffusionLoss("vlb", scheduler)(output, **batch))
    assert torch.equal(of_hybrid[:, :2], of_simple[:, :2])
    torch.testing.assert_close(of_hybrid[:, 2:], 0.001 * of_vlb[:, 2:], rtol=1e-7, atol=1e-20)
    assert (of_vlb[:, 2:].abs() > 0).all() and (of_vlb[:, :2].abs() > 0).any()
    only_variance = DiffusionLoss("hybrid", scheduler)
    frozen = torch.cat([output[:, :2].detach(), output[:, 2:]], dim=1)
    part = 0.001 * only_variance.vlb(frozen, batch["x0"], batch["x_t"], batch["t"])
    assert torch.equal(gradient(part)[:, :2], torch.zeros_like(output[:, :2]))


def test_simple_is_the_simple_loss():
    scheduler = chain(variance_type="fixed_small")
    batch = noised(scheduler, [0, 10, 999])
    batch["model_output"] = batch["model_output"][:, :2]
    weight = torch.tensor([1.0, 2.0, 3.0])
    found = DiffusionLoss("simple", scheduler)(**batch, weight=weight)
    assert torch.equal(found, simple_loss(batch["model_output"], batch["target"], weight))


def test_the_mean_of_vlb_over_t_is_the_bound_without_its_prior():
    """Training's losses at each t, and evaluation's terms on the same noise, nothing clipped."""
    scheduler = chain(30, clip_sample=False)
    x0 = noised(scheduler, [0, 0, 0])["x0"]
    eps = {t: randn(*x0.shape, seed=t).double() for t in range(30)}

    def model(x_t: torch.Tensor, t: int) -> torch.Tensor:
        return torch.cat([0.9 * x_t, x_t.tanh()], dim=1)

    bound = vlb_terms(model, scheduler, x0, eps.__getitem__).bits.sum(1) - prior_term(scheduler, x0)
    loss, losses = DiffusionLoss("vlb", scheduler), []
    for t in range(30):
        steps = torch.full((3,), t)
        x_t = scheduler.add_noise(x0, eps[t], steps)
        losses.append(loss(model(x_t, t), eps[t], x0, x_t, steps))
    torch.testing.assert_close(torch.stack(losses).mean(0), bound, rtol=1e-9, atol=0)


def test_drawing_pictures_between_two_steps_changes_nothing():
    """A model's scheduler is told 25 timesteps when it draws, and clips; the loss is of all, not clipped."""
    scheduler = chain(prediction_type="sample", clip_sample=True)
    batch = noised(scheduler, [3, 501, 998])
    batch["model_output"][:, :2] += 3  # far out of [-1, 1]
    loss = DiffusionLoss("vlb", scheduler)
    before = loss(**batch)
    scheduler.set_timesteps(25)
    assert torch.equal(loss(**batch), before)
    torch.testing.assert_close(before, 1000 * term_by_hand(scheduler, batch), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_are_read_in_float32(dtype):
    scheduler = chain()
    batch = noised(scheduler, [0, 1, 500, 999])
    batch = {name: x.float() if x.is_floating_point() else x for name, x in batch.items()}
    batch["model_output"] = batch["model_output"].to(dtype)
    for kind in ("hybrid", "vlb"):
        loss = DiffusionLoss(kind, scheduler)
        found = loss(**batch)
        assert found.dtype == torch.float32
        exact = loss(**{name: x.double() if x.is_floating_point() else x for name, x in batch.items()})
        torch.testing.assert_close(found.double(), exact.double(), rtol=2e-3, atol=1e-6)


def test_training_finds_the_best_variance_and_leaves_the_mean():
    """One v for each t and one bias in the prediction, on 1,200 fixed draws. The best variance is known, and
    a learned range reaches it: beta~ + mean (mu~ - mu)^2; the bias goes where the simple loss has it, to the
    mean error. x0 is 0.5 or -0.5, the predictor exact but for 0.05."""
    T, n = 6, 1200
    scheduler = DDPMScheduler(
        num_train_timesteps=T,
        beta_start=0.05,
        beta_end=0.5,
        variance_type="learned_range",
        prediction_type="sample",
        clip_sample=False,
    )
    t = torch.arange(n) % T
    sign = torch.randint(0, 2, (n, 1), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    x0 = (0.5 * sign * 127.5).round() / 127.5
    eps = randn(n, 1, seed=1).double()
    x_t = scheduler.add_noise(x0, eps, t)
    abar = scheduler.alphas_cumprod.double()[t][:, None]
    guess = x0.abs() * torch.tanh(abar.sqrt() * x0.abs() * x_t / (1 - abar)) + 0.05
    v = torch.zeros(T, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    loss = DiffusionLoss("hybrid", scheduler, vlb_weight=1.0)
    optimizer = torch.optim.Adam([v, bias], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        output = torch.cat([guess + bias, v[t][:, None]], dim=1)
        loss(output, x0, x0, x_t, t).mean().backward()
        optimizer.step()

    assert bias.item() == pytest.approx(float((x0 - guess).mean()), abs=1e-4)
    previous = torch.cat([torch.ones(1).double(), scheduler.alphas_cumprod.double()])[t][:, None]
    beta = 1 - abar / previous
    of_x0 = previous.sqrt() * beta / (1 - abar)  # the weight of x0 in mu~
    error = (of_x0 * (x0 - guess - bias.detach())).square()
    small = (1 - previous) / (1 - abar) * beta
    v = v.detach()
    for step in range(1, T):
        rows = t == step
        low, high = float(small[rows][0]), float(beta[rows][0])
        best = low + float(error[rows].mean())
        found = math.exp(float((v[step] + 1) / 2 * math.log(high) + (1 - v[step]) / 2 * math.log(low)))
        assert low < best < high
        assert found == pytest.approx(best, rel=1e-3), step


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("elbo", "fixed_small"), "loss must be one of .*, got 'elbo'"),
        (
            ("simple", "learned_range"),
            "loss must be hybrid or vlb with variance_type='learned_range', got 'simple'",
        ),
        (("hybrid", "fixed_large"), "variance_type must be one of .* with loss='hybrid', got 'fixed_large'"),
        (("vlb", "fixed_small", 6, 3), "out_channels must be 3 with variance_type='fixed_small', got 6"),
        (("hybrid", "learned", 3, 3), "out_channels must be 6 with variance_type='learned', got 3"),
        (("hybrid", "learned", 6, 3, 0.0), "vlb_weight must be above 0, got 0.0"),
    ],
)
def test_losses_that_cannot_be_are_refused(arguments, message):
    kind, variance, *rest = arguments
    with pytest.raises(ValueError, match=message):
        DiffusionLoss(kind, chain(variance_type=variance), *rest)


def test_vlb_takes_no_weight_and_outputs_must_fit():
    batch = noised(chain(), [5, 6])
    with pytest.raises(ValueError, match="weight must be None with loss='vlb'"):
        DiffusionLoss("vlb", chain())(**batch, weight=torch.ones(2))
    batch["model_output"] = batch["model_output"][:, :2]
    for kind in ("vlb", "hybrid"):
        with pytest.raises(ValueError, match="model_output shape"):
            DiffusionLoss(kind, chain())(**batch)


# ------------------------------------------------------------ loss-aware timesteps


def filled(T: int = 4, history: int = 10, **settings) -> tuple[LossAwareTimesteps, torch.Tensor]:
    """A sampler with a full history, and the losses (T, history) that it holds."""
    sampler = LossAwareTimesteps(T, history, **settings)
    losses = torch.arange(1.0, T * history + 1).reshape(T, history)
    for column in losses.T:
        sampler.update(torch.arange(T), column)
    return sampler, losses


def test_probabilities_are_roots_of_mean_squares():
    sampler, losses = filled(uniform_share=1e-9)
    rms = losses.double().square().mean(1).sqrt()
    torch.testing.assert_close(sampler.probabilities(), rms / rms.sum(), rtol=1e-6, atol=0)
    sampler, _ = filled(uniform_share=0.1)
    torch.testing.assert_close(sampler.probabilities(), 0.9 * rms / rms.sum() + 0.1 / 4, rtol=1e-6, atol=0)


def test_only_the_last_ten_losses_count():
    """The eleventh drops the first; two of one t in a batch are both taken in, in their order."""
    sampler, losses = filled(uniform_share=1e-9)
    sampler.update(torch.tensor([2, 2, 0]), torch.tensor([100.0, 200.0, 0.0]))
    losses[2] = torch.cat([losses[2, 2:], torch.tensor([100.0, 200.0])])
    losses[0] = torch.cat([losses[0, 1:], torch.tensor([0.0])])
    rms = losses.double().square().mean(1).sqrt()
    torch.testing.assert_close(sampler.probabilities(), rms / rms.sum(), rtol=1e-6, atol=0)
    assert torch.equal(sampler.losses, losses.double())


def test_uniform_until_every_timestep_has_ten():
    sampler = LossAwareTimesteps(3)
    for _ in range(9):
        sampler.update(torch.tensor([0, 1, 2, 2]), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    sampler.update(torch.tensor([0, 2]), torch.tensor([1.0, 9.0]))
    assert torch.equal(sampler.probabilities(), torch.full((3,), 1 / 3, dtype=torch.float64))
    t, weight = sampler.draw(50, torch.Generator().manual_seed(0))
    assert torch.equal(weight, torch.ones(50)) and t.unique().tolist() == [0, 1, 2]
    sampler.update(torch.tensor([1]), torch.tensor([2.0]))
    assert sampler.probabilities()[2] > sampler.probabilities()[1] > sampler.probabilities()[0]


def test_what_is_not_finite_is_left_out():
    sampler, losses = filled()
    sampler.update(torch.tensor([0, 1]), torch.tensor([math.nan, math.inf]))
    assert torch.equal(sampler.losses, losses.double())
    silent = LossAwareTimesteps(2, history=1)
    silent.update(torch.tensor([0, 1]), torch.zeros(2))
    assert silent.probabilities().tolist() == [0.5, 0.5]


def test_draws_follow_the_probabilities_and_weights_undo_them():
    """40,000 draws: frequencies by chi-square (3 degrees, 99.9 %); the mean of weight x loss is the mean loss
    within four standard errors, with less spread than even draws have."""
    sampler, losses = filled(uniform_share=0.001)
    n, p = 40_000, sampler.probabilities()
    t, weight = sampler.draw(n, torch.Generator().manual_seed(1))
    counts = torch.bincount(t, minlength=4)
    assert float(((counts - n * p) ** 2 / (n * p)).sum()) < 16.3
    torch.testing.assert_close(weight.double(), 1 / (4 * p[t]), rtol=1e-6, atol=0)
    loss = losses.mean(1)  # at each t
    weighted = (weight * loss[t]).double()
    assert abs(weighted.mean() - loss.mean()) < 4 * weighted.std() / n**0.5
    assert weighted.std() < 0.2 * loss.std()
    sampler.update(torch.zeros(10).long(), torch.zeros(10))
    assert float(1 / (4 * sampler.probabilities()[0])) == pytest.approx(1000)  # 1/uniform_share at most


def test_draws_are_functions_of_state_and_generator_through_a_checkpoint(tmp_path):
    """A run that goes on from accelerate's checkpoint draws what the unbroken run draws."""
    accelerator = Accelerator(cpu=True)
    sampler, _ = filled()
    accelerator.register_for_checkpointing(sampler)
    accelerator.save_state(str(tmp_path / "checkpoint"))
    kept = sampler.state_dict()

    def go_on(other: LossAwareTimesteps) -> list[torch.Tensor]:
        drawn = []
        for step in range(5):
            t, weight = other.draw(16, torch.Generator().manual_seed(step))
            other.update(t, 100.0 * weight + t)
            drawn += [t, weight]
        return drawn

    expected = go_on(sampler)
    assert not torch.equal(sampler.losses, kept["losses"])  # the copy is no view
    accelerator.load_state(str(tmp_path / "checkpoint"))
    assert all(torch.equal(a, b) for a, b in zip(go_on(sampler), expected, strict=True))
    fresh = LossAwareTimesteps(4)
    fresh.load_state_dict(kept)
    assert all(torch.equal(a, b) for a, b in zip(go_on(fresh), expected, strict=True))
    with pytest.raises(ValueError, match=r"losses must be of shape \(5, 10\), got \(4, 10\)"):
        LossAwareTimesteps(5).load_state_dict(kept)


@pytest.mark.parametrize("settings", [(0,), (4, 0), (4, 10, 0.0), (4, 10, 1.5)])
def test_samplers_that_cannot_be_are_refused(settings):
    with pytest.raises(ValueError, match="^(num_timesteps|history) must be at least 1|^uniform_share must"):
        LossAwareTimesteps(*settings)
