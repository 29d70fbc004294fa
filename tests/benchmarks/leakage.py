"""What a random split of the tiles claims, and what scenes that stay whole say; prints figures.

usage: python tests/benchmarks/leakage.py path/to/tiles [name=value ...] [--seeds 1 2 3]
           [--of REGEX] [--elsewhere REGEX]

For each seed, with shares of 60, 20 and 20 %: (1) a random split of the tiles and (2) a split by
scene, each trained and scored on its own test tiles; (3) the same tiles judged twice: half of the
tiles of (2)'s test scenes, drawn at random within each scene, are judged by the model of (2), which
knows nothing of their scenes, and by a model with as many training tiles, among them the other
halves of those scenes. All of it with the tiles alone whose names --of finds; (1) and (2) are then
judged on those that --elsewhere finds, too. Any setting of the notebook may be given; without any,
it is a small model for a CPU.
"""

import argparse
import random
import re
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import pandas as pd
from unseen import setting

sys.path.insert(0, str(Path(__file__).parents[1]))
import nbtools


def train(nb, config, split, device):
    """Train on a split; the run with its best model by validation roof IoU."""
    names = {part: [tile.name for tile in tiles] for part, tiles in split.items()}
    precision = nb.choose_precision(config.precision, device)
    run = nb.Run(config, device, precision, {"split": names})
    nb.fit_with_recovery(run, split)
    run.ema = nb.load_model(Path(config.save_dir) / nb.BEST_FILES["iou"], device)
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


SMALL = {"encoder_name": "resnet18", "encoder_weights": None, "image_size": 128, "epochs": 20}
SMALL |= {"batch_size": 8, "large_images": "resize"}


def one_seed(nb, settings, words):
    """Roof IoU by what is judged."""
    device, runs, splits, row = nb.pick_device(), {}, {}, {}
    for way, group_by in {"random": None, "by scene": "auto"}.items():
        own = {"group_by": group_by, "save_dir": tempfile.mkdtemp(), "split": [0.6, 0.2, 0.2]}
        config = nb.make_config(**settings | own)
        tiles = nb.inspect_dataset(config)[0]
        found = {
            name: nb.find_scenes([t for t in tiles if re.search(name, Path(t.name).stem)], group_by)
            for name in (words.of, words.elsewhere)
        }
        splits[way], _ = nb.split_tiles(found[words.of], config)
        runs[way] = train(nb, config, splits[way], device)
        row[f"{way}, own test"] = judge(nb, config, runs[way], splits[way]["test"])
        if found[words.elsewhere]:
            row[f"{way}, elsewhere"] = judge(nb, config, runs[way], found[words.elsewhere])
    rng, split = random.Random(config.seed), splits["by scene"]
    known, judged = halves(split["test"], rng)
    kept = rng.sample(split["train"], len(split["train"]) - len(known))
    leaky = train(nb, config, split | {"train": kept + known}, device)
    row["scenes known"] = judge(nb, config, leaky, judged)
    row["scenes unknown"] = judge(nb, config, runs["by scene"], judged)
    return row


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("root")
    parser.add_argument("settings", nargs="*", type=setting)
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument("--of", default="")
    parser.add_argument("--elsewhere", default="(?!)")  # none
    words = parser.parse_args()
    nb, rows = nbtools.load(), []
    settings = nbtools.settings() | SMALL | {"root": words.root} | dict(words.settings)
    for seed in words.seeds:
        rows.append(one_seed(nb, settings | {"seed": seed}, words))
        print(pd.DataFrame(rows[-1:], [f"seed {seed}"]).T.to_string(float_format="%.3f"))
    print(pd.DataFrame(rows).mean().to_string(float_format="%.3f"))


if __name__ == "__main__":
    main()
