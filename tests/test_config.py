"""Settings: what is refused, and when the sample starts."""

from dataclasses import FrozenInstanceError, asdict
from pathlib import Path

import numpy as np
import pytest
from faulty import save


def test_defaults_are_valid_and_frozen(nb, defaults):
    config = nb.make_config(**defaults)
    assert asdict(config) == defaults
    with pytest.raises(FrozenInstanceError):
        config.epochs = 3


BAD = {
    "wrong type": {"epochs": "ten"},
    "float for int": {"batch_size": 8.5},
    "bool for int": {"seed": True},
    "below range": {"epochs": 0},
    "batch of one": {"batch_size": 1},
    "not a number": {"learning_rate": float("nan")},
    "above range": {"lr_factor": 1.5},
    "unknown choice": {"augmentation": "lots"},
    "unknown precision": {"precision": "fp8"},
    "unknown encoder": {"encoder_name": "resnet5000"},
    "unknown architecture": {"architecture": "DeepLabV9"},
    "encoder that cannot be dilated": {"encoder_name": "densenet121"},
    "side not divisible by 16": {"image_size": 250},
    "views that the model cannot see": {
        "tta": True,
        "architecture": "PAN",
        "encoder_name": "mobilenet_v2",
        "image_size": 128,
    },
    "split does not add up": {"split": [0.9, 0.2, 0.05]},
    "split of two": {"split": [0.5, 0.5]},
    "split with an empty part": {"split": [0.9, 0.1, 0.0]},
    "regex without a group": {"group_by": "a.*"},
    "regex that is none": {"group_by": "(a"},
    "classes disagree": {"num_classes": 3},
    "class value twice": {"class_values": [255, 255]},
    "class value too large": {"class_values": [0, 2**31]},
    "class value that is no colour": {"class_values": ["other", "#12"]},
    "two others": {"class_values": ["other", "other"]},
    "one value in two classes": {"class_values": [[0, 1], ["#010101", 2]]},
    "weights that do not exist": {"encoder_weights": "imagenet21k"},
    "weights file that does not exist": {"encoder_weights": "nowhere/resnet50.pth"},
    "infinite weight": {"ce_weight": float("inf")},
    "floor above the start": {"min_lr": 0.1},
    "split file that does not exist": {"split": "nowhere.json"},
    "split that is a number": {"split": 0.9},
    "absolute folder": {"images_dir": "/data/images"},
    "empty weights": {"encoder_weights": ""},
    "no loss": {"ce_weight": 0.0, "dice_weight": 0.0},
    "None where a value is needed": {"root": None},
    "ignored class": {"ignore_value": 255},
    "ignore value too large": {"ignore_value": 2**31},
    "unknown way with large images": {"large_images": "crop"},
    "threshold of one": {"threshold": 1.0},
    "threshold by another name": {"threshold": "best"},
    "tta that is a number": {"tta": 8},
    "unknown views": {"tta": "most"},
    "ensemble that is a name": {"ensemble": "model.pt"},
    "ensemble that does not exist": {"ensemble": ["nowhere/model.pt"]},
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD.keys())
def test_bad_setting_is_named_with_its_value(nb, defaults, change):
    with pytest.raises(ValueError) as caught:
        nb.make_config(**defaults | change)
    name, value = next(iter(change.items()))
    assert name in str(caught.value)
    assert str(value) in str(caught.value)


def test_a_threshold_needs_two_classes(nb, defaults):
    three = {"num_classes": 3, "class_names": ["a", "b", "c"], "class_values": [0, 1, 2]}
    assert nb.make_config(**defaults | three).threshold == "auto"
    with pytest.raises(ValueError, match="threshold = 0.4"):
        nb.make_config(**defaults | three | {"threshold": 0.4})


