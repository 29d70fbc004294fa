"""Run the notebook in a kernel that is killed or interrupted, and compare what runs have left."""

import csv
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import torch
from faulty import picture, save
from nbclient import NotebookClient

import nbtools

CHECKPOINTS = ("rooftop_last.pt", "rooftop_best_model_iou.pt", "rooftop_best_model_loss.pt")
SKIPPED = ("step-run", "loader-run", "look-", "loss-run", "metrics-run", "curves-run")
SKIPPED += ("show-random", "show-worst", "show-suspects")


def small_run(root: Path, epochs: int) -> dict:
    """Write a few tiles below root; the settings of a run of a few seconds on them, with a loader process."""
    for number in range(16):
        for folder, pixels, end in zip(
            ("images/images", "label/label"), picture(f"{number}"), ("", "_label"), strict=True
        ):
            save(root / folder / f"s{number}_1{end}.png", pixels)
    size = {"image_size": 64, "batch_size": 4, "epochs": epochs, "split": [0.5, 0.25, 0.25]}
    quick = {
        "num_workers": 1,
        "tta": False,
        "encoder_name": "mobilenet_v2",
        "encoder_weights": None,
    }
    return {"root": str(root)} | size | quick


def state_of(folder: Path) -> list:
    """What must not differ: weights and epochs of the checkpoints, optimiser, scheduler, history but seconds, metrics."""
    saved = [torch.load(folder / name, weights_only=True) for name in CHECKPOINTS]
    with open(folder / "history.csv", newline="") as file:
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]
    metrics = (
        json.loads((folder / "metrics.json").read_text())
        if (folder / "metrics.json").exists()
        else None
    )
    weights = [(checkpoint["model"], checkpoint["epoch"]) for checkpoint in saved]
    weights.append(saved[0]["learner"])
    return [
        weights,
        saved[0]["optimizer"]["state"],
        saved[0]["scheduler"],
        saved[0]["scaler"],
        rows,
        metrics,
    ]


def same(one: object, other: object) -> bool:
    """True if two nests of dicts and lists hold the same, tensors to the last bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def run_notebook(
    folder: Path,
    settings: dict,
    when: Callable | None = None,
    kill: int = signal.SIGKILL,
    again: bool = False,
    before_training: str = "",
) -> nbformat.NotebookNode:
    """Execute the cells that training and scoring need; again: the training cell twice; before_training: what else.

    Once when() is true, the kernel and its loader processes are sent a signal, as Jupyter's stop button does.
    """
    notebook = nbformat.read(nbtools.NOTEBOOK, as_version=4)
    cells = [
        cell
        for cell in notebook.cells
        if cell.cell_type == "code" and not cell.id.startswith(SKIPPED)
    ]
    ids = [cell.id for cell in cells]
    if again:
        cells.insert(
            ids.index("start-run") + 1,
            nbformat.v4.new_code_cell(cells[ids.index("start-run")].source),
        )
    before_training = f"WRITE_SHARE = math.inf  # write after every epoch\n{before_training}"
    cells.insert(ids.index("start-run"), nbformat.v4.new_code_cell(before_training))
    lines = [f"{name} = {value!r}" for name, value in settings.items()]
    cells.insert(ids.index("settings") + 1, nbformat.v4.new_code_cell("\n".join(lines)))
    notebook.cells = cells
    client = NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(folder)}})
    ended = threading.Event()

    def watch() -> None:
        while not when() and not ended.is_set():
            time.sleep(0.001)
        if not ended.is_set():
            os.killpg(client.km.provisioner.pgid, kill)

    if when:
        threading.Thread(target=watch, daemon=True).start()
    try:
        client.execute()
    finally:
        ended.set()
    return notebook


def epochs_done(folder: Path) -> int:
    """How many epochs a run has written down."""
    try:
        return len((folder / "history.csv").read_text().splitlines()) - 1
    except FileNotFoundError:
        return 0
