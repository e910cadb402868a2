"""What a person sees and does, in Chromium."""

import base64

import numpy as np
import pytest
import torch
from browser.served import SIDE, expected, same_picture
from PIL import Image

from pipelines import ImageToImagePipeline
from pipelines.drawing.images import write_picture

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
    if {"num_inference_steps", "guidance_scale"} & numbers.keys() and not page.locator(
        "#num_inference_steps"
    ).is_visible():
        page.get_by_role("button", name="Advanced").click()
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
    ask(page, seed=11, num_inference_steps=8, guidance_scale=2.5)
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
    ask(page, seed=20, num_images_per_prompt=count)
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
    ask(page, seed=1, num_inference_steps=100, num_images_per_prompt=2)
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
    for part in ("#prompt", "#go", "#gallery", "#style", "#seed", "#more"):
        left, _, right, _ = box(page.locator(part))
        assert left >= 0, part
        assert right <= width, part
        assert right - left > 0.85 * width, part  # nothing squeezed beside something else
    left, top, right, bottom = box(page.locator("#gallery .grid-container img"))
    assert right - left > 0.8 * width
    assert top < 780 - 100  # the picture begins on the first screen


def test_dark_mode_is_dark(open_page, screenshots):
    page = open_page(color_scheme="dark")
    ask(page, seed=2, num_images_per_prompt=4)
    draw(page, 4)
    page.screenshot(path=screenshots / "dark.png")

    def brightness(selector, what):
        colour = page.locator(selector).evaluate(f"e => getComputedStyle(e).{what}")
        return sum(float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]) / 3

    assert brightness("body", "backgroundColor") < 60
    assert brightness("#prompt textarea", "color") > 180
    assert brightness("#header h1", "color") > 180


# ---- editing, enlarging, and what comes back


DROP = """([name, base64]) => {
  const bytes = Uint8Array.from(atob(base64), character => character.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, { type: "image/png" }));
  return transfer;
}"""


def drop(page, selector, path):
    """A file let go over a part of the page."""
    content = base64.b64encode(path.read_bytes()).decode()
    transfer = page.evaluate_handle(DROP, [path.name, content])
    button = page.locator(f"{selector} button:has(input[type=file])")
    button.dispatch_event("drop", {"dataTransfer": transfer})


def picture_in(page, selector):
    """The pixels of the one picture of a widget, when there is one."""
    image = page.locator(f"{selector} img").first
    image.wait_for()
    height, width, data = image.evaluate(DECODE)
    return np.array(data, np.uint8).reshape(height, width, 4)[..., :3]


def open_tab(page, name):
    page.get_by_role("tab", name=name).click()


@pytest.fixture
def photo(tmp_path):
    """A picture of the model's size that no model drew."""
    coarse = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_what_is_painted_over_with_the_mouse_changes_and_nothing_else(open_page, photo, screenshots):
    page = open_page()
    open_tab(page, "Edit")
    drop(page, "#edit_source", photo)
    canvas = page.locator("#edit_mask canvas").first
    canvas.wait_for()
    page.wait_for_timeout(500)  # the canvas takes its size
    left, top, right, bottom = box(canvas)
    side = (right - left) * 0.89 / SIDE  # of a pixel of the picture, which stands in the middle
    x, y = (left + right) / 2, (top + bottom) / 2 - 6 * side
    page.mouse.move(x - 8 * side, y)
    page.mouse.down()
    page.mouse.move(x + 8 * side, y, steps=20)
    page.mouse.up()
    page.screenshot(path=screenshots / "mask.png")
    fill_in(page.locator("#edit_prompt textarea"), "a cat")
    page.get_by_role("button", name="Repaint").click()
    result = picture_in(page, "#edit_result")
    page.screenshot(path=screenshots / "repainted.png")
    original = np.asarray(Image.open(photo))
    changed = (result != original).any(axis=-1)
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    assert changed[10, 10:22].mean() > 0.9  # along the stroke
    # and it ends a brush's half width from it; beyond that every pixel is the picture's own
    assert 5 <= rows[0] and rows[-1] <= 14 and 4 <= columns[0] and columns[-1] <= 27


