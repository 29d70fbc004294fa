"""Injects faults by the dozen and by the thousand, and prints how many were tried, survived and lost.

usage: python tests/benchmarks/reliability.py [--kills 36] [--stops 12] [--runs 24] [--files 20000]

Kills and stops are those of real kernels with a loader process; whatever happened, the run must end in
the same weights, optimiser state, history and metrics as one that was left alone, to the last bit.
"Lost" counts runs that did not, and files that ended in anything but a result or a named error.
"""

import argparse
import contextlib
import io
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
from nbclient.exceptions import CellExecutionError, DeadKernelError

sys.path.insert(0, str(Path(__file__).parents[1]))
from faulty import picture, save
from kernels import epochs_done, run_notebook, same, small_run, state_of
from mutate import (
    changed_settings,
    mutate,
    no_longer_than,
    only,
    pictures,
    small_checkpoint,
    with_right_sums,
)

import nbtools

os.environ["HF_HUB_OFFLINE"] = "1"


def moments(out, rng, total):
    """Yield (name, when): at a random moment of the run, or while a checkpoint is being written."""
    for number in range(total):
        report, launched = out / "dataset_report.csv", time.time()
        if number % 2:
            pause = rng.uniform(0, 8)
            yield (
                "at a random moment",
                lambda report=report, launched=launched, pause=pause: (
                    report.exists() and report.stat().st_mtime > launched and not time.sleep(pause)
                ),
            )
        else:
            epoch = epochs_done(out) + rng.choice((0, 1))
            yield (
                "while a checkpoint is written",
                lambda epoch=epoch: epochs_done(out) >= epoch and any(out.glob("rooftop_*.part")),
            )


def kill_kernels(folder, settings, total, signal_number, rng, counts):
    """Kill or interrupt kernels until the number is reached; each run that ends is compared with one left alone."""
    run_notebook(folder, settings | {"save_dir": "whole"})
    whole, out = state_of(folder / "whole"), folder / "out"
    word = "killed" if signal_number == signal.SIGKILL else "stopped"
    pending = Counter()
    for name, when in moments(out, rng, total):
        hit = []

        def due(when=when, hit=hit):
            if when():
                hit.append(1)
            return bool(hit)

        with contextlib.suppress(DeadKernelError, CellExecutionError):
            run_notebook(folder, settings | {"save_dir": "out"}, due, signal_number)
        if hit:
            pending[f"kernel {word} {name}"] += 1
        if not hit or epochs_done(out) == settings["epochs"]:
            settle(folder, settings, whole, pending, counts)
    settle(folder, settings, whole, pending, counts)


def settle(folder, settings, whole, pending, counts):
    """Let the run end undisturbed, and count the faults that it has been through."""
    try:
        run_notebook(folder, settings | {"save_dir": "out"})
        survived = same(whole, state_of(folder / "out"))
    except Exception as error:
        print(f"  {error!r}"[:300])
        survived = False
    for name, number in pending.items():
        counts[name, "tried"] += number
        counts[name, "survived" if survived else "lost"] += number
    print(
        "  " + ", ".join(f"{n} x {name}" for name, n in pending.items()),
        "survived" if survived else "LOST",
        flush=True,
    )
    pending.clear()
    shutil.rmtree(folder / "out", ignore_errors=True)


def disturbed_runs(nb, folder, settings, total, rng, counts):
    """Runs in one process, during which the disk fills up or steps go wrong; the disk has room again at the end."""
    cpu = torch.device("cpu")
    config = nb.make_config(
        **nbtools.settings() | settings | {"num_workers": 0, "save_dir": str(folder / "m")}
    )

    def train(name, save_epoch=None, forward=None):
        here = nb.replace(config, save_dir=str(folder / name))
        tiles = nb.find_scenes(nb.verify_dataset(here)[0], "auto")
        split, _ = nb.split_by_scene(tiles, here)
        sets = {
            part: nb.RooftopDataset(split[part], here, part == "train") for part in ("train", "val")
        }
        run, kept = nb.start_run(here, cpu, "fp32"), (nb.save_epoch, nb.forward)
        nb.save_epoch, nb.forward = save_epoch or kept[0], forward or kept[1]
        try:
            nb.fit(run, sets, nb.CombinedLoss(0.6, 0.4), here, {"split": {}, "files": ""})
        finally:
            nb.save_epoch, nb.forward = kept
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        nb.write_files(run, here)
        return run, state_of(folder / name)

    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    original_save, original_forward = nb.save_epoch, nb.forward
    _, whole = train("alone")
    for number in range(total):
        full = {
            epoch: rng.randrange(10, 60_000_000)
            for epoch in rng.sample(range(1, config.epochs + 1), 2)
        }

        def save_epoch(run, *words, full=full):
            resource.setrlimit(resource.RLIMIT_FSIZE, (full.get(len(run.history), hard), hard))
            original_save(run, *words)
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

        _, state = train(f"full{number}", save_epoch)
        outcome = "survived" if same(whole, state) else "lost"
        counts["disk full while an epoch is saved", "tried"] += len(full)
        counts["disk full while an epoch is saved", outcome] += len(full)
        bad = {rng.randrange(12): rng.choice((float("nan"), float("inf"))) for _ in range(3)}
        steps = []

        def forward(run, images, bad=bad, steps=steps):
            if run.model.training:
                steps.append(1)
                return original_forward(run, images * bad.get(len(steps) - 1, 1))
            return original_forward(run, images)

        run, state = train(f"numbers{number}", forward=forward)
        finite = all(torch.isfinite(tensor).all() for tensor in run.model.state_dict().values())
        outcome = "survived" if finite and len(run.history) == config.epochs else "lost"
        counts["step without finite numbers", "tried"] += len(bad)
        counts["step without finite numbers", outcome] += len(bad)
        for name in (f"full{number}", f"numbers{number}"):
            shutil.rmtree(folder / name)


