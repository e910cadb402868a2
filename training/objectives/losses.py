"""The losses of a diffusion model: functions of tensors, and `DiffusionLoss`, which knows the chain."""

from typing import Any

import torch
from torch import Tensor

from pipelines.chain.equations import LEARNED_VARIANCES
from pipelines.coding.likelihood import chain_of, vlb_term
from training.run.settings import require

LOSSES = ("simple", "hybrid", "vlb")


def min_snr_weight(snr: Tensor, prediction_type: str, gamma: float, floor: float = 0.0) -> Tensor:
    """Min-SNR-gamma loss weight of each sample, which caps the signal-to-noise ratio (Hang 2023, equation 6).

    w_t = min(max(SNR(t), floor), gamma), divided by SNR(t) for epsilon, by SNR(t) + 1 for v_prediction, and
    by 1 for sample. With floor 0 this is the paper's min(SNR(t), gamma), which is close to 0 where x_t is
    almost pure noise. There only the text says what the picture shows; a floor of 1 keeps the plain x0 loss
    at these timesteps.

    Args:
        snr: abar_t / (1 - abar_t) of each sample, (B,), positive.
        prediction_type: "epsilon", "v_prediction" or "sample".
        gamma: the cap, positive; 5 in the paper.
        floor: the lower bound of the ratio, from 0 to gamma.

    Raises:
        ValueError: prediction_type is unknown, gamma is not positive, or floor is outside [0, gamma].
    """
    if gamma <= 0:
        raise ValueError(f"gamma must be above 0, got {gamma}")
    if not 0 <= floor <= gamma:
        raise ValueError(f"floor must be in [0, gamma] = [0, {gamma}], got {floor}")
    divisors = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}
    if prediction_type not in divisors:
        raise ValueError(f"prediction_type must be epsilon, v_prediction or sample, got {prediction_type!r}")
    return snr.clamp(floor, gamma) / divisors[prediction_type]


