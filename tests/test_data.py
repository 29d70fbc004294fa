"""Data: reading, pairing, verifying, resizing, augmenting, splitting."""

import csv
import json
from pathlib import Path

import faulty
import numpy as np
import pytest
import torch
from faulty import save
from PIL import Image


def config_of(nb, settings, **changes):
    return nb.make_config(**settings | changes)


def read_image(nb, path):
    with nb.open_raster(path) as raster:
        return nb.read_image(raster, nb.Window(0, 0, raster.width, raster.height))[:2]


def inspect_one(nb, config):
    """The tile of the only pair, if it is usable, and the faults."""
    (pair,), _, _ = nb.pair_files(config)
    found = nb.inspect_pair(pair, None, config)
    tiles, faults = nb.decide_label_meaning(
        [one for one in found if isinstance(one, nb.Tile)], config
    )
    faults = [one for one in found if isinstance(one, nb.Fault)] + faults
    return tiles[0] if tiles else None, faults


# ---- reading


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA"])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_images_of_many_kinds_become_rgb(nb, tmp_path, mode, suffix):
    pixels = np.zeros((6, 9, 3), np.uint8)
    pixels[:3] = 255
    Image.fromarray(pixels).convert(mode).save(tmp_path / f"a{suffix}")
    read, seen = read_image(nb, tmp_path / f"a{suffix}")
    assert read.dtype == np.uint8 and seen.all()
    # in a palette of 16 bits, Pillow before 11 writes 255 as 65,280
    np.testing.assert_allclose(read, pixels, atol=1 if (mode, suffix) == ("P", ".tif") else 0)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp", ".bmp"])
@pytest.mark.parametrize(
    "spoil", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"no image" * 9]
)
def test_a_broken_file_is_named(nb, tmp_path, suffix, spoil):
    path = tmp_path / f"broken{suffix}"
    save(path, np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"broken\{suffix}"):
        read_image(nb, path)


def test_a_file_of_another_format_is_not_opened(nb, tmp_path):
    save(tmp_path / "secret.png", np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "link.tif").write_text(
        '<VRTDataset rasterXSize="4" rasterYSize="4"><VRTRasterBand dataType="Byte" band="1">'
        f"<SimpleSource><SourceFilename>{tmp_path}/secret.png</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>"
    )
    with pytest.raises(ValueError, match=r"link\.tif.*not recognized"):
        read_image(nb, tmp_path / "link.tif")


def test_bands_come_in_the_order_of_their_names(nb, tmp_path):
    names = nb.rasterio.enums.ColorInterp
    faulty.save_tiff(
        tmp_path / "a.tif", np.array([[[1]], [[2]], [[3]]], np.uint8), photometric="RGB"
    )
    with nb.rasterio.open(tmp_path / "a.tif", "r+") as raster:
        raster.colorinterp = [names.blue, names.green, names.red]
    assert read_image(nb, tmp_path / "a.tif")[0].tolist() == [[[3, 2, 1]]]


# ---- pairing and verifying


def test_every_fault_is_found_and_good_pairs_go_on(nb, settings):
    root = Path(settings["root"])
    expected = faulty.build(root)
    before = {path: path.read_bytes() for path in root.rglob("*.*") if path.is_file()}
    tiles, report = nb.inspect_dataset(config_of(nb, settings))
    found = {(Path(row.file).name, row.kind, row.action) for row in report.itertuples()}
    assert {(name, *what) for name, what in expected.items()} <= found
    left_out = {Path(row.file).stem for row in report.itertuples() if row.action == "left out"}
    stems = {Path(tile.name).stem for tile in tiles}
    assert not stems & left_out and {"good_0", "inner_1", "Dächer_1", "wrong_1", "deep_1"} <= stems
    kinds = {kind for _, kind, _ in found}
    assert kinds == {kind for kind, _ in expected.values()}  # and nothing is made up
    good = [row for row in report.itertuples() if Path(row.file).stem.startswith("good_")]
    assert good == []
    details = " ".join(report["detail"])
    for hint in ("CMYK pixels; convert", "4 bands", "image 64 x 64, label 64 x 32"):
        assert hint in details
    with open(
        Path(settings["save_dir"]) / "dataset_report.csv", newline="", encoding="utf-8"
    ) as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["file", "kind", "detail", "action"] and len(rows) == len(report) + 1
    assert before == {path: path.read_bytes() for path in root.rglob("*.*") if path.is_file()}


