"""Every training loss: functions of tensors, and `DiffusionLoss`, which knows the chain."""

from typing import Any

import torch
from torch import Tensor

from pipelines.chain.equations import LEARNED_VARIANCES
from pipelines.coding.likelihood import chain_of, vlb_term
from training.run.settings import require

LOSSES = ("simple", "hybrid", "vlb")


def min_snr_weight(snr: Tensor, prediction_type: str, gamma: float, floor: float = 0.0) -> Tensor:
    """Loss weight per sample that caps the signal-to-noise ratio at gamma (Hang 2023, equation 6).

    w = clamp(SNR, floor, gamma), divided by SNR for epsilon, by SNR + 1 for v_prediction, by 1 for sample.
    With floor 0 it is the paper's min(SNR, gamma), which is near 0 where there is almost only noise: there
    nothing but the text tells what the picture shows, and a floor of 1 keeps the plain x0 loss.

    Args:
        snr: abar_t / (1 - abar_t) of each sample, (B,), positive.
        prediction_type: "epsilon", "v_prediction" or "sample".
        gamma: the cap, positive; the paper's 5.
        floor: the least SNR counts as, from 0 to gamma.

    Raises:
        ValueError: an unknown prediction_type, gamma not above 0, or floor outside [0, gamma].
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
    """L_simple (Ho 2020, equation 14): the squared error, mean over dimensions, times the sample's weight.

    The target is eps, v or x0, as the model predicts. Computed in fp32 whatever the inputs.

    Args:
        model_output, target: (B, ...), same shape.
        weight: (B,) or None for ones.

    Returns:
        (B,) loss of each sample, so that the caller can average or sort it by timestep.

    Raises:
        ValueError: the shapes differ (broadcasting would hide it).
    """
    shapes = tuple(model_output.shape), tuple(target.shape)
    if shapes[0] != shapes[1]:
        raise ValueError(f"model_output {shapes[0]} and target {shapes[1]} differ in shape")
    loss = (model_output.float() - target.float()).pow(2).flatten(1).mean(dim=1)
    return loss if weight is None else weight * loss


def detail_loss(x0_hat: Tensor, x0: Tensor, snr: Tensor, least: float) -> Tensor:
    """Mean |x0_hat - x0| of each sample that is nearly clean, SNR >= least; 0 for the others.

    The squared error all but ignores a grain of 0.02 on what is one colour, next to one wrong edge; here both
    pull alike. Where it counts the picture is all but known, so that the median, to which this leads, is the
    mean as well.

    Args:
        x0_hat, x0: (B, ...), same shape.
        snr: abar_t / (1 - abar_t) of each sample, (B,).
        least: the ratio from which on a sample counts.

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
    """L_simple, L_hybrid or L_vlb of each sample of a micro-batch, a function of tensors once it is made.

    simple: mean (target - prediction)^2                           Ho 2020, eq. 14
    hybrid: simple + vlb_weight T L_t, no gradient from L_t to the prediction, so that L_t trains the variance
        alone                                                      Nichol 2021, section 3.1
    vlb: T L_t, whose mean over evenly drawn t is the bound without the prior term

    L_t is in bits per dimension, of the full chain of T timesteps, with x0 not clipped (a clipped x0 has no
    gradient). Each is one of T terms that add up, so one drawn term stands for T of them: hence the factor T,
    which is not the `vlb_weight` of 0.001 and does not depend on it.

    Args:
        kind: "simple", "hybrid" or "vlb".
        scheduler: of the model that is trained; its config is copied, so that drawing pictures with few steps
            between two training steps leaves the loss as it is.
        out_channels, channels: the U-Net's and the picture's, if known, so that a mismatch is found at once.
        vlb_weight: lambda.

    Raises:
        ValueError: an unknown kind; simple with a learned variance, which it would leave untrained; hybrid
            with a fixed one, which it could not train; out_channels that do not fit variance_type; a weight
            not above 0.
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
            target: eps, v or x0, as the model predicts, (B, C, ...); vlb has no use for it.
            x0, x_t: (B, C, ...), the clean picture and its noised version at t, (B,).
            weight: (B,), on the simple part: min-SNR. vlb is not weighted; pass None.

        Raises:
            ValueError: shapes do not fit, or vlb is given a weight.
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
        """T L_t of each sample, (B,), bits per dimension."""
        output, x0, x_t = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (model_output, x0, x_t))
        return len(self.chain) * vlb_term(self.chain, output, t, x0, x_t).bits


class LossAwareTimesteps:
    """Draws timesteps in proportion to the size of their loss, for L_vlb (Nichol 2021, section 3.3, eq. 18).

    p_t = sqrt(mean of L_t^2 over its last `history` losses), normalised; uniform until every t has so many.
    A sample's loss times its weight 1/(T p_t) has the mean that evenly drawn t would give, and less spread.

    What it draws is a function of its state and the generator, and `state_dict` is all of the state, so that
    it fits `accelerator.register_for_checkpointing`. Processes stay alike if each is given all losses.

    Args:
        num_timesteps: T.
        history: losses kept for each t; the paper's 10.
        uniform_share: so much of every p_t is uniform, or a t whose last losses were 0 would never be drawn
            again and weights had no limit; they are below 1/uniform_share.
    """

    def __init__(self, num_timesteps: int, history: int = 10, uniform_share: float = 0.001) -> None:
        require(num_timesteps >= 1, "num_timesteps", num_timesteps, "at least 1")
        require(history >= 1, "history", history, "at least 1")
        require(0 < uniform_share <= 1, "uniform_share", uniform_share, "above 0 and at most 1")
        self.uniform_share = uniform_share
        self.losses = torch.zeros(num_timesteps, history, dtype=torch.float64)  # the oldest first once full
        self.counts = torch.zeros(num_timesteps, dtype=torch.long)  # how many of them are there

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
        """Take in the losses (B,) at t (B,), unweighted; a t that comes twice takes both, in their order.

        Losses that are not finite are left out: one would fill p with NaN.
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
        """Raises ValueError where the state is of another T or history."""
        for name, own in self.state_dict().items():
            shape, wanted = tuple(state[name].shape), tuple(own.shape)
            require(shape == wanted, name, shape, f"of shape {wanted}")
        self.losses, self.counts = state["losses"].clone(), state["counts"].clone()
