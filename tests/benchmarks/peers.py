"""How fast others train the same model on the same tiles, and map the same scene; prints figures.

usage: python tests/benchmarks/peers.py path/to/tiles [--steps 12] [--batch 8]
           [--model best.pt --scene scene.tif [--side 5000]]

Needs an environment of its own: requirements.txt, tests/requirements.txt, and torchgeo, lightning
and geoai-py. Each loop runs in a process of its own, one epoch of so many steps of DeepLabV3Plus with
ResNet50 from random weights: this notebook's one_pass; smp's own example of a Lightning module;
torchgeo's SemanticSegmentationTask; geoai's train_segmentation_model. Each in fp32, ours in its own
precision as well; each with its defaults otherwise. Images a second are counted from the first
training step to the last, in the model itself, so that start and end do not matter. smp's example runs
with Lightning's bf16-mixed as well, which is the fair rival of our own precision. With a model of this
notebook and a scene, section 13 (one view, files included) stands beside geoai's semantic_segmentation
with the same weights and windows; ours in fp32, as that is, and in its own precision. With --side the
scene is repeated, or cut, to a square of so many pixels. The model must be one without outlines
(outline_weight=0), as geoai cannot load others.
"""

import argparse
import io
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path

import numpy as np
import rasterio
import segmentation_models_pytorch as smp
import torch
from mapping import repeat_scene
from torch.utils.data import DataLoader, Dataset, Subset

sys.path.insert(0, str(Path(__file__).parents[1]))
import nbtools

TRAINERS = ("ours fp32", "ours", "smp", "smp bf16", "torchgeo", "geoai")
ENCODER = "resnet50"


class Clock:
    """Notes when a model of smp begins a training step on a batch of the given size."""

    def __init__(self, batch: int) -> None:
        self.times, self.batch = [], batch
        forward = smp.DeepLabV3Plus.forward

        def timed(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
            if model.training and len(images) == batch:  # trials of a few images are no steps
                self.times.append(time.perf_counter())
            return forward(model, images)

        smp.DeepLabV3Plus.forward = timed

    def rate(self) -> float:
        """Images a second between the first training step and the last."""
        return (len(self.times) - 1) * self.batch / (self.times[-1] - self.times[0])


class Tiles(Dataset):
    """Images (3, H, W) float32 in 0-1 and masks (H, W) int64, read at every access."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted((folder / "images").iterdir())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        file = self.files[index]
        with (
            rasterio.open(file) as image,
            rasterio.open(file.parents[1] / "labels" / file.name) as label,
        ):
            pixels, mask = image.read(), label.read(1)
        return {"image": torch.from_numpy(pixels) / 255, "mask": torch.from_numpy(mask).long()}


def write_tiles(root: Path, folder: Path, number: int) -> None:
    """Copy tiles as GeoTIFFs of images and of labels of 0 and 1, named alike."""
    nb = nbtools.load()
    config = nb.make_config(**nbtools.settings() | {"root": str(root), "save_dir": str(folder)})
    tiles, _ = nb.inspect_dataset(config)
    for place in ("images", "labels"):
        (folder / place).mkdir()
    for tile in tiles[:: max(1, len(tiles) // number)][:number]:
        image, label = nb.read_tile(tile)
        bands = {"images": np.moveaxis(image, 2, 0), "labels": label[None]}
        for place, pixels in bands.items():
            size = {"count": len(pixels), "height": len(label), "width": label.shape[1]}
            name = f"{Path(tile.name).stem}.tif"
            with rasterio.open(folder / place / name, "w", dtype="uint8", **size) as file:
                file.write(pixels)


def train_ours(folder: Path, batch: int, precision: str) -> None:
    """One epoch of this notebook."""
    nb = nbtools.load()
    changes = {"images_dir": "images", "labels_dir": "labels", "label_suffix": ""}
    changes |= {"root": str(folder), "save_dir": str(folder / "ours"), "encoder_weights": None}
    changes |= {"batch_size": batch, "precision": precision, "class_values": [0, 1]}
    config = nb.make_config(**nbtools.settings() | changes)
    device = nb.pick_device()
    run = nb.Run(config, device, nb.choose_precision(precision, device), {})
    data = nb.RooftopDataset(nb.inspect_dataset(config)[0], config, train=True)
    with nb.keep_freed_memory(device):
        nb.one_pass(
            run, nb.make_loader(data, device), nb.CombinedLoss(0.6, 0.4, config.outline_weight)
        )


def train_smp(folder: Path, batch: int, precision: str = "32-true") -> None:
    """One epoch in the way of smp's example of binary segmentation."""
    import lightning

    class Module(lightning.LightningModule):
        """Dice, and counts of every step, as there."""

        def __init__(self) -> None:
            super().__init__()
            self.model = smp.DeepLabV3Plus(ENCODER, encoder_weights=None, classes=1)
            self.loss, self.outputs = smp.losses.DiceLoss("binary"), []

        def training_step(self, batch: dict, _: int) -> torch.Tensor:
            logits, truth = self.model(batch["image"]), batch["mask"][:, None]
            found = (logits.sigmoid() > 0.5).long()
            self.outputs.append(smp.metrics.get_stats(found, truth, mode="binary"))
            return self.loss(logits, truth)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=2e-4)

    workers = os.cpu_count()
    loader = DataLoader(Tiles(folder), batch, shuffle=True, num_workers=workers, drop_last=True)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options["precision"] = precision
    lightning.Trainer(max_epochs=1, log_every_n_steps=1, **options).fit(Module(), loader)