def test_the_table_of_findings_counts_files(nb):
    """A raster that was cut into tiles may have a finding in each of them."""
    rows = [("d/a.tif", "blank image", "all 0", "left out")] * 3
    rows += [("e/a.tif", "blank image", "all 9", "left out")]
    table = nb.summarise_findings(
        nb.pd.DataFrame(rows, columns=["file", "kind", "detail", "action"])
    )
    assert table.loc[("blank image", "left out")].tolist() == [2, "a.tif", "all 0"]


def test_files_in_the_cache_that_are_not_the_notebooks_stay(nb, settings, write_pair):
    for i in range(4):
        write_pair(f"s{i}_1", seed=i)
    cache = Path(settings["save_dir"], "cache")
    cache.mkdir(parents=True)
    others = {cache / "features.npy", cache / "features.part", cache.parent / "rooftop_old.part"}
    old = {cache / f"{'a0' * 16}.npy", cache / f"{'b1' * 16}.npy.part"}
    for path in others | old:
        path.write_text("here")
    tiles = nb.verify_dataset(nb.make_config(**settings)).tiles
    assert set(cache.iterdir()) == {tile.pixels for tile in tiles} | others - {
        cache.parent / "rooftop_old.part"
    }
    assert all(path.read_text() == "here" for path in others)


def test_of_identical_images_the_first_is_used(nb, settings, write_pair):
    for i in range(12):
        write_pair(f"s{i}_1")
    images = Path(settings["root"]) / settings["images_dir"]
    for i in range(4, 12, 4):
        (images / f"s{i}_1.png").write_bytes((images / "s1_1.png").read_bytes())
    tiles, report = nb.inspect_dataset(config_of(nb, settings))
    kept = [Path(tile.name).stem for tile in tiles]
    assert kept == [f"s{i}_1" for i in range(12) if i not in (4, 8)]
    twins = report[report["kind"] == "identical images"]
    assert [Path(file).stem for file in twins["file"]] == ["s4_1", "s8_1"]
    assert set(twins["action"]) == {"left out"} and "s1_1.png" in twins["detail"].iloc[0]


def test_pairs_are_made_by_name_across_suffixes_and_folders(nb, settings, write_pair):
    for stem in ("b/tile_10", "b/tile_2", "a tile", "Ünï_1", "thumbing_1"):
        write_pair(stem, suffix=".JPG")
    pairs, faults, _ = nb.pair_files(config_of(nb, settings))
    assert faults == []
    assert [Path(image).stem for _, image, *_ in pairs] == [
        "a tile",
        "tile_2",
        "tile_10",
        "thumbing_1",
        "Ünï_1",
    ]
    assert all(Path(label).stem == f"{Path(image).stem}_label" for _, image, label, *_ in pairs)


def test_links_are_followed_but_not_in_circles(nb, settings, write_pair, tmp_path):
    write_pair("x_1")
    images = Path(settings["root"]) / settings["images_dir"]
    (tmp_path / "elsewhere").mkdir()
    save(tmp_path / "elsewhere" / "y_1.png", np.zeros((8, 8, 3), np.uint8))
    (images / "linked").symlink_to(tmp_path / "elsewhere")
    (images / "circle").symlink_to(images)
    found = [path.name for path in nb.list_files(images) if path.suffix == ".png"]
    assert found == ["y_1.png", "x_1.png"]


