"""Pictures to tensors and back, without a lost or shifted level."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from pipelines.drawing.images import (
    decode_latents,
    encode_pictures,
    image_grid,
    read_masks,
    to_numpy,
    to_pil,
    to_rgb,
    to_tensor,
    to_unit,
)


@pytest.fixture
def all_levels() -> Image.Image:
    """Every one of the 256 levels in every channel, in different places."""
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    return Image.fromarray(np.stack([ramp, ramp.T, 255 - ramp], axis=-1))


def test_round_trip_keeps_every_level(all_levels):
    flipped = all_levels.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    back = to_pil(to_tensor([all_levels, flipped]))
    assert [np.array(image).tolist() for image in back] == [
        np.array(all_levels).tolist(),
        np.array(flipped).tolist(),
    ]


def test_scale_and_layout(all_levels):
    tensor = to_tensor(all_levels)
    assert tensor.shape == (1, 3, 16, 16) and tensor.dtype == torch.float32 and tensor.is_contiguous()
    pixels = torch.from_numpy(np.array(all_levels).astype(np.float32))
    torch.testing.assert_close(tensor[0, 2, 3, 5], pixels[3, 5, 2] / 127.5 - 1)
    assert tensor.min() == -1 and tensor.max() == 1
    np.testing.assert_allclose(to_numpy(tensor)[0], np.array(all_levels) / 255, atol=1e-6)


def test_values_beyond_the_range_are_clipped_and_halves_rounded():
    x = torch.tensor([-7.0, -1.0, 0.0, 1.0, 7.0]).view(1, 1, 1, 5)
    assert to_unit(x).flatten().tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert np.array(to_pil(x)[0]).tolist() == [[0, 0, 128, 255, 255]]


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_modes_by_channels(channels, mode):
    x = torch.linspace(-1, 1, channels * 6).view(1, channels, 2, 3)
    image = to_pil(x)[0]
    assert image.mode == mode and image.size == (3, 2)
    expected = ((x[0].permute(1, 2, 0) + 1) * 127.5).round().squeeze(-1)
    assert np.array(image).tolist() == expected.tolist()


def test_unusable_tensors_and_lists_are_refused(all_levels):
    for bad in (torch.zeros(1, 2, 4, 4), torch.zeros(3, 4, 4)):
        with pytest.raises(ValueError, match="to_pil"):
            to_pil(bad)
    for pictures in ([], [all_levels, all_levels.resize((8, 8))]):
        with pytest.raises(ValueError, match="one size"):
            to_tensor(pictures)


def test_transparency_is_laid_over_the_background():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))  # red hides under the transparent pixel
    image.putpixel((1, 0), (0, 0, 255, 255))
    over_white, over_black = to_tensor(image), to_tensor(image, background="black")
    assert over_white[0, :, 0, 0].tolist() == [1, 1, 1] and over_black[0, :, 0, 0].tolist() == [-1, -1, -1]
    assert over_white[0, :, 0, 1].tolist() == over_black[0, :, 0, 1].tolist() == [-1, -1, 1]
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([255, 0, 0])
    palette.info["transparency"] = 0
    assert to_tensor(palette)[0, :, 0, 0].tolist() == [1, 1, 1]
    assert to_tensor(Image.new("L", (1, 1), 51))[0, :, 0, 0].tolist() == pytest.approx([51 / 127.5 - 1] * 3)


def test_decoding_undoes_the_vaes_scale_and_shift():
    torch.manual_seed(0)
    vae = AutoencoderKL(
        norm_num_groups=1, block_out_channels=(4,), scaling_factor=0.25, shift_factor=0.5
    ).eval()
    z = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        decoded = decode_latents(vae, (z - 0.5) * 0.25)
        torch.testing.assert_close(decoded, vae.decode(z).sample, atol=1e-5, rtol=1e-5)
    assert decode_latents(None, z) is z


def test_grid_puts_pictures_row_by_row():
    colours = ["red", "lime", "blue", "yellow", "cyan"]
    images = [Image.new("RGB", (4, 3), colour) for colour in colours]
    sheet = image_grid(images, columns=3, gap=2, background="black")
    assert sheet.size == (3 * 6 + 2, 2 * 5 + 2)
    pixels = np.array(sheet)
    for i, image in enumerate(images):
        x, y = 2 + i % 3 * 6, 2 + i // 3 * 5
        assert (pixels[y : y + 3, x : x + 4] == np.array(image)).all()
        pixels[y : y + 3, x : x + 4] = 0
    assert not pixels.any()  # nothing but background between, around, and in the cell left empty
    assert image_grid(images[:4], gap=0).size == (8, 6)


def test_grid_labels_stay_under_their_picture():
    images = [Image.new("RGB", (30, 10), "red"), Image.new("RGB", (30, 10), "blue")]
    sheet = np.array(image_grid(images, columns=2, gap=3, labels=["a label much wider than its picture", ""]))
    assert sheet.shape == (10 + 14 + 6, 2 * 33 + 3, 3)
    assert (sheet[3:13, 3:33] == [255, 0, 0]).all() and (sheet[3:13, 36:66] == [0, 0, 255]).all()
    assert (sheet[13:27, 3:33] < 128).any()  # dark letters on white
    assert (sheet[13:27, 33:] == 255).all()  # cut at the cell's edge; no letters for the empty label


@pytest.mark.parametrize("arguments", [{"images": []}, {"columns": 0}, {"labels": ["one", "two"]}])
def test_impossible_grids_are_refused(arguments):
    with pytest.raises(ValueError, match="image_grid"):
        image_grid(**({"images": [Image.new("RGB", (2, 2))]} | arguments))


@pytest.mark.parametrize("listed", [False, True])
def test_encoding_draws_the_posterior_and_then_shifts_and_scales(listed):
    """(mean + std z - shift) scale, z from one generator, or a row of it from each picture's own."""
    torch.manual_seed(0)
    settings = {"norm_num_groups": 1, "block_out_channels": (4,), "scaling_factor": 0.25, "shift_factor": 0.5}
    vae, pictures = AutoencoderKL(**settings).eval(), torch.rand(2, 3, 8, 8) * 2 - 1
    seeds = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    with torch.no_grad():
        latents = encode_pictures(vae, pictures, seeds if listed else seeds[0])
        posterior = vae.encode(pictures).latent_dist
    shape = posterior.mean.shape
    rows = [torch.randn((1, *shape[1:]), generator=torch.Generator().manual_seed(seed)) for seed in (5, 6)]
    z = torch.cat(rows) if listed else torch.randn(shape, generator=torch.Generator().manual_seed(5))
    expected = (posterior.mean + posterior.std * z - 0.5) * 0.25
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-5)
    assert encode_pictures(None, pictures) is pictures


