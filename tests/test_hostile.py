"""Files and settings that nobody would write on purpose, or only somebody with bad intent."""

import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from faulty import picture, save, save_tiff
from mutate import (
    changed_settings,
    mutate,
    no_longer_than,
    only,
    pictures,
    small_checkpoint,
    with_right_sums,
)

CPU = torch.device("cpu")


@pytest.fixture
def pair(settings):
    """The paths of an image and its label, both written."""
    root = Path(settings["root"])
    image, label = root / "images/images/a_1.png", root / "label/label/a_1_label.png"
    for path, pixels in zip((image, label), picture("a_1"), strict=True):
        save(path, pixels)
    return image, label


def inspect(nb, files, config):
    """Inspect a pair and decide what its pixels mean: its tiles, and what was noticed."""
    found = nb.inspect_pair(nb.Pair("a", *map(str, files)), None, config)
    faults = [one for one in found if isinstance(one, nb.Fault)]
    try:
        tiles, noticed = nb.decide_label_meaning(
            [one for one in found if isinstance(one, nb.Tile)], config
        )
    except ValueError as error:  # a whole set of such labels would stop the run
        assert "Set in section 1.1" in str(error)
        return [], faults + [nb.Fault(str(files[1]), "unclear", str(error))]
    return tiles, faults + noticed


# ---- bombs