@pytest.mark.parametrize(
    ("images_dir", "labels_dir", "label_suffix", "files"),
    [
        ("images", "masks", "", ["images/a_1.png", "masks/a_1.png"]),  # Inria: images, gt
        (
            "train",
            "train_labels",
            "",
            ["train/a_1.tiff", "train_labels/a_1.tif", "val/b.tiff"],
        ),  # Massachusetts
        (
            "*",
            "*_labels",
            "",
            ["train/a_1.tiff", "train_labels/a_1.tif", "val/a_1.tiff", "val_labels/a_1.tif"],
        ),
        (
            "*/image",
            "*/label",
            "",
            ["train/image/a_1.tif", "train/label/a_1.tif", "test/image/2.tif", "test/label/2.tif"],
        ),
        (".", ".", "_mask", ["city/a_1.png", "city/a_1_mask.png", "b.png", "b_mask.png"]),
        ("all", "all/masks", "", ["all/a_1.png", "all/masks/a_1.png"]),
        ("im[1]", "la?", "_label", ["im[1]/a_1.png", "la?/a_1_label.png"]),
    ],
)
def test_layouts_of_well_known_data_sets(nb, settings, images_dir, labels_dir, label_suffix, files):
    image, label = faulty.picture("a")
    for name in files:
        is_label = "label" in name or "mask" in name
        save(Path(settings["root"]) / name, label if is_label else image)
    layout = {"images_dir": images_dir, "labels_dir": labels_dir, "label_suffix": label_suffix}
    config = config_of(nb, settings, **layout)
    assert not nb.needs_sample(config)
    pairs, faults, _ = nb.pair_files(config)
    root = settings["root"]
    found = sorted(Path(path).relative_to(root).as_posix() for pair in pairs for path in pair[1:3])
    assert found == sorted(name for name in files if not name.startswith("val/b")) and faults == []


def test_a_folder_without_a_usable_pair_stops_with_the_reasons(nb, settings, write_pair):
    write_pair("bad_1")
    (Path(settings["root"]) / settings["images_dir"] / "bad_1.png").write_bytes(b"")
    with pytest.raises(
        ValueError,
        match=r"0 usable tiles with 0 windows.*commonest is: unreadable, in .*bad_1.png: ",
    ):
        nb.inspect_dataset(config_of(nb, settings))


def test_too_few_tiles_stop_with_the_reasons(nb, settings, write_pair):
    for i in range(3):
        write_pair(f"a_{i}")
    write_pair("bad_1")
    (Path(settings["root"]) / settings["images_dir"] / "bad_1.png").write_bytes(b"")
    with pytest.raises(
        ValueError,
        match=r"3 usable tiles with 3 windows, 4 are needed.*commonest is: unreadable, in .*dataset_report.csv",
    ):
        nb.inspect_dataset(config_of(nb, settings))


def test_real_tiles_verify_clean(nb, defaults, real_tiles, tmp_path):
    tiles, report = nb.inspect_dataset(
        nb.make_config(**defaults | {"root": real_tiles, "save_dir": str(tmp_path)})
    )
    assert len(tiles) == 712 and report["kind"].tolist() == ["label without roof"] * 339
    assert {tile.scale for tile in tiles} == {(0, 255)} and sum(
        tile.class_pixels[1] == 0 for tile in tiles
    ) == 339
    assert np.mean([tile.roof_share for tile in tiles]) == pytest.approx(0.09, abs=0.005)


# ---- dataset and loader


@pytest.fixture
def tiles(nb, settings, write_pair):
    """Twelve verified tiles in three scenes."""
    for i in range(12):
        write_pair(f"scene{i % 3}_{i}")
    return nb.inspect_dataset(config_of(nb, settings))[0]


@pytest.mark.parametrize("side", [48, 64, 100])
def test_item_is_standardised_and_of_the_models_size(nb, settings, write_pair, side):
    for i in range(4):
        write_pair(f"s_{i}", side=side)
    config = config_of(nb, settings, large_images="resize")
    image, label, _ = nb.RooftopDataset(nb.inspect_dataset(config)[0], config)[0, 0]
    assert image.shape == (3, 64, 64) and image.dtype == torch.float32
    assert label.shape == (64, 64) and label.dtype == torch.int64
    assert label.unique().tolist() == [0, 1]
    pixels = image * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) + torch.tensor(
        [0.485, 0.456, 0.406]
    ).view(3, 1, 1)
    assert pixels.min() >= -1e-5 and pixels.max() <= 1 + 1e-5
    assert (
        pixels[:, label == 1].min() > pixels[:, label == 0].mean()
    )  # label and bright square coincide


