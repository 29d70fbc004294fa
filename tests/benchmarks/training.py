"""How fast the notebook trains, beside the bare model step and beside a plain loop; prints figures.

usage: python tests/benchmarks/training.py [path/to/tiles]
           [--tiles 64] [--batch 8] [--side 256] [--rounds 3] [--encoder resnet50]
           [--give-back] [--only-turns]

On the same tiles, model and settings: (a) a step of the notebook's one_pass, with reading,
augmentation and running metrics; (b) the model's step alone on one batch that stays on the device.
The two take turns, step by step, over so many rounds through the tiles, and medians are compared.
Reading is done by the main process, so that no step of (b) hides it. Then, once a round: (c) an epoch
of a plain loop that decodes every tile and computes in fp32; (d) the same as (b) with all layers
channels last, those too that the notebook lays out otherwise on a CPU; a validation and a checkpoint.
Beside (a) and the validation stands what section 3 expects of them. Without a folder the notebook's
sample is used. With --give-back memory that is freed goes back to the system, which the notebook does
not let happen. With --only-turns (c), (d) and the rest are left out.
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


class Turns:
    """A loader for one_pass that takes a bare step after each step of the notebook, and times both."""

    def __init__(self, loader, bare_step, device):
        self.loader, self.bare_step, self.device = loader, bare_step, device
        self.dataset, self.notebook, self.bare = loader.dataset, [], []

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        batches = iter(self.loader)
        for _ in range(len(self)):
            started = time.perf_counter()
            yield next(batches)  # one_pass comes back for the next one when its step is done
            timed(lambda: None, self.device)  # until the device has done it
            self.notebook.append(time.perf_counter() - started)
            self.bare.append(timed(self.bare_step, self.device))


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
    parser.add_argument("--only-turns", action="store_true")
    words = parser.parse_args()
    nb, scratch = nbtools.load(), tempfile.mkdtemp()
    changes = {"root": words.root or scratch, "save_dir": scratch, "encoder_weights": None}
    changes |= {"batch_size": words.batch, "image_size": words.side}
    changes |= {"encoder_name": words.encoder, "num_workers": 0}
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
    table = nb.time_training_steps(config, device, [precision])
    a_window = table.loc[precision, "seconds per window"]
    train = nb.RooftopDataset(tiles, config, train=True)
    judged = nb.RooftopDataset(tiles[: max(2, len(tiles) // 18)], config)
    loader, held_out = nb.make_loader(train, device), nb.make_loader(judged, device)
    loss_fn = nb.CombinedLoss(config.ce_weight, config.dice_weight, config.outline_weight)
    run = nb.Run(config, device, precision, {})
    images, labels, _ = next(iter(loader))
    batch = (images.to(device, memory_format=torch.channels_last), labels.to(device))
    run.history.append({"epoch": 1, "val_loss": 1.0, "val_iou": 0.5, "seconds": 1.0})
    windows = len(loader) * config.batch_size
    print(f"{len(tiles)} tiles, {len(loader)} batches of {words.batch} a round,", end=" ")
    print(f"{words.side} px, {device}, {precision}")
    nb.one_pass(run, loader, loss_fn)  # warm-up: files are cached, kernels are chosen
    turns = Turns(loader, lambda: bare_steps(nb, run, batch, 1, loss_fn), device)
    for _ in range(words.rounds):
        nb.one_pass(run, turns, loss_fn)
    median = {"a": statistics.median(turns.notebook), "b": statistics.median(turns.bare)}
    print(f"(a) the notebook's step: {words.batch / median['a']:.2f} images/s")
    print(f"(b) the bare step: {words.batch / median['b']:.2f} images/s")
    pairs = list(zip(turns.bare, turns.notebook, strict=True))
    quartiles = statistics.quantiles((bare / notebook for bare, notebook in pairs), n=4)
    more = statistics.median(notebook - bare for bare, notebook in pairs)
    print(f"(a)/(b) {median['b'] / median['a']:.3f}, medians of {len(pairs)} steps;", end=" ")
    print(f"of pairs {quartiles[1]:.3f}, half of them {quartiles[0]:.3f} to {quartiles[2]:.3f};")
    print(f"the notebook's step takes {1000 * more:.0f} ms more (median of the pairs)", flush=True)
    epoch = median["a"] * len(loader)
    validation = statistics.median(
        timed(lambda: nb.one_pass(run, held_out, loss_fn), device) for _ in range(words.rounds)
    )
    expected, took = a_window * (windows + len(judged) / 3), epoch + validation
    print(f"section 3 expects {expected:.1f} s for training and validation; they took {took:.1f} s")
    if not words.only_turns:
        compare_loops(nb, words, run, train, batch, loss_fn, epoch)
        nb.WRITE_SHARE = float("inf")
        saving = timed(lambda: nb.keep_finished_epoch(run, ["iou", "loss"]), device)
        whole = epoch + validation + saving
        print(f"validation: {validation / whole:.1%}, checkpoints: {saving / whole:.1%}", end=" ")
        print(f"of an epoch of {len(tiles)} training and {len(judged)} validation tiles")


def compare_loops(nb, words, run, train, batch, loss_fn, epoch):
    """Time and print the plain loop and the other layout, beside the notebook's epoch."""
    config, device, steps = run.config, run.device, len(train) // words.batch
    plain, one_layout = (nb.Run(config, device, name, {}) for name in ("fp32", run.precision))
    plain.optimizer = torch.optim.AdamW(plain.model.parameters(), config.learning_rate)
    one_layout.model = nb.build_model(config).to(device, memory_format=torch.channels_last)
    rates = {"lr": config.learning_rate, "fused": device.type in ("cpu", "cuda")}
    one_layout.optimizer = torch.optim.AdamW(one_layout.model.parameters(), **rates)
    rows = []
    for _ in range(words.rounds):
        # another model's steps make the next one's slower, so that some go before, untimed
        bare_steps(nb, plain, batch, 2, loss_fn)
        slow = timed(lambda: plain_epoch(nb, plain, train, words.batch, loss_fn), device)
        bare_steps(nb, one_layout, batch, 2, loss_fn)
        alike = timed(lambda: bare_steps(nb, one_layout, batch, steps, loss_fn), device)
        bare_steps(nb, run, batch, 2, loss_fn)
        bare = timed(lambda: bare_steps(nb, run, batch, steps, loss_fn), device)
        rows.append((slow, alike, bare))
    images = steps * words.batch
    slow, alike, _ = (statistics.median(column) for column in zip(*rows, strict=True))
    print(f"(c) a plain loop: {images / slow:.2f} images/s, (a)/(c) {slow / epoch:.2f}")
    ratio = statistics.median(alike / bare for _, alike, bare in rows)
    print(f"(d) one layout: {images / alike:.2f} images/s, (b)/(d) {ratio:.2f}")


if __name__ == "__main__":
    main()
