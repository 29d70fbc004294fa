"""How fast section 13 maps, beside its model alone, and what memory it takes; prints figures.

usage: python tests/benchmarks/mapping.py [--model best.pt --scene scene.tif [--tta True] [--rounds 2]
           [--side 10000]] [--sides 4096 16384 30000]

Speed: megapixels per second of the whole section (mask, outlines, files) for a scene, and of the model
alone on as many windows, resident, in the same batches; and their ratio. With --side the scene is
repeated, or cut, to a square of so many pixels. Memory: scenes of the sample's
roofs are mapped, each in a process of its own, by a model that does next to nothing; peak memory above
what the process held before.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import rasterio
import torch
from rasterio.windows import Window

sys.path.insert(0, str(Path(__file__).parents[1]))
import nbtools

VIEWS = {"False": False, "few": "few", "True": True}  # values of tta
FACTS = {"scales": {}, "ground_resolution": None}
GRID = {"driver": "GTiff", "count": 3, "dtype": "uint8", "crs": "EPSG:32633"}
GRID |= {"transform": rasterio.Affine(0.3, 0, 500_000, 0, -0.3, 6_400_000)}


class Bright(torch.nn.Module):
    """Calls roof what is bright, and outline where the light changes: logits (B, 3, S, S)."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        light = 5 * images[:, :1]
        pool = partial(torch.nn.functional.max_pool2d, kernel_size=5, stride=1, padding=2)
        return torch.cat([-light, light, 20 * (pool(light) + pool(-light) - 1)], 1)


def repeat_scene(scene: Path, path: Path, side: int) -> None:
    """Write a scene of three bands again and again, as a square of a side."""
    with rasterio.open(scene) as file:
        pixels, grid = file.read([1, 2, 3]), {"crs": file.crs, "transform": file.transform}
    _, height, width = pixels.shape
    pixels = np.tile(pixels, (1, -(-side // height), -(-side // width)))[:, :side, :side]
    grid |= {"driver": "GTiff", "count": 3, "dtype": pixels.dtype, "tiled": True}
    with rasterio.open(path, "w", width=side, height=side, **grid) as file:
        file.write(pixels)


def speed(model: Path, scene: Path, tta: bool | str) -> dict:
    """Megapixels per second of the section and of the model alone."""
    nb, device = nbtools.load(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        settings = nbtools.settings() | {"model": str(model), "save_dir": folder}
        config = nb.make_config(**settings)
        saved, precision = nb.load_checkpoint(model), nb.choose_precision("auto", device)
        chosen = {
            "threshold": saved.get("threshold", 0.5),
            "wall_depth": nb.load_wall_depth([model]),
        }
        models = [nb.load_model(model, device)]
        predictor = nb.Predictor(models, config, device, precision, tta=tta, **chosen)
        with rasterio.open(scene) as file:
            rows, columns = (nb.blend_weights(side, config.image_size) for side in file.shape)
            megapixels = file.width * file.height / 1e6
        windows = torch.randn(len(columns), 3, config.image_size, config.image_size)
        predictor(windows)  # warms up
        started = time.perf_counter()
        for _ in rows:
            predictor(windows)
        alone = time.perf_counter() - started
        started = time.perf_counter()
        mask = nb.map_scene(scene, predictor, FACTS | {"scales": saved["scales"]})
        area, depth = predictor.config.min_roof_area, predictor.wall_depth
        roofs, _ = nb.polygonize_and_score(mask, area, scene, depth)
        section = time.perf_counter() - started
    rates = {"section Mpx/s": megapixels / section, "model Mpx/s": megapixels / alone}
    return rates | {"ratio": alone / section, "roofs": len(roofs)}


def write_scene(nb: object, path: Path, side: int) -> None:
    """The sample's houses, white and grey on black, again and again over a scene of a side."""
    _, houses = nb.paint_houses(0, nb.SAMPLE_SCENE)
    light = np.uint8(np.where(houses % 2, 255, 170) * (houses > 0))
    strip = np.tile(light, (1, side // nb.SAMPLE_SCENE + 1))[:, :side]
    with rasterio.open(
        path, "w", width=side, height=side, tiled=True, compress="deflate", **GRID
    ) as f:
        for y in range(0, side, len(strip)):
            rows = strip[: side - y]
            f.write(np.stack([rows] * 3), window=Window(0, y, side, len(rows)))


def memory(side: int) -> dict:
    """Peak memory of mapping a scene of a side, in this process."""
    nb = nbtools.load()
    with tempfile.TemporaryDirectory() as folder:
        changes = {"save_dir": folder, "encoder_name": "resnet18", "encoder_weights": None}
        config = nb.make_config(**nbtools.settings() | changes)
        scene = Path(folder, "scene.tif")
        write_scene(nb, scene, side)
        predictor = nb.Predictor([Bright()], config, torch.device("cpu"), "fp32", wall_depth=0.3)
        before, started = psutil.Process().memory_info().rss, time.perf_counter()
        mask = nb.map_scene(scene, predictor, FACTS)
        area, depth = predictor.config.min_roof_area, predictor.wall_depth
        roofs, _ = nb.polygonize_and_score(mask, area, scene, depth)
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    row = {"side": side, "GiB above": (peak - before) / 2**30, "roofs": len(roofs)}
    return row | {"seconds": seconds, "Mpx/s": side**2 / 1e6 / seconds}


def main() -> None:
    """Measure what is asked for, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--scene", type=Path)
    parser.add_argument("--tta", choices=VIEWS, default="False")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--side", type=int)
    parser.add_argument("--sides", type=int, nargs="*", default=[4096, 16384, 30000])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(memory(options.one)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        scene = options.scene
        if options.side:
            scene = Path(folder, "scene.tif")
            repeat_scene(options.scene, scene, options.side)
        for _ in range(options.rounds if options.model else 0):
            rows.append(speed(options.model, scene, VIEWS[options.tta]))
    if rows:
        print(pd.DataFrame(rows).to_string(index=False, float_format="%.3f"), flush=True)
    for side in options.sides:
        own = [sys.executable, __file__, "--one", str(side)]
        row = json.loads(subprocess.check_output(own).splitlines()[-1])
        print(pd.DataFrame([row]).to_string(index=False, float_format="%.2f"), flush=True)


if __name__ == "__main__":
    main()
