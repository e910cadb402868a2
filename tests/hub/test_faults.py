"""Downloads and uploads that go wrong in the middle: nothing half-loaded, and the same call again works."""

from typing import Any

import pytest
from hub.snippets import LOAD, PUSH

NO_WAITING = "import time; time.sleep = lambda seconds: None\n"  # the client waits longer from try to try
OFFLINE = "import huggingface_hub.constants; huggingface_hub.constants.HF_HUB_OFFLINE = True\n"


PUSHED: dict[str, Any] = {}  # by the first test that needs it


@pytest.fixture
def pushed(elsewhere: Any, hub: Any, make_pipeline: Any, make_unet: Any, tmp_path: Any) -> list[Any]:
    """What the model me/corgi draws."""
    make_pipeline(unet=make_unet(patch_size=2)).save_pretrained(tmp_path / "model")
    if not PUSHED:
        drawn, *_ = elsewhere(PUSH, ours=True, folder=str(tmp_path / "model"), name="me/corgi", options={})
        files = {path: file.content for path, file in hub.model("me/corgi").files().items()}
        PUSHED.update(drawn=drawn, files=files)
    hub.add("me/corgi", PUSHED["files"])
    elsewhere.forget()
    return PUSHED["drawn"]


def load(elsewhere: Any, **options: Any) -> Any:
    return elsewhere(NO_WAITING + LOAD, ours=True, name="me/corgi", options=options)


@pytest.mark.parametrize("kind", ["drop", "truncate"])
@pytest.mark.parametrize("path", [r"\.safetensors$", r"/resolve/.*model_index\.json$"])
def test_a_download_that_breaks_off_once_goes_on_by_itself(elsewhere, hub, pushed, kind, path):
    hub.fail("GET", path, kind)
    assert load(elsewhere) == pushed
    assert not any(fault.times for fault in hub.faults)  # it did happen


@pytest.mark.parametrize("kind", ["500", "drop", "truncate"])
def test_a_download_that_stays_broken_says_so_and_the_next_call_ends_it(elsewhere, hub, pushed, kind):
    hub.fail("GET", r"/storage/.*diffusion_pytorch_model\.safetensors$", kind, times=-1)
    with pytest.raises(Exception, match=r"(?s)OSError: The download of me/corgi broke off .*same call"):
        load(elsewhere)
    with pytest.raises(Exception, match=r"OSError: me/corgi .*not wholly, in the cache"):
        load(elsewhere, local_files_only=True)  # what has arrived does not count as a model
    hub.repair()
    hub.requests.clear()
    assert load(elsewhere) == pushed
    assert not any(
        "tokenizer" in line for line in hub.requests if line.startswith("GET")
    )  # it was there already
    hub.fail("GET", "", "drop", times=-1)
    assert load(elsewhere, local_files_only=True) == pushed  # and now it is whole


def test_a_hub_out_of_reach(elsewhere, hub, pushed):
    for method in ("GET", "HEAD", "POST"):
        hub.fail(method, "", "drop", times=-1)
    with pytest.raises(Exception, match=r"OSError: me/corgi .*the Hub is out of reach"):
        load(elsewhere)
    hub.repair()
    assert load(elsewhere) == pushed
    for method in ("GET", "HEAD", "POST"):
        hub.fail(method, "", "drop", times=-1)
    assert load(elsewhere) == pushed  # from the cache
    assert elsewhere(OFFLINE + LOAD, ours=True, name="me/corgi", options={}) == pushed


@pytest.mark.parametrize(
    ("method", "path", "kind"),
    [
        ("PUT", "/upload/", "500"),
        ("PUT", "/upload/", "drop"),
        ("POST", "/preupload/", "500"),
        ("POST", "/commit/", "drop"),
    ],
)
def test_a_push_that_breaks_off_leaves_the_repository_as_it_was(
    elsewhere, hub, pushed, tmp_path, method, path, kind
):
    before = dict(hub.model("me/corgi").branches)
    code = NO_WAITING + PUSH.replace("info =", "with torch.no_grad(): pipe.unet.conv_out.bias += 0.3\ninfo =")
    arguments = {"ours": True, "folder": str(tmp_path / "model"), "name": "me/corgi", "options": {}}
    hub.fail(method, path, kind, times=-1)
    with pytest.raises(Exception, match=r"OSError: Could not push to me/corgi on the Hub: "):
        elsewhere(code, **arguments)
    assert hub.model("me/corgi").branches == before and load(elsewhere) == pushed
    hub.repair()
    changed, *_ = elsewhere(code, **arguments)
    assert changed != pushed and load(elsewhere) == changed


def test_an_upload_that_fails_once_is_tried_again(elsewhere, hub, pushed, tmp_path):
    hub.fail("PUT", "/upload/", "500")
    code = NO_WAITING + PUSH.replace("info =", "with torch.no_grad(): pipe.unet.conv_out.bias += 0.3\ninfo =")
    changed, *_ = elsewhere(code, ours=True, folder=str(tmp_path / "model"), name="me/corgi", options={})
    assert load(elsewhere) == changed


# ---- repositories that mean harm ----


@pytest.mark.parametrize(
    "path", ["../../escaped.json", "unet/../../../escaped.json", "/escaped.json", "unet/..\\escaped.json"]
)
def test_file_names_that_lead_out_of_the_cache_write_nothing(elsewhere, hub, pushed, path):
    content = {name: file.content for name, file in hub.model("me/corgi").files().items()}
    hub.add("me/harm", content | {path: b"{}"})
    with pytest.raises(
        Exception, match="OSError: me/harm has a file named .* leads out of it; nothing was read"
    ):
        elsewhere(LOAD, ours=True, name="me/harm", options={})
    cached = [file.name for file in elsewhere.home.rglob("*") if "harm" in str(file) and file.is_file()]
    assert not list(elsewhere.home.rglob("*escaped*")) and not any("safetensors" in name for name in cached)


def test_an_index_of_shards_that_leads_out_of_the_cache_reads_nothing(elsewhere, hub, pushed):
    content = {name: file.content for name, file in hub.model("me/corgi").files().items()}
    weights = content.pop("unet/diffusion_pytorch_model.safetensors")
    (elsewhere.home / "outside.safetensors").write_bytes(weights)
    for shard in (str(elsewhere.home / "outside.safetensors"), "../../../../../../../../outside.safetensors"):
        index = b'{"metadata": {}, "weight_map": {"conv_in.weight": "%s"}}' % shard.encode()
        hub.add("me/harm", content | {"unet/diffusion_pytorch_model.safetensors.index.json": index})
        with pytest.raises(Exception, match="OSError: .*names the shard .* not one of that folder's"):
            elsewhere(LOAD, ours=True, name="me/harm", options={})


def test_pickles_are_not_even_downloaded(elsewhere, hub, pushed):
    content = {name: file.content for name, file in hub.model("me/corgi").files().items()}
    content["unet/diffusion_pytorch_model.bin"] = content.pop("unet/diffusion_pytorch_model.safetensors")
    hub.add("me/harm", content)
    hub.requests.clear()
    with pytest.raises(Exception, match=r"OSError: me/harm: the weights of unet are a pickle .*convert it"):
        elsewhere(LOAD, ours=True, name="me/harm", options={})
    assert not any(".bin" in line or "/storage/" in line for line in hub.requests)
