"""A saved model, used without training: its settings, its scale, its threshold; and fine-tuning from it."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import rasterio
import torch
from faulty import save
from safetensors.torch import save_file

import nbtools

CPU = torch.device("cpu")
CHOSEN = {"threshold": 0.31, "tta": False, "ground_resolution": 0.3}


@pytest.fixture
def small(settings):
    """Settings of a small model whose window and encoder are not the defaults."""
    return settings | {"image_size": 64, "encoder_name": "resnet18", "large_images": "resize"}


@pytest.fixture
def make_model(nb, small, tmp_path):
    """A function that writes a checkpoint as section 12 leaves it, of a model with random weights."""

    def make(name="model.pt", changes=None, **content):
        config = nb.make_config(**small | (changes or {}))
        data = {"split": {}, "files": "", "scales": {"uint16": [100, 1100]}, "seen": []}
        run = nb.Run(config, CPU, "fp32", data)
        scores = {"loss": 0.4, "pixel_accuracy": 0.8, "miou": 0.5, "iou": 0.5}
        row = {f"{part}_{key}": scores[key] for part in ("train", "val") for key in scores}
        run.history = [{"epoch": 1} | row | {"learning_rate": 1e-3, "seconds": 1.0}]
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(nb.make_checkpoint(run, ("model",)))
        path.write_bytes(nb.to_checkpoint_bytes(nb.load_checkpoint(path) | CHOSEN | content))
        return path, run

    return make


def write_raster(path, values):
    """Pixels (3, S, S) of 16 bits as a GeoTIFF in UTM, 0.3 m per pixel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grid = rasterio.Affine(0.3, 0, 500_000, 0, -0.3, 6_400_000)
    size = {"width": values.shape[2], "height": values.shape[1], "count": 3, "dtype": "uint16"}
    with rasterio.open(path, "w", crs="EPSG:32633", transform=grid, **size) as file:
        file.write(values)


def text_of(notebook, cell):
    """What a cell printed."""
    (found,) = [c for c in notebook.cells if c.id == cell]
    return "".join(o.get("text", "") for o in found.outputs)


def test_its_settings_are_the_models(nb, defaults, make_model):
    path, run = make_model()
    config = nb.make_config(**defaults | {"model": str(path), "threshold": 0.7})
    own = (config.image_size, config.encoder_name, config.large_images)
    assert own == (64, "resnet18", "resize")
    assert config.threshold == 0.7 and config.epochs == defaults["epochs"]


def test_more_classes_bring_their_label_values(nb, defaults, make_model):
    classes = {"class_names": ["ground", "roof", "pool"], "class_values": [0, 1, 2]}
    path, _ = make_model(changes=classes | {"num_classes": 3, "ignore_value": 9})
    config = nb.make_config(**defaults | {"model": str(path)})
    assert config.class_values == [0, 1, 2] and config.ignore_value == 9
    assert config.class_names[2] == "pool"


@pytest.mark.parametrize("content", [None, b"", b"text", {"state_dict": {}}, [1, 2]])
def test_what_is_no_saved_model_is_refused_by_name(nb, defaults, tmp_path, content):
    path = tmp_path / "foreign.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=r"model = '.*foreign.pt' cannot be used: .*foreign.pt"):
        nb.make_config(**defaults | {"model": str(path)})


def test_an_older_checkpoint_without_this_setting_can_be_used(nb, make_model):
    path, _ = make_model()
    saved = nb.load_checkpoint(path)
    del saved["config"]["model"]
    path.write_bytes(nb.to_checkpoint_bytes(saved))
    assert nb.load_model(path, CPU)


def test_tiles_of_16_bits_are_read_at_its_scale(nb, small, make_model, tmp_path):
    path, _ = make_model()
    for number in range(4):
        image = np.random.default_rng(number).integers(600, 640, (3, 64, 64), np.uint16)
        image[:, :8] = image[:, 8:16] + 560
        label = np.zeros((64, 64), np.uint8)
        label[:8] = 255
        write_raster(tmp_path / f"data/images/images/t_{number}.tif", image)
        save(tmp_path / f"data/label/label/t_{number}_label.png", label)
    tiles, _ = nb.inspect_dataset(nb.make_config(**small | {"model": str(path)}))
    image, _ = nb.read_tile(tiles[0])
    assert tiles[0].scale == [100, 1100]
    assert 127 <= image[8:].min() and image[8:].max() <= 137  # (600 to 640 - 100) / 1000 of 255
    assert image[:8].min() == 255
    fresh, _ = nb.inspect_dataset(nb.make_config(**small))
    assert fresh[0].scale != tiles[0].scale


