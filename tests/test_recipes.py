"""The trials of recipes: each is one that training takes, of about the baseline's size."""

import pytest
import yaml

from benchmarks.recipes import TRIALS, settings_of, table
from pipelines import ConditionalUNet
from training.config import parse_config
from training.text_to_image import TextToImageConfig


def parameters(unet: dict) -> int:
    return sum(p.numel() for p in ConditionalUNet.from_config(unet).parameters())


@pytest.mark.parametrize("name", TRIALS)
def test_each_changes_what_it_says_and_keeps_the_size(name, tmp_path):
    settings, baseline = settings_of(name), settings_of("baseline")
    (tmp_path / "trial.yaml").write_text(yaml.safe_dump(settings))
    config = parse_config(TextToImageConfig, ["--config", str(tmp_path / "trial.yaml")])
    for key, value in TRIALS[name].items():
        expected = baseline["unet"] | value if key == "unet" else value
        assert getattr(config, key) == expected, key
    changed = {key for key in settings if settings[key] != baseline.get(key)}
    assert changed == set(TRIALS[name]) - {"more_ema_decays"}
    assert parameters(settings["unet"]) == pytest.approx(parameters(baseline["unet"]), rel=0.1)


def test_the_table_has_a_row_for_each():
    baseline = {"updates": 200, "R@1": 0.1, "R@5": 0.25, "CLIP score": 21.5}
    assert table({"baseline": baseline, "real": {"R@5": 0.9}}).splitlines()[2:] == [
        "| baseline | 200 | 0.1 | 0.25 | 21.5 |  |",
        "| real |  |  | 0.9 |  |  |",
    ]
