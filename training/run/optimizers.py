"""The optimizers: AdamW, or Muon for the matrices with AdamW for the rest."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from training.run.precision import has_bf16

OPTIMIZERS = ("adamw", "muon")
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a, b, c of Newton-Schulz, steepest at 0 (Jordan 2024)
MOMENTUM = 0.95


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """Approximate the nearest matrix with orthonormal rows or columns, whichever are fewer: U V^T of U S V^T.

    Newton-Schulz iterates X <- a X + b (X X^T) X + c (X X^T)^2 X from X / |X|, which brings the singular
    values to about [0.7, 1.2] in five steps (Jordan 2024). It runs in bf16 if the hardware supports it, since
    the result need not be exact.

    Args:
        matrix: (R, C).

    Returns:
        (R, C), bfloat16 or float32.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).to(torch.bfloat16 if has_bf16(matrix.device.type) else torch.float32)
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon(torch.optim.AdamW):
    """Muon (Jordan 2024) for the parameter groups that have "momentum", AdamW for the others. Muon's step is:

        m <- mu m + (1 - mu) g
        w <- (1 - lr wd) w - 0.2 lr sqrt(max(R, C)) orthogonalize(mu m + (1 - mu) g)

    The factor gives updates a root mean square of 0.2 lr, about that of AdamW's (Liu 2025, equation 4). A
    weight with more than two axes is treated as a matrix (out, rest). torch.optim.Muon accepts only matrices
    and would need a second optimizer for the rest.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        groups = self.param_groups
        self.param_groups = [group for group in groups if "momentum" not in group]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if "momentum" in group:
                self._step_matrices(group)
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        mu, rate = group["momentum"], group["lr"]
        for weight in group["params"]:
            if weight.grad is None:
                continue
            state = self.state[weight]
            if not state:
                state["step"] = torch.zeros(())  # AdamW looks for it in every saved state
                state["momentum_buffer"] = torch.zeros_like(weight)
            state["step"] += 1
            average = state["momentum_buffer"].lerp_(weight.grad, 1 - mu)
            update = orthogonalize(weight.grad.lerp(average, mu).flatten(1))
            scale = 0.2 * rate * max(update.shape) ** 0.5
            weight.mul_(1 - rate * group["weight_decay"]).add_(update.view_as(weight), alpha=-scale)


def make_optimizer(
    kind: str, models: Iterable[nn.Module], learning_rate: float, matrix_learning_rate: float, **settings: Any
) -> torch.optim.Optimizer:
    """An optimizer for all trainable parameters of `models`.

    Args:
        kind: "adamw" or "muon". Muon updates the weights with two or more axes, except those of the first and
            last layers (`conv_in`, `conv_out`) and of the embeddings; AdamW updates these and the vectors.
        learning_rate: AdamW's.
        matrix_learning_rate: Muon's.
        settings: AdamW's betas, eps and weight_decay; Muon uses the weight_decay too.
    """
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for model in models:
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        for name, weight in model.named_parameters():
            outer = name.startswith(("conv_in.", "conv_out.")) or id(weight) in embeddings
            if weight.requires_grad:
                (matrices if weight.ndim > 1 and not outer else others).append(weight)
    if kind == "adamw":
        return torch.optim.AdamW(others + matrices, lr=learning_rate, fused=True, **settings)
    of_muon = {"params": matrices, "lr": matrix_learning_rate, "momentum": MOMENTUM}
    groups: list[dict[str, Any]] = [{"params": others}, of_muon]
    return Muon(groups, lr=learning_rate, **settings)


def add_decay(schedule: torch.optim.lr_scheduler.LambdaLR, total: int, decay: int) -> None:
    """On top of the schedule, decay linearly to 0 over the last `decay` of `total` steps."""

    def falling(rate: Callable[[int], float], step: int) -> float:
        return rate(step) * min(1.0, max(0.0, (total - step) / decay))

    if decay:
        schedule.lr_lambdas = [functools.partial(falling, rate) for rate in schedule.lr_lambdas]


def make_adamw(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW for the model's trainable parameters; vectors (biases, scales of norms) have no weight decay."""
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    matrices = {"params": [weight for weight in learning if weight.ndim > 1], "weight_decay": weight_decay}
    vectors = {"params": [weight for weight in learning if weight.ndim <= 1], "weight_decay": 0.0}
    return torch.optim.AdamW([matrices, vectors], lr=learning_rate, betas=(0.9, 0.98), fused=True)
