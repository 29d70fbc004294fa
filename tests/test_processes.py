"""The notebook under torchrun: two processes on the CPU learn, score and map as one does."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import rasterio
import torch
from faulty import picture, save
from kernels import SKIPPED

import nbtools

# Dropout draws for each process, and statistics of a batch are shared by GPUs only
STILL = """
with_batches = build_model

def build_model(config):
    model = with_batches(config)
    for module in list(model.modules()):
        for name, part in module.named_children():
            if isinstance(part, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(1, part.num_features))
            if isinstance(part, nn.Dropout):
                part.p = 0.0
    model.unused = nn.Parameter(torch.zeros(1))  # as some encoders have
    return model
"""
AGREE = """
train_before = fit_with_recovery

def fit_with_recovery(run, split):
    train_before(run, split)
    content = torch.cat([part.flatten() for part in run.ema_tensors]).numpy().tobytes()
    found = [None] * WORLD_SIZE
    distributed.all_gather_object(found, hashlib.blake2b(content).hexdigest())
    print("MODELS", len(set(found)))
"""
DIES = """
import signal
judge = train_one_epoch

def train_one_epoch(run, *words):
    if RANK == 1 and len(run.history) == 1:
        while not Path(run.config.save_dir, LAST_FILE).exists():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)
    judge(run, *words)
"""


def write_data(root: Path) -> dict:
    """Tiles and a scene below root; the settings of a run of seconds on them."""
    for number in range(19):
        for folder, pixels, end in zip(
            ("images/images", "label/label"), picture(f"{number}"), ("", "_label"), strict=True
        ):
            save(root / folder / f"s{number}_1{end}.png", pixels)
    scene = np.random.default_rng(0).integers(0, 255, (3, 150, 100), np.uint8)
    (root / "scenes").mkdir()
    size = {"width": 100, "height": 150, "count": 3, "dtype": "uint8", "crs": "EPSG:32633"}
    grid = rasterio.Affine(0.3, 0, 5e5, 0, -0.3, 6e6)
    with rasterio.open(root / "scenes" / "one.tif", "w", transform=grid, **size) as file:
        file.write(scene)
    size = {"image_size": 64, "batch_size": 4, "epochs": 3, "split": [0.5, 0.25, 0.25]}
    quick = {"num_workers": 0, "encoder_name": "mobilenet_v2", "encoder_weights": None}
    return {"root": str(root), "scenes": str(root / "scenes"), "precision": "fp32"} | size | quick


def run_in(
    folder: Path, processes: int, further: str = "", still: str = STILL, **settings: object
) -> tuple[int, str]:
    """Run the notebook in so many processes, results in folder: exit status, and what it said."""
    notebook = nbformat.read(nbtools.NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if not cell.id.startswith(SKIPPED)]
    notebook.cells = []
    for cell in cells:
        before = {"setup-run": still, "start-run": further}.get(cell.id, "")
        if before:
            notebook.cells.append(nbformat.v4.new_code_cell(before))
        notebook.cells.append(cell)
        given = {"settings": settings | {"save_dir": str(folder)}}.get(cell.id, {})
        code = "\n".join(f"{name} = {value!r}" for name, value in given.items())
        if code:
            notebook.cells.append(nbformat.v4.new_code_cell(code))
    folder.mkdir(exist_ok=True)
    nbformat.write(notebook, folder / "main.ipynb")
    command = [Path(sys.executable).with_name("torchrun"), f"--nproc-per-node={processes}"]
    command += ["--no-python", Path(sys.executable).with_name("ipython"), folder / "main.ipynb"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout + done.stderr


def history(folder: Path) -> np.ndarray:
    """The figures of history.csv but the seconds, an epoch a row."""
    with open(folder / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return np.array([[float(row[key] or "nan") for key in row if key != "seconds"] for row in rows])


@pytest.mark.parametrize(("windows", "train"), [(19, True), (19, False), (3, True)])
def test_every_window_is_seen_once_in_the_order_of_one_process(nb, monkeypatch, windows, train):
    class Windows(list):
        config = SimpleNamespace(seed=1, batch_size=4)

    data = Windows(range(windows))
    data.train = train
    alone = nb.epoch_order(data, 5)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(nb, "RANK", rank)
        monkeypatch.setattr(nb, "WORLD_SIZE", 2)
        shares.append(nb.epoch_order(data, 5))
    assert len(shares[0]) == len(shares[1])  # as many batches in each
    together = [window for pair in zip(*shares, strict=True) for window in pair]
    assert together[: len(alone)] == alone and len(together) - len(alone) == len(alone) % 2
    assert len(set(alone)) == len(alone) == (windows // 4 * 4 or windows if train else windows)


def test_a_batch_that_cannot_be_shared_is_refused(nb, monkeypatch):
    monkeypatch.setattr(nb, "WORLD_SIZE", 3)
    for size in (32, 3):
        with pytest.raises(ValueError, match=f"batch_size = {size}.*multiple of 3, from 6 on"):
            nb.init_processes(size)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """Settings, and the folder of a run by one process."""
    base = tmp_path_factory.mktemp("processes")
    settings = write_data(base / "data")
    status, said = run_in(base / "one", 1, **settings)
    assert status == 0, said
    return settings, base / "one"


def test_two_processes_end_where_one_does(alone):
    settings, one = alone
    status, said = run_in(two := one.with_name("two"), 2, **settings)
    assert status == 0, said
    assert said.count("epoch   1") == 1  # the first alone prints
    np.testing.assert_allclose(
        history(one), history(two), rtol=1e-3, atol=2e-3
    )  # pixels near 0.5 may flip
    scores = [json.loads((folder / "metrics.json").read_text()) for folder in (one, two)]
    assert scores[0]["tiles"] == scores[1]["tiles"]
    assert scores[0]["roof_iou"] == pytest.approx(scores[1]["roof_iou"], abs=0.02)
    maps = [rasterio.open(folder / "scenes" / "one_mask.tif").read(2) for folder in (one, two)]
    assert np.abs(maps[0].astype(int) - maps[1]).max() <= 10
    weights = [torch.load(f / "rooftop_last.pt", weights_only=True)["learner"] for f in (one, two)]
    assert weights[0].keys() == weights[1].keys()


def test_all_processes_judge_one_and_the_same_model(alone):
    """Also where each one's normalisation sees other windows."""
    settings, one = alone
    status, said = run_in(one.with_name("agree"), 2, AGREE, "", **settings)
    assert status == 0 and "MODELS 1" in said, said


def test_an_error_of_another_than_the_first_process_is_said(alone):
    settings, one = alone
    fails = """
def fit_with_recovery(run, split):
    if RANK == 1:
        raise ValueError("of the second")
    on_rank_zero(print, "the first waits")
"""
    status, said = run_in(one.with_name("fails"), 2, fails, **settings)
    assert status != 0 and "ValueError: of the second" in said


def test_a_process_that_dies_ends_the_run_and_another_number_goes_on(alone):
    settings, one = alone
    died = one.with_name("died")
    status, said = run_in(died, 2, DIES, **settings)
    assert status != 0 and "SIGKILL" in said
    assert len(history(died)) == 1
    status, said = run_in(died, 1, **settings)
    assert status == 0 and "going on after epoch 1" in said
    np.testing.assert_allclose(
        history(one), history(died), rtol=1e-3, atol=2e-3
    )  # pixels near 0.5 may flip
