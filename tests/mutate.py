"""Files and settings that are changed at random: what a broken disk, a bad download or an attacker leaves behind."""

import random
import signal
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from faulty import picture, save, save_tiff

EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def mutate(content: bytes, rng: random.Random) -> bytes:
    """A copy with one to eight changes: bits flipped, numbers made extreme, parts cut, repeated, moved or zeroed."""
    new = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        near = rng.random() < 0.5  # heads hold most of what can go wrong
        at = rng.randrange(min(len(new), 200) if near else len(new)) if new else 0
        size = rng.choice((1, 2, 4, 16, 200))
        kind = rng.choice(("flip", "number", "cut", "end", "repeat", "zero", "noise"))
        if kind == "flip" and new:
            new[at] ^= 1 << rng.randrange(8)
        elif kind == "number":
            number = struct.pack(rng.choice("<>") + "I", rng.choice(EXTREMES))[
                : rng.choice((1, 2, 4))
            ]
            new[at : at + len(number)] = number
        elif kind == "cut":
            del new[at : at + size]
        elif kind == "end":
            del new[at:]
        elif kind == "repeat":
            new[at:at] = new[at : at + size] * rng.choice((1, 2, 50))
        elif kind == "zero":
            new[at : at + size] = bytes(size)
        elif kind == "noise":
            new[at : at + size] = rng.randbytes(size)
    return bytes(new)


def with_right_sums(content: bytes) -> bytes:
    """A PNG whose chunks have the checksums that fit them, so that a change gets past the first gate."""
    new, at = bytearray(content), 8
    while at + 12 <= len(new):
        end = at + 8 + struct.unpack(">I", new[at : at + 4])[0]
        if end + 4 > len(new):
            break
        new[end : end + 4] = struct.pack(">I", zlib.crc32(new[at + 4 : end]))
        at = end + 4
    return bytes(new)


def pictures(folder: Path) -> list[Path]:
    """Write a small valid file of each format and kind of compression."""
    pixels, label = picture("seed")
    files = [
        folder / f"seed{suffix}" for suffix in (".png", ".jpg", ".bmp", ".webp", ".tif", ".tiff")
    ]
    for path in files[:4]:
        save(path, pixels)
    bands = np.moveaxis(pixels, -1, 0)
    save_tiff(
        files[4],
        bands,
        compress="deflate",
        tiled=True,
        blockxsize=16,
        blockysize=16,
        crs="EPSG:32633",
    )
    save_tiff(files[5], bands, compress="lzw", interleave="pixel")
    for name, options in {
        "packed": {"compress": "packbits"},
        "raw": {},
        "jpeg": {"compress": "jpeg"},
    }.items():
        files.append(folder / f"{name}.tif")
        save_tiff(files[-1], bands, **options)
    files.append(folder / "deep.png")
    save(files[-1], label.astype(np.uint16) * 257)
    return files


VALUES = [
    None,
    True,
    -1,
    0,
    1,
    3,
    2**31,
    10**30,
    0.0,
    -0.5,
    1e-320,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "auto",
    "x",
]
VALUES += [
    "\0",
    "../..",
    "/",
    "/dev/null",
    "a" * 5000,
    "\ud800",
    "💥",
    "(",
    "(.*)",
    "tu-hf-hub:a/b",
    "$\\frac$",
    "{}",
]
VALUES += [
    [],
    [[]],
    [0, 255],
    [0.5, 0.5, 0.0],
    [1, 2, 3],
    ["a", "b"],
    ["a", "a"],
    [None],
    {},
    {"a": 1},
    b"x",
    (0, 1),
    ...,
]


def changed_settings(settings: dict, rng: random.Random) -> dict:
    """The settings with one to three values of any kind."""
    names = rng.sample(list(settings), rng.choice((1, 1, 2, 3)))
    return settings | {name: rng.choice(VALUES) for name in names}


@contextmanager
def no_longer_than(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in what takes longer."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def only(errors: type | tuple, call: Callable) -> str:
    """Call and say how it ended: "accepted", or "refused" with one of the errors; others go through."""
    with no_longer_than(60):
        try:
            call()
        except TimeoutError:
            raise
        except errors as error:
            assert str(error), "an error without a word"
            return "refused"
    return "accepted"


def small_checkpoint(nb: object, config: object) -> Path:
    """The file of a small valid checkpoint."""
    run = nb.Run(config, torch.device("cpu"), "fp32", {})
    run.history.append({"epoch": 1, "val_loss": 1.0, "val_iou": 0.5, "seconds": 1.0})
    nb.keep_finished_epoch(run, ["iou"])
    return Path(config.save_dir) / nb.BEST_FILES["iou"]
