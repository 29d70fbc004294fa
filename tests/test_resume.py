"""Nothing is lost: kills, interrupts, finished runs, changed settings."""

import csv
import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError

import nbtools

CPU = torch.device("cpu")


def state_of(folder):
    """What must be the same: weights of all three checkpoints, optimiser, scheduler, history but for seconds, metrics."""
    files = ("rooftop_last.pt", "rooftop_best_model_iou.pt", "rooftop_best_model_loss.pt")
    saved = [torch.load(folder / name, weights_only=True) for name in files]
    with open(folder / "history.csv", newline="") as file:
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]
    metrics = json.loads((folder / "metrics.json").read_text()) if (folder / "metrics.json").exists() else None
    return (
        [s["model"] for s in saved],
        [s["epoch"] for s in saved],
        saved[0]["optimizer"]["state"],
        saved[0]["scheduler"],
        rows,
        metrics,
    )


def same(one, other):
    """True if two nests of dicts and lists hold the same, tensors to the last bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


# ---- in one process


@pytest.fixture
def start(nb, settings, write_pair):
    """A function that makes a fresh run on twelve tiles: (run, go), where go trains as the notebook's cell does."""
    for i in range(12):
        write_pair(f"s{i}_1")

    def make(**changes):
        small = {"encoder_name": "mobilenet_v2", "split": [0.5, 0.25, 0.25], "early_stopping_patience": 9}
        config = nb.make_config(**settings | small | changes)
        tiles = nb.find_scenes(nb.verify_dataset(config)[0], config.group_by)
        split, _ = nb.split_by_scene(tiles, config)
        loaders = {p: nb.make_loader(nb.RooftopDataset(split[p], config, p == "train"), CPU) for p in ("train", "val")}
        data = {"split": {p: [tile.name for tile in split[p]] for p in nb.SPLITS}, "files": "x"}
        run = nb.start_run(config, CPU, nb.choose_precision(config.precision, CPU)[0])

        def go():
            if not run.history and not nb.resume_run(run, config, data):
                nb.archive_old_run(Path(config.save_dir))
            return nb.fit(run, loaders, nb.CombinedLoss(0.6, 0.4), config, data)

        return run, go

    return make


@pytest.mark.parametrize(("precision", "workers"), [("fp32", 0), ("fp32", 2), ("bf16", 0), ("fp16", 0)])
def test_a_run_in_two_halves_is_the_same_as_one(start, settings, tmp_path, precision, workers):
    start(epochs=4, save_dir=str(tmp_path / "one"), precision=precision)[1]()
    start(epochs=2, save_dir=str(tmp_path / "two"), precision=precision, num_workers=workers)[1]()
    history = start(epochs=4, save_dir=str(tmp_path / "two"), precision=precision)[1]()
    assert len(history) == 4
    assert same(state_of(tmp_path / "one"), state_of(tmp_path / "two"))


def test_a_changed_setting_starts_a_new_run_and_is_named(start, settings, capsys):
    start()[1]()
    old = (Path(settings["save_dir"]) / "rooftop_best_model_iou.pt").read_bytes()
    run, go = start(learning_rate=2e-3)
    go()
    assert "learning_rate: 0.001 is now 0.002" in capsys.readouterr().out
    (kept,) = (Path(settings["save_dir"]) / "archive").glob("*/rooftop_best_model_iou.pt")
    assert kept.read_bytes() == old


@pytest.mark.parametrize("change", [{"threshold": 0.4}, {"tta": False}, {"num_workers": 1}, {"resume": True}])
def test_settings_that_do_not_matter_to_training_never_retrain(start, capsys, change):
    start()[1]()
    capsys.readouterr()
    assert len(start(**change)[1]()) == 2
    text = capsys.readouterr().out
    assert "going on after epoch 2" in text and "train loss" not in text


def test_resume_false_starts_anew(start, settings):
    start()[1]()
    assert len(start(resume=False)[1]()) == 2
    assert len(list((Path(settings["save_dir"]) / "archive").iterdir())) == 1


def test_other_data_starts_a_new_run(start, write_pair, capsys):
    start()[1]()
    write_pair("s99_1")
    start()[1]()
    assert "other split" in capsys.readouterr().out


def test_a_resumed_run_keeps_its_precision(start):
    first, go = start(epochs=1, precision="auto")
    first.precision, first.scaler = "fp16", torch.amp.GradScaler("cpu")  # as if trained on a GPU
    go()
    run, go = start(epochs=2, precision="auto")
    assert run.precision != "fp16"
    go()
    assert run.precision == "fp16" and run.scaler.is_enabled()