def test_all_problems_in_one_message_and_what_is_allowed(nb, defaults):
    with pytest.raises(ValueError) as caught:
        nb.make_config(**defaults | {"epochs": 0, "augmentation": "lots", "precision": 16})
    for word in (
        "epochs",
        "augmentation",
        "precision",
        "'standard'",
        "'bf16'",
        "greater than 0",
    ):
        assert word in str(caught.value)


def test_missing_setting_is_named(nb, defaults):
    del defaults["epochs"]
    with pytest.raises(ValueError, match="epochs = 'missing'"):
        nb.make_config(**defaults)


@pytest.mark.parametrize(
    ("architecture", "encoder"),
    [
        ("DeepLabV3Plus", "resnet101"),
        ("DeepLabV3Plus", "efficientnet-b0"),
        ("DeepLabV3Plus", "mit_b0"),
        ("DeepLabV3Plus", "mobilenet_v2"),
        ("DeepLabV3Plus", "tu-convnext_tiny"),
        ("Unet", "resnet18"),
        ("FPN", "densenet121"),
        ("Segformer", "mit_b0"),
    ],
)
def test_other_models_are_accepted(nb, defaults, architecture, encoder):
    config = nb.make_config(**defaults | {"architecture": architecture, "encoder_name": encoder})
    assert config.encoder_name == encoder


def picture(path: Path) -> None:
    save(path, np.zeros((8, 8, 3), np.uint8))


def test_sample_only_for_the_default_root_without_any_image(nb, defaults, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert nb.needs_sample(nb.make_config(**defaults))
    picture(Path("dataset/sample/images/images/a.png"))
    picture(Path("dataset/scenes/b.tif"))
    Path("dataset/README.md").write_text("not an image")
    assert nb.needs_sample(nb.make_config(**defaults))
    picture(Path("dataset/elsewhere/c.png"))
    with pytest.raises(
        FileNotFoundError, match=r"images_dir.*holds 1, the first is dataset/elsewhere/c.png"
    ):
        nb.needs_sample(nb.make_config(**defaults))


def test_another_root_without_images_stops(nb, defaults, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="root = 'tiles' is not a folder"):
        nb.needs_sample(nb.make_config(**defaults | {"root": "tiles"}))
    Path("tiles").mkdir()
    with pytest.raises(FileNotFoundError, match="no image files in /.*tiles/images/images"):
        nb.needs_sample(nb.make_config(**defaults | {"root": "tiles"}))
    picture(Path("tiles/images/images/a.png"))
    with pytest.raises(FileNotFoundError, match="labels_dir"):
        nb.needs_sample(nb.make_config(**defaults | {"root": "tiles"}))
    picture(Path("tiles/label/label/a_label.png"))
    assert not nb.needs_sample(nb.make_config(**defaults | {"root": "tiles"}))


def test_sample_only_lowers_settings_and_keeps_apart(nb, defaults):
    before = nb.make_config(**defaults | {"epochs": 2, "save_dir": "out"})
    after = asdict(nb.sample_config(before))
    changed = {name for name, value in asdict(before).items() if after[name] != value}
    assert changed == {
        "root",
        "save_dir",
        "scenes",
        "batch_size",
        "image_size",
    }  # 2 epochs are few enough
    assert (after["root"], after["save_dir"]) == ("dataset/sample", "out/sample")


@pytest.mark.parametrize(
    ("setting", "device", "features", "expected"),
    [
        ("auto", "cuda", {}, "fp16"),
        ("auto", "cpu", {"avx512_bf16": True}, "bf16"),
        ("auto", "cpu", {"amx_bf16": True}, "bf16"),
        ("auto", "cpu", {"avx512_bf16": False}, "fp32"),
        ("auto", "mps", {"avx512_bf16": True}, "fp32"),
        ("fp32", "cuda", {}, "fp32"),
    ],
)
def test_precision(nb, monkeypatch, setting, device, features, expected):
    monkeypatch.setattr(nb.torch.cpu, "get_capabilities", lambda: features, raising=False)
    assert nb.choose_precision(setting, nb.torch.device(device)) == expected
