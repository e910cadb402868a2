"""`--push_to_hub` of training: the trained pipeline, or the adapters, under the name that was asked for."""

import json

import pytest
from PIL import Image

TRAIN = """
import os, sys
os.environ["ACCELERATE_USE_CPU"] = "true"
sys.argv = ["text_to_image", *arguments]
from accelerate.state import AcceleratorState, GradientState
AcceleratorState._reset_state(reset_partial_state=True)
GradientState._reset_state()
from training import text_to_image
text_to_image.main()
value = None
"""


@pytest.fixture
def arguments(make_pipeline, tmp_path) -> list[str]:
    make_pipeline().save_pretrained(tmp_path / "model")
    (tmp_path / "mine").mkdir()
    Image.new("RGB", (16, 16), "red").save(tmp_path / "mine" / "a.png")
    (tmp_path / "mine" / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "red"}))
    settings = {"pretrained_model_name_or_path": "model", "train_data_dir": "mine", "cache_dir": "cache"}
    listed = [part for key, value in settings.items() for part in (f"--{key}", str(tmp_path / value))]
    return [
        *listed,
        "--max_train_steps",
        "1",
        "--train_batch_size",
        "2",
        "--report_to",
        "none",
        "--push_to_hub",
    ]


def test_the_pipeline_is_pushed(elsewhere, hub, arguments, tmp_path):
    output = tmp_path / "reds"
    elsewhere(
        TRAIN, ours=True, arguments=[*arguments, "--output_dir", str(output), "--hub_model_id", "me/red"]
    )
    files = hub.model("me/red").files()
    weights = output / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    assert files["unet/diffusion_pytorch_model.safetensors"].content == weights.read_bytes()
    assert {"model_index.json", "text_encoder/model.safetensors", "tokenizer/tokenizer.json"} <= set(files)


def test_adapters_are_pushed_under_the_runs_name(elsewhere, hub, arguments, tmp_path):
    output = tmp_path / "reds"
    elsewhere(TRAIN, ours=True, arguments=[*arguments, "--output_dir", str(output), "--rank", "2"])
    name = "pytorch_lora_weights.safetensors"
    assert hub.model("me/reds").files()[name].content == (output / name).read_bytes()


def test_a_token_that_may_not_write_is_told_before_training(elsewhere, hub, arguments, tmp_path):
    output = tmp_path / "reds"
    with pytest.raises(Exception, match="401|403|Unauthorized|Forbidden|not authorized|denied"):
        elsewhere(TRAIN, ours=True, token="hf_reader", arguments=[*arguments, "--output_dir", str(output)])
    assert not list(output.glob("checkpoint-*")) and not hub.repositories