def test_a_picture_goes_from_tab_to_tab_and_its_visit_is_its_visitors_own(open_page, pipe, screenshots):
    page = open_page()
    ask(page, seed=12)
    (picture,) = draw(page)
    page.get_by_role("button", name="Enlarge it").click()
    assert np.array_equal(picture_in(page, "#enlarge_source"), picture)
    page.locator("#enlarge_new_each_time input").uncheck()
    fill_in(page.locator("#enlarge_seed input"), 5)
    page.get_by_role("button", name="Enlarge 4 times").click()
    page.wait_for_function("document.querySelectorAll('#history img').length === 2")
    page.screenshot(path=screenshots / "before_and_after.png")
    large = pipe.upsampler(image=Image.fromarray(picture), generator=torch.Generator().manual_seed(5))
    page.get_by_role("button", name="Edit this picture").click()
    open_tab(page, "Edit")
    page.locator("#edit_mask canvas").first.wait_for()
    page.wait_for_timeout(500)  # Gradio's canvas complains in the console when it goes while it loads
    page.get_by_text("Restyle").click()
    assert same_picture(picture_in(page, "#edit_source"), np.asarray(large.images[0]))

    # an earlier picture of the visit brings its settings back, and itself
    open_tab(page, "Create")
    fill_in(page.locator("#prompt textarea"), "a red heart")
    page.locator("#history button").last.click()
    page.wait_for_function(f"document.querySelector('#prompt textarea').value === {PROMPT!r}")
    assert used_seed(page) == 12
    assert np.array_equal(shown(page)[0], picture)

    other = open_page()
    assert other.locator("#history img").count() == 0


def test_a_saved_picture_dropped_back_restores_its_settings(open_page, pipe, photo, tmp_path):
    options = {"num_inference_steps": 8, "guidance_scale": 2.5, "guidance_rescale": 0.5}
    settings = {
        "prompt": "a cat, noto style",
        "negative_prompt": "a dog",
        "seed": 21,
        "num_inference_steps": 8,
        "guidance_scale": 2.5,
        "guidance_rescale": 0.5,
        "Software": "Corgi",
    }
    saved = write_picture(Image.new("RGB", (4 * SIDE, 4 * SIDE)), tmp_path, "cat", settings)
    page = open_page()
    drop(page, "#restore", photo)
    page.get_by_text("carries no settings").wait_for()
    assert page.locator("#gallery img").count() == 0

    drop(page, "#restore", saved)
    page.wait_for_function("document.querySelector('#prompt textarea').value === 'a cat'")
    assert used_seed(page) == 21
    (picture,) = draw(page)
    large = {"height": 4 * SIDE, "width": 4 * SIDE, "negative_prompt": "a dog"}
    page.wait_for_function(
        f"document.querySelector('#gallery .grid-container img').naturalWidth === {4 * SIDE}"
    )
    assert same_picture(shown(page)[0], expected(pipe, "a cat, noto style", 21, **options, **large))


def test_the_keyboard_alone_draws_and_edits(open_page, pipe):
    page = open_page()
    ask(page, seed=3)
    page.locator("#prompt textarea").focus()
    page.keyboard.press("Enter")
    (picture,) = shown(page)

    def tab_to(selector):
        for _ in range(25):
            page.keyboard.press("Tab")
            if page.evaluate("s => document.activeElement.matches(s)", selector):
                return
        raise AssertionError(f"Tab does not reach {selector}")

    tab_to("#create_to_edit")
    page.keyboard.press("Enter")
    page.locator("#edit_mask canvas").first.wait_for()
    page.get_by_role("tab", name="Edit").focus()
    tab_to("#mode input[value=restyle]")
    page.keyboard.press("Space")
    page.locator("#edit_strength").wait_for()
    tab_to("#edit_prompt textarea")
    page.keyboard.type("a cat")
    page.keyboard.press("Enter")
    result = picture_in(page, "#edit_result")
    redraw = ImageToImagePipeline.from_pipe(pipe)
    redraw.set_progress_bar_config(disable=True)
    seed = int(page.locator("#edit_seed input").input_value())
    options = {"strength": 0.7, "generator": torch.Generator().manual_seed(seed)}
    drawn = redraw("a cat", image=Image.fromarray(picture), **options).images[0]
    assert same_picture(result, np.asarray(drawn))


def test_every_tab_fits_a_phone(open_page, photo, screenshots):
    page = open_page(390, 780, is_mobile=True, has_touch=True)
    for name in ("Edit", "Enlarge", "Create"):
        page.get_by_role("tab", name=name).tap()
        if name == "Create":
            page.get_by_role("button", name="Advanced").tap()
        elif name == "Edit":
            drop(page, "#edit_source", photo)
            page.locator("#edit_mask canvas").first.wait_for()
            page.get_by_text("Extend the canvas").tap()
            page.locator("#edit_frame img").wait_for()
        page.wait_for_timeout(300)
        page.screenshot(path=screenshots / f"phone_{name.lower()}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
