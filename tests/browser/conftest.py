"""A real, headless Chromium and the page it looks at."""

import os
from pathlib import Path

import pytest

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def served(tmp_path_factory, tokenizer, make_text_encoder, make_unet, make_upsampler):
    from browser.served import save_tiny_model, serve

    folder = tmp_path_factory.mktemp("model") / "tiny-model"
    save_tiny_model(folder, tokenizer, make_text_encoder, make_unet, make_upsampler)
    with serve(folder, tmp_path_factory.mktemp("app")) as running:
        yield running


@pytest.fixture(scope="module")
def pipe(served):
    return served.load()


@pytest.fixture(scope="module")
def chromium():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail("playwright is missing: pip install -r tests/requirements-browser.txt")
    if not Path(CHROMIUM).exists():
        pytest.fail(f"There is no Chromium at {CHROMIUM}: install it, or set CHROMIUM to where it is.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium, served):
    """open_page(width, height) -> the page, ready to use.

    Errors in the browser's console and anything fetched from elsewhere fail the test.
    """
    contexts, problems = [], []

    def open_at(width: int = 1280, height: int = 900, **options):
        context = chromium.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(120_000)  # a busy machine is no failure
        page.on("pageerror", lambda error: problems.append(f"script error: {error}"))
        page.on("console", lambda m: problems.append(f"console: {m.text}") if m.type == "error" else None)

        def watch(request):
            if not request.url.startswith((served.url, "data:", "blob:")):
                problems.append(f"fetched from elsewhere: {request.url}")

        page.on("request", watch)
        page.goto(served.url)
        page.locator("#go").wait_for()
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture(scope="session")
def screenshots():
    """Where the tests leave pictures of the page, to look at: SCREENSHOTS, or outputs/screenshots."""
    folder = Path(os.environ.get("SCREENSHOTS", "outputs/screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