def test_resizing_invents_no_class_between_two_others(nb, settings, write_pair):
    for i in range(4):
        write_pair(f"s_{i}", side=100)
    three = {
        "num_classes": 3,
        "class_names": ["ground", "wall", "roof"],
        "class_values": [0, 100, 255],
    }
    config = config_of(nb, settings, large_images="resize", **three)
    tiles = nb.inspect_dataset(config)[0]
    assert all(
        set(nb.RooftopDataset(tiles, config)[0, i][1].unique().tolist()) == {0, 2} for i in range(4)
    )


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_only_linux_has_loader_processes(nb, settings, tiles, monkeypatch, system):
    data = nb.RooftopDataset(tiles, config_of(nb, settings, num_workers=2))
    assert nb.make_loader(data, torch.device("cpu")).num_workers == 2
    monkeypatch.setattr(nb.sys, "platform", system)
    for wanted in (2, "auto"):
        data = nb.RooftopDataset(tiles, config_of(nb, settings, num_workers=wanted))
        loader = nb.make_loader(data, torch.device("cpu"))
        assert loader.num_workers == 0 and loader.multiprocessing_context is None


@pytest.mark.parametrize("kind", ["standard", "strong"])
def test_augmentation_depends_on_seed_epoch_and_tile_alone(nb, settings, tiles, kind):
    config = config_of(nb, settings, augmentation=kind)
    data = nb.RooftopDataset(tiles, config, train=True)
    first, *_ = data[1, 0]
    data[2, 5]  # another tile in between changes nothing
    assert torch.equal(data[1, 0][0], first)
    assert not torch.equal(data[2, 0][0], first)
    other = nb.RooftopDataset(tiles, config_of(nb, settings, seed=1, augmentation=kind), train=True)
    assert not torch.equal(other[1, 0][0], first)
    assert all(set(data[epoch, 3][1].unique().tolist()) <= {0, 1} for epoch in range(20))
    held_out = nb.RooftopDataset(tiles, config)
    assert torch.equal(
        held_out[1, 0][0], held_out[2, 0][0]
    )  # what judges the model is never changed


def test_augmented_label_follows_its_image(nb, settings, tiles):
    data = nb.RooftopDataset(tiles, config_of(nb, settings), train=True)
    for epoch in range(10):
        image, label, _ = data.pixels(epoch, 2)
        bright = image.mean(axis=2) > image.mean()
        assert (bright == (label == 1)).mean() > 0.95


def test_transforms_draw_independently(nb, settings, tiles):
    data = nb.RooftopDataset(tiles, config_of(nb, settings), train=True)
    kept = []
    for epoch in range(200):
        image, label, _ = data.pixels(epoch, 0)
        kept.append((label.sum() == 32 * 32, image[label == 1].mean()))
    still = [light for unscaled, light in kept if unscaled]
    assert 60 < len(still) < 140  # Affine is applied to half of them ...
    assert np.std(still) > 5  # ... and those that it leaves alone are re-lit all the same


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_whatever_the_workers(nb, settings, tiles, workers):
    def batches(count, epoch):
        config = config_of(nb, settings, num_workers=count, augmentation="strong")
        loader = nb.make_loader(nb.RooftopDataset(tiles, config, train=True), torch.device("cpu"))
        loader.sampler[:] = nb.epoch_order(loader.dataset, epoch)
        return [images for images, *_ in loader]

    data = nb.RooftopDataset(tiles, config_of(nb, settings), train=True)
    orders = [[index for _, index in nb.epoch_order(data, epoch)] for epoch in (1, 2, 1)]
    assert orders[0] == orders[2] != orders[1] and sorted(orders[0]) == sorted(orders[1]) == list(
        range(len(data))
    )
    assert torch.equal(torch.cat(batches(workers, 1)), torch.cat(batches(0, 1)))
    assert not torch.equal(torch.cat(batches(workers, 1)), torch.cat(batches(workers, 2)))


