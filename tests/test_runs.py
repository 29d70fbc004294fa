"""The whole notebook in a real kernel."""

import csv
import json
import re
import shutil
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import rasterio.features
import shapely
import torch
from faulty import save
from kernels import run_notebook

import nbtools

FILES = {"rooftop_best_model_iou.pt", "rooftop_best_model_loss.pt", "rooftop_last.pt"}
FILES |= {"metrics.json", "split.json", "history.csv", "dataset_report.csv"}
FILES |= {"cache", "rooftop.onnx", "training.lock"}
QUICK = {"encoder_name": "resnet18", "encoder_weights": None}


def output(notebook, cell):
    """The text of the table that a cell ends with."""
    (found,) = [c for c in notebook.cells if c.id == cell]
    return found.outputs[-1].data["text/plain"]


def pictures(notebook):
    """How many figures each cell drew."""
    counts = {
        c.id: sum("image/png" in o.get("data", {}) for o in c.get("outputs", []))
        for c in notebook.cells
    }
    return {cell: count for cell, count in counts.items() if count}


def test_sample_from_nothing(tmp_path):
    """A person with no data: the sample, all files, all pictures, nothing outside its folders."""
    notebook = nbtools.run(nbtools.NOTEBOOK, tmp_path, encoder_weights=None)
    text = nbtools.printed(notebook)
    assert "NO DATA FOUND" in text and "26,678,099 parameters" in text
    assert "Warning" not in text  # of a library, for our own misuse
    folder = tmp_path / "saved_models" / "sample"
    assert {path.name for path in folder.iterdir()} == FILES | {"scenes"}
    made = {path.name for path in (folder / "scenes").iterdir()}
    names = {"suburb_mask.tif", "suburb_roofs.gpkg", "suburb_roofs.geojson", "suburb_map.html"}
    assert made == names
    assert {path.name for path in tmp_path.iterdir()} == {"dataset", "saved_models"}
    always = {"sample-run", "look-tiles", "look-augmented", "curves-run", "threshold-curve"}
    always |= {"meaning-run", "show-scene-run"}
    always |= {"show-random", "show-worst"}
    drawn = pictures(notebook)
    assert always <= drawn.keys() <= always | {"show-suspects"} and set(drawn.values()) == {1}
    assert "scored" in output(notebook, "runs-run")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["iou"]["rooftop"] >= 0.8
    low, high = metrics["intervals"]["iou"]["rooftop"]
    assert low < metrics["iou"]["rooftop"] < high and 0 < metrics["threshold"] < 1
    assert metrics["object_f1"].keys() == {"rooftop"} and metrics["boundary_iou"].keys() == {
        "background",
        "rooftop",
    }
    split = json.loads((folder / "split.json").read_text())
    assert metrics["tiles"] == len(split["test"])
    saved = torch.load(folder / metrics["checkpoint"], weights_only=True)
    assert saved["encoder_weights"] == "random" and saved["class_names"] == [
        "background",
        "rooftop",
    ]
    chosen = saved["threshold"], saved["tta"], saved["ground_resolution"]
    assert chosen == (metrics["threshold"], True, None)
    assert len(saved["seen"]) == len(split["train"]) + len(split["val"])
    assert metrics["tiles_seen_in_training"] == 0
    with open(folder / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert max(rows, key=lambda row: float(row["val_iou"]))["epoch"] == str(saved["epoch"])


def test_own_tiles_with_every_cell_run_twice(tmp_path, settings, write_pair):
    """Tiles with odd names, and a person who runs each cell twice: the same result, no stale state."""
    names = [
        "plain",
        "new\nline",
        "-rf",
        "%s{0}",
        "a" * 150,
        "\udcff",
        "Dächer 屋根",
        "..",
        "'\"&;`",
        "CON",
    ]
    for i in range(20):
        write_pair(rf"{names[i // 2]}$\no${i // 2}_{i}", side=80)
    changes = {"root": settings["root"], "image_size": 64, "batch_size": 4, "epochs": 2} | QUICK
    changes |= {"large_images": "resize"}
    once = nbtools.run(nbtools.NOTEBOOK, tmp_path / "data", save_dir="once", **changes)
    twice = nbtools.run(
        nbtools.NOTEBOOK, tmp_path / "data", save_dir="twice", twice=True, **changes
    )
    results = [
        json.loads((tmp_path / "data" / name / "metrics.json").read_text())
        for name in ("once", "twice")
    ]
    assert results[0] == results[1]
    assert {path.name for path in (tmp_path / "data" / "twice").iterdir()} == FILES
    assert "16 usable tiles" in nbtools.printed(once)
    table = output(once, "split-run").splitlines()  # the last columns: shrunk, enlarged
    assert [row.split()[-2:] for row in table[1:]] == [["12", "0"], ["2", "0"], ["2", "0"]]
    report = (tmp_path / "data" / "once" / "dataset_report.csv").read_text()
    assert r"\udcff$\no$5_10.png,unreadable" in report and r"..$\no$7_14.png,hidden file" in report
    assert len(re.findall(r"epoch +\d+ +\d+ s ", nbtools.printed(twice))) == 2  # trained once
    assert len(pictures(twice)) == 2 * len(pictures(once))
    assert {
        "look-tiles",
        "look-augmented",
        "curves-run",
        "threshold-curve",
        "show-random",
    } <= pictures(once).keys()


def test_real_tiles_by_one_setting(tmp_path, real_tiles):
    """Real tiles: the notebook runs from verification to the pictures."""
    small = {
        "image_size": 32,
        "large_images": "resize",
        "batch_size": 16,
        "epochs": 1,
        "tta": False,
    } | QUICK
    notebook = nbtools.run(nbtools.NOTEBOOK, tmp_path, root=real_tiles, **small)
    text = nbtools.printed(notebook)
    assert "no tile says where on the ground it lies" in text
    assert "label is named like its image" in text
    assert "712 usable tiles" in text and "70 whole scenes" in text
    metrics = json.loads((tmp_path / "saved_models" / "metrics.json").read_text())
    assert 0.5 < metrics["pixel_accuracy"] <= 1
    assert not (Path(tmp_path) / "dataset").exists()


def test_three_classes_an_ignored_value_and_an_ensemble_of_two_encoders(tmp_path, settings):
    """Every section adapts to the classes; the second run averages its model with the first one's."""
    rng = np.random.default_rng(0)
    for i in range(24):
        image, label = rng.integers(0, 50, (64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8)
        for value, channel in ((100, 0), (200, 2)):
            x, y = rng.integers(0, 40, 2)
            label[y : y + 24, x : x + 24], image[y : y + 24, x : x + 24, channel] = value, 200
        label[:4] = 7
        save(Path(settings["root"]) / settings["images_dir"] / f"s{i}_1.png", image)
        save(Path(settings["root"]) / settings["labels_dir"] / f"s{i}_1_label.png", label)
    classes = {
        "class_names": ["ground", "roof", "pool"],
        "class_values": [0, 100, 200],
        "num_classes": 3,
    }
    small = {
        "root": settings["root"],
        "image_size": 64,
        "batch_size": 4,
        "epochs": 6,
        "split": [0.6, 0.2, 0.2],
    }
    changes = classes | small | QUICK | {"ignore_value": 7}
    run_notebook(tmp_path, changes | {"save_dir": "one"})
    one = json.loads((tmp_path / "one" / "metrics.json").read_text())
    assert set(one["iou"]) == {"ground", "roof", "pool"} and set(one["object_f1"]) == {
        "roof",
        "pool",
    }
    assert one["threshold"] is None and min(one["iou"].values()) > 0.3
    changes |= {"encoder_name": "mobilenet_v2", "ensemble": ["one/rooftop_best_model_iou.pt"]}
    notebook = nbtools.run(nbtools.NOTEBOOK, tmp_path, save_dir="two", **changes)
    assert "the likeliest class wins" in nbtools.printed(notebook)
    table = output(notebook, "choose-run")
    steps = re.findall(r"^\d +(\d) +(True|False)", table, re.MULTILINE)
    assert steps == [("1", "False"), ("1", "True"), ("2", "False"), ("2", "True")]
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert two["iou"] != one["iou"] and set(two["intervals"]["iou"]) == {"ground", "roof", "pool"}


def test_a_split_without_test_tiles_stops_before_training(tmp_path, settings, write_pair):
    for i in range(6):
        write_pair(f"a_{i}")
    names = [f"images/images/a_{i}.png" for i in range(6)]
    (tmp_path / "split.json").write_text(
        json.dumps({"train": names[:4], "val": names[4:], "test": ["gone.png"]})
    )
    changes = {"root": settings["root"], "image_size": 64, "split": "split.json"} | QUICK
    with pytest.raises(Exception, match="test has 0 tiles with 0 windows.*or change split"):
        run_notebook(tmp_path, changes)


def test_a_bad_setting_stops_at_the_check(tmp_path):
    with pytest.raises(Exception, match="root = 'nowhere' is not a folder"):
        nbtools.run(nbtools.NOTEBOOK, tmp_path, root="nowhere")
    assert list(tmp_path.iterdir()) == []


def test_a_corrected_map_trains_the_next_model(nb, tmp_path):
    """The circle: map, delete two roofs, draw one, train on that, map again."""
    town = tmp_path / "town"
    nb.write_sample_scene(town / "images")
    shutil.move(town / "images/suburb.geojson", town / "first.geojson")
    small = QUICK | {"root": str(town), "images_dir": "images", "scenes": str(town / "images")}
    small |= {"image_size": 96, "batch_size": 8, "tta": False}
    first = {"labels_dir": "first.geojson", "save_dir": "one", "epochs": 12}
    nbtools.run(nbtools.NOTEBOOK, tmp_path, **small, **first)
    roofs = gpd.read_file(tmp_path / "one/scenes/suburb_roofs.gpkg")
    assert len(roofs) > 20 and roofs["confidence"].is_monotonic_increasing
    assert roofs["verdict"].isna().all()
    deleted, kept = roofs.geometry[:2], roofs.geometry[2:]
    with rasterio.open(town / "images/suburb.tif") as file:
        free = shapely.box(*file.bounds) - kept.union_all().buffer(2)
    spot = shapely.maximum_inscribed_circle(free).coords[0]
    drawn = shapely.Point(spot).buffer(2, cap_style="square")
    corrected = gpd.GeoSeries([*kept, drawn], crs=roofs.crs)
    corrected.to_file(town / "corrected.gpkg")
    second = {"labels_dir": "corrected.gpkg", "save_dir": "two", "epochs": 2}
    second["encoder_weights"] = str(tmp_path / "one/rooftop_best_model_iou.pt")
    notebook = nbtools.run(nbtools.NOTEBOOK, tmp_path, **small | second)
    assert f"from {second['encoder_weights']} weights" in nbtools.printed(notebook)
    again = gpd.read_file(tmp_path / "two/scenes/suburb_roofs.gpkg")
    assert len(again) > 10 and (tmp_path / "two/metrics.json").is_file()
    # What was taught is what was drawn
    config = nb.make_config(
        **nbtools.settings() | small | second | {"save_dir": str(tmp_path / "x")}
    )
    label = np.zeros((600, 600), np.uint8)
    for tile in nb.verify_dataset(config).tiles:
        x, y, width, height = tile.box
        label[y : y + height, x : x + width] = nb.read_tile(tile)[1]
    with rasterio.open(town / "images/suburb.tif") as file:
        new, gone = (
            rasterio.features.rasterize(shapes, file.shape, transform=file.transform) > 0
            for shapes in ([drawn], [roof - kept.union_all() for roof in deleted])
        )
    assert new.any() and label[new].all() and gone.any() and not label[gone & ~new].any()
