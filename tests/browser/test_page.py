"""What a person sees and does, in Chromium."""

import numpy as np
import pytest
from browser.served import SIDE, expected, same_picture
from PIL import Image

pytestmark = pytest.mark.browser

PROMPT = "a corgi in a party hat"
# The pixels of an <img> as the browser decoded them.
DECODE = """async img => {
  await img.decode();
  const canvas = document.createElement("canvas");
  canvas.width = img.naturalWidth;
  canvas.height = img.naturalHeight;
  const context = canvas.getContext("2d");
  context.drawImage(img, 0, 0);
  return [canvas.height, canvas.width, [...context.getImageData(0, 0, canvas.width, canvas.height).data]];
}"""


def fill_in(field, value):
    """Type into a field until it keeps the value: one that has just appeared may still get its default."""
    for _ in range(20):
        field.fill(str(value))
        field.press("Tab")
        field.page.wait_for_timeout(150)
        if field.input_value() == str(value):
            return
    raise AssertionError(f"the field does not keep {value}, it holds {field.input_value()}")


def ask(page, prompt=PROMPT, seed=None, **numbers):
    """Fill in the page as a person would; `numbers` are sliders by their id."""
    fill_in(page.locator("#prompt textarea"), prompt)
    if seed is not None:
        page.get_by_label("New seed each time").uncheck()
        fill_in(page.locator("#seed input"), seed)
    if {"steps", "guidance"} & numbers.keys() and not page.locator("#steps").is_visible():
        page.get_by_role("button", name="More settings").click()
    for name, value in numbers.items():
        fill_in(page.locator(f"#{name} input[type=number]"), value)


def shown(page, count=1):
    """The pictures of the gallery, decoded by the browser, when `count` of them are there."""
    page.wait_for_function(
        "n => document.querySelectorAll('#gallery .grid-container img').length === n", arg=count
    )
    images = page.locator("#gallery .grid-container img").all()
    decoded = [image.evaluate(DECODE) for image in images]
    return [np.array(data, np.uint8).reshape(height, width, 4)[..., :3] for height, width, data in decoded]


def file_names(page):
    return [image.get_attribute("src") for image in page.locator("#gallery .grid-container img").all()]


def used_seed(page):
    return int(page.locator("#seed input").input_value())


def draw(page, count=1):
    """Press the button and wait for new pictures."""
    before = file_names(page)
    page.get_by_role("button", name="Draw").click()
    page.wait_for_function(
        """before => {
          const images = [...document.querySelectorAll('#gallery .grid-container img')];
          const now = images.map(image => image.getAttribute('src'));
          return now.length > 0 && now.every(src => !before.includes(src));
        }""",
        arg=before,
    )
    return shown(page, count)


def box(locator):
    """left, top, right, bottom"""
    b = locator.bounding_box()
    return b["x"], b["y"], b["x"] + b["width"], b["y"] + b["height"]


def test_a_prompt_gives_the_picture_of_its_seed(open_page, pipe, screenshots):
    page = open_page()
    page.screenshot(path=screenshots / "start.png")
    ask(page, seed=7)
    (picture,) = draw(page)
    page.screenshot(path=screenshots / "picture.png")
    assert same_picture(picture, expected(pipe, PROMPT, 7))
    assert not same_picture(picture, expected(pipe, PROMPT, 8))
    assert not same_picture(picture, expected(pipe, "a red heart", 7))
    left, top, right, bottom = box(page.locator("#gallery .grid-container img"))
    assert min(right - left, bottom - top) > 400  # big, though the file is 32 pixels wide
    assert bottom <= 900  # and in view


def test_enter_draws_too(open_page, pipe):
    page = open_page()
    ask(page, seed=3)
    page.locator("#prompt textarea").press("Enter")
    (picture,) = shown(page)
    assert same_picture(picture, expected(pipe, PROMPT, 3))


def test_an_empty_prompt_is_told_and_the_page_goes_on_working(open_page, pipe, screenshots):
    page = open_page()
    page.get_by_role("button", name="Draw").click()
    message = page.get_by_text("the prompt is empty")
    message.wait_for()
    page.screenshot(path=screenshots / "empty_prompt.png")
    assert page.locator("#gallery img").count() == 0
    ask(page, seed=5)
    (picture,) = draw(page)
    assert same_picture(picture, expected(pipe, PROMPT, 5))


@pytest.mark.parametrize("seed", ["1.5", "-3", "99999999999"])
def test_a_bad_seed_is_told(open_page, seed):
    page = open_page()
    ask(page, seed=seed)
    page.get_by_role("button", name="Draw").click()
    page.get_by_text("The seed must be a whole number").wait_for()
    assert page.locator("#gallery img").count() == 0


def test_the_seed_used_is_shown_and_can_be_kept(open_page, pipe):
    page = open_page()
    ask(page)
    (first,) = draw(page)
    seed = used_seed(page)
    assert same_picture(first, expected(pipe, PROMPT, seed))

    page.get_by_label("New seed each time").uncheck()
    (again,) = draw(page)
    assert used_seed(page) == seed
    assert np.array_equal(first, again)

    page.get_by_label("New seed each time").check()
    (other,) = draw(page)
    assert used_seed(page) != seed
    assert same_picture(other, expected(pipe, PROMPT, used_seed(page)))
    assert not same_picture(first, other)