@pytest.mark.parametrize(("batch", "sizes"), [(4, [4, 4, 4]), (5, [5, 5]), (12, [12]), (13, [12])])
def test_training_batches_are_full_unless_there_is_only_one(nb, settings, tiles, batch, sizes):
    config = config_of(nb, settings, batch_size=batch)
    sets = [nb.RooftopDataset(tiles, config, train=train) for train in (True, False)]
    batches = [
        [len(images) for images, *_ in nb.make_loader(data, torch.device("cpu"))] for data in sets
    ]
    assert batches[0] == sizes and sum(batches[1]) == 12


def test_no_workers_where_they_cannot_be_forked(nb, settings, tiles, monkeypatch):
    for system in ("win32", "darwin"):
        monkeypatch.setattr(nb.sys, "platform", system)
        for workers in ("auto", 8):
            data = nb.RooftopDataset(tiles, config_of(nb, settings, num_workers=workers))
            assert nb.make_loader(data, torch.device("cpu")).num_workers == 0


@pytest.mark.parametrize(
    "device, cores, workers", [("cpu", 2, (0, 0)), ("cpu", 8, (1, 0)), ("cuda", 64, (16, 16))]
)
def test_loader_processes_are_as_many_as_help(
    nb, settings, tiles, monkeypatch, device, cores, workers
):
    """Training on a CPU spares one core of many; a validation's process would copy its memory."""
    monkeypatch.setattr(nb.sys, "platform", "linux")
    monkeypatch.setattr(nb.os, "sched_getaffinity", lambda _: range(cores), raising=False)
    config = config_of(nb, settings, num_workers="auto")
    sets = [nb.RooftopDataset(tiles, config, train=train) for train in (True, False)]
    loaders = [nb.make_loader(data, torch.device(device)) for data in sets]
    assert tuple(loader.num_workers for loader in loaders) == workers


# ---- split


def fake(nb, names, roof=0.1):
    """Tiles of 10 x 10 pixels of which no file is read."""
    facts = {"image": "", "label": "", "box": (0, 0, 10, 10), "kind": "", "sample": []}
    facts |= {"codes": None, "lossy": False, "nodata": None, "pixels": Path(), "place": None}
    facts |= {"hidden": [], "measured": False}
    facts["class_pixels"] = np.array([int(100 - 100 * roof), int(100 * roof)])
    return [nb.Tile(name=f"images/{n}.png", key=n, digest=n, **facts) for n in names]


def split_of(nb, defaults, tiles, **changes):
    config = nb.make_config(**defaults | changes)
    return nb.split_tiles(nb.find_scenes(tiles, config.group_by), config)


def names_of(tiles):
    return [tile.name for tile in tiles]


def test_scenes_never_straddle_a_split(nb, defaults):
    tiles = fake(nb, [f"block-{i // 7:02}_{i}" for i in range(210)])
    split, how = split_of(nb, defaults, tiles)
    assert sorted(names_of(sum(split.values(), []))) == sorted(names_of(tiles))
    scenes = {part: {nb.scene_name(tile, "auto") for tile in split[part]} for part in nb.SPLITS}
    assert not (
        scenes["train"] & scenes["val"]
        or scenes["train"] & scenes["test"]
        or scenes["val"] & scenes["test"]
    )
    assert 0.85 <= len(split["train"]) / 210 <= 0.95 and "30 whole scenes" in how
    assert split_of(nb, defaults, tiles)[0] == split
    assert split_of(nb, defaults, tiles, seed=1)[0] != split


def test_roof_shares_are_alike_where_possible(nb, defaults):
    tiles = [
        t
        for i in range(40)
        for t in fake(nb, [f"s{i}_{j}" for j in range(5)], roof=[0.0, 0.4][i % 2])
    ]
    split, _ = split_of(nb, defaults, tiles)
    shares = [np.mean([tile.roof_share for tile in split[part]]) for part in nb.SPLITS]
    assert shares == pytest.approx([0.2] * 3, abs=0.05)


