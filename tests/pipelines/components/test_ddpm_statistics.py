"""DDPMScheduler by its statistics: with the exact noise predictor, sampling gives back the distribution.

Tolerances are in standard errors where the truth is exact; where the chain's own discretisation also counts,
they are stated beside the test. With CORGI_FIGURES set, the Swiss roll's figure is drawn into that folder.
"""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.chain.equations import posterior_mean, posterior_variance, q_sample
from pipelines.components.ddpm_scheduler import DDPMScheduler


@pytest.mark.parametrize(
    "schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "zero_snr"]
)
def test_add_noise_has_the_closed_form_mean_and_variance(schedule: str) -> None:
    """E x_t = sqrt(abar_t) x0, Var x_t = 1 - abar_t, each within 5 standard errors of 100,000 draws."""
    zero = schedule == "zero_snr"
    scheduler = DDPMScheduler(beta_schedule="linear" if zero else schedule, rescale_betas_zero_snr=zero)
    n, generator = 100_000, torch.Generator().manual_seed(0)
    betas = scheduler.betas.double()
    for t in (0, 10, 300, 700, 999):
        abar = torch.prod(1 - betas[: t + 1])
        for x0 in (-1.0, 0.3):
            eps = torch.randn(n, generator=generator)
            x_t = scheduler.add_noise(torch.full((n,), x0), eps, torch.tensor(t)).double()
            variance = 1 - abar.item()
            assert abs(x_t.mean() - abar.sqrt() * x0) < 5 * math.sqrt(variance / n)
            assert abs(x_t.var() / variance - 1) < 5 * math.sqrt(2 / n)


def test_posterior_is_the_conditional_of_simulated_chains() -> None:
    """Simulate x_prev and x_t step by step: given x_t, x_prev has the posterior's mean and variance."""
    abar_prev, abar_t, x0, n = 0.6, 0.45, 0.8, 400_000
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, n, generator=generator, dtype=torch.float64)
    x_prev = q_sample(torch.full((n,), x0, dtype=torch.float64), z[0], abar_prev)
    x_t = math.sqrt(abar_t / abar_prev) * x_prev + math.sqrt(1 - abar_t / abar_prev) * z[1]
    residual = x_prev - posterior_mean(torch.full((n,), x0, dtype=torch.float64), x_t, abar_t, abar_prev)
    variance = float(posterior_variance(torch.tensor(abar_t), torch.tensor(abar_prev)))
    assert abs(residual.mean()) < 5 * math.sqrt(variance / n)
    assert abs(residual.var() / variance - 1) < 5 * math.sqrt(2 / n)
    correlation = torch.corrcoef(torch.stack([residual, x_t]))[0, 1]
    assert abs(correlation) < 5 / math.sqrt(n)


# ------------------------------------------------------------ a Gaussian mixture


class Mixture:
    """sum_k w_k N(m_k, C_k) in D dimensions, and what a perfect model would say of its noised versions."""

    def __init__(self, weights: torch.Tensor, means: torch.Tensor, covariances: torch.Tensor) -> None:
        self.weights, self.means, self.covariances = weights, means, covariances  # (K,), (K, D), (K, D, D)

    def mean(self) -> torch.Tensor:
        return self.weights @ self.means

    def covariance(self) -> torch.Tensor:
        second = self.covariances + self.means[:, :, None] * self.means[:, None, :]
        return (self.weights[:, None, None] * second).sum(0) - torch.outer(self.mean(), self.mean())

    def noise(self, x_t: torch.Tensor, abar: float) -> torch.Tensor:
        """-sqrt(1 - abar) grad log p_t(x_t), p_t a mixture of N(sqrt(abar) m, abar C + (1 - abar) I)."""
        covariances = abar * self.covariances + (1 - abar) * torch.eye(self.means.shape[1])
        precisions = torch.linalg.inv(covariances)
        d = x_t[:, None] - math.sqrt(abar) * self.means  # (B, K, D)
        pull = torch.einsum("kij,bkj->bki", precisions, d)
        logits = self.weights.log() - 0.5 * torch.logdet(covariances) - 0.5 * (d * pull).sum(-1)
        return math.sqrt(1 - abar) * (logits.softmax(-1)[..., None] * pull).sum(1)  # (B, D)


MIXTURE = Mixture(
    torch.tensor([0.5, 0.3, 0.2]),
    torch.tensor([[0.6, 0.5], [-0.7, 0.1], [0.1, -0.8]]),
    torch.tensor([[[0.02, 0.01], [0.01, 0.03]], [[0.01, 0.0], [0.0, 0.04]], [[0.03, -0.02], [-0.02, 0.02]]]),
)


