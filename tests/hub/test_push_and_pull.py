"""Models pushed by one process and loaded by name in others, which have never seen this repository."""

from typing import Any

import numpy as np
import pytest
from diffusers import AutoencoderKL
from hub.snippets import DRAW, LOAD, PUSH
from transformers import CLIPTextModel

from pipelines import DDPMScheduler


@pytest.fixture
def saved(make_pipeline: Any, make_unet: Any, tmp_path: Any) -> str:
    """A folder of a model with features of ours."""
    features = {"patch_size": 2, "pooled_text_time_embedding": True, "pooled_text_dim": 24}
    make_pipeline(unet=make_unet(**features)).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_pushed_model_loads_where_this_repository_is_not(elsewhere, hub, saved, tmp_path, fresh):
    elsewhere.fresh = fresh
    drawn, sha, _ = elsewhere(PUSH, ours=True, folder=saved, name="me/corgi", options={"private": True})
    files = set(hub.model("me/corgi").files())
    assert hub.model("me/corgi").branches == {"main": sha} and hub.model("me/corgi").private
    assert {"README.md", "model_index.json", "pipeline.py", "unet/conditional_unet.py"} <= files
    assert {"unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"} <= files
    elsewhere.forget()

    with pytest.raises(Exception, match=r"ModuleNotFoundError: No module named 'pipelines'"):
        elsewhere("import pipelines")
    with pytest.raises(Exception, match=r"(?s)ValueError: .*trust_remote_code=True"):
        elsewhere('from diffusers import DiffusionPipeline\nDiffusionPipeline.from_pretrained("me/corgi")')
    code = """
    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(name, trust_remote_code=True)
    pipe.save_pretrained(again)
    value = [draw(pipe), type(pipe).__name__, type(pipe.unet).__name__, type(pipe.scheduler).__module__]
    """
    code = DRAW + "\n".join(line.strip() for line in code.splitlines())
    far, *names = elsewhere(code, name="me/corgi", again=str(tmp_path / "again"))
    assert names == ["TextToImagePipeline", "ConditionalUNet", "diffusers_modules.local.ddpm_scheduler"]
    assert np.abs(np.subtract(far, drawn)).max() < 1e-5

    elsewhere.forget()  # a third process, with what the second saved and nothing else
    hub.repositories.clear()
    farther, *names = elsewhere(code, name=str(tmp_path / "again"), again=str(tmp_path / "once-more"))
    assert names == ["TextToImagePipeline", "ConditionalUNet", "diffusers_modules.local.ddpm_scheduler"]
    assert np.abs(np.subtract(farther, drawn)).max() < 1e-5
    files = {path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*")}
    assert files == {path.relative_to(tmp_path / "once-more") for path in (tmp_path / "once-more").rglob("*")}
    index = (tmp_path / "once-more/model_index.json").read_text()
    assert "diffusers_modules" not in index and str(tmp_path) not in index


def test_our_class_loads_by_name_and_runs_none_of_the_code(elsewhere, hub, saved):
    drawn, *_ = elsewhere(PUSH, ours=True, folder=saved, name="me/corgi", options={})
    files = hub.model("me/corgi").files()
    marker = elsewhere.home / "ran"
    for path in files:
        if path.endswith(".py"):
            files[path].content = f"open({str(marker)!r}, 'w')\n".encode() + files[path].content
    elsewhere.forget()
    assert elsewhere(LOAD, ours=True, name="me/corgi", options={}) == drawn
    assert not marker.exists() and not list((elsewhere.home / "hf").rglob("*.py"))


def test_a_model_without_features_of_ours_loads_without_code(
    elsewhere, make_pipeline, make_unet, make_text_encoder, tmp_path
):
    vae = AutoencoderKL(block_out_channels=(16,), latent_channels=4, norm_num_groups=8)
    scheduler = DDPMScheduler(clip_sample=False, timestep_spacing="trailing")
    tower = make_text_encoder(CLIPTextModel, eos_token_id=2)
    unet = make_unet(in_channels=4, out_channels=4)
    make_pipeline(vae=vae, scheduler=scheduler, unet=unet, text_encoder=tower).save_pretrained(tmp_path)
    drawn, *_ = elsewhere(
        PUSH, ours=True, folder=str(tmp_path), name="me/plain", options={"diffusers_format": True}
    )
    code = (
        DRAW
        + """
from diffusers import StableDiffusionPipeline
value = draw(StableDiffusionPipeline.from_pretrained("me/plain"))
assert not any(module.startswith("diffusers_modules") for module in sys.modules)
"""
    )
    assert np.abs(np.subtract(elsewhere("import sys" + code), drawn)).max() < 1e-4


def test_revisions_variants_and_pull_requests(elsewhere, hub, saved):
    first, sha, _ = elsewhere(PUSH, ours=True, folder=saved, name="me/corgi", options={})
    code = PUSH.replace("info =", "with torch.no_grad(): pipe.unet.conv_out.bias += 0.3\ninfo =")
    proposed, _, pull = elsewhere(
        code, ours=True, token="hf_you", folder=saved, name="me/corgi", options={"create_pr": True}
    )
    assert pull == "refs/pr/1" and hub.model("me/corgi").branches["main"] == sha
    code = PUSH.replace("info =", "pipe.to(torch.float16)\ninfo =").replace(
        "draw(pipe)", "draw(pipe.to(torch.float32))"
    )
    half, later, _ = elsewhere(code, ours=True, folder=saved, name="me/corgi", options={"variant": "fp16"})
    assert len({str(first), str(proposed), str(half)}) == 3
    for options, expected in (
        ({}, first),
        ({"revision": sha}, first),
        ({"revision": "refs/pr/1"}, proposed),
        ({"variant": "fp16"}, half),
        ({"revision": later, "variant": "fp16"}, half),
    ):
        elsewhere.forget()
        hub.requests.clear()
        assert elsewhere(LOAD, ours=True, name="me/corgi", options=options) == expected, options
        weights = {line.split("/")[-1] for line in hub.requests if line.startswith("GET /storage")}
        kind = ".fp16" if "variant" in options else ""
        assert weights == {f"diffusion_pytorch_model{kind}.safetensors", f"model{kind}.safetensors"}
    remote = (
        DRAW
        + """
from diffusers import DiffusionPipeline
value = draw(DiffusionPipeline.from_pretrained("me/corgi", variant="fp16", trust_remote_code=True))
"""
    )
    assert np.abs(np.subtract(elsewhere(remote), half)).max() < 1e-5
    for options, message in (
        ({"variant": "bf16"}, "ValueError: .*variant=bf16.*me/corgi has none"),
        ({"revision": "v9"}, "OSError: me/corgi on the Hub has no revision 'v9'"),
    ):
        with pytest.raises(Exception, match=message):
            elsewhere(LOAD, ours=True, name="me/corgi", options=options)


def test_tokens_that_are_missing_or_wrong(elsewhere, hub, saved):
    elsewhere(PUSH, ours=True, folder=saved, name="me/secret", options={"private": True})
    elsewhere.forget()
    load = LOAD.replace("value = draw(pipe)", "value = type(pipe).__name__")
    for token, message in (
        (None, "OSError: me/secret is neither a folder here nor a model that the Hub shows.*token"),
        ("hf_you", "OSError: me/secret is neither a folder here nor a model that the Hub shows.*token"),
        ("hf_wrong", r"OSError: The Hub refused the token for me/secret \(401\)"),
    ):
        with pytest.raises(Exception, match=message):
            elsewhere(load, ours=True, token=token, name="me/secret", options={})
    for token, options in (("hf_reader", {}), (None, {"token": "hf_reader"})):
        elsewhere.forget()
        assert (
            elsewhere(load, ours=True, token=token, name="me/secret", options=options)
            == "TextToImagePipeline"
        )
    before = dict(hub.model("me/secret").branches)
    for token, options, message in (
        (None, {}, r"OSError: Could not push to me/secret .*token that may write there \(401\)"),
        ("hf_wrong", {}, r"OSError: Could not push to me/secret .*token that may write there \(401\)"),
        ("hf_reader", {}, r"OSError: Could not push to me/secret .*token that may write there \(403\)"),
        ("hf_me", {"token": "hf_wrong"}, r"OSError: Could not push to me/secret .*\(401\)"),
    ):
        with pytest.raises(Exception, match=message):
            elsewhere(PUSH, ours=True, token=token, folder=saved, name="me/secret", options=options)
    with pytest.raises(Exception, match=r"HFValidationError: Repo id must"):
        elsewhere(PUSH, ours=True, folder=saved, name="no/such/name", options={})
    assert hub.model("me/secret").branches == before and list(hub.repositories) == [("model", "me/secret")]


def test_a_push_keeps_the_card_that_is_there_and_drops_stale_shards(elsewhere, hub, saved):
    options = {"max_shard_size": "100KB", "model_card": {"license": "mit"}}
    elsewhere(PUSH, ours=True, folder=saved, name="me/corgi", options=options)
    files = hub.model("me/corgi").files()
    assert (
        "unet/diffusion_pytorch_model.safetensors.index.json" in files
        and b"license: mit" in files["README.md"].content
    )
    files["README.md"].content += b"My own words.\n"
    drawn, *_ = elsewhere(
        PUSH, ours=True, folder=saved, name="me/corgi", options={"model_card": {"datasets": ["me/emoji"]}}
    )
    files = hub.model("me/corgi").files()
    assert [path for path in files if path.startswith("unet/") and ".safetensors" in path] == [
        "unet/diffusion_pytorch_model.safetensors"
    ]
    card = files["README.md"].content
    assert card.endswith(b"My own words.\n") and b"license: mit" in card and b"- me/emoji" in card
    elsewhere.forget()
    assert elsewhere(LOAD, ours=True, name="me/corgi", options={}) == drawn

    # the folder's own card goes with it, by save_pretrained
    code = PUSH.replace(
        "info = pipe.push_to_hub(name, **options)",
        "pipe.save_pretrained(folder, push_to_hub=True, repo_id='me/two')",
    )
    code = code.replace("[draw(pipe), info.oid, info.pr_revision]", "None")
    elsewhere(f"open(folder + '/README.md', 'w').write('# Mine')\n{code}", ours=True, folder=saved)
    files = hub.model("me/two").files()
    assert files["README.md"].content == b"# Mine" and "unet/conditional_unet.py" in files


def test_a_push_that_changes_nothing_makes_no_commit(elsewhere, hub, saved):
    _, sha, _ = elsewhere(PUSH, ours=True, folder=saved, name="me/corgi", options={})
    _, again, _ = elsewhere(PUSH, ours=True, folder=saved, name="me/corgi", options={})
    assert again == sha == hub.model("me/corgi").branches["main"]


def test_what_is_not_meant_for_others_is_not_pushed(elsewhere, hub, saved):
    """Hidden files, and anything at all where `private` was asked for and the repository is public."""
    code = """
from pathlib import Path
from pipelines import TextToImagePipeline
pipe = TextToImagePipeline.from_pretrained(folder)
for hidden in (".env", "unet/.env", ".git/config"):
    Path(folder, hidden).parent.mkdir(exist_ok=True)
    Path(folder, hidden).write_text("secret")
Path(folder, "notes.txt").write_text("hello")
pipe.save_pretrained(folder, push_to_hub=True, repo_id="me/corgi", **options)
"""
    elsewhere(code, ours=True, folder=saved, options={})
    files, branches = hub.model("me/corgi").files(), dict(hub.model("me/corgi").branches)
    assert {"notes.txt", "unet/config.json"} <= set(files)
    assert not any(b"secret" in file.content for file in files.values())
    for code_ in (code, PUSH):
        with pytest.raises(Exception, match=r"ValueError: `private` must not be True for me/corgi.*public"):
            elsewhere(code_, ours=True, folder=saved, name="me/corgi", options={"private": True})
    assert hub.model("me/corgi").branches == branches and not hub.model("me/corgi").private


def test_a_card_that_cannot_be_makes_no_repository(elsewhere, hub, saved):
    with pytest.raises(Exception, match="ValueError: .*eval_results"):
        options = {"model_card": {"eval_results": 3}}
        elsewhere(PUSH, ours=True, folder=saved, name="me/corgi", options=options)
    assert not hub.repositories


def test_a_gated_model_says_how_to_get_at_it(elsewhere, hub, saved):
    elsewhere(PUSH, ours=True, folder=saved, name="me/corgi", options={})
    hub.model("me/corgi").gated = True
    elsewhere.forget()
    with pytest.raises(Exception, match=r"OSError: me/corgi on the Hub is gated: ask for access"):
        elsewhere(LOAD, ours=True, token="hf_you", name="me/corgi", options={})


def test_other_kinds_of_models_are_refused_before_their_weights_are_fetched(elsewhere, hub):
    index = b'{"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}'
    hub.add("me/flux", {"model_index.json": index, "transformer/model.safetensors": b"large"})
    with pytest.raises(Exception, match=r"OSError: me/flux is a FluxPipeline, with transformer, for which"):
        elsewhere(LOAD, ours=True, name="me/flux", options={})
    assert not any("/storage/" in line for line in hub.requests)
