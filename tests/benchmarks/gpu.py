"""All that the notebook does on a GPU, in one go; prints figures. Runs on a CPU as well, slowly.

usage: python tests/benchmarks/gpu.py path/to/tiles [name=value ...]
           [--batches 32 128] [--steps 40] [--no-run] [--out folder]

1. The device's peak: products of large bf16 matrices. 2. For each batch size, in fp16 (CUDA only) and
bf16: images a second of the notebook's one_pass, with reading, augmentation and metrics, beside the
bare step on one resident batch; its TFLOP/s and share of the peak; peak memory. 3. A batch too large
for the memory: what is said. 4. The whole notebook with the given settings, then once more with one
epoch more, which must go on where the first ended. Ends with what metrics.json says.
"""

import argparse
import json
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import nbformat
import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode
from training import bare_steps, timed
from unseen import setting

sys.path.insert(0, str(Path(__file__).parents[1]))
import nbtools

SIDE = 8192  # of the matrices
TOO_MANY = 2**12  # windows in a batch


def peak(device: torch.device) -> float:
    """TFLOP/s of a product of square bf16 matrices, the best of five tries."""
    side = SIDE if device.type == "cuda" else SIDE // 8
    one, other = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    one @ other
    seconds = min(timed(lambda: [one @ other for _ in range(10)], device) for _ in range(5))
    return 10 * 2 * side**3 / seconds / 1e12


def steps(nb, config, tiles, device, precision, number, top) -> dict:
    """A row of the table: the notebook's epoch of so many steps beside the bare step."""
    copies = -(-number * config.batch_size // len(tiles))
    data = nb.RooftopDataset((tiles * copies)[: number * config.batch_size], config, train=True)
    loader = nb.make_loader(data, device)
    loss_fn = nb.CombinedLoss(0.6, 0.4, config.outline_weight)
    run = nb.Run(config, device, precision, {})
    number = len(loader)  # of tiles with several windows more
    images, labels, _ = next(iter(loader))
    batch = images.to(device, memory_format=torch.channels_last), labels.to(device)
    with FlopCounterMode(display=False) as flops:
        bare_steps(nb, run, batch, 1, loss_fn)
    bare_steps(nb, run, batch, 3, loss_fn)
    nb.one_pass(run, loader, loss_fn)  # warm-up: processes start, kernels are chosen
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    epoch = min(timed(lambda: nb.one_pass(run, loader, loss_fn), device) for _ in range(3))
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    bare = min(timed(lambda: bare_steps(nb, run, batch, number, loss_fn), device) for _ in range(3))
    seen, rate = number * config.batch_size, number * flops.get_total_flops() / 1e12
    row = {"batch": config.batch_size, "precision": precision, "images/s": seen / epoch}
    row |= {"bare step": seen / bare, "ratio": bare / epoch, "TFLOP/s": rate / epoch}
    return row | {"of the peak": rate / epoch / top, "GiB": memory / 2**30}


def too_large(nb, config, tiles, device) -> str:
    """What the notebook says of a batch that does not fit."""
    config = replace(config, batch_size=TOO_MANY, num_workers=0, large_images="resize")
    split = {"train": tiles * (2 * TOO_MANY // len(tiles) + 1), "val": tiles[:2], "test": []}
    try:
        nb.fit_with_recovery(nb.Run(config, device, nb.choose_precision("auto", device), {}), split)
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return "it fits"


def whole_run(settings: dict, out: Path) -> None:
    """Run the notebook, and again with one epoch more; print times, lines and scores."""
    out.mkdir(parents=True, exist_ok=True)
    epochs = (nbtools.settings() | settings)["epochs"]
    for number in (epochs, epochs + 1):
        started = time.perf_counter()
        notebook = nbtools.run(nbtools.NOTEBOOK, out, **settings | {"epochs": number})
        nbformat.write(notebook, out / f"executed-{number}.ipynb")
        said = nbtools.printed(notebook)
        print(f"{number} epochs: {time.perf_counter() - started:.0f} s in all")
        print("\n".join(re.findall("(?m)^(?:epoch .*|going on.*|[0-9]+ epochs in.*)$", said)))
    assert f"going on after epoch {epochs}" in said or "stopped early" in said
    metrics = json.loads(Path(settings["save_dir"], "metrics.json").read_text())
    figures = {name: metrics[name] for name in ("roof_iou", "miou", "pixel_accuracy")}
    table = pd.DataFrame({"value": figures, "interval": metrics["intervals"]}).dropna()
    print(table.to_string())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("settings", nargs="*", type=setting)
    parser.add_argument("--batches", nargs="*", type=int, default=[32, 128])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--no-run", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("gpu"))
    words = parser.parse_args()
    out = words.out.resolve()
    given = {"encoder_weights": None, "scenes": str(out / "none")} | dict(words.settings)
    given |= {"root": str(words.root.resolve()), "save_dir": str(out)}
    nb = nbtools.load()
    device, config = nb.pick_device(), nb.make_config(**nbtools.settings() | given)
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    top = peak(device)
    print(f"{name}, torch {torch.__version__}: {top:.0f} TFLOP/s of bf16 at best", flush=True)
    tiles, rows = nb.inspect_dataset(config)[0], []
    torch.backends.cudnn.benchmark = True
    for batch in words.batches:
        for precision in ("fp16", "bf16") if device.type == "cuda" else ("bf16",):
            changed = replace(config, batch_size=batch, save_dir=str(out / "steps"))
            rows.append(steps(nb, changed, tiles, device, precision, words.steps, top))
            print(pd.DataFrame(rows[-1:]).to_string(index=False, float_format="%.3f"), flush=True)
    if device.type == "cuda":
        changed = replace(config, save_dir=str(out / "steps"))
        print(f"a batch of {TOO_MANY}: {too_large(nb, changed, tiles, device)}", flush=True)
        torch.cuda.empty_cache()
    if not words.no_run:
        whole_run(given, out)


if __name__ == "__main__":
    main()