def test_fine_tuning_takes_the_whole_model(nb, small, make_model):
    path, run = make_model()
    tuned = nb.Run(
        nb.make_config(**small | {"seed": 7, "encoder_weights": str(path)}), CPU, "fp32", {}
    )
    assert tuned.encoder_weights == str(path)
    for name, value in run.ema.state_dict().items():
        assert torch.equal(tuned.ema.state_dict()[name], value), name
        assert torch.equal(tuned.model.state_dict()[name], value), name


def test_fine_tuning_to_more_classes_takes_all_but_the_head(nb, small, make_model):
    path, run = make_model()
    classes = {"class_names": ["a", "b", "c"], "class_values": [0, 1, 2], "num_classes": 3}
    own = nb.make_config(**small | classes | {"seed": 7, "encoder_weights": str(path)})
    old, new = run.ema.state_dict(), nb.Run(own, CPU, "fp32", {}).ema.state_dict()
    other = [name for name in old if not torch.equal(old[name].ravel(), new[name].ravel())]
    assert other and all(name.startswith("segmentation_head") for name in other)


def test_a_model_of_another_encoder_cannot_be_tuned(nb, small, make_model):
    path, _ = make_model()
    other = small | {"encoder_name": "mobilenet_v2", "encoder_weights": str(path)}
    with pytest.raises(ValueError, match="encoder_weights = .* does not fit mobilenet_v2"):
        nb.Run(nb.make_config(**other), CPU, "fp32", {})


def test_an_encoders_own_file_still_loads(nb, small, make_model, tmp_path):
    _, run = make_model()
    state = {k: v.contiguous() for k, v in run.ema.encoder.state_dict().items()}
    save_file(state, tmp_path / "encoder.safetensors")
    weights = {"seed": 7, "encoder_weights": str(tmp_path / "encoder.safetensors")}
    new = nb.Run(nb.make_config(**small | weights), CPU, "fp32", {}).model
    name = "layer1.0.conv1.weight"
    assert torch.equal(new.encoder.state_dict()[name], run.ema.encoder.state_dict()[name])