def test_a_decoder_that_draws_noise_draws_it_from_the_calls_generator():
    class Noisy:
        config = SimpleNamespace(scaling_factor=2.0)

        def decode(self, z, return_dict=True, generator=None):
            return (z + torch.randn(z.shape, generator=generator),)

    z = torch.ones(1, 3, 4, 4)
    drawn = decode_latents(Noisy(), z, torch.Generator().manual_seed(7))
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(drawn, z / 2 + noise)


def test_grey_of_16_bits_is_rounded_to_the_nearest_of_256_levels():
    levels = np.array([[0, 128, 129, 257 * 100 + 128, 257 * 100 + 129, 65535]], dtype=np.uint16)
    picture = to_rgb(Image.fromarray(levels))
    assert np.asarray(picture)[0, :, 0].tolist() == [0, 0, 1, 100, 101, 255]


def test_a_picture_that_lies_is_set_upright():
    """EXIF's orientation 6 says: turn by 90 degrees, clockwise."""
    stored = Image.fromarray(np.arange(18, dtype=np.uint8).reshape(2, 3, 3))
    stored.getexif()[0x0112] = 6
    upright = np.rot90(np.arange(18, dtype=np.uint8).reshape(2, 3, 3), -1)
    assert np.array_equal(np.asarray(to_rgb(stored)), upright)


def test_what_is_transparent_in_a_mask_is_kept_though_it_is_white():
    mask = Image.new("RGBA", (2, 1), (255, 255, 255, 0))
    mask.putpixel((1, 0), (255, 255, 255, 255))
    assert read_masks(mask)[0, 0, 0].tolist() == [0, 1]
