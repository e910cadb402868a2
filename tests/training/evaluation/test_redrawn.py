"""Pictures as a model redraws them."""

import numpy as np
import pytest
import torch

from pipelines import DDPMScheduler
from pipelines.drawing.text import encode_text
from training.data.pictures import cache_pictures, load_pictures
from training.evaluation import redrawn
from training.evaluation.redrawn import cache_redrawn, redraw

pytest_plugins = ["evaluation_folders"]


@pytest.fixture
def pipe(make_pipeline):
    chain = DDPMScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", eta=0.0)
    return make_pipeline(scheduler=chain)


@torch.no_grad()
def test_two_steps_of_ddim_by_hand(pipe):
    """Song 2020, eq. 12 with sigma 0, from t to t/2 and from there to x0, the null prompt's states alone."""
    x0 = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    drawn = redraw(pipe, x0, seed=5)
    generator = torch.Generator().manual_seed(5)
    noised = int(torch.randint(60, 241, (1,), generator=generator))
    abar = torch.cos((torch.arange(1001, dtype=torch.float64) / 1000 + 0.008) / 1.008 * torch.pi / 2) ** 2
    abar = torch.cumprod(1 - (1 - abar[1:] / abar[:-1]).clamp(max=0.999), 0).float()
    x_t = abar[noised].sqrt() * x0 + (1 - abar[noised]).sqrt() * torch.randn(x0.shape, generator=generator)
    states, pooled = encode_text(pipe.tokenizer, pipe.text_encoder, [""] * 3)[:2]
    for t, following in ((noised, abar[noised // 2]), (noised // 2, torch.tensor(1.0))):
        eps = pipe.unet(x_t, t, states, added_cond_kwargs={"text_embeds": pooled}).sample
        clean = ((x_t - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()).clamp(-1, 1)
        eps = (x_t - abar[t].sqrt() * clean) / (1 - abar[t]).sqrt()
        x_t = following.sqrt() * clean + (1 - following).sqrt() * eps
    expected = (x_t.clamp(-1, 1) + 1) * 127.5
    assert drawn.dtype == torch.uint8 and float((drawn.float() - expected).abs().max()) <= 0.51
    assert float((expected - (x0 + 1) * 127.5).abs().mean()) > 5


def test_t_is_of_all_that_leaves_the_style(pipe, monkeypatch):
    seen = []
    add_noise = DDPMScheduler.add_noise
    monkeypatch.setattr(
        DDPMScheduler, "add_noise", lambda self, x, eps, t: seen.append(int(t)) or add_noise(self, x, eps, t)
    )
    for seed in range(60):
        redraw(pipe, torch.zeros(1, 3, 16, 16), seed)
    assert 60 <= min(seen) < 80 and 220 < max(seen) <= 240 and len(set(seen)) > 40


def test_each_picture_is_redrawn_once(pipe, dataset_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(redrawn, "BATCH", 20)
    pictures = cache_pictures(load_pictures(str(dataset_folder), "train"), 16, tmp_path, "image", None)
    rows = cache_redrawn(pictures, pipe, tmp_path)
    for start, end in ((0, 20), (20, 40), (40, 52)):
        assert np.array_equal(rows[start:end], redraw(pipe, pictures.images(range(start, end)), start))
    with monkeypatch.context() as patch:
        patch.setattr(redrawn, "redraw", None)
        assert np.array_equal(cache_redrawn(pictures, pipe, tmp_path), rows)
    pipe.unet.conv_in.weight.data += 0.1  # another model's are its own
    other = cache_redrawn(pictures, pipe, tmp_path)
    assert np.array_equal(other[:20], redraw(pipe, pictures.images(range(20)), 0))
    assert not np.array_equal(other, rows)
