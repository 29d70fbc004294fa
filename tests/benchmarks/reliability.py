"""Injects faults by the dozen and by the thousand, and prints how many were tried, survived and lost.

usage: python tests/benchmarks/reliability.py [--kills 36] [--stops 12] [--runs 24] [--files 20000]

Kills and stops are those of real kernels with a loader process; whatever happened, the run must end in
the same weights, optimiser state, history and metrics as one that was left alone, to the last bit.
"Lost" counts runs that did not, and files that ended in anything but a result or a named error.
"""

import argparse
import contextlib
import functools
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
    """Kill or interrupt kernels a number of times; what ends is compared with a run left alone."""
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
    faults = ", ".join(f"{n} x {name}" for name, n in pending.items())
    print(f"  {faults} {'survived' if survived else 'LOST'}", flush=True)
    pending.clear()
    shutil.rmtree(folder / "out", ignore_errors=True)


def disturbed_runs(nb, folder, settings, total, rng, counts):
    """Runs in one process with a disk that is full for a while, or with steps that go wrong."""
    cpu, here = torch.device("cpu"), {"num_workers": 0, "save_dir": str(folder / "m")}
    config = nb.make_config(**nbtools.settings() | settings | here)

    def train(name, finish_epoch=None, forward=None):
        here = nb.replace(config, save_dir=str(folder / name))
        tiles = nb.find_scenes(nb.inspect_dataset(here)[0], "auto")
        split, _ = nb.split_tiles(tiles, here)
        run = nb.Run(here, cpu, "fp32", {"split": {}, "files": ""})
        kept = nb.keep_finished_epoch, nb.forward_pass
        nb.keep_finished_epoch, nb.forward_pass = finish_epoch or kept[0], forward or kept[1]
        try:
            nb.fit_with_recovery(run, split)
        finally:
            nb.keep_finished_epoch, nb.forward_pass = kept
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        nb.write_checkpoint_files(run)
        return run, state_of(folder / name)

    nb.WRITE_SHARE = float("inf")  # after every epoch, short as they are
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    original_finish, original_forward = nb.keep_finished_epoch, nb.forward_pass
    _, whole = train("alone")
    for number in range(total):
        epochs = rng.sample(range(1, config.epochs + 1), 2)
        full = {epoch: rng.randrange(10, 60_000_000) for epoch in epochs}

        def finish_epoch(run, better, full=full):
            resource.setrlimit(resource.RLIMIT_FSIZE, (full.get(len(run.history), hard), hard))
            original_finish(run, better)
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

        _, state = train(f"full{number}", finish_epoch)
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
        finite = all(torch.isfinite(tensor).all() for tensor in run.ema.state_dict().values())
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
    data, cpu = folder / "data", torch.device("cpu")
    files = [data / "images/images/a_1.png", data / "label/label/a_1_label.png"]
    seeds = {path: path.read_bytes() for path in pictures(folder / "seeds")}

    def look(pair):
        with no_longer_than(60):
            found = nb.inspect_pair(nb.Pair("a", *pair), None, config)
            faults = [one for one in found if isinstance(one, nb.Fault)]
            try:
                found = [one for one in found if isinstance(one, nb.Tile)]
                tiles, noticed = nb.decide_label_meaning(found, config)
            except ValueError as error:  # a whole set of such labels would stop the run
                assert "Set in section 1.2" in str(error)
                return "refused"
            assert all(fault.file and fault.detail for fault in faults + noticed)
            assert bool(tiles) != ("left out" in [fault.action for fault in faults + noticed])
            for tile in tiles:
                nb.RooftopDataset([tile], config, train=True)[1, 0]
            return "accepted" if tiles else "refused"

    for _ in range(total):
        for path, pixels in zip(files, picture("a"), strict=True):
            if not path.exists():
                save(path, pixels)
        seed, which = rng.choice(list(seeds)), rng.randrange(2)
        content, broken = mutate(seeds[seed], rng), files[which].with_suffix(seed.suffix)
        broken.write_bytes(with_right_sums(content) if rng.random() < 0.5 else content)
        pair = tuple(str(broken if i == which else path) for i, path in enumerate(files))
        name = "mutated image" if which == 0 else "mutated label"
        count(counts, name, lambda pair=pair: look(pair))
        broken.unlink()
    path = small_checkpoint(nb, config)
    whole = path.read_bytes()
    torch.save(torch.load(path, weights_only=True) | {"model": {}}, path)
    head = path.read_bytes()
    for _ in range(total // 8):
        path.write_bytes(mutate(whole if rng.random() < 0.3 else head, rng))
        load = functools.partial(nb.load_model, path, cpu)
        count(counts, "mutated checkpoint", functools.partial(only, ValueError, load))
    for _ in range(total // 4):
        check = functools.partial(nb.make_config, **changed_settings(settings, rng))
        count(counts, "mutated settings", functools.partial(only, ValueError, check))


def main():
    """Inject, count and print."""
    parser = argparse.ArgumentParser()
    numbers = {"kills": 36, "stops": 12, "runs": 24, "files": 20_000, "seed": 0}
    for name, value in numbers.items():
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
            took = f"{time.time() - started:.0f} s, memory grew by {grown:.0f} MiB"
            print(f"mutated files: {took}", flush=True)
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
        used, refused = counts[name, "accepted"], counts[name, "refused"]
        ways = f" ({used} used, {refused} refused)" if refused else ""
        print(f"| {name} | {tried:,} | {survived:,}{ways} | {lost} |")
    sys.exit(bool(sum(n for (_, kind), n in counts.items() if kind == "lost")))


if __name__ == "__main__":
    main()