def test_no_data_is_needed_but_a_folder_that_is_named(
    nb, defaults, make_model, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path, _ = make_model()
    model = {"model": str(path)}
    assert nb.needs_sample(nb.make_config(**defaults | model)) is False
    (tmp_path / "empty").mkdir()
    assert nb.needs_sample(nb.make_config(**defaults | model | {"root": "empty"})) is False
    with pytest.raises(FileNotFoundError, match="root = 'typo' is not a folder"):
        nb.needs_sample(nb.make_config(**defaults | model | {"root": "typo"}))
    save(tmp_path / "empty" / "elsewhere" / "a.png", np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        nb.needs_sample(nb.make_config(**defaults | model | {"root": "empty"}))


def test_with_no_tiles_it_maps_only(make_model, tmp_path):
    """A machine with a model, a scene and nothing else: no training, no sample, each cell says so."""
    path, _ = make_model()
    here = tmp_path / "elsewhere"
    noise = np.random.default_rng(0).integers(100, 1100, (3, 150, 150), np.uint16)
    write_raster(here / "dataset" / "scenes" / "town.tif", noise)
    notebook = nbtools.run(nbtools.NOTEBOOK, here, model=str(path), num_workers=0)
    made = {file.name for file in (here / "saved_models" / "scenes").iterdir()}
    assert made >= {"town_mask.tif", "town_roofs.gpkg", "town_roofs.geojson"}
    left = {file.name for file in (here / "saved_models").iterdir()}
    assert left == {"scenes", "rooftop.onnx", "dataset_report.csv"}
    assert {file.name for file in (here / "dataset").iterdir()} == {"scenes"}  # no sample
    assert "threshold 0.31, tta False" in text_of(notebook, "choose-run")
    idle = "meaning-run verify-kinds step-run loader-run leak-run look-tiles "
    idle += "look-augmented start-run choose-run threshold-curve score-run show-random"
    for cell in idle.split():
        assert "nothing to do here without" in text_of(notebook, cell), cell
    (curves,) = [c for c in notebook.cells if c.id == "curves-run"]
    assert any("image/png" in o.get("data", {}) for o in curves.outputs)
    with rasterio.open(here / "saved_models" / "scenes" / "town_mask.tif") as mask:
        roof, probability, _ = mask.read()
    assert np.array_equal(roof, probability >= 0.31 * 250)


def test_tiles_at_hand_are_all_scored_and_known_ones_are_named(
    nb, make_model, small, write_pair, tmp_path
):
    """All labelled tiles judge the model; those that trained it are counted; an older score is kept."""
    for number in range(6):
        write_pair(f"s{number}_1")
    tiles, _ = nb.inspect_dataset(nb.make_config(**small))
    path, _ = make_model(
        "models/rooftop_best_model_iou.pt", seen=[tiles[0].digest, tiles[3].digest]
    )
    (tmp_path / "models" / "metrics.json").write_text('{"older": 1}')
    before = path.read_bytes()
    given = {name: small[name] for name in ("root", "save_dir", "num_workers")}
    notebook = nbtools.run(
        nbtools.NOTEBOOK, tmp_path, twice=True, model=str(path), scenes="none", **given
    )
    metrics = json.loads((tmp_path / "models" / "metrics.json").read_text())
    assert metrics["tiles"] == 6 and metrics["threshold"] == 0.31
    assert metrics["tiles_seen_in_training"] == 2
    assert "WARNING: 2 of 6 tiles helped to make the model" in text_of(notebook, "score-run")
    assert path.read_bytes() == before
    (older, *_) = sorted((tmp_path / "models" / "archive").glob("*/metrics.json"))
    assert older.read_text() == '{"older": 1}'
    assert not list((tmp_path / "models").glob("rooftop_last.pt"))
    assert not (tmp_path / "models" / "split.json").exists()


def test_its_config_still_is_one(nb, make_model):
    path, run = make_model()
    assert nb.load_checkpoint(path)["config"] == asdict(run.config)


def test_a_new_run_does_not_move_the_model_that_it_is_tuned_from(nb, small, make_model, tmp_path):
    path, _ = make_model("models/rooftop_best_model_iou.pt")
    own = small | {"save_dir": str(tmp_path / "models")}
    with pytest.raises(ValueError, match="encoder_weights = .* that is not in save_dir"):
        nb.make_config(**own | {"encoder_weights": str(path)})
    assert nb.make_config(**own | {"model": str(path)})


def test_classes_of_other_names_are_refused(nb, defaults, make_model):
    classes = {"class_names": ["ground", "roof", "pool"], "class_values": [0, 1, 2]}
    path, _ = make_model(changes=classes | {"num_classes": 3})
    other = classes | {"num_classes": 3, "class_names": ["ground", "pool", "roof"]}
    with pytest.raises(ValueError, match=r"its classes are \['ground', 'roof', 'pool'\]"):
        nb.make_config(**defaults | other | {"model": str(path)})
    values = classes | {"class_values": [5, 6, 7], "model": str(path)}
    assert nb.make_config(**defaults | values).class_values == [5, 6, 7]


def test_pixels_of_a_type_that_it_does_not_know_are_refused(nb, small, make_model, tmp_path):
    path, _ = make_model(scales={"uint8": [0, 255]})
    for number in range(4):
        image = np.random.default_rng(number).integers(0, 4000, (3, 64, 64), np.uint16)
        write_raster(tmp_path / f"data/images/images/t_{number}.tif", image)
        label = np.zeros((64, 64), np.uint8)
        label[:8] = 255
        save(tmp_path / f"data/label/label/t_{number}_label.png", label)
    with pytest.raises(ValueError, match=r"uint16 pixels, the model was trained on \['uint8'\]"):
        nb.inspect_dataset(nb.make_config(**small | {"model": str(path)}))


def test_tiles_without_roof_may_judge_it_and_another_runs_cache_stays(
    nb, small, make_model, write_pair, tmp_path
):
    path, _ = make_model()
    for number in range(4):
        write_pair(f"bare_{number}", high=0)
    other = tmp_path / "models" / "cache" / "other.npy"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"of a training in this folder")
    tiles, _ = nb.inspect_dataset(nb.make_config(**small | {"model": str(path)}))
    assert len(tiles) == 4 and not any(tile.roof_share for tile in tiles)
    assert other.exists()
    with pytest.raises(ValueError, match="no roof in any label"):
        nb.inspect_dataset(nb.make_config(**small))


def test_a_scene_may_lie_anywhere_below_root(nb, defaults, make_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, _ = make_model()
    save(tmp_path / "dataset" / "ortho.png", np.zeros((64, 64, 3), np.uint8))
    model = {"model": str(path), "scenes": "dataset/ortho.png"}
    assert nb.needs_sample(nb.make_config(**defaults | model)) is False


def test_a_run_goes_on_from_a_checkpoint_without_the_newer_keys(nb, start):
    run, go = start(epochs=1)
    go()
    last = nb.Path(run.config.save_dir, nb.LAST_FILE)
    saved = nb.load_checkpoint(last)
    assert {"seen", "ground_resolution"}.isdisjoint(saved)
    again, go = start(epochs=1)
    again.data |= {"seen": ["a"], "ground_resolution": 0.3}
    assert nb.resume_run(again) and len(again.history) == 1
