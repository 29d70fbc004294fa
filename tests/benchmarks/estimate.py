"""Section 3's estimate of an epoch beside what epochs take, at three settings; prints figures.

usage: python tests/benchmarks/estimate.py path/to/tiles [--epochs 2]

The tiles are spread over the folder; the models start from random weights.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import nbtools

SETTINGS = {  # number of tiles, and what is set
    "ResNet-50": (48, {"batch_size": 8}),
    "EfficientNet-Lite0": (96, {"encoder_name": "tu-tf_efficientnet_lite0", "batch_size": 32}),
    "ResNet-18, 128 pixels": (192, {"encoder_name": "resnet18", "image_size": 128}),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("root")
    parser.add_argument("--epochs", type=int, default=2)
    words = parser.parse_args()
    nb = nbtools.load()
    device = nb.pick_device()
    precision = nb.choose_precision("auto", device)
    fixed = {"root": words.root, "epochs": words.epochs, "split": [0.8, 0.1, 0.1]}
    fixed |= {"encoder_weights": None, "batch_size": 16, "large_images": "resize"}
    for name, (number, own) in SETTINGS.items():
        own = fixed | own | {"save_dir": tempfile.mkdtemp()}
        config = nb.make_config(**nbtools.settings() | own)
        tiles = nb.find_scenes(nb.inspect_dataset(config)[0], None)
        tiles = tiles[:: max(1, len(tiles) // number)][:number]
        with nb.keep_freed_memory(device):
            costs = nb.time_training_steps(config, device, [precision])
        expected = costs.loc[precision, "seconds per window"] * nb.windows_per_epoch(tiles, config)
        split, _ = nb.split_tiles(tiles, config)
        history = nb.fit_with_recovery(
            nb.Run(config, device, precision, {"split": {}, "files": ""}), split
        )
        took = " and ".join(f"{row['seconds']:.1f}" for row in history)
        print(f"\n{name}: {len(tiles)} tiles, batches of {config.batch_size}:", end=" ")
        print(f"{expected:.1f} s expected, {took} s taken in {precision}", flush=True)


if __name__ == "__main__":
    main()
