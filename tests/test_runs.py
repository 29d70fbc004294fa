"""The whole notebook in a real kernel."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch

import nbtools

FILES = {"rooftop_best_model_iou.pt", "rooftop_best_model_loss.pt", "rooftop_last.pt"}
FILES |= {"metrics.json", "split.json", "history.csv", "dataset_report.csv"}
QUICK = {"encoder_name": "resnet18", "encoder_weights": None}


def pictures(notebook):
    """How many figures each cell drew."""
    counts = {c.id: sum("image/png" in o.get("data", {}) for o in c.get("outputs", [])) for c in notebook.cells}
    return {cell: count for cell, count in counts.items() if count}


def test_sample_from_nothing(tmp_path):
    """A person with no data: the sample, all files, all pictures, nothing outside its folders."""
    notebook = nbtools.run(nbtools.NOTEBOOK, tmp_path, encoder_weights=None)
    text = nbtools.printed(notebook)
    assert "NO DATA FOUND" in text and "26,677,842 parameters" in text
    folder = tmp_path / "saved_models" / "sample"
    assert {path.name for path in folder.iterdir()} == FILES
    assert {path.name for path in tmp_path.iterdir()} == {"dataset", "saved_models"}
    assert pictures(notebook) == dict.fromkeys(
        ["look-tiles", "look-augmented", "curves-run", "show-random", "show-worst"], 1
    )
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["iou"]["rooftop"] >= 0.8
    split = json.loads((folder / "split.json").read_text())
    assert metrics["tiles"] == len(split["test"])
    saved = torch.load(folder / metrics["checkpoint"], weights_only=True)
    assert saved["encoder_weights"] == "random" and saved["class_names"] == ["background", "rooftop"]
    with open(folder / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert max(rows, key=lambda row: float(row["val_iou"]))["epoch"] == str(saved["epoch"])


def test_own_tiles_with_every_cell_run_twice(tmp_path, settings, write_pair):
    """A person with a folder of tiles who runs each cell twice: the same result, no stale state."""
    for i in range(20):
        write_pair(f"scene{i // 2}_{i}", side=80)
    changes = {"root": settings["root"], "image_size": 64, "batch_size": 4, "epochs": 2} | QUICK
    once = nbtools.run(nbtools.NOTEBOOK, tmp_path / "data", save_dir="once", **changes)
    twice = nbtools.run(nbtools.NOTEBOOK, tmp_path / "data", save_dir="twice", twice=True, **changes)
    results = [json.loads((tmp_path / "data" / name / "metrics.json").read_text()) for name in ("once", "twice")]
    assert results[0] == results[1]
    assert {path.name for path in (tmp_path / "data" / "twice").iterdir()} == FILES
    assert "20 usable tiles" in nbtools.printed(once) and "20 tiles shrunk" in nbtools.printed(once)
    assert len(re.findall(r"epoch +\d+ +\d+ s ", nbtools.printed(twice))) == 2  # trained once
    assert len(pictures(twice)) == 2 * len(pictures(once))


def test_real_tiles_by_one_setting(tmp_path, real_tiles):
    """Real tiles: the notebook runs from verification to the pictures."""
    small = {"image_size": 64, "batch_size": 16, "epochs": 1} | QUICK
    notebook = nbtools.run(nbtools.NOTEBOOK, tmp_path, root=real_tiles, **small)
    text = nbtools.printed(notebook)
    assert "712 usable tiles" in text and "70 whole scenes dealt out" in text
    metrics = json.loads((tmp_path / "saved_models" / "metrics.json").read_text())
    assert 0.5 < metrics["pixel_accuracy"] <= 1
    assert not (Path(tmp_path) / "dataset").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"epochs": "two"}, "epochs = 'two'"), ({"root": "nowhere"}, "root = 'nowhere' is not a folder")],
)
def test_a_bad_setting_stops_at_the_check(tmp_path, change, message):
    with pytest.raises(Exception, match=message):
        nbtools.run(nbtools.NOTEBOOK, tmp_path, **change)
    assert list(tmp_path.iterdir()) == []