@pytest.mark.parametrize("count", [4, 7, 40, 400])
def test_one_scene_is_cut_into_contiguous_runs(nb, defaults, count):
    tiles = fake(nb, [f"image_{i}" for i in range(count)])
    split, how = split_of(nb, defaults, tiles)
    assert names_of(split["train"] + split["val"] + split["test"]) == names_of(
        tiles
    )  # in natural order
    assert (
        all(len(split[part]) >= max(1, count // 20 - 1) for part in nb.SPLITS)
        and "cut in three" in how
    )


@pytest.mark.parametrize("count", range(4, 25))
@pytest.mark.parametrize("scenes", [1, 2, 3, 100])
def test_every_split_gets_a_tile_however_few_there_are(nb, defaults, count, scenes):
    tiles = fake(nb, sorted(f"s{i % scenes}_{i}" for i in range(count)))
    split, _ = split_of(nb, defaults, tiles)
    assert all(split.values()) and sorted(names_of(sum(split.values(), []))) == sorted(
        names_of(tiles)
    )
    assert len(split["train"]) >= count / 2


def test_stems_without_underscore_are_scenes_of_their_own(nb, defaults):
    _, how = split_of(nb, defaults, fake(nb, [f"tile{i}" for i in range(50)]))
    assert "50 whole scenes" in how


@pytest.mark.parametrize(
    ("name", "group_by", "scene"),
    [
        ("jonkoping-c03_r512", "auto", "jonkoping-c03"),
        ("usa/austin1_12", "auto", "usa/austin1"),
        ("austin1_12", r"^([a-z]+)", "austin"),
        ("usa/austin1_12", r"^([a-z]+)/", "usa"),
        ("austin1_12", None, "images/x.png"),
    ],
)
def test_scene_name(nb, name, group_by, scene):
    (tile,) = fake(nb, ["x"])
    tile.key = name
    assert nb.scene_name(tile, group_by) == scene
    if group_by is None:
        return
    tile.name = f"{name}#0,0,64,64"  # a part of a raster belongs to the raster's scene
    assert nb.scene_name(tile, group_by) == scene


def test_regex_that_does_not_match_names_the_file(nb):
    with pytest.raises(ValueError, match="group_by.*vienna_1.png"):
        nb.scene_name(fake(nb, ["vienna_1"])[0], r"(austin)")


def test_split_from_a_file(nb, defaults, tmp_path):
    tiles = fake(nb, [f"a_{i}" for i in range(6)])
    tiles += fake(nb, ["large_1.png#0,0,5,5", "large_1.png#5,0,5,5"])
    for tile in tiles[6:]:
        tile.name = tile.name.removesuffix(".png")
    train = [*names_of(tiles[:2]), "gone.png", "images/large_1.png"]
    names = {"train": train, "val": [tiles[4].name], "test": [tiles[5].name]}
    path = tmp_path / "split.json"
    path.write_text(json.dumps(names))
    config = nb.make_config(**defaults | {"split": str(path)})
    split, how = nb.split_tiles(tiles, config)
    assert split == {"train": tiles[:2] + tiles[6:], "val": [tiles[4]], "test": [tiles[5]]}
    # a raster's name stands for all its tiles; what is lost is said
    assert "1 names fit no usable tile, and are left out: gone.png" in how and str(path) in how
    assert "2 tiles are not named, and are left out: images/a_2.png, images/a_3.png" in how
    windows = json.dumps(names).replace("/", "\\\\")  # as Windows writes it
    path.write_text("\ufeff" + windows, encoding="utf-8")
    assert nb.split_from_file(tiles, config)[0] == split
    for twice in (tiles[0].name, tiles[6].name):
        path.write_text(json.dumps(names | {"test": [twice]}))
        with pytest.raises(ValueError, match=rf"names pixels twice: {twice}"):
            nb.split_from_file(tiles, config)
    for text in ("not json", "[]", '{"train": []}', json.dumps(names | {"test": None})):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"split = .*split\.json"):
            nb.split_from_file(tiles, config)


def test_real_tiles_split_by_block(nb, defaults, real_tiles, tmp_path):
    config = nb.make_config(**defaults | {"root": real_tiles, "save_dir": str(tmp_path)})
    tiles = nb.find_scenes(nb.inspect_dataset(config)[0], "auto")
    split, _ = nb.split_tiles(tiles, config)
    home = {tile.name: part for part in nb.SPLITS for tile in split[part]}
    assert len(home) == 712
    blocks = {part: {Path(t.name).stem.split("_")[0] for t in split[part]} for part in nb.SPLITS}
    assert (
        not blocks["train"] & (blocks["val"] | blocks["test"])
        and not blocks["val"] & blocks["test"]
    )
    assert all(
        abs(len(split[p]) / 712 - share) < 0.02
        for p, share in zip(nb.SPLITS, config.split, strict=True)
    )


@pytest.mark.parametrize("images_dir", ["images/images/", "./images/images", "images//images"])
def test_folders_may_be_written_in_any_way(nb, settings, write_pair, images_dir):
    write_pair("x_1")
    assert len(nb.pair_files(config_of(nb, settings, images_dir=images_dir))[0]) == 1


def test_touching_tiles_are_one_scene(nb):
    tiles = fake(nb, [f"tile{i}" for i in range(8)])
    boxes = [(0, 0, 10, 10), (10, 0, 20, 10), (20.4, 10, 30, 20), (50, 0, 60, 10), (62, 0, 70, 10)]
    boxes += [(0, 0, 10, 10), (70.3, 10, 80, 0)]  # in another zone; with south up
    grid = nb.Affine.translation(500_000, 6_400_000)
    for number, (tile, box) in enumerate(zip(tiles, boxes, strict=False)):
        tile.place = nb.web_mercator_box(grid, box, f"EPSG:{32634 if number == 5 else 32633}")
    for order in (1, -1):
        nb.find_scenes(tiles[::order], "auto")
        scenes = [tile.scene for tile in tiles]
        assert scenes[0] == scenes[1] == scenes[2] and scenes[4] == scenes[6]
        assert len(set(scenes)) == 5
    nb.find_scenes(tiles, None)  # a random tile split was asked for
    assert len({tile.scene for tile in tiles}) == 8


def test_georeference_comes_from_the_files(nb, settings):
    root = Path(settings["root"])
    for i in range(4):
        image, label = faulty.picture(f"x{i}")
        corner = {
            "crs": "EPSG:32633",
            "transform": faulty.rasterio.transform.from_origin(500000 + 32 * i, 0, 0.5, 0.5),
        }
        faulty.save_tiff(
            root / settings["images_dir"] / f"x{i}.tif", np.moveaxis(image, 2, 0), **corner
        )
        save(root / settings["labels_dir"] / f"x{i}_label.png", label)
    tiles = nb.inspect_dataset(config_of(nb, settings))[0]
    middle = 15 / 360 * nb.WEB_MERCATOR_WIDTH  # of the zone; these lie at the equator
    ground = np.subtract(tiles[1].place.bounds, [middle, 0, middle, 0]) * 0.9996
    assert ground == pytest.approx([32, -32, 64, 0], abs=0.5)
    assert len({tile.scene for tile in nb.find_scenes(tiles, "auto")}) == 1


# ---- the sample


def test_sample_is_the_same_every_time_and_its_labels_fit(nb):
    image, label = nb.paint_suburb(3, 256)
    again, label_again = nb.paint_suburb(3, 256)
    assert np.array_equal(image, again) and np.array_equal(label, label_again)
    assert (
        image.shape == (256, 256, 3) and image.dtype == np.uint8 and set(np.unique(label)) == {0, 1}
    )
    assert 0.03 < label.mean() < 0.4
    assert not np.array_equal(nb.paint_suburb(4, 256)[0], image)


def test_a_tile_keeps_little_of_its_image_in_memory(nb, settings, write_pair):
    for i in range(4):
        write_pair(f"a_{i}", side=300)
    tiles, _ = nb.inspect_dataset(nb.make_config(**settings))
    for tile in tiles:
        kept = tile.sample if tile.sample.base is None else tile.sample.base
        assert kept.nbytes < 20_000 < 300 * 300 * 3
