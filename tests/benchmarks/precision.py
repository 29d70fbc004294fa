"""Whether fp16 and bf16 learn as well as fp32: the sample, trained in each; prints figures.

usage: python tests/benchmarks/precision.py [--encoder resnet50] [--epochs 8] [--seeds 42 1]
           [--precisions fp32 fp16 bf16]

The sample's own settings, from random weights, on the CPU. Halves are computed as by a GPU's tensor
cores (tests/halves.py): sums in fp32, results rounded. That shows what the numbers do, not the speed.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from halves import TensorCores

import nbtools

CPU = torch.device("cpu")


def train(nb, precision, **changes):
    """Train on a sample of its own: the run, roof IoU of validation and test, convolutions of halves."""
    changes |= {"encoder_weights": None, "precision": precision}
    config = nb.make_config(**nbtools.settings() | changes)
    with tempfile.TemporaryDirectory() as folder, TensorCores() as cores:
        config = nb.replace(nb.sample_config(config), root=folder, save_dir=folder)
        nb.write_sample(config)
        tiles = nb.find_scenes(nb.inspect_dataset(config)[0], config.group_by)
        parts, _ = nb.split_tiles(tiles, config)
        run = nb.Run(config, CPU, precision, {"split": {}, "files": ""})
        nb.fit_with_recovery(run, parts)
        judged = nb.RooftopDataset(parts["val"] + parts["test"], config)
        loss_fn = nb.CombinedLoss(config.ce_weight, config.dice_weight, config.outline_weight)
        scores, _ = nb.one_pass(run, nb.make_loader(judged, CPU), loss_fn)
    return run, scores["iou"], cores.rounded


def main():
    """Train, and print a line a run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--encoder", default="resnet50")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "fp16", "bf16"])
    words = parser.parse_args()
    nb = nbtools.load()
    for seed in words.seeds:
        for precision in words.precisions:
            changes = {"encoder_name": words.encoder, "epochs": words.epochs, "seed": seed}
            run, iou, rounded = train(nb, precision, **changes)
            last = run.history[-1]
            print(f"RESULT seed {seed} {precision}: roof IoU {iou:.3f}", end=" ")
            print(f"(validation {last['val_iou']:.3f}, loss {last['val_loss']:.3f});", end=" ")
            print(f"{rounded} convolutions in halves,", end=" ")
            print(f"scale of the loss {run.scaler.get_scale():g}", flush=True)


if __name__ == "__main__":
    main()