@pytest.mark.parametrize("spoil", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"foreign" * 99])
def test_a_last_checkpoint_that_cannot_be_read_is_kept_and_named(start, settings, spoil):
    start()[1]()
    path = Path(settings["save_dir"]) / "rooftop_last.pt"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=r"rooftop_last.pt is no checkpoint to go on from.*resume = False"):
        start()[1]()
    assert path.exists() and not (Path(settings["save_dir"]) / "archive").exists()


@pytest.mark.parametrize("at", [0, 3, 5])
def test_an_interrupt_falls_back_to_the_last_finished_epoch(nb, start, settings, tmp_path, monkeypatch, at, capsys):
    start(epochs=3, save_dir=str(tmp_path / "whole"))[1]()
    run, go = start(epochs=3, save_dir=str(tmp_path / "cut"))
    calls, forward = [], nb.forward

    def interrupting(*words):
        calls.append(1)
        if len(calls) == at + 1:
            raise KeyboardInterrupt
        return forward(*words)

    monkeypatch.setattr(nb, "forward", interrupting)
    history = go()
    assert len(history) == at // 2 and f"{at // 2} finished epochs are kept" in capsys.readouterr().out
    assert len(go()) == 3  # the same cell once more
    assert same(state_of(tmp_path / "whole"), state_of(tmp_path / "cut"))


# ---- in a real kernel


SKIPPED = ("memory-run", "step-run", "loader-run", "look-", "loss-run", "metrics-run", "curves-run", "show-")


def run_and_kill(folder, settings, when, signal_number):
    """Execute the notebook in a kernel; once when() is true send it a signal. The executed notebook."""
    notebook = nbformat.read(nbtools.NOTEBOOK, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if not cell.id.startswith(SKIPPED)]
    index = [cell.metadata.get("tags", []) == ["parameters"] for cell in notebook.cells].index(True)
    lines = [f"{name} = {value!r}" for name, value in settings.items()]
    notebook.cells.insert(index + 1, nbformat.v4.new_code_cell("\n".join(lines)))
    client = NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(folder)}})

    def watch():
        while not when():
            time.sleep(0.001)
        os.kill(client.km.provisioner.pid, signal_number)

    if when:
        threading.Thread(target=watch, daemon=True).start()
    client.execute()
    return notebook


@pytest.fixture
def small(settings, write_pair):
    """Settings of a run of a few seconds, on tiles that are there."""
    for i in range(16):
        write_pair(f"s{i}_1")
    changes = {"epochs": 4, "split": [0.5, 0.25, 0.25], "num_workers": 1, "tta": False, "encoder_name": "mobilenet_v2"}
    return {name: settings[name] for name in ("image_size", "batch_size", "encoder_weights", "root")} | changes


def test_kills_at_any_moment_lose_nothing(tmp_path, small):
    run_and_kill(tmp_path, small | {"save_dir": "whole"}, None, 0)
    out, rng = tmp_path / "killed", random.Random(0)

    def after(epoch, delay):
        def due():
            if not (out / "history.csv").exists():
                return False
            if len((out / "history.csv").read_text().splitlines()) <= epoch:
                return False
            time.sleep(delay)
            return True

        return due

    def writing():
        return any(out.glob("rooftop_*.part"))

    for when in (writing, after(1, rng.uniform(0, 0.5)), after(2, rng.uniform(0, 0.5))):
        with pytest.raises(DeadKernelError):
            run_and_kill(tmp_path, small | {"save_dir": "killed"}, when, signal.SIGKILL)
    text = nbtools.printed(run_and_kill(tmp_path, small | {"save_dir": "killed"}, None, 0))
    assert "going on after epoch" in text
    assert same(state_of(tmp_path / "whole"), state_of(out))
    assert not (out / "archive").exists()


def test_the_stop_button_is_not_a_crash(tmp_path, small):
    def due():
        history = tmp_path / "out" / "history.csv"
        return history.exists() and len(history.read_text().splitlines()) >= 3

    long = small | {"save_dir": "out", "epochs": 300, "early_stopping_patience": 300}
    notebook = run_and_kill(tmp_path, long, due, signal.SIGINT)
    assert "finished epochs are kept; run this cell again to go on" in nbtools.printed(notebook)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert np.isfinite(metrics["pixel_accuracy"])