def test_the_settings_reach_the_picture(open_page, pipe, screenshots):
    page = open_page()
    ask(page, seed=11, steps=8, guidance=2.5)
    fill_in(page.locator("#negative_prompt textarea"), "a dog")
    page.locator("#style input").click()
    page.get_by_role("option", name="Noto").click()
    (picture,) = draw(page)
    page.screenshot(path=screenshots / "settings.png")
    options = {"num_inference_steps": 8, "guidance_scale": 2.5, "negative_prompt": "a dog"}
    assert same_picture(picture, expected(pipe, f"{PROMPT}, noto style", 11, **options))


def test_an_example_fills_the_prompt_in(open_page):
    page = open_page()
    page.get_by_role("button", name="a red heart").click()
    page.wait_for_function("document.querySelector('#prompt textarea').value === 'a red heart'")


@pytest.mark.parametrize(("count", "columns"), [(4, 2), (9, 3)])
def test_several_pictures_share_the_frame(open_page, pipe, screenshots, count, columns):
    page = open_page()
    ask(page, seed=20, num_images=count)
    pictures = draw(page, count)
    page.screenshot(path=screenshots / f"{count}_pictures.png")
    for i, picture in enumerate(pictures):
        assert same_picture(picture, expected(pipe, PROMPT, 20 + i))
    frame = box(page.locator("#gallery"))
    boxes = [box(image) for image in page.locator("#gallery .grid-container img").all()]
    assert all(b[0] >= frame[0] and b[1] >= frame[1] and b[2] <= frame[2] and b[3] <= frame[3] for b in boxes)
    assert len({round(b[0]) for b in boxes}) == columns


def test_progress_shows_and_an_impatient_person_gets_one_picture(open_page, screenshots):
    page = open_page()
    ask(page, seed=1, steps=100, num_images=2)
    requests = []
    page.on(
        "request",
        lambda request: requests.append(request.post_data or "") if request.method == "POST" else None,
    )
    page.get_by_role("button", name="Draw").click()
    page.get_by_text("Drawing").wait_for()
    page.wait_for_function("/[1-9]\\d*\\/100 steps/.test(document.querySelector('#gallery').innerText)")
    page.screenshot(path=screenshots / "drawing.png")
    page.get_by_role("button", name="Draw").click()
    shown(page, 2)
    assert sum(PROMPT in body for body in requests) == 1


def test_a_picture_can_be_saved_with_its_settings(open_page, pipe, screenshots, tmp_path):
    page = open_page()
    ask(page, seed=6)
    draw(page)
    page.locator("#gallery .grid-container button").click()
    page.locator("#gallery [data-testid=detailed-image]").wait_for()
    page.screenshot(path=screenshots / "enlarged.png")
    with page.expect_download() as download:
        page.locator("#gallery").get_by_role("button", name="Download").click()
    assert download.value.suggested_filename == "a-corgi-in-a-party-hat_seed6.png"
    download.value.save_as(tmp_path / "saved.png")
    with Image.open(tmp_path / "saved.png") as image:
        assert image.format == "PNG"
        assert image.size == (SIDE, SIDE)
        assert (image.text["prompt"], image.text["seed"]) == (PROMPT, "6")
        assert same_picture(np.asarray(image), expected(pipe, PROMPT, 6))


@pytest.mark.parametrize("width", [360, 390])
def test_a_phone_shows_everything_in_its_width(open_page, pipe, screenshots, width):
    page = open_page(width, 780, is_mobile=True, has_touch=True, device_scale_factor=2)
    fill_in(page.locator("#prompt textarea"), PROMPT)
    page.get_by_role("button", name="Draw").tap()
    (picture,) = shown(page)
    page.screenshot(path=screenshots / f"phone_{width}.png", full_page=True)
    assert same_picture(picture, expected(pipe, PROMPT, used_seed(page)))
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for part in ("#prompt", "#draw", "#gallery", "#style", "#seed", "#more"):
        left, _, right, _ = box(page.locator(part))
        assert left >= 0, part
        assert right <= width, part
        assert right - left > 0.85 * width, part  # nothing squeezed beside something else
    left, top, right, bottom = box(page.locator("#gallery .grid-container img"))
    assert right - left > 0.8 * width
    assert top < 780 - 100  # the picture begins on the first screen


def test_dark_mode_is_dark(open_page, screenshots):
    page = open_page(color_scheme="dark")
    ask(page, seed=2, num_images=4)
    draw(page, 4)
    page.screenshot(path=screenshots / "dark.png")

    def brightness(selector, what):
        colour = page.locator(selector).evaluate(f"e => getComputedStyle(e).{what}")
        return sum(float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]) / 3

    assert brightness("body", "backgroundColor") < 60
    assert brightness("#prompt textarea", "color") > 180
    assert brightness("#header h1", "color") > 180
