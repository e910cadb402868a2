"""Muon beside torch's own, and which weights it takes."""

import copy

import pytest
import torch
from diffusers.optimization import get_scheduler
from torch import nn

from training.run import optimizers
from training.run.optimizers import Muon, add_decay, make_adamw, make_optimizer, orthogonalize

SETTINGS = {"betas": (0.9, 0.99), "weight_decay": 0.1, "eps": 1e-8}


@pytest.mark.parametrize("shape", [(64, 32), (32, 64), (48, 48), (24, 8, 3, 3)])
def test_muon_as_torch_has_it(shape, monkeypatch):
    """Ten steps on random gradients, in bf16 as theirs; a kernel of convolution is the matrix (out, rest)."""
    monkeypatch.setattr(optimizers, "has_bf16", lambda device: True)
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours = nn.Parameter(start.clone())
    theirs = nn.Parameter(start.flatten(1).clone())
    a = Muon([{"params": [ours], "momentum": 0.95}], lr=1e-2, weight_decay=0.1)
    b = torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(10):
        gradient = torch.randn(shape)
        ours.grad, theirs.grad = gradient.clone(), gradient.flatten(1).clone()
        a.step()
        b.step()
    assert (theirs - start.flatten(1)).abs().mean() > 1e-3
    torch.testing.assert_close(ours.flatten(1), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("native", "tolerance"), [(True, 0.05), (False, 1e-5)], ids=["bf16", "fp32"])
def test_orthogonalize_against_the_singular_value_decomposition(native, tolerance, monkeypatch):
    """Same singular vectors, and singular values within [0.65, 1.25]: U^T X V is nearly diagonal."""
    monkeypatch.setattr(optimizers, "has_bf16", lambda device: native)
    torch.manual_seed(1)
    for shape in ((40, 90), (90, 40)):
        matrix = torch.randn(shape)
        u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
        inside = u.T @ orthogonalize(matrix).float() @ vt.T
        values = inside.diagonal()
        assert values.min() > 0.65 and values.max() < 1.25
        assert (inside - values.diag()).abs().max() < tolerance


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 3)
        self.words = nn.Embedding(10, 8)
        self.hidden = nn.Conv2d(8, 8, 3)
        self.norm = nn.GroupNorm(2, 8)
        self.linear = nn.Linear(8, 8)
        self.frozen = nn.Linear(8, 8)
        self.conv_out = nn.Conv2d(8, 3, 3)
        self.frozen.requires_grad_(False)


def test_which_weights_are_whose():
    """AdamW's are those of torch's AdamW, step for step; Muon's are hidden matrices; frozen ones stay."""
    torch.manual_seed(2)
    ours = Net()
    theirs = copy.deepcopy(ours)
    before = {name: value.clone() for name, value in ours.named_parameters()}
    a = make_optimizer("muon", [ours], 1e-3, 5e-3, **SETTINGS)
    b = make_optimizer("adamw", [theirs], 1e-3, 5e-3, **SETTINGS)
    for _ in range(3):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    other = dict(theirs.named_parameters())
    differ = set()
    for name, value in ours.named_parameters():
        if not torch.allclose(value, other[name], rtol=0, atol=1e-7):
            differ.add(name)
        assert torch.equal(value, before[name]) == name.startswith("frozen")
    assert differ == {"hidden.weight", "linear.weight"}
    assert [group["lr"] for group in a.param_groups] == [1e-3, 5e-3]


def test_a_saved_state_goes_on(tmp_path):
    torch.manual_seed(3)
    nets = [Net()]
    optimizers = [make_optimizer("muon", nets, 1e-3, 5e-3, **SETTINGS)]
    gradients = [[torch.randn_like(p) for p in nets[0].parameters()] for _ in range(4)]

    def step(net, optimizer, gradient):
        for p, g in zip(net.parameters(), gradient, strict=True):
            p.grad = g.clone()
        optimizer.step()

    for gradient in gradients[:2]:
        step(nets[0], optimizers[0], gradient)
    torch.save(optimizers[0].state_dict(), tmp_path / "state.pt")
    nets.append(copy.deepcopy(nets[0]))
    optimizers.append(make_optimizer("muon", nets[1:], 1e-3, 5e-3, **SETTINGS))
    optimizers[1].load_state_dict(torch.load(tmp_path / "state.pt"))
    for gradient in gradients[2:]:
        step(nets[0], optimizers[0], gradient)
        step(nets[1], optimizers[1], gradient)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_last_steps_fall_to_nothing():
    """Two steps of warm-up, then constant, the last four of ten down a straight line; both groups alike."""
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (1.0, 0.5)]
    optimizer = torch.optim.SGD(groups)
    schedule = get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=2, num_training_steps=10)
    add_decay(schedule, total=10, decay=4)
    rates = []
    for _ in range(10):
        optimizer.step()
        schedule.step()
        rates.append([group["lr"] for group in optimizer.param_groups])
    expected = torch.tensor([0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])
    torch.testing.assert_close(torch.tensor(rates), torch.stack([expected, 0.5 * expected], dim=1))


def test_vectors_do_not_decay_in_the_guides_adamw():
    """Without a gradient's push a matrix shrinks by 1 - lr decay, and biases and scales stay."""
    torch.manual_seed(4)
    net = Net()
    before = {name: value.clone() for name, value in net.named_parameters()}
    optimizer = make_adamw(net, learning_rate=0.1, weight_decay=0.5)
    for weight in net.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    for name, value in net.named_parameters():
        shrinks = value.ndim > 1 and not name.startswith("frozen")
        torch.testing.assert_close(value, before[name] * (0.95 if shrinks else 1))