def simple_loss(model_output: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """L_simple (Ho 2020, equation 14) of each sample: the mean squared error over dimensions, times the
    sample's weight.

    The target is eps, v or x0, whichever the model predicts. The loss is computed in fp32 whatever the
    inputs.

    Args:
        model_output, target: (B, ...), of the same shape.
        weight: (B,), or None for ones.

    Returns:
        (B,), the loss of each sample, so that the caller can average it or group it by timestep.

    Raises:
        ValueError: the shapes differ (broadcasting would hide it).
    """
    shapes = tuple(model_output.shape), tuple(target.shape)
    if shapes[0] != shapes[1]:
        raise ValueError(f"model_output {shapes[0]} and target {shapes[1]} differ in shape")
    loss = (model_output.float() - target.float()).pow(2).flatten(1).mean(dim=1)
    return loss if weight is None else weight * loss


def detail_loss(x0_hat: Tensor, x0: Tensor, snr: Tensor, least: float) -> Tensor:
    """Mean |x0_hat - x0| of each nearly clean sample, one with SNR(t) >= least; 0 for the others.

    Next to a single wrong edge, the squared error almost ignores grain of 0.02 on an area of one colour; the
    absolute error gives every pixel the same pull. It leads to the median of x0 instead of the mean. At these
    timesteps x0 is almost certain, so the two coincide.

    Args:
        x0_hat, x0: (B, ...), of the same shape.
        snr: abar_t / (1 - abar_t) of each sample, (B,).
        least: the lowest ratio at which a sample counts.

    Returns:
        (B,), fp32.

    Raises:
        ValueError: the shapes differ (broadcasting would hide it).
    """
    if x0_hat.shape != x0.shape:
        raise ValueError(f"x0_hat {tuple(x0_hat.shape)} and x0 {tuple(x0.shape)} differ in shape")
    error = (x0_hat.float() - x0.float()).abs().flatten(1).mean(dim=1)
    return error * (snr >= least)


class DiffusionLoss:
    """L_simple, L_hybrid or L_vlb of each sample of a micro-batch.

    simple: L_simple, the mean of (target - prediction)^2          Ho 2020, eq. 14
    hybrid: L_hybrid = L_simple + lambda L_vlb                     Nichol 2021, section 3.1
    vlb: L_vlb = L_0 + L_1 + ... + L_T                             Nichol 2021, section 2.1

    A sample drawn at t estimates L_vlb, without the prior term L_T, by T L_t: one drawn term stands for all T
    terms of the sum. This factor T is independent of lambda. In L_hybrid, no gradient flows from L_vlb to the
    prediction, so that L_vlb trains only the variance. L_t is in bits per dimension, for the full chain of T
    timesteps, and x0 is not clipped, as a clipped x0 has no gradient.

    Args:
        kind: "simple", "hybrid" or "vlb".
        scheduler: the trained model's; its config is copied, so that drawing pictures with a few steps
            between two training steps does not affect the loss.
        out_channels, channels: the U-Net's and the picture's, if known, so that a mismatch is found at once.
        vlb_weight: lambda, 0.001 in the paper.

    Raises:
        ValueError: the kind is unknown; it is simple with a learned variance, which would remain untrained,
            or hybrid with a fixed variance, which cannot be trained; out_channels does not fit variance_type;
            or vlb_weight is not positive.
    """

    def __init__(
        self, kind: str, scheduler: Any, out_channels: int | None = None, channels: int | None = None,
        vlb_weight: float = 0.001,
    ) -> None:  # fmt: skip
        require(kind in LOSSES, "loss", kind, f"one of {LOSSES}")
        require(vlb_weight > 0, "vlb_weight", vlb_weight, "above 0")
        variance = scheduler.config.get("variance_type")
        learned, told = variance in LEARNED_VARIANCES, f"with variance_type={variance!r}"
        require(not learned or kind != "simple", "loss", kind, f"hybrid or vlb {told}")
        allowed = f"one of {LEARNED_VARIANCES} with loss='hybrid'"
        require(learned or kind != "hybrid", "variance_type", variance, allowed)
        if out_channels is not None and channels is not None:
            wanted = channels * (2 if learned else 1)
            fits = out_channels == wanted
            require(fits, "the U-Net's out_channels", out_channels, f"{wanted} {told}")
        self.kind, self.vlb_weight = kind, vlb_weight
        self.chain = chain_of(scheduler, clip_sample=False, thresholding=False)

    def __call__(
        self, model_output: Tensor, target: Tensor, x0: Tensor, x_t: Tensor, t: Tensor,
        weight: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The loss of each sample, (B,), computed in fp32 whatever the inputs.

        Args:
            model_output: (B, C, ...), or (B, 2C, ...) with a learned variance.
            target: (B, C, ...), eps, v or x0, whichever the model predicts; vlb does not use it.
            x0, x_t: (B, C, ...), the clean picture and its noised version at timestep t.
            t: (B,), the timesteps.
            weight: (B,), the min-SNR weight of the L_simple part. vlb is not weighted: pass None.

        Raises:
            ValueError: the shapes do not fit, or vlb is given a weight.
        """
        if self.kind == "simple":
            return simple_loss(model_output, target, weight)
        if self.kind == "vlb":
            if weight is not None:
                raise ValueError("weight must be None with loss='vlb': the bound weighs its terms itself")
            return self.vlb(model_output, x0, x_t, t)
        prediction, v = model_output.tensor_split([target.shape[1]], dim=1)  # (B, C, ...) each
        frozen = torch.cat([prediction.detach(), v], dim=1)
        return simple_loss(prediction, target, weight) + self.vlb_weight * self.vlb(frozen, x0, x_t, t)

    def vlb(self, model_output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """T L_t of each sample, (B,), in bits per dimension."""
        output, x0, x_t = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (model_output, x0, x_t))
        return len(self.chain) * vlb_term(self.chain, output, t, x0, x_t).bits


class LossAwareTimesteps:
    """Draws timesteps in proportion to the size of their loss, for L_vlb (Nichol 2021, section 3.3, eq. 18).

    p_t is proportional to sqrt(E[L_t^2]), where the mean is over the last `history` losses at t, and sum p_t
    = 1. Until every t has that many losses, p_t is uniform. A sample's loss times its weight 1/(T p_t) has
    the same expectation as with uniformly drawn t, and less variance.

    The draws are a function of the state and the generator. `state_dict` holds all of the state, so the
    object can be passed to `accelerator.register_for_checkpointing`. Processes stay identical if each
    receives the losses of all.

    Args:
        num_timesteps: T.
        history: how many losses are kept for each t; 10 in the paper.
        uniform_share: the uniform share of every p_t. Without it, a t whose last losses were 0 would never be
            drawn again, and the weights would be unbounded; with it they stay below 1/uniform_share.
    """

    def __init__(self, num_timesteps: int, history: int = 10, uniform_share: float = 0.001) -> None:
        require(num_timesteps >= 1, "num_timesteps", num_timesteps, "at least 1")
        require(history >= 1, "history", history, "at least 1")
        require(0 < uniform_share <= 1, "uniform_share", uniform_share, "above 0 and at most 1")
        self.uniform_share = uniform_share
        self.losses = torch.zeros(num_timesteps, history, dtype=torch.float64)  # oldest first
        self.counts = torch.zeros(num_timesteps, dtype=torch.long)  # number of losses held for each t

    def probabilities(self) -> Tensor:
        """p_t, (T,), float64."""
        total, history = self.losses.shape
        uniform = torch.full((total,), 1 / total, dtype=torch.float64)
        size = self.losses.square().mean(1).sqrt()
        if (self.counts < history).any() or size.sum() == 0:
            return uniform
        return (1 - self.uniform_share) * size / size.sum() + self.uniform_share * uniform

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(t, weight), each (count,): t ~ p, int64, and 1/(T p_t), float32."""
        p = self.probabilities()
        t = torch.multinomial(p, count, replacement=True, generator=generator)
        return t, (1 / (len(p) * p[t])).float()

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Record the unweighted losses (B,) at t (B,). If a t occurs twice, both losses are recorded in
        order.

        Losses that are not finite are left out: a single one would turn all of p into NaN.
        """
        for step, loss in zip(t.tolist(), losses.detach().double().cpu(), strict=True):
            if not loss.isfinite():
                continue
            if self.counts[step] == self.losses.shape[1]:
                self.losses[step] = self.losses[step].roll(-1)
                self.counts[step] -= 1
            self.losses[step, self.counts[step]] = loss
            self.counts[step] += 1

    def state_dict(self) -> dict[str, Tensor]:
        return {"losses": self.losses.clone(), "counts": self.counts.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a saved state. Raises ValueError if it has another T or history."""
        for name, own in self.state_dict().items():
            shape, wanted = tuple(state[name].shape), tuple(own.shape)
            require(shape == wanted, name, shape, f"of shape {wanted}")
        self.losses, self.counts = state["losses"].clone(), state["counts"].clone()
