"""How fast the notebook trains, beside the bare model step and beside a plain loop; prints figures.

usage: python tests/benchmarks/training.py [path/to/tiles]
           [--tiles 64] [--batch 8] [--side 256] [--rounds 3] [--encoder resnet50] [--give-back]

Per round, on the same tiles, model and settings: (a) an epoch of the notebook's one_pass, with
reading, augmentation and running metrics, then a validation and a checkpoint, timed apart; (b) the
model step alone on one batch that stays on the device; (c) an epoch of a plain loop that decodes every
tile in the main process and computes in fp32; (d) the same as (b) with all layers channels last, those
too that the notebook lays out otherwise on a CPU. Beside (a) and the validation stands what section 3
expects of them. Without a folder the notebook's sample is used. With --give-back memory that is freed
goes back to the system, which the notebook does not let happen.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import nbtools


def timed(function, device):
    """Seconds that a call takes, the device's queue included."""
    started = time.perf_counter()
    function()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - started


def bare_steps(nb, run, batch, steps, loss_fn):
    """Forward, loss, backward and update on one resident batch."""
    images, labels = batch
    run.model.train()
    for _ in range(steps):
        with nb.autocast(run.device, run.precision):
            logits = run.model(images)
        run.optimizer.zero_grad(set_to_none=True)
        run.scaler.scale(loss_fn(logits, labels)).backward()
        run.scaler.step(run.optimizer)
        run.scaler.update()


def decoded(nb, dataset, index):
    """An item whose files are decoded once more, as a loop without a cache has to."""
    tile, _ = dataset.windows[index]
    for file in (tile.image, tile.label):
        with nb.open_raster(file) as raster:
            raster.read()
    return dataset[1, index]


def plain_epoch(nb, run, dataset, batch_size, loss_fn):
    """What a first script does: decode in the main process, fp32, read back a metric every step."""
    model, optimizer, device = run.model, run.optimizer, run.device
    model.train()
    order = torch.randperm(len(dataset)).tolist()
    for start in range(0, len(order) - batch_size + 1, batch_size):
        items = [decoded(nb, dataset, index) for index in order[start : start + batch_size]]
        images = torch.stack([image for image, *_ in items]).to(device)
        labels = torch.stack([label for _, label, _ in items]).to(device)
        logits = model(images)
        loss = loss_fn(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        (logits[:, :2].argmax(1) == labels).float().mean().item()


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("root", nargs="?")
    for name, value in (("tiles", 64), ("batch", 8), ("side", 256), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--encoder", default="resnet50")
    parser.add_argument("--give-back", action="store_true")
    words = parser.parse_args()
    nb, scratch = nbtools.load(), tempfile.mkdtemp()
    changes = {"root": words.root or scratch, "save_dir": scratch, "encoder_weights": None}
    changes |= {"batch_size": words.batch, "image_size": words.side}
    changes["encoder_name"] = words.encoder
    config = nb.make_config(**nbtools.settings() | changes)
    if not words.root:
        nb.write_sample(config)
    tiles = nb.inspect_dataset(config)[0]
    tiles = tiles[:: max(1, len(tiles) // words.tiles)][: words.tiles]
    device = nb.pick_device()
    memory = contextlib.nullcontext() if words.give_back else nb.keep_freed_memory(device)
    with memory:
        measure(nb, words, config, tiles, device)


def measure(nb, words, config, tiles, device):
    """Time the rounds on some tiles, and print."""
    precision = nb.choose_precision("auto", device)
    a_window = nb.time_training_steps(config, device, [precision]).loc[
        precision, "seconds a window"
    ]
    train = nb.RooftopDataset(tiles, config, train=True)
    loader = nb.make_loader(train, device)
    judged = nb.RooftopDataset(tiles[: max(2, len(tiles) // 18)], config)
    held_out = nb.make_loader(judged, device)
    loss_fn = nb.CombinedLoss(config.ce_weight, config.dice_weight, config.outline_weight)
    run, plain = (nb.Run(config, device, name, {}) for name in (precision, "fp32"))
    plain.optimizer = torch.optim.AdamW(plain.model.parameters(), config.learning_rate)
    one_layout = nb.Run(config, device, precision, {})
    one_layout.model = nb.build_model(config).to(device, memory_format=torch.channels_last)
    rates = {"lr": config.learning_rate, "fused": device.type in ("cpu", "cuda")}
    one_layout.optimizer = torch.optim.AdamW(one_layout.model.parameters(), **rates)
    images, labels, _ = next(iter(loader))
    batch = (images.to(device, memory_format=torch.channels_last), labels.to(device))
    run.history.append({"epoch": 1, "val_loss": 1.0, "val_iou": 0.5, "seconds": 1.0})
    steps = len(loader)
    print(f"{len(tiles)} tiles, {steps} batches of {words.batch} a round,", end=" ")
    print(f"{words.side} px, {device}, {precision}")
    nb.one_pass(run, loader, loss_fn)  # warm-up: processes start, kernels are chosen
    rows, nb.WRITE_SHARE = [], float("inf")
    for _ in range(words.rounds):
        # another model's steps make the next one's slower, so that some go before, untimed
        bare_steps(nb, run, batch, 2, loss_fn)
        notebook = timed(lambda: nb.one_pass(run, loader, loss_fn), device)
        bare = timed(lambda: bare_steps(nb, run, batch, steps, loss_fn), device)
        bare_steps(nb, plain, batch, 2, loss_fn)
        slow = timed(lambda: plain_epoch(nb, plain, train, words.batch, loss_fn), device)
        bare_steps(nb, one_layout, batch, 2, loss_fn)
        alike = timed(lambda: bare_steps(nb, one_layout, batch, steps, loss_fn), device)
        validation = timed(lambda: nb.one_pass(run, held_out, loss_fn), device)
        saving = timed(lambda: nb.keep_finished_epoch(run, ["iou", "loss"]), device)
        rows.append((notebook, bare, slow, alike, validation, saving))
        print("  " + "  ".join(f"{seconds:7.2f} s" for seconds in rows[-1]), flush=True)
    images_a_round = steps * words.batch
    names = ("(a) the notebook's epoch", "(b) the bare step", "(c) a plain loop", "(d) one layout")
    for i, name in enumerate(names):
        print(f"{name}: {images_a_round / statistics.median(row[i] for row in rows):.2f} images/s")
    print(f"(a)/(b) {statistics.median(row[1] / row[0] for row in rows):.3f}, median of the rounds")
    print(f"(a)/(c) {statistics.median(row[2] / row[0] for row in rows):.2f}")
    print(f"(d)/(b) {statistics.median(row[3] / row[1] for row in rows):.2f}")
    expected = a_window * (images_a_round + len(judged) / 3)
    took = statistics.median(row[0] + row[4] for row in rows)
    print(f"section 3 expects {expected:.1f} s for training and validation; they took {took:.1f} s")
    whole = [(row[0] + row[4] + row[5]) for row in rows]
    for i, name in ((4, "validation"), (5, "checkpoints (last and both best)")):
        share = statistics.median(row[i] / total for row, total in zip(rows, whole, strict=True))
        print(f"{name}: {share:.1%} of an epoch of {len(tiles)} training", end=" ")
        print(f"and {len(judged)} validation tiles")


if __name__ == "__main__":
    main()