def png(path, width, height, rows=b""):
    """A PNG of 8-bit grey that claims a size and holds some rows."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def sparse(path, **options):
    """A GeoTIFF that claims pixels which it does not hold."""
    with rasterio.open(path, "w", driver="GTiff", dtype="uint8", SPARSE_OK=True, **options):
        pass


SIDE = 100_000
BOMBS = {
    "a PNG of 10,000 million pixels": lambda p: png(p, SIDE, SIDE),
    "a PNG that inflates to 900 million": lambda p: png(p, 30_000, 30_000, bytes(30_001 * 1000)),
    "the largest PNG there may be": lambda p: png(p, 2**31 - 1, 2**31 - 1),
    "a GeoTIFF of a million by a million": lambda p: sparse(
        p, width=10**6, height=10**6, count=3, tiled=True
    ),
    "a GeoTIFF of one row": lambda p: sparse(p, width=2**21, height=1, count=3),
    "a GeoTIFF with huge blocks": lambda p: sparse(
        p,
        width=40_000,
        height=40_000,
        count=3,
        tiled=True,
        blockxsize=32768,
        blockysize=32768,
        compress="deflate",
    ),
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS.keys())
@pytest.mark.parametrize("which", [0, 1], ids=["image", "label"])
def test_a_bomb_is_refused_by_name_at_once(nb, settings, pair, bomb, which):
    pair[which].unlink()
    bomb(pair[which])
    with no_longer_than(10):
        (fault,) = nb.inspect_pair(nb.Pair("a", *map(str, pair)), None, nb.make_config(**settings))
    assert isinstance(fault, nb.Fault) and fault.action == "left out"
    assert str(pair[which]) in fault.file + fault.detail
    advice = "cut it, or save it as tiled GeoTIFF"
    assert advice in fault.detail or "libpng: Invalid IHDR" in fault.detail


def test_a_label_of_many_bands_is_refused(nb, settings, pair):
    pair[1].unlink()
    save_tiff(pair[1], np.zeros((300, 64, 64), np.uint8))
    (fault,) = nb.inspect_pair(nb.Pair("a", *map(str, pair)), None, nb.make_config(**settings))
    assert isinstance(fault, nb.Fault) and fault.action == "left out"
    assert "a label with 300 bands" in fault.detail


# ---- links and names


def test_links_and_pipes(nb, settings, write_pair, tmp_path):
    """What leads nowhere, in a circle or to a pipe is named; links to data elsewhere are used."""
    for number in range(4):
        write_pair(f"a_{number}")
    images, labels = (
        Path(settings["root"], settings[name]) for name in ("images_dir", "labels_dir")
    )
    elsewhere = tmp_path / "elsewhere"
    for folder in (images, labels):
        (elsewhere / folder.name).mkdir(parents=True)
    for path in (images / "a_3.png", labels / "a_3_label.png"):
        path.rename(elsewhere / path.parent.name / path.name)
    (images / "far").symlink_to(elsewhere / images.name)
    (labels / "far").symlink_to(elsewhere / labels.name)
    (images / "circle").symlink_to(images)
    for stem in ("dangling", "looped", "piped"):
        save(labels / f"{stem}_1_label.png", picture(stem)[1])
    (images / "dangling_1.png").symlink_to(tmp_path / "nowhere.png")
    (images / "looped_1.png").symlink_to(images / "looped_1.png")
    os.mkfifo(images / "piped_1.png")
    with no_longer_than(20):
        tiles, report = nb.inspect_dataset(nb.make_config(**settings))
    assert [tile.name for tile in tiles] == [f"images/images/a_{i}.png" for i in range(3)] + [
        "images/images/far/a_3.png"
    ]
    unreadable = report[report["kind"] == "unreadable"]
    assert {Path(file).stem for file in unreadable["file"]} == {"dangling_1", "looped_1", "piped_1"}
    assert unreadable["detail"].str.contains("no such file, or a link that leads nowhere").all()


@pytest.mark.parametrize(
    "change",
    [
        {"images_dir": "../../outside"},
        {"labels_dir": "label/../../../outside"},
        {"label_suffix": "/../../outside"},
        {"label_suffix": "\\..\\outside"},
        {"num_workers": 100_000},
        {"root": "a\0b"},
        {"encoder_name": "tu-hf-hub:somebody/something"},
    ],
    ids=str,
)
def test_settings_that_reach_beyond_are_refused(nb, defaults, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        nb.make_config(**defaults | change)


# ---- fuzzing; tests/benchmarks/reliability.py does the same for longer


def test_mutated_images_and_labels_give_a_tile_or_a_named_fault(nb, settings, pair, tmp_path):
    config, rng, counts = nb.make_config(**settings), random.Random(0), {}
    whole = {path: path.read_bytes() for path in pictures(tmp_path / "seeds")}
    for _ in range(2000):
        seed, which = rng.choice(list(whole)), rng.randrange(2)
        content = mutate(whole[seed], rng)
        broken = pair[which].with_suffix(seed.suffix)
        broken.write_bytes(with_right_sums(content) if rng.random() < 0.5 else content)
        files = tuple(broken if number == which else path for number, path in enumerate(pair))
        with no_longer_than(60):
            tiles, faults = inspect(nb, files, config)
            for tile in tiles:
                nb.RooftopDataset([tile], config, train=True)[1, 0]
        assert all(fault.file in map(str, files) and fault.detail for fault in faults)
        assert bool(tiles) != ("left out" in [fault.action for fault in faults])
        counts[bool(tiles)] = counts.get(bool(tiles), 0) + 1
        if broken != pair[which]:
            broken.unlink()
        else:
            save(broken, picture("a_1")[which])
    assert min(counts.values()) > 100  # both ends were reached


def test_mutated_checkpoints_are_loaded_or_named(nb, settings):
    config, rng = nb.make_config(**settings | {"encoder_name": "mobilenet_v2"}), random.Random(0)
    path, names = small_checkpoint(nb, config), ["a", "b"]
    state = torch.load(path, weights_only=True)
    torch.save(state | {"model": {}}, path)  # mostly head
    small = path.read_bytes()
    for _ in range(300):
        path.write_bytes(mutate(small, rng))
        only(ValueError, lambda: nb.load_model(path, CPU))
    for value in (None, 5, "x", [], {}, torch.ones(3), [["a"]], {"a": 1}):
        for name in (
            "config",
            "class_names",
            "model",
            "format",
            "history",
            "optimizer",
            "precision",
        ):
            torch.save(state | {"model": {}} | {name: value}, path)
            ending = only(ValueError, lambda: nb.load_model(path, CPU, class_names=names))
            assert ending == "refused"


def test_mutated_settings_are_accepted_or_named(nb, settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng, refused = random.Random(0), 0
    for _ in range(400):
        changed = changed_settings(settings, rng)
        try:
            with no_longer_than(60):
                nb.make_config(**changed)
        except ValueError as error:
            names = [name for name in settings if changed[name] is not settings[name]]
            assert any(name in str(error) for name in names), (names, str(error))
            refused += 1
    assert 200 < refused < 400 and not list(tmp_path.iterdir())


def test_mutated_split_files_are_used_or_named(nb, settings, write_pair, tmp_path):
    for number in range(4):
        write_pair(f"a_{number}")
    path, rng = tmp_path / "split.json", random.Random(0)
    path.write_text("{}")
    config = nb.make_config(**settings | {"split": str(path)})
    tiles, _ = nb.inspect_dataset(config)
    whole = b'{"train": ["images/images/a_0.png#0,0,9,9"], "val": ["images/images/a_2.png"], '
    whole += b'"test": []}'
    odd = [b"[" * 100_000, b"null", b'{"train": 1}', b"\xff\xfe"]
    for content in [mutate(whole, rng) for _ in range(500)] + odd:
        path.write_bytes(content)
        only(ValueError, lambda: nb.split_from_file(tiles, config))