def count(counts, name, call):
    """Count a file or a set of settings: survived if it ended in a result or a named error."""
    counts[name, "tried"] += 1
    try:
        ending = call()
        counts[name, "survived"] += 1
        counts[name, ending] += 1
    except Exception as error:
        counts[name, "lost"] += 1
        print(f"  {name}: {error!r}"[:300], flush=True)


def mutated_files(nb, folder, settings, total, rng, counts):
    """Mutated images and labels, checkpoints, encoder weights and settings."""
    here = {"root": str(folder / "data"), "save_dir": str(folder / "m"), "num_workers": 0}
    settings = nbtools.settings() | settings | here
    config = nb.make_config(**settings)
    files = [folder / "data/images/images/a_1.png", folder / "data/label/label/a_1_label.png"]
    seeds = {path: path.read_bytes() for path in pictures(folder / "seeds")}

    def look(pair):
        with no_longer_than(60):
            tile, faults = nb.inspect_pair(pair, config)
            if not tile:
                assert len(faults) == 1 and faults[0].detail and faults[0].file
                return "refused"
            nb.RooftopDataset([tile], config, train=True)[1, 0]
            return "accepted"

    for _ in range(total):
        for path, pixels in zip(files, picture("a"), strict=True):
            if not path.exists():
                save(path, pixels)
        seed, which = rng.choice(list(seeds)), rng.randrange(2)
        content, broken = mutate(seeds[seed], rng), files[which].with_suffix(seed.suffix)
        broken.write_bytes(with_right_sums(content) if rng.random() < 0.5 else content)
        pair = tuple(broken if number == which else path for number, path in enumerate(files))
        count(
            counts, "mutated image" if which == 0 else "mutated label", lambda pair=pair: look(pair)
        )
        broken.unlink()
    path = small_checkpoint(nb, config)
    whole = path.read_bytes()
    torch.save(torch.load(path, weights_only=True) | {"model": {}}, path)
    head = path.read_bytes()
    for _ in range(total // 8):
        path.write_bytes(mutate(whole if rng.random() < 0.3 else head, rng))
        count(
            counts,
            "mutated checkpoint",
            lambda: only(ValueError, lambda: nb.load_model(path, torch.device("cpu"), {})),
        )
    for _ in range(total // 4):
        changed = changed_settings(settings, rng)
        count(
            counts,
            "mutated settings",
            lambda changed=changed: only(ValueError, lambda: nb.make_config(**changed)),
        )


def main():
    """Inject, count and print."""
    parser = argparse.ArgumentParser()
    for name, value in (("kills", 36), ("stops", 12), ("runs", 24), ("files", 20_000), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    words, counts = parser.parse_args(), Counter()
    rng, started = random.Random(words.seed), time.time()
    nb = nbtools.load()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = small_run(folder / "tiles", epochs=6)
        if words.files:
            torch.set_num_threads(1)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            mutated_files(nb, folder / "fuzz", settings, words.files, rng, counts)
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            print(
                f"mutated files: {time.time() - started:.0f} s, memory grew by {grown:.0f} MiB",
                flush=True,
            )
        if words.runs:
            with contextlib.redirect_stdout(io.StringIO()):
                disturbed_runs(nb, folder / "runs", settings, words.runs, rng, counts)
            print(f"disturbed runs: at {time.time() - started:.0f} s", flush=True)
        for total, number in ((words.kills, signal.SIGKILL), (words.stops, signal.SIGINT)):
            if total:
                kill_kernels(folder, settings, total, number, rng, counts)
    print(
        f"\n{time.time() - started:.0f} s\n\n| fault | tried | survived | lost |\n|---|---|---|---|"
    )
    for name in dict.fromkeys(name for name, _ in counts):
        tried, survived, lost = (counts[name, kind] for kind in ("tried", "survived", "lost"))
        ways = (
            f" ({counts[name, 'accepted']} used, {counts[name, 'refused']} refused)"
            if counts[name, "refused"]
            else ""
        )
        print(f"| {name} | {tried:,} | {survived:,}{ways} | {lost} |")
    sys.exit(bool(sum(n for (_, kind), n in counts.items() if kind == "lost")))


if __name__ == "__main__":
    main()
