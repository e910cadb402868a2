"""The ancestral sampler: `DDPMScheduler`, built on `chain.equations`."""

from typing import Any, ClassVar, cast

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..chain.equations import (
    BETA_SCHEDULES,
    FIXED_VARIANCES,
    LEARNED_VARIANCES,
    PREDICTION_TYPES,
    SMALLEST_VARIANCE,
    TIMESTEP_SPACINGS,
    ReverseStep,
    invalid,
    make_betas,
    p_mean_variance,
    posterior_variance,
    q_sample,
    require,
    rescale_to_zero_terminal_snr,
    reverse_variance,
    spaced_timesteps,
    velocity,
)

logger = logging.get_logger(__name__)


class DDPMScheduler(SchedulerMixin, ConfigMixin):
    """Ancestral sampling (Ho 2020, algorithm 2), with the config, methods and numbers of diffusers' class.

    Args:
        num_train_timesteps: T, the length of the chain.
        beta_start, beta_end: ends of the linear, scaled_linear and sigmoid schedules, in (0, 1).
        beta_schedule: "linear", "scaled_linear", "squaredcos_cap_v2" (cosine), "sigmoid" or "laplace".
        trained_betas: the T betas themselves, in (0, 1]; replaces beta_schedule.
        variance_type: sigma_t^2 is beta~_t ("fixed_small", "fixed_small_log"), beta_t ("fixed_large",
            "fixed_large_log"), or given by the model's second C channels v: exp(v) ("learned"), or from
            beta~_t at v = -1 to beta_t at v = 1 ("learned_range"). None means "fixed_small".
        clip_sample, clip_sample_range: clamp the predicted x0 to +-range (unless thresholding).
        prediction_type: what the model's output is: "epsilon", "sample" (x0) or "v_prediction".
        thresholding, dynamic_thresholding_ratio, sample_max_value: see `dynamic_threshold`.
        timestep_spacing, steps_offset: which timesteps `set_timesteps(n)` visits; see `spaced_timesteps`.
            `leading` never visits the noisiest one; models of ours ask for "trailing".
        rescale_betas_zero_snr: make abar_{T-1} = 0; for v_prediction or sample.
        eta: share of sigma_t that `step` adds, in [0, 1]; 0 is DDIM with eps taken from the clipped x0.

    Raises ValueError for unusable arguments. In float32 the results are those of diffusers up to rounding,
    except where diffusers is wrong:
        - The last step adds no noise, whatever its t. diffusers adds some if t > 0: its last picture is noisy
          with fixed_large, learned or learned_range under `trailing`, custom timesteps or a steps_offset.
        - fixed_large_log: diffusers takes the root of log beta_t, which is NaN. Here it equals fixed_large.
        - learned: diffusers takes the root of the log-variance. Here sigma_t = exp(v/2).
        - learned_range on the last step: log beta~_1 replaces log 0 (Nichol 2021); diffusers uses log 1e-20.
        - Half precision: everything is float32 until the final rounding, which saturates. In diffusers the
          first cosine step, whose x0 is 20,000 times its input, overflows float16, and steps at small t lose
          their noise.
        - Zero terminal SNR with epsilon and no clipping: diffusers divides by 0; see `predict_x0`.
        - `trailing` has n timesteps for every n. In diffusers rounding can append t = -1.
    """

    _compatibles: ClassVar[list[str]] = [e.name for e in KarrasDiffusionSchedulers]
    order = 1
    config: Any  # a frozen dict, its keys readable as attributes

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
        beta_schedule: str = "linear", trained_betas: np.ndarray | list[float] | None = None,
        variance_type: str | None = "fixed_small", clip_sample: bool = True, prediction_type: str = "epsilon",
        thresholding: bool = False, dynamic_thresholding_ratio: float = 0.995, clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0, timestep_spacing: str = "leading", steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False, eta: float = 1.0,
    ) -> None:  # fmt: skip
        for name, value, allowed in (
            ("beta_schedule", beta_schedule, BETA_SCHEDULES),
            ("variance_type", variance_type, (*FIXED_VARIANCES, *LEARNED_VARIANCES, None)),
            ("prediction_type", prediction_type, PREDICTION_TYPES),
            ("timestep_spacing", timestep_spacing, TIMESTEP_SPACINGS),
        ):
            require(value in allowed, name, value, f"one of {allowed}")
        require(num_train_timesteps >= 1, "num_train_timesteps", num_train_timesteps, "at least 1")
        require(steps_offset >= 0, "steps_offset", steps_offset, "at least 0")
        for name, end in (("beta_start", beta_start), ("beta_end", beta_end)):
            require(0 < end < 1, name, end, "in (0, 1)")
        for name, end in (("clip_sample_range", clip_sample_range), ("sample_max_value", sample_max_value)):
            require(end > 0, name, end, "above 0")
        for name, share in (("dynamic_thresholding_ratio", dynamic_thresholding_ratio), ("eta", eta)):
            require(0 <= share <= 1, name, share, "in [0, 1]")

        if trained_betas is not None:
            betas = torch.tensor(trained_betas, dtype=torch.float32)
            require(betas.ndim == 1 and len(betas), "trained_betas", trained_betas, "a list of numbers")
        else:
            betas = make_betas(beta_schedule, num_train_timesteps, beta_start, beta_end)
        if rescale_betas_zero_snr:
            betas = rescale_to_zero_terminal_snr(betas)
        source = "trained_betas" if trained_betas is not None else f"betas of {beta_schedule}"
        usable = ((1 - betas < 1) & (betas <= 1)).all()  # 1 - 3e-8 is 1 in float32
        require(usable, source, f"{betas.min():g} .. {betas.max():g}", "in [6e-8, 1]")

        self.betas = betas
        self.alphas = 1.0 - betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)  # abar, (T,)
        self.one = torch.tensor(1.0)
        self.init_noise_sigma = 1.0
        self.variance_type = variance_type
        if self.alphas_cumprod[-1] == 0 and prediction_type == "epsilon":
            logger.warning("epsilon tells no x0 at zero terminal SNR: use prediction_type='v_prediction'")

        self.num_inference_steps: int | None = None
        self.custom_timesteps = False
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`q_sample` at timesteps of shape () or (B,), in 0 .. T-1 (not checked: that would stall a GPU)."""
        return q_sample(original_samples, noise, self._forward_abar(original_samples, noise, timesteps))

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`velocity` for a clean sample and its noise, at timesteps as for `add_noise`."""
        return velocity(sample, noise, self._forward_abar(sample, noise, timesteps))

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """The sample itself; other schedulers scale here."""
        return sample

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Set the timesteps to visit: their number, spaced as configured, or a list, falling in 0 .. T-1."""
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("pass one of num_inference_steps and timesteps, not both and not neither")
        T = self.config.num_train_timesteps
        if timesteps is not None:
            chosen = np.asarray(timesteps)
            descending = chosen.ndim == 1 and chosen.dtype.kind in "iu" and (np.diff(chosen) < 0).all()
            require(descending, "timesteps", timesteps, "integers in descending order")
        else:
            n = cast(int, num_inference_steps)
            whole = isinstance(n, (int, np.integer)) and 1 <= n <= T
            require(whole, "num_inference_steps", n, f"an integer in 1 .. {T} (num_train_timesteps)")
            chosen = spaced_timesteps(self.config.timestep_spacing, T, n, self.config.steps_offset)
        last = min(T, len(self.alphas_cumprod)) - 1
        inside = chosen[-1] >= 0 and chosen[0] <= last
        require(inside, "timesteps", f"{chosen[0]} .. {chosen[-1]}", f"in 0 .. {last}, steps_offset included")
        self.custom_timesteps = timesteps is not None
        self.num_inference_steps = len(chosen)
        self.timesteps = torch.from_numpy(chosen.astype(np.int64)).to(device)

    def previous_timestep(self, timestep: int | Tensor) -> int | Tensor:
        """The timestep visited after this one, -1 after the last; ValueError if the chain does not visit it.

        () -> (), (B,) -> (B,), on the device of `self.timesteps`; t - 1 until `set_timesteps` is called.
        """
        if not self.custom_timesteps and not self.num_inference_steps:
            return timestep - 1
        t = torch.as_tensor(timestep, device=self.timesteps.device)
        hits = t.reshape(-1, 1) == self.timesteps  # (B, n)
        if not hits.any(dim=1).all():
            raise invalid("timestep", timestep, "one that scheduler.timesteps holds")
        following = torch.cat([self.timesteps[1:], self.timesteps.new_full((1,), -1)])
        return following[hits.int().argmax(dim=1)].reshape(t.shape)

    def p_mean_variance(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, eta: float = 1.0
    ) -> ReverseStep:
        """p(x_prev | x_t) from a model's output: predict_x0, clip or threshold, posterior_mean, variance.

        sample (B, C, ...); model_output (B, C, ...), or (B, 2C, ...) for a learned variance; timestep () or
        (B,). Differentiable. On the last step, where beta~ = 0 and `step` uses no variance, the beta~ of the
        step before is used (beta~_1 in a full chain), or beta_t if there is only one step. `eta` affects the
        mean only, see `posterior_mean`. Raises ValueError for a model_output of another shape.
        """
        config, kind = self.config, self.config.variance_type
        given, wanted = list(model_output.shape), list(sample.shape)
        if kind in LEARNED_VARIANCES and sample.ndim > 1:
            wanted[1] *= 2
        if given != wanted:
            raise invalid("model_output shape", given, f"{wanted} with variance_type={kind!r}")
        abar_t, abar_prev = (self.abar(t, sample) for t in (timestep, self.previous_timestep(timestep)))
        last_step = None  # whose beta~ is not 0
        if len(self.timesteps) > 1:
            last_step = self.abar(self.timesteps[-2], abar_t), self.abar(self.timesteps[-1], abar_t)
        thresholds = config.dynamic_thresholding_ratio, config.sample_max_value
        return p_mean_variance(
            model_output, sample, abar_t, abar_prev, config.prediction_type, kind, stand_in=last_step,
            clip_range=config.clip_sample_range if config.clip_sample else None,
            threshold=thresholds if config.thresholding else None, eta=eta,
        )  # fmt: skip

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None, return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:  # fmt: skip
        """x_prev = mean + eta sigma_t z, z ~ N(0, I), and z = 0 on the last step. Ho 2020, algorithm 2.

        Tensors are as for `p_mean_variance`, with one timestep for all. With a list of generators, one per
        image (else ValueError), the noise of image i comes from generator i alone, whatever its batch.
        """
        if isinstance(generator, (list, tuple)):
            generator, count = list(generator), len(generator)
            if count != len(sample):
                raise invalid("number of generators", count, f"{len(sample)}, one per image")
        t: Any = timestep.item() if isinstance(timestep, Tensor) and timestep.numel() == 1 else timestep
        if not (isinstance(t, (int, np.integer)) and 0 <= t < len(self.alphas_cumprod)):
            raise invalid("timestep", t, f"one integer in 0 .. {len(self.alphas_cumprod) - 1}")

        eta = self.config.eta
        prev_sample, variance, log_variance, x0 = self.p_mean_variance(model_output, int(t), sample, eta)
        if t > 0 and eta > 0:
            # Drawn as in diffusers: in the model's dtype, and even if a last step with t > 0 does not use it,
            # so that a generator shared by several runs goes through the same states.
            z = randn_tensor(sample.shape, generator, model_output.device, model_output.dtype)
            if t != self.timesteps[-1]:
                # Two formulas, as in diffusers, so that rounding differences do not add up over 1000 steps.
                root = self.config.variance_type in ("fixed_small", "fixed_large", None)
                sigma = variance.sqrt() if root else torch.exp(0.5 * log_variance)
                prev_sample = prev_sample + eta * sigma * z

        dtype = torch.result_type(model_output, sample)
        prev_sample, x0 = _saturate(prev_sample, dtype), _saturate(x0, dtype)
        if not return_dict:
            return prev_sample, x0
        return DDPMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x0)

    def abar(self, timesteps: int | Tensor, like: Tensor) -> Tensor:
        """abar at integer timesteps of any shape, 1 where t < 0; device of `like`, float32 or better."""
        t = torch.as_tensor(timesteps, device=like.device)
        if t.is_floating_point():
            raise invalid("timesteps", t.dtype, "integers")
        self.alphas_cumprod = self.alphas_cumprod.to(like.device)  # moves once
        abar = self.alphas_cumprod[t.clamp(min=0)].to(torch.promote_types(like.dtype, torch.float32))
        return torch.where(t < 0, torch.ones_like(abar), abar)

    def _get_variance(
        self, t: int | Tensor, predicted_variance: Tensor | None = None, variance_type: str | None = None
    ) -> Tensor:
        """For callers of diffusers' method of this name, in its units: sigma^2 for fixed_small and
        fixed_large, sigma for fixed_small_log, log sigma^2 for the rest. Otherwise use `p_mean_variance`."""
        kind = variance_type or self.config.variance_type or "fixed_small"
        like = self.betas if predicted_variance is None else predicted_variance
        abar_t, abar_prev = self.abar(t, like), self.abar(self.previous_timestep(t), like)
        small = posterior_variance(abar_t, abar_prev).clamp(min=SMALLEST_VARIANCE)
        if kind in ("fixed_small", "fixed_small_log"):
            return small.sqrt() if kind == "fixed_small_log" else small
        last = [self.abar(step, like) for step in self.timesteps[-2:]]
        stand_in = posterior_variance(*last) if len(last) == 2 else 1 - abar_t
        variance, log_variance = reverse_variance(kind, abar_t, abar_prev, stand_in, predicted_variance)
        return variance if kind == "fixed_large" else log_variance

    def _forward_abar(self, x0: Tensor, eps: Tensor, timesteps: Tensor) -> Tensor:
        """abar, (B,) or (1,), after checking that the shapes fit; B noises may share one picture."""
        batch = max(len(x0), len(eps))
        fits = x0.shape[1:] == eps.shape[1:] and {len(x0), len(eps)} <= {1, batch}
        if not fits:
            raise invalid("noise shape", tuple(eps.shape), f"that of the samples, {tuple(x0.shape)}")
        abar = self.abar(timesteps, x0).flatten()
        if len(abar) not in (1, batch) and batch != 1:
            raise invalid("number of timesteps", len(abar), f"1 or {batch}")
        return abar


def _saturate(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast to dtype, clamping values outside its range: float16 holds +-65504."""
    limit = torch.finfo(dtype).max
    return x if x.dtype == dtype else x.clamp(-limit, limit).to(dtype)
