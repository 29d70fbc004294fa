"""How time and memory grow with the number of tiles; prints figures.

usage: python tests/benchmarks/growth.py [--tiles 500 5000 50000] [--side 64]

For each number, in a process of its own: seconds of verification, of the split, until the first batch,
and of reading all training windows once (an epoch without a model); the size of the cache; and peak
memory above what the process held before. Tiles are noise with a square, in scenes of a hundred.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import nbtools


def write_tiles(root: Path, settings: dict, count: int, side: int) -> None:
    """Tiles that all differ, and their labels."""
    rng, label = np.random.default_rng(0), np.zeros((side, side), np.uint8)
    label[side // 4 : side // 2, side // 4 : side // 2] = 255
    images, labels = (root / settings[name] for name in ("images_dir", "labels_dir"))
    for folder in (images, labels):
        folder.mkdir(parents=True)
    for number in range(count):
        name = f"scene{number // 100:04}_{number % 100:02}"
        pixels = rng.integers(0, 255, (side, side, 3), np.uint8)
        Image.fromarray(pixels).save(images / f"{name}.png", compress_level=1)
        Image.fromarray(label).save(labels / f"{name}{settings['label_suffix']}.png")


class Peak(threading.Thread):
    """The largest memory of this process and its children while a block runs, in bytes."""

    def __enter__(self) -> "Peak":
        self.bytes, self.running = 0, True
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.join()

    def run(self) -> None:
        """Look ten times a second."""
        process = psutil.Process()
        while self.running:
            self.bytes = max(self.bytes, process.memory_info().rss)
            time.sleep(0.1)


def grow(count: int, side: int) -> dict:
    """The row of a number of tiles."""
    nb = nbtools.load()
    with tempfile.TemporaryDirectory() as folder:
        changes = {"root": f"{folder}/data", "save_dir": f"{folder}/models", "image_size": side}
        changes |= {"encoder_name": "resnet18", "encoder_weights": None}
        config = nb.make_config(**nbtools.settings() | changes)
        write_tiles(Path(config.root), nbtools.settings(), count, side)
        before, moments = psutil.Process().memory_info().rss, [time.perf_counter()]
        with Peak(daemon=True) as peak:
            tiles, _ = nb.inspect_dataset(config)
            moments.append(time.perf_counter())
            tiles = nb.find_scenes(tiles, config.group_by)
            split, _ = nb.split_tiles(tiles, config)
            moments.append(time.perf_counter())
            data = nb.RooftopDataset(split["train"], config, train=True)
            loader = nb.make_loader(data, torch.device("cpu"))
            batches = iter(loader)
            next(batches)
            moments.append(time.perf_counter())
            for _ in batches:
                pass
            moments.append(time.perf_counter())
        cache = sum(file.stat().st_size for file in Path(folder, "models", "cache").iterdir())
    row = {"tiles": len(tiles)}
    names = ("verification s", "split s", "first batch s", "epoch without model s")
    row |= dict(zip(names, np.diff(moments), strict=True))
    return row | {"MiB above": (peak.bytes - before) / 2**20, "cache MB": cache / 1e6}


def main() -> None:
    """Measure what is asked for, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiles", type=int, nargs="*", default=[500, 5000, 50000])
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(grow(options.one, options.side)))
        return
    rows = []
    for count in options.tiles:
        own = [sys.executable, __file__, "--one", str(count), "--side", str(options.side)]
        rows.append(json.loads(subprocess.check_output(own).splitlines()[-1]))
        print(pd.DataFrame(rows[-1:]).to_string(index=False, float_format="%.2f"), flush=True)


if __name__ == "__main__":
    main()