def train_torchgeo(folder: Path, batch: int) -> None:
    """One epoch of torchgeo's task."""
    import lightning
    from torchgeo.trainers import SemanticSegmentationTask

    task = SemanticSegmentationTask(
        model="deeplabv3+", backbone=ENCODER, in_channels=3, num_classes=2, loss="ce"
    )
    workers = os.cpu_count()
    loader = DataLoader(Tiles(folder), batch, shuffle=True, num_workers=workers, drop_last=True)
    options = {"enable_checkpointing": False, "enable_progress_bar": False, "logger": False}
    trainer = lightning.Trainer(max_epochs=1, log_every_n_steps=1, **options)
    judged = DataLoader(Subset(Tiles(folder), [0, 1]), 2)  # its scheduler wants a validation loss
    trainer.fit(task, loader, judged)


def train_geoai(folder: Path, batch: int) -> None:
    """One epoch of geoai; two tiles validate."""
    import geoai

    geoai.train_segmentation_model(
        str(folder / "images"),
        str(folder / "labels"),
        str(folder / "geoai"),
        architecture="deeplabv3plus",
        encoder_name=ENCODER,
        encoder_weights=None,
        batch_size=batch,
        num_epochs=1,
        val_split=2 / len(Tiles(folder)),
        verbose=False,
        num_workers=os.cpu_count(),
    )


def map_ours(folder: Path, model: str, scene: str, precision: str) -> float:
    """Section 13, one view; seconds from the model's file to the outlines."""
    nb = nbtools.load()
    given = {"root": str(folder / "empty"), "save_dir": str(folder), "model": model}
    (folder / "empty").mkdir()
    config = nb.make_config(**nbtools.settings() | given)
    started = time.perf_counter()
    device, saved = nb.pick_device(), nb.load_checkpoint(model)
    models = [nb.load_model(Path(model), device)]
    precision = nb.choose_precision(precision, device)
    predictor = nb.Predictor(models, config, device, precision, False, saved.get("threshold", 0.5))
    facts = {"scales": saved["scales"], "ground_resolution": None}
    nb.polygonize_and_score(nb.map_scene(Path(scene), predictor, facts), 4.0, Path(scene))
    return time.perf_counter() - started


def map_geoai(folder: Path, model: str, scene: str) -> float:
    """geoai's mask alone, the same windows and overlap; seconds from the model's file to it."""
    import geoai

    saved = torch.load(model, weights_only=True)
    torch.save(saved["model"], folder / "weights.pth")
    size, encoder = saved["config"]["image_size"], saved["config"]["encoder_name"]
    options = {"architecture": "deeplabv3plus", "encoder_name": encoder, "quiet": True}
    options |= {"window_size": size, "overlap": size // 4, "batch_size": 32}
    out = str(folder / "mask.tif")
    started = time.perf_counter()
    geoai.semantic_segmentation(scene, out, str(folder / "weights.pth"), **options)
    return time.perf_counter() - started


def one(what: str, folder: Path, words: argparse.Namespace) -> None:
    """Do one thing in this process, and print its figures."""
    clock, precision = Clock(words.batch), "fp32" if "fp32" in what else "auto"
    if what.startswith("map "):
        if what.startswith("map ours"):
            seconds = map_ours(folder, words.model, words.scene, precision)
        else:
            seconds = map_geoai(folder, words.model, words.scene)
        with rasterio.open(words.scene) as scene:
            rate, unit = scene.width * scene.height / 1e6 / seconds, "megapixels/s"
    else:
        if what.startswith("ours"):
            train_ours(folder, words.batch, precision)
        elif what == "smp bf16":
            train_smp(folder, words.batch, "bf16-mixed")
        else:
            {"smp": train_smp, "torchgeo": train_torchgeo, "geoai": train_geoai}[what](
                folder, words.batch
            )
        rate, unit = clock.rate(), f"images/s in {len(clock.times)} steps"
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"RESULT {what:13} {rate:6.2f} {unit}, peak {memory:.1f} GiB", flush=True)


def main() -> None:
    """Run each in a process of its own, and print what it says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--model")
    parser.add_argument("--scene")
    parser.add_argument("--side", type=int)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="*")
    words = parser.parse_args()
    if words.one:
        return one(words.one, words.root, words)
    names = ("torch", "segmentation-models-pytorch", "lightning", "torchgeo", "geoai-py")
    print(", ".join(f"{name} {version(name)}" for name in names), flush=True)
    maps = ["map ours", "map ours fp32", "map geoai"] if words.model and words.scene else []
    for what in words.only or [*TRAINERS, *maps]:
        with tempfile.TemporaryDirectory() as scratch:
            with redirect_stdout(io.StringIO()):
                write_tiles(words.root, Path(scratch), words.steps * words.batch + 2)
            scene = words.scene
            if words.side:
                scene = str(Path(scratch, "scene.tif"))
                repeat_scene(Path(words.scene), Path(scene), words.side)
            command = [
                sys.executable,
                __file__,
                scratch,
                "--one",
                what,
                "--batch",
                str(words.batch),
            ]
            if words.model:
                command += ["--model", words.model, "--scene", scene]
            done = subprocess.run(command, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
        print(*(lines or [what, "failed", done.stderr[-1500:]]), flush=True)


if __name__ == "__main__":
    main()
