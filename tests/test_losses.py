"""Training losses against their papers' formulas, torch, diffusers' SNR and open_clip's loss."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler as DiffusersDDPM
from diffusers.training_utils import compute_snr
from open_clip.loss import ClipLoss

from training.losses import clip_contrastive_loss, min_snr_weight, simple_loss

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


# ------------------------------------------------------------ CLIP's loss


@pytest.mark.parametrize("tau", [0.0, math.log(1 / 0.07), 4.6])
@pytest.mark.parametrize("batch, width", [(1, 8), (7, 16), (32, 5)])
def test_contrastive_loss_and_gradients_match_open_clip(batch, width, tau):
    ours = [3 * randn(batch, width), randn(batch, width, seed=1), torch.tensor(tau)]
    references = [tensor.clone().requires_grad_() for tensor in ours]
    ours = [tensor.requires_grad_() for tensor in ours]
    image, text, scale = references
    expected = ClipLoss()(F.normalize(image, dim=-1), F.normalize(text, dim=-1), scale.exp())
    loss = clip_contrastive_loss(*ours)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    expected.backward()
    for mine, reference in zip(ours, references, strict=True):
        torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-4, atol=1e-5)


def test_contrastive_loss_in_closed_form():
    """B orthogonal pairs: log(1 + (B - 1) exp(-s)), whatever the lengths; shifted by one: s more."""
    batch, tau = 6, 1.2
    scale = math.exp(tau)
    image, text = torch.diag(torch.arange(1.0, 7)), 0.1 * torch.eye(batch)
    right = math.log(1 + (batch - 1) * math.exp(-scale))
    assert clip_contrastive_loss(image, text, torch.tensor(tau)).item() == pytest.approx(right, rel=1e-5)
    wrong = clip_contrastive_loss(image, text.roll(1, 0), torch.tensor(tau)).item()
    assert wrong == pytest.approx(right + scale, rel=1e-5)


def test_contrastive_loss_looks_at_rows_and_columns():
    """Two pictures alike: their texts are told apart by neither, so both directions count and differ."""
    image = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    rows = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(1))) / 2  # logits [[1, 0], [1, 0]]
    columns = math.log(2)
    loss = clip_contrastive_loss(image, text, torch.tensor(0.0))
    assert loss.item() == pytest.approx((rows + columns) / 2, rel=1e-6)
