"""What the tests share: the notebook's definitions, its settings, and small folders of tiles."""

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small models: threads would wait for one another

import matplotlib
import numpy as np
import pytest
import torch
from faulty import save

import nbtools

matplotlib.use("Agg")
os.environ["HF_HUB_OFFLINE"] = (
    "1"  # weights that are not cached fail at once, not after half a minute
)
REAL_TILES = Path(__file__).parents[2] / "shared" / "data" / "rooftops"


def pytest_configure(config: pytest.Config) -> None:
    """Pass over what rasterio says of pictures without coordinates, and of itself."""
    config.addinivalue_line("filterwarnings", "ignore::rasterio.errors.NotGeoreferencedWarning")
    config.addinivalue_line("filterwarnings", "ignore::PendingDeprecationWarning")  # of affine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole notebooks first: with two processes, the other one does all the rest meanwhile."""
    items.sort(key=lambda item: item.path.name != "test_runs.py")


@pytest.fixture(scope="session")
def nb() -> ModuleType:
    """The notebook's definitions."""
    return nbtools.load()


@pytest.fixture
def defaults() -> dict:
    """The settings as the parameters cell gives them."""
    return nbtools.settings()


@pytest.fixture
def settings(defaults: dict, tmp_path: Path) -> dict:
    """Default settings made small: random weights, a small encoder, folders below tmp_path."""
    small = {"root": str(tmp_path / "data"), "save_dir": str(tmp_path / "models"), "image_size": 64}
    quick = {
        "batch_size": 4,
        "encoder_name": "resnet18",
        "encoder_weights": None,
        "epochs": 2,
        "num_workers": 0,
    }
    return defaults | small | quick


@pytest.fixture
def write_pair(settings: dict) -> Callable:
    """A function that writes one image and its label, a bright square on dark ground, below root."""

    def write(
        stem: str,
        side: int = 64,
        low: int = 0,
        high: int = 255,
        suffix: str = ".png",
        seed: int = 0,
    ) -> None:
        rng = np.random.default_rng([seed, *os.fsencode(stem)])
        image, label = (
            rng.integers(0, 60, (side, side, 3), np.uint8),
            np.full((side, side), low, np.uint8),
        )
        x, y = rng.integers(0, side // 2, 2)
        label[y : y + side // 2, x : x + side // 2] = high
        image[label == high] += 150
        root = Path(settings["root"])
        save(root / settings["images_dir"] / f"{stem}{suffix}", image)
        save(root / settings["labels_dir"] / f"{stem}{settings['label_suffix']}.png", label)

    return write


@pytest.fixture
def start(
    nb: ModuleType, settings: dict, write_pair: Callable, monkeypatch: pytest.MonkeyPatch
) -> Callable:
    """A function that makes a fresh run on twelve tiles: (run, go), where go trains as the notebook's cell does."""
    monkeypatch.setattr(nb, "WRITE_SHARE", float("inf"))  # after every epoch, short as they are
    for i in range(12):
        write_pair(f"s{i}_1")

    def make(**changes: object) -> tuple:
        small = {
            "encoder_name": "mobilenet_v2",
            "split": [0.5, 0.25, 0.25],
            "early_stopping_patience": 9,
        }
        config, cpu = nb.make_config(**settings | small | changes), torch.device("cpu")
        tiles = nb.find_scenes(nb.inspect_dataset(config)[0], config.group_by)
        split, _ = nb.split_tiles(tiles, config)
        data = {"split": {p: [tile.name for tile in split[p]] for p in nb.SPLITS}, "files": "x"}
        run = nb.Run(config, cpu, nb.choose_precision(config.precision, cpu), data)

        def go() -> list[dict]:
            nb.train_or_resume(run, split)
            return run.history

        return run, go

    return make


@pytest.fixture
def real_tiles() -> str:
    """Folder of the real tiles; the test is skipped where they are not at hand."""
    if not REAL_TILES.is_dir():
        pytest.skip(f"the real tiles are not at {REAL_TILES}")
    return str(REAL_TILES)


@pytest.fixture
def views_of_one_size(nb: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """All flips and rotations at the window's own size, as other sizes blur."""
    views = {tta: {1: sum(scales.values(), [])} for tta, scales in nb.VIEWS.items()}
    monkeypatch.setattr(nb, "VIEWS", views)
