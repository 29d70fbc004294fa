"""What a random split of the tiles claims, and what scenes that stay whole say; prints figures.

usage: python tests/benchmarks/leakage.py path/to/tiles
           [--seeds 3] [--epochs 20] [--encoder resnet18] [--side 128] [--batch 8]

For each seed, with shares of 60, 20 and 20 %: (1) a random split of the tiles and (2) a split by
scene, each trained and scored on its own test tiles; (3) the same tiles judged twice: half of the
tiles of (2)'s test scenes, drawn at random within each scene, are judged by the model of (2), which
knows nothing of their scenes, and by a model with as many training tiles, among them the other
halves of those scenes.
"""

import argparse
import random
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import nbtools


def train(nb, config, split, device):
    """Train on a split; the run with its best model by validation roof IoU."""
    names = {part: [tile.name for tile in tiles] for part, tiles in split.items()}
    precision = nb.choose_precision(config.precision, device)
    run = nb.Run(config, device, precision, {"split": names})
    nb.fit(run, split)
    run.model = nb.load_model(Path(config.save_dir) / nb.BEST_FILES["iou"], device)
    return run


def judge(nb, config, run, tiles):
    """Roof IoU on tiles, at the model's resolution and threshold 0.5."""
    loader = nb.make_loader(nb.RooftopDataset(tiles, config), run.device)
    loss_fn = nb.CombinedLoss(config.ce_weight, config.dice_weight)
    return nb.one_pass(run, loader, loss_fn)[0]["iou"]


def halves(tiles, rng):
    """Each scene's tiles dealt into two halves at random."""
    first, second, scenes = [], [], defaultdict(list)
    for tile in tiles:
        scenes[tile.scene].append(tile)
    for scene in scenes.values():
        scene = rng.sample(scene, len(scene))
        first += scene[: len(scene) // 2]
        second += scene[len(scene) // 2 :]
    return first, second


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("root")
    parser.add_argument("--encoder", default="resnet18")
    for name, value in (("seeds", 3), ("epochs", 20), ("side", 128), ("batch", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    words = parser.parse_args()
    nb = nbtools.load()
    device, rows = nb.pick_device(), []
    fixed = {"root": words.root, "encoder_name": words.encoder, "encoder_weights": None}
    fixed |= {"image_size": words.side, "batch_size": words.batch, "epochs": words.epochs}
    fixed |= {"split": [0.6, 0.2, 0.2], "large_images": "resize"}
    ways = (None, "auto")
    for seed in range(1, words.seeds + 1):
        runs, splits = {}, {}
        for group_by in ways:
            own = {"seed": seed, "group_by": group_by, "save_dir": tempfile.mkdtemp()}
            config = nb.make_config(**nbtools.settings() | fixed | own)
            tiles = nb.find_scenes(nb.verify_dataset(config)[0], group_by)
            splits[group_by], _ = nb.split_tiles(tiles, config)
            runs[group_by] = train(nb, config, splits[group_by], device)
        own = [judge(nb, config, runs[way], splits[way]["test"]) for way in ways]
        rng, split = random.Random(seed), splits["auto"]
        known, judged = halves(split["test"], rng)
        kept = rng.sample(split["train"], len(split["train"]) - len(known))
        unaware = judge(nb, config, runs["auto"], judged)
        leaky = train(nb, config, split | {"train": kept + known}, device)
        rows.append((*own, judge(nb, config, leaky, judged), unaware))
        print(f"seed {seed}: random split {own[0]:.3f}, by scene {own[1]:.3f};", end=" ")
        print(f"{len(judged)} tiles with the rest of their scenes in training", end=" ")
        print(f"{rows[-1][2]:.3f}, without {unaware:.3f}")
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    print("means: " + ", ".join(f"{mean:.3f}" for mean in means))


if __name__ == "__main__":
    main()
