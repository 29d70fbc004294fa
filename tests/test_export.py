"""Section 14: rooftop.onnx is read as QGIS's Deepness, GeoDeep and plain onnxruntime read it."""

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

import nbtools

SIZE, CPU = 64, torch.device("cpu")
THRESHOLD = 0.37


def make_predictor(nb: ModuleType, names: list[str], threshold: float | None) -> object:
    """A predictor of a small model that has been somewhere: its normalisations are not the initial ones."""
    small = {"image_size": SIZE, "encoder_name": "resnet18", "encoder_weights": None}
    classes = {
        "class_names": names,
        "class_values": list(range(len(names))),
        "num_classes": len(names),
    }
    config = nb.make_config(**nbtools.settings() | small | classes)
    torch.manual_seed(0)
    model, images = nb.build_model(config), torch.rand(4, 3, 4, 4).repeat_interleave(SIZE // 4, 2)
    images = (images.repeat_interleave(SIZE // 4, 3) - 0.45) / 0.225
    head = model.segmentation_head[0]
    with torch.no_grad():
        for norm in [part for part in model.modules() if isinstance(part, torch.nn.BatchNorm2d)]:
            norm.weight.uniform_(0.5, 1.5)
        head.weight *= 150  # sure of itself: probabilities from 0 to 1
        for _ in range(3):
            model(images)
        logits = model.eval()(images)[:, : len(names)]  # without the outline
        head.bias -= logits.mean((0, 2, 3))  # no class is rare
    model = model.to(memory_format=torch.channels_last)
    return nb.Predictor([model], config, CPU, "fp32", False, threshold)


@pytest.fixture(scope="module")
def alone(nb: ModuleType) -> object:
    """A predictor of two classes."""
    return make_predictor(nb, ["background", "rooftop"], THRESHOLD)


@pytest.fixture(scope="module")
def content(nb: ModuleType, alone: object) -> bytes:
    """Its export, from tiles of 14.9 cm."""
    return nb.build_onnx(alone, 0.14931)


@pytest.fixture
def windows() -> np.ndarray:
    """Five windows (B, S, S, 3) uint8 of blocks and noise."""
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (5, SIZE // 16, SIZE // 16, 3)).repeat(16, 1).repeat(16, 2)
    return np.clip(blocks + rng.integers(-20, 20, blocks.shape), 0, 255).astype(np.uint8)


def ask_predictor(nb: ModuleType, predictor: object, windows: np.ndarray) -> np.ndarray:
    """Probabilities (B, C, S, S) as section 12 finds them."""
    return predictor(torch.stack([nb.TO_TENSORS(image=w)["image"] for w in windows])).numpy()


def as_deepness(content: bytes, windows: np.ndarray) -> np.ndarray:
    """Classes (B, S, S) as Deepness finds them: /255, standardised, zero below the threshold, argmax."""
    session = ort.InferenceSession(content)
    facts = {k: json.loads(v) for k, v in session.get_modelmeta().custom_metadata_map.items()}
    (only,) = session.get_inputs()
    assert isinstance(only.shape[0], str) and only.shape[1:] == [3, SIZE, SIZE]
    images = np.float32(windows * 1.0 / 255.0)
    images = (images - facts["standardization_mean"]) / facts["standardization_std"]
    images = np.transpose(images, (0, 3, 1, 2)).astype(np.float32)
    (result,) = session.run(None, {only.name: images})
    result[result < facts["seg_thresh"]] = 0
    return result.argmax(1)


def test_decides_as_section_12(nb: ModuleType, alone: object, content: bytes, windows: np.ndarray):
    own = ask_predictor(nb, alone, windows)
    roof = own[:, 1] >= THRESHOLD
    assert 0.2 < roof.mean() < 0.8 and (roof != (own[:, 1] >= 0.5)).mean() > 0.01  # else no test
    for batch in (1, 2, 5):
        assert (as_deepness(content, windows[:batch]) == roof[:batch]).all()


def test_probabilities_are_softmax_with_the_threshold_at_one_half(nb, alone, content, windows):
    p = ask_predictor(nb, alone, windows)[:, 1].astype(float)
    q = nb.open_onnx(content)(torch.stack([nb.TO_TENSORS(image=w)["image"] for w in windows]))
    assert q.shape == (5, 2, SIZE, SIZE) and np.allclose(q.sum(1), 1, atol=1e-6)
    odds = p / np.maximum(1 - p, 1e-12) * (1 - THRESHOLD) / THRESHOLD
    assert abs(q[:, 1] - odds / (1 + odds)).max() < 1e-4


def test_file_can_be_opened_where_it_is_meant_to(content: bytes):
    model = onnx.load_from_string(content)
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version <= 9  # Deepness's onnxruntime refuses 10
    assert [(o.domain, o.version <= 20) for o in model.opset_import] == [("", True)]
    assert all(len(w.external_data) == 0 for w in model.graph.initializer)
    (output,) = model.graph.output
    dims = output.type.tensor_type.shape.dim
    assert dims[0].dim_param and [d.dim_value for d in dims[1:]] == [2, SIZE, SIZE]


def test_facts_are_those_that_deepness_and_geodeep_read(content: bytes):
    model = onnx.load_from_string(content)
    facts = {p.key: json.loads(p.value) for p in model.metadata_props}
    assert facts == {
        "model_type": "Segmentor",
        "class_names": {"0": "background", "1": "rooftop"},
        "resolution": 14.93,
        "tile_size": SIZE,
        "tiles_size": SIZE,
        "tiles_overlap": 25,
        "seg_thresh": 0.5,
        "seg_small_segment": 0,
        "standardization_mean": [0, 0, 0],
        "standardization_std": [1, 1, 1],
    }


def test_unknown_resolution_is_not_made_up(nb: ModuleType, alone: object):
    assert "resolution" not in nb.deepness_metadata(alone.config, None)


def test_file_tells_nothing_of_this_machine(content: bytes):
    model = onnx.load_from_string(content)
    for weight in model.graph.initializer:
        weight.ClearField("raw_data")
    text = model.SerializeToString()
    assert b"DeepLab" not in text and b"site-packages" not in text and b".py" not in text


def test_more_classes_are_neither_shifted_nor_cut(
    nb: ModuleType, windows: np.ndarray, recwarn, capfd
):
    three = make_predictor(nb, ["ground", "roof", "größeres Dach"], None)
    content = nb.build_onnx(three, None)
    assert capfd.readouterr() == ("", "")
    assert not [str(w.message) for w in recwarn]
    own = ask_predictor(nb, three, windows)
    assert (own.max(1) < 0.5).mean() > 0.01  # where a threshold of a half would make background
    assert (as_deepness(content, windows) == own.argmax(1)).all()
    images = torch.stack([nb.TO_TENSORS(image=w)["image"] for w in windows])
    assert abs(nb.open_onnx(content)(images) - own).max() < 1e-4
    facts = ort.InferenceSession(content).get_modelmeta().custom_metadata_map
    assert json.loads(facts["class_names"])["2"] == "größeres Dach"
    assert nb.check_onnx(content, three, images)["share decided otherwise"] == 0


def test_another_model_or_threshold_is_noticed(nb: ModuleType, alone: object, content: bytes):
    images = torch.randn(2, 3, SIZE, SIZE)
    assert nb.check_onnx(content, alone, images)["largest difference"] < 1e-4
    with pytest.raises(ValueError, match=r"rooftop.onnx was not written.*differs"):
        nb.check_onnx(content, replace(alone, threshold=THRESHOLD + 0.01), images)
    other = make_predictor(nb, ["background", "rooftop"], THRESHOLD).models
    with torch.no_grad():
        other[0].segmentation_head[0].bias[1] = np.nan
    with pytest.raises(ValueError, match=r"differs from its model"):
        nb.check_onnx(content, replace(alone, models=other), images)


def choose(nb: ModuleType, predictor: object, tiles: list) -> tuple[object, object]:
    """What the action cell is given: a choice of unknown ground resolution, and a session."""
    parts = {"train": [], "val": [], "test": tiles}
    split = nb.Split(config=predictor.config, tile_set=None, parts=parts, how="")
    empty = {"trials": None, "histogram": None, "suspects": []}
    choice = nb.Choice(split=split, files=[], checkpoint={}, predictor=predictor, **empty)
    return choice, nb.Session(predictor.config, CPU, predictor.precision, False)


def test_action_cell(nb, alone, content, settings, write_pair, capsys, monkeypatch):
    for i in range(4):
        write_pair(f"a_{i}", side=SIZE, seed=i)
    config, asked, shown = nb.make_config(**settings), [], []

    def spy(one: object, resolution: float | None) -> bytes:
        asked.append((one, resolution))
        return content

    check = nb.check_onnx
    monkeypatch.setattr(nb, "build_onnx", spy)
    monkeypatch.setattr(nb, "check_onnx", lambda *words: shown.append(words[2]) or check(*words))
    tiles = nb.find_scenes(nb.inspect_dataset(config)[0], None)
    other = make_predictor(nb, ["background", "rooftop"], None).models
    predictor = nb.Predictor(alone.models + other, config, CPU, "bf16", True, THRESHOLD)
    capsys.readouterr()
    table = nb.export_model(*choose(nb, predictor, tiles))
    assert "NOTE: the ground resolution" in capsys.readouterr().out
    ((one, resolution),) = asked
    assert (len(one.models), one.precision, one.tta, one.threshold) == (1, "fp32", False, THRESHOLD)
    assert resolution is None
    assert torch.equal(
        one.models[0].segmentation_head[0].bias, alone.models[0].segmentation_head[0].bias
    )
    pictures = np.stack([nb.read_tile(tile)[0] for tile in tiles])
    colours = shown[0] * torch.tensor(nb.STD)[:, None, None] * 255
    colours += torch.tensor(nb.MEAN)[:, None, None] * 255
    assert abs(colours.permute(0, 2, 3, 1).numpy() - pictures).max() < 0.01
    timed = [name.split(", ")[1] for name in table.index if name.startswith("ms")]
    assert timed == ["PyTorch fp32", "PyTorch bf16", "onnxruntime"]
    file = Path(config.save_dir, "rooftop.onnx")
    assert file.read_bytes() == content and list(table.columns) == [file.name]

    file.write_bytes(b"older")  # an export that fails leaves the old file, and no other
    wrong = replace(predictor, threshold=0.9)
    with pytest.raises(ValueError, match="was not written"):
        nb.export_model(*choose(nb, wrong, []))  # no tiles: noise
    assert file.read_bytes() == b"older"
    assert [path.name for path in file.parent.glob("*onnx*")] == ["rooftop.onnx"]


@pytest.mark.parametrize(("setting", "written"), [("auto", 0.6), (0.45, 0.45)])
def test_the_best_model_alone_is_exported_with_its_own_threshold(
    nb: ModuleType,
    alone: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    setting: str | float,
    written: float,
) -> None:
    """Not with that of the ensemble, unless it is set."""
    asked, build = [], nb.build_onnx

    def spy(one: object, resolution: float | None) -> bytes:
        asked.append(one.threshold)
        return build(one, resolution)

    monkeypatch.setattr(nb, "build_onnx", spy)
    other = make_predictor(nb, ["background", "rooftop"], THRESHOLD).models
    changes = {"ensemble": ["other.pt"], "threshold": setting, "save_dir": str(tmp_path)}
    config = replace(alone.config, **changes)
    threshold = THRESHOLD if setting == "auto" else setting
    both = replace(alone, models=alone.models + other, config=config, threshold=threshold)
    choice, session = choose(nb, both, [])
    nb.export_model(replace(choice, checkpoint={"threshold": 0.6}), session)
    assert asked == [written] and (tmp_path / "rooftop.onnx").exists()
