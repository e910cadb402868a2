"""Every training loss, each a pure function of tensors."""

import torch
import torch.nn.functional as F
from torch import Tensor


def min_snr_weight(snr: Tensor, prediction_type: str, gamma: float) -> Tensor:
    """Loss weight per sample that caps the signal-to-noise ratio at gamma (Hang 2023, equation 6).

    epsilon: min(SNR, gamma) / SNR;  v_prediction: min(SNR, gamma) / (SNR + 1);  sample: min(SNR, gamma).

    Args:
        snr: abar_t / (1 - abar_t) of each sample, (B,), positive.
        prediction_type: "epsilon", "v_prediction" or "sample".
        gamma: the cap, positive; the paper's 5.

    Raises:
        ValueError: an unknown prediction_type, or gamma not above 0.
    """
    if gamma <= 0:
        raise ValueError(f"gamma must be above 0, got {gamma}")
    capped = snr.clamp(max=gamma)
    if prediction_type == "epsilon":
        return capped / snr
    if prediction_type == "v_prediction":
        return capped / (snr + 1)
    if prediction_type == "sample":
        return capped
    raise ValueError(f"prediction_type must be epsilon, v_prediction or sample, got {prediction_type!r}")


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
    if model_output.shape != target.shape:
        raise ValueError(
            f"model_output {tuple(model_output.shape)} and target {tuple(target.shape)} differ in shape"
        )
    loss = (model_output.float() - target.float()).pow(2).flatten(1).mean(dim=1)
    return loss if weight is None else weight * loss


def clip_contrastive_loss(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy (Radford 2021, figure 3).

    logits = exp(tau) I T^t on l2-normalised rows; row i and column i belong together; the mean of the
    cross-entropy over rows (which text is this picture's?) and over columns (which picture is this text's?).

    Args:
        image_embeds, text_embeds: (B, D), of any length; normalised here.
        logit_scale: tau, a scalar: the log of the inverse temperature.
    """
    image_embeds, text_embeds = F.normalize(image_embeds, dim=-1), F.normalize(text_embeds, dim=-1)
    logits = logit_scale.exp() * image_embeds @ text_embeds.T  # (B, B)
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