@pytest.mark.parametrize(
    ("prediction", "variance", "schedule"),
    [
        ("epsilon", "fixed_small", "linear"),
        ("v_prediction", "fixed_large", "squaredcos_cap_v2"),
        ("sample", "learned_range", "linear"),
    ],
)
def test_1000_reverse_steps_give_back_a_gaussian_mixture(
    prediction: str, variance: str, schedule: str
) -> None:
    """From N(0, I), with the exact noise predictor: mean, covariance and weights of the mixture (8,000).

    Tolerance: 4 standard errors, and on top 0.01 for the covariance, 0.005 for the weights and 0.004 for the
    covariance of each part, since 1000 steps are not infinitely many.
    """
    n, truth = 8_000, MIXTURE
    scheduler = DDPMScheduler(
        beta_schedule=schedule, variance_type=variance, prediction_type=prediction, clip_sample=False
    )
    scheduler.set_timesteps(1000)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 2, generator=generator)
    for t in scheduler.timesteps:
        abar = scheduler.alphas_cumprod[t].item()
        eps = truth.noise(x, abar)
        x0 = (x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
        v = math.sqrt(abar) * eps - math.sqrt(1 - abar) * x0
        output = {"epsilon": eps, "sample": x0, "v_prediction": v}[prediction]
        if variance == "learned_range":
            output = torch.cat([output, torch.zeros_like(output)], dim=1)  # half-way between the two
        x = scheduler.step(output, t, x, generator=generator).prev_sample
    expected, covariance = truth.mean(), truth.covariance()
    error = (x.mean(0) - expected).abs() / (covariance.diagonal() / n).sqrt()
    print(f"{prediction}, {variance}: mean off by {error.tolist()} standard errors, covariance by")
    print((torch.cov(x.T) - covariance).tolist())
    assert (error < 4).all()
    close = 0.01 + 4 * covariance.max().item() * math.sqrt(2 / n)
    torch.testing.assert_close(torch.cov(x.T), covariance, rtol=0, atol=close)
    d = x[:, None] - truth.means
    nearest = torch.einsum("bki,kij,bkj->bk", d, torch.linalg.inv(truth.covariances), d).argmin(1)
    shares = torch.bincount(nearest, minlength=3) / n
    assert (
        (shares - truth.weights).abs() < 4 * (truth.weights * (1 - truth.weights) / n).sqrt() + 0.005
    ).all()
    within = torch.stack([torch.cov(x[nearest == k].T) for k in range(3)])
    torch.testing.assert_close(within, truth.covariances, rtol=0, atol=0.004)


# ------------------------------------------------------------ the Swiss roll


def swiss_roll(n: int, seed: int = 0) -> torch.Tensor:
    """n points, (n, 2), in order along a spiral of one and a half turns, unit variance."""
    angle = 1.5 * np.pi * (1 + 2 * np.sort(np.random.default_rng(seed).random(n)))
    points = np.stack([angle * np.cos(angle), angle * np.sin(angle)], axis=1)
    return torch.tensor((points - points.mean(0)) / points.std(), dtype=torch.float32)


def predict_noise(points: torch.Tensor, x_t: torch.Tensor, abar: float) -> torch.Tensor:
    """E[eps | x_t] exactly, x0 being one of the points with equal chances."""
    distance = torch.cdist(x_t, math.sqrt(abar) * points, compute_mode="use_mm_for_euclid_dist") ** 2
    x0 = (-distance / (2 * (1 - abar))).softmax(-1) @ points
    return (x_t - math.sqrt(abar) * x0) / math.sqrt(1 - abar)


def draw_figure(path: Path, rows: dict[str, list[tuple[str, torch.Tensor]]]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.3 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), max(map(len, rows.values())), squeeze=False)
    for row, (name, panels) in zip(axes, rows.items(), strict=True):
        for ax, (title, x) in zip(row, panels, strict=True):
            ax.scatter(*x.T, s=1)
            ax.set(title=title, xlim=(-3, 3), ylim=(-3, 3), aspect="equal", xticks=[], yticks=[])
        row[0].set_ylabel(name)
    FigureCanvasAgg(figure).print_png(str(path))


def test_swiss_roll_comes_back(tmp_path: Path) -> None:
    """1000 reverse steps from noise return to the roll: mean, covariance, and every part about equally often.

    Tolerances for 2,000 samples of 300 points: 4 standard errors for mean and covariance; every sample within
    0.03 of a point (the coils are 0.8 apart); chi-square of 30 equal arcs within 4 deviations of its mean.
    """
    points, n = swiss_roll(300), 2_000
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", clip_sample=False, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(1000)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 2, generator=generator)
    panels = []
    for t in scheduler.timesteps.tolist():
        if t in (999, 600, 300, 100):
            panels.append((f"t = {t}", x))
        eps = predict_noise(points, x, scheduler.alphas_cumprod[t].item())
        x = scheduler.step(eps, t, x, generator=generator).prev_sample
    panels.append(("t = 0", x))

    notes = DDPMScheduler(num_train_timesteps=10, trained_betas=[0.05] * 10)  # the lecture notes' example
    cloud = points.repeat(10, 1)
    eps = torch.randn(cloud.shape, generator=generator)
    forward = [("the roll", points)]
    forward += [(f"step {t + 1}", notes.add_noise(cloud, eps, torch.tensor(t))) for t in (0, 3, 6, 9)]
    path = Path(os.environ.get("CORGI_FIGURES", tmp_path)) / "swiss_roll.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_figure(path, {"forward, beta = 0.05": forward, "reverse, cosine": panels})
    assert path.stat().st_size > 10_000

    mean, covariance = points.mean(0), torch.cov(points.T, correction=0)
    distances = torch.cdist(x, points)
    distance, nearest = distances.min(1)
    arcs = torch.bincount(nearest // 10, minlength=30)
    chi_square = ((arcs - n / 30) ** 2 / (n / 30)).sum().item()
    errors = (x.mean(0) - mean).tolist(), (torch.cov(x.T) - covariance).tolist()
    print(
        "Swiss roll: mean and covariance off by",
        errors,
        f"farthest {distance.max():.4f}, arcs {chi_square:.0f}",
    )
    assert ((x.mean(0) - mean).abs() < 4 * (covariance.diagonal() / n).sqrt()).all()
    centred = points - mean
    products = centred[:, :, None] * centred[:, None, :]  # their spread is the standard error of a covariance
    assert ((torch.cov(x.T) - covariance).abs() < 4 * products.std(0) / math.sqrt(n)).all()
    assert distance.max() < 0.03
    assert abs(chi_square - 29) < 4 * math.sqrt(2 * 29)
