"""Data: reading, pairing, verifying, resizing, augmenting, splitting."""

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import save


def config_of(nb, settings, **changes):
    return nb.make_config(**settings | changes)


# ---- reading


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1"])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_images_of_many_kinds_become_rgb(nb, tmp_path, mode, suffix):
    pixels = np.zeros((6, 9, 3), np.uint8)
    pixels[:3] = 255
    Image.fromarray(pixels).convert(mode).save(tmp_path / f"a{suffix}")
    read = nb.read_pixels(tmp_path / f"a{suffix}", "RGB")
    assert read.dtype == np.uint8 and np.array_equal(read, pixels)


@pytest.mark.parametrize("spoil", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"no image" * 9])
def test_a_broken_file_is_named(nb, tmp_path, spoil):
    path = tmp_path / "broken.png"
    save(path, np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=r"broken\.png"):
        nb.read_pixels(path, "RGB")


@pytest.mark.parametrize("pixels", [np.full((4, 4), 40000, np.uint16), np.ones((4, 4), np.float32)])
def test_deep_pixels_are_refused_by_name_with_what_to_do(nb, tmp_path, pixels):
    save(tmp_path / "deep.tif", pixels)
    with pytest.raises(ValueError, match=r"deep\.tif.*convert them to 8-bit"):
        nb.read_pixels(tmp_path / "deep.tif", "RGB")


@pytest.mark.parametrize(
    ("values", "expected", "kind"),
    [
        ([0, 255, 255, 0], [0, 1, 1, 0], None),
        ([0, 1, 1, 0], [0, 1, 1, 0], "label of 0 and 1"),
        ([1, 1, 1, 1], [1, 1, 1, 1], "label of 0 and 1"),
        ([0, 120, 130, 255], [0, 0, 1, 1], "unexpected label values"),
        ([0, 1, 254, 255], [0, 0, 1, 1], "unexpected label values"),
        ([0, 0, 0, 0], [0, 0, 0, 0], None),
    ],
)
def test_label_values_become_class_numbers(nb, tmp_path, values, expected, kind):
    save(tmp_path / "a.png", np.array([values], np.uint8))
    label, odd = nb.read_label(tmp_path / "a.png", [0, 255])
    assert label.dtype == np.uint8 and label.tolist() == [expected]
    assert (odd and odd[0]) == kind
    inverted, odd = nb.read_label(tmp_path / "a.png", [255, 0])
    assert inverted.tolist() == [[1 - number for number in expected]] and (odd and odd[0]) == kind


def test_palette_and_three_class_labels_keep_their_numbers(nb, tmp_path):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), mode="P")
    image.putpalette([0, 0, 0, 255, 0, 0, 255, 255, 255])
    image.save(tmp_path / "a.png")
    assert nb.read_label(tmp_path / "a.png", [0, 1, 2])[0].tolist() == [[0, 1, 2]]
    save(tmp_path / "b.png", np.array([[10, 20, 30]], np.uint8))
    assert nb.read_label(tmp_path / "b.png", [30, 10, 20])[0].tolist() == [[1, 2, 0]]


# ---- pairing and verifying


@pytest.fixture
def faulty(settings, write_pair):
    """A folder with six good pairs and one of every fault."""
    for i in range(6):
        write_pair(f"good_{i}")
    for stem in ("lonely_1", "short_1", "empty_1", "small_1", "twice_1", "wrong_1"):
        write_pair(stem)
    write_pair("binary_1", high=1)
    write_pair("grey_1", high=200)
    images = Path(settings["root"]) / settings["images_dir"]
    labels = Path(settings["root"]) / settings["labels_dir"]
    (labels / "lonely_1_label.png").unlink()
    save(labels / "stray_1_label.png", np.zeros((64, 64), np.uint8))
    data = (images / "short_1.png").read_bytes()
    (images / "short_1.png").write_bytes(data[: len(data) // 2])
    (labels / "empty_1_label.png").write_bytes(b"")
    save(labels / "small_1_label.png", np.zeros((32, 64), np.uint8))
    save(images / "twice_1.jpg", np.zeros((64, 64, 3), np.uint8))
    save(labels / "wrong_1_label.png", np.full((64, 64), 255, np.uint8))
    save(images / ".hidden_1.png", np.zeros((64, 64, 3), np.uint8))
    return settings


def test_every_fault_is_found_and_good_pairs_go_on(nb, faulty):
    before = {path: path.read_bytes() for path in Path(faulty["root"]).rglob("*.*")}
    tiles, report = nb.verify_dataset(config_of(nb, faulty))
    found = {(Path(row.file).name, row.kind, row.action) for row in report.itertuples()}
    assert found == {
        ("lonely_1.png", "image without label", "left out"),
        ("stray_1_label.png", "label without image", "left out"),
        ("short_1.png", "unreadable", "left out"),
        ("empty_1.png", "unreadable", "left out"),
        ("small_1.png", "size mismatch", "left out"),
        ("twice_1.jpg", "several files for one tile", "left out"),
        ("binary_1_label.png", "label of 0 and 1", "1 read as 255"),
        ("grey_1_label.png", "unexpected label values", "read as the nearest class value"),
        ("wrong_1_label.png", "label without background", "used"),
    }
    stems = [Path(tile.image).stem for tile in tiles]
    assert stems == ["binary_1", *(f"good_{i}" for i in range(6)), "grey_1", "wrong_1"]
    assert tiles[0].class_pixels == (64 * 64 - 32 * 32, 32 * 32)
    with open(Path(faulty["save_dir"]) / "dataset_report.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["file", "kind", "detail", "action"] and len(rows) == 10
    detail = {row[1]: row[2] for row in rows}
    assert "empty_1_label.png" in rows[[Path(r[0]).name for r in rows].index("empty_1.png")][2]
    assert detail["size mismatch"] == "image 64 x 64, label 64 x 32"
    assert before == {path: path.read_bytes() for path in Path(faulty["root"]).rglob("*.*")}


def test_pairs_are_made_by_name_across_suffixes_and_folders(nb, settings, write_pair):
    for stem in ("b/tile_10", "b/tile_2", "a tile", "Ünï_1"):
        write_pair(stem, suffix=".JPG")
    pairs, faults = nb.pair_files(config_of(nb, settings))
    assert faults == []
    assert [image.stem for image, _ in pairs] == ["a tile", "tile_2", "tile_10", "Ünï_1"]
    assert all(label.stem == f"{image.stem}_label" for image, label in pairs)


def test_links_are_followed_but_not_in_circles(nb, settings, write_pair, tmp_path):
    write_pair("x_1")
    images = Path(settings["root"]) / settings["images_dir"]
    (tmp_path / "elsewhere").mkdir()
    save(tmp_path / "elsewhere" / "y_1.png", np.zeros((8, 8, 3), np.uint8))
    (images / "linked").symlink_to(tmp_path / "elsewhere")
    (images / "circle").symlink_to(images)
    assert [path.name for path in nb.find_images(images)] == ["y_1.png", "x_1.png"]


def test_labels_of_the_same_stem(nb, settings, write_pair):
    settings |= {"label_suffix": "", "labels_dir": "masks"}
    write_pair("x_1")
    assert len(nb.pair_files(config_of(nb, settings))[0]) == 1


def test_too_few_tiles_stop_with_the_reasons(nb, settings, write_pair):
    for i in range(3):
        write_pair(f"a_{i}")
    write_pair("bad_1")
    (Path(settings["root"]) / settings["images_dir"] / "bad_1.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"3 usable tiles, at least 4 .*1 x unreadable.*dataset_report.csv"):
        nb.verify_dataset(config_of(nb, settings))


def test_real_tiles_verify_clean(nb, defaults, real_tiles, tmp_path):
    tiles, report = nb.verify_dataset(nb.make_config(**defaults | {"root": real_tiles, "save_dir": str(tmp_path)}))
    assert len(tiles) == 712 and len(report) == 0
    assert sum(tile.class_pixels[1] == 0 for tile in tiles) == 339
    assert np.mean([nb.roof_share(tile) for tile in tiles]) == pytest.approx(0.09, abs=0.005)


# ---- dataset and loader


@pytest.fixture
def tiles(nb, settings, write_pair):
    """Twelve verified tiles in three scenes."""
    for i in range(12):
        write_pair(f"scene{i % 3}_{i}")
    return nb.verify_dataset(config_of(nb, settings))[0]


@pytest.mark.parametrize("side", [48, 64, 100])
def test_item_is_standardised_and_of_the_models_size(nb, settings, write_pair, side):
    for i in range(4):
        write_pair(f"s_{i}", side=side)
    config = config_of(nb, settings)
    image, label = nb.RooftopDataset(nb.verify_dataset(config)[0], config)[0, 0]
    assert image.shape == (3, 64, 64) and image.dtype == torch.float32
    assert label.shape == (64, 64) and label.dtype == torch.int64
    assert label.unique().tolist() == [0, 1]
    pixels = image * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) + torch.tensor([0.485, 0.456, 0.406]).view(
        3, 1, 1
    )
    assert pixels.min() >= -1e-5 and pixels.max() <= 1 + 1e-5
    assert pixels[:, label == 1].min() > pixels[:, label == 0].mean()  # label and bright square coincide


def test_resizing_invents_no_class_between_two_others(nb, settings, write_pair):
    for i in range(4):
        write_pair(f"s_{i}", side=100)
    three = {"num_classes": 3, "class_names": ["ground", "wall", "roof"], "class_values": [0, 100, 255]}
    config = config_of(nb, settings, **three)
    tiles = nb.verify_dataset(config)[0]
    assert all(set(nb.RooftopDataset(tiles, config)[0, i][1].unique().tolist()) == {0, 2} for i in range(4))


@pytest.mark.parametrize("kind", ["standard", "strong"])
def test_augmentation_depends_on_seed_epoch_and_tile_alone(nb, settings, tiles, kind):
    config = config_of(nb, settings)
    data = nb.RooftopDataset(tiles, config, kind)
    first, _ = data[1, 0]
    data[2, 5]  # another tile in between changes nothing
    assert torch.equal(data[1, 0][0], first)
    assert not torch.equal(data[2, 0][0], first)
    other = nb.RooftopDataset(tiles, config_of(nb, settings, seed=1), kind)
    assert not torch.equal(other[1, 0][0], first)
    assert all(set(data[epoch, 3][1].unique().tolist()) <= {0, 1} for epoch in range(20))


def test_augmented_label_follows_its_image(nb, settings, tiles):
    data = nb.RooftopDataset(tiles, config_of(nb, settings), "standard")
    for epoch in range(10):
        image, label = data.pixels(epoch, 2)
        bright = image.mean(axis=2) > image.mean()
        assert (bright == (label == 1)).mean() > 0.95


def test_transforms_draw_independently(nb, settings, tiles):
    data = nb.RooftopDataset(tiles, config_of(nb, settings), "standard")
    kept = []
    for epoch in range(200):
        image, label = data.pixels(epoch, 0)
        kept.append((label.sum() == 32 * 32, image[label == 1].mean()))
    still = [light for unscaled, light in kept if unscaled]
    assert 60 < len(still) < 140  # Affine is applied to half of them ...
    assert np.std(still) > 5  # ... and those that it leaves alone are re-lit all the same


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_whatever_the_workers(nb, settings, tiles, workers):
    def batches(count, epoch):
        config = config_of(nb, settings, num_workers=count)
        loader = nb.make_loader(nb.RooftopDataset(tiles, config, "strong"), torch.device("cpu"), train=True)
        loader.sampler.epoch = epoch
        return [images for images, _ in loader]

    assert torch.equal(torch.cat(batches(workers, 1)), torch.cat(batches(0, 1)))
    assert not torch.equal(torch.cat(batches(workers, 1)), torch.cat(batches(workers, 2)))


@pytest.mark.parametrize(("batch", "sizes"), [(4, [4, 4, 4]), (5, [5, 5]), (12, [12]), (13, [12])])
def test_training_batches_are_full_unless_there_is_only_one(nb, settings, tiles, batch, sizes):
    config = config_of(nb, settings, batch_size=batch)
    data, cpu = nb.RooftopDataset(tiles, config), torch.device("cpu")
    assert [len(images) for images, _ in nb.make_loader(data, cpu, train=True)] == sizes
    assert sum(len(images) for images, _ in nb.make_loader(data, cpu)) == 12


def test_no_workers_where_they_cannot_be_forked(nb, monkeypatch):
    for system in ("win32", "darwin"):
        monkeypatch.setattr(nb.sys, "platform", system)
        assert nb.worker_count("auto", torch.device("cuda")) == nb.worker_count(8, torch.device("cuda")) == 0


# ---- split


def fake(nb, names, roof=0.1):
    return [nb.Tile(f"images/{n}.png", "", 10, 10, "", (int(100 - 100 * roof), int(100 * roof))) for n in names]


def split_of(nb, defaults, tiles, **changes):
    return nb.split_by_scene(tiles, nb.make_config(**defaults | changes))


def test_scenes_never_straddle_a_split(nb, defaults):
    tiles = fake(nb, [f"block-{i // 7:02}_{i}" for i in range(210)])
    split, how = split_of(nb, defaults, tiles)
    assert sorted(sum(split.values(), [])) == sorted(tiles)
    scenes = {part: {nb.scene_of(tile.image, "auto") for tile in split[part]} for part in nb.SPLITS}
    assert not (scenes["train"] & scenes["val"] or scenes["train"] & scenes["test"] or scenes["val"] & scenes["test"])
    assert 0.85 <= len(split["train"]) / 210 <= 0.95 and "30 whole scenes" in how
    assert split_of(nb, defaults, tiles)[0] == split
    assert split_of(nb, defaults, tiles, seed=1)[0] != split


def test_roof_shares_are_alike_where_possible(nb, defaults):
    tiles = [t for i in range(40) for t in fake(nb, [f"s{i}_{j}" for j in range(5)], roof=[0.0, 0.4][i % 2])]
    split, _ = split_of(nb, defaults, tiles)
    shares = [np.mean([nb.roof_share(tile) for tile in split[part]]) for part in nb.SPLITS]
    assert shares == pytest.approx([0.2] * 3, abs=0.05)


@pytest.mark.parametrize("count", [4, 7, 40, 400])
def test_one_scene_is_cut_into_contiguous_runs(nb, defaults, count):
    tiles = fake(nb, [f"image_{i}" for i in range(count)])
    split, how = split_of(nb, defaults, tiles)
    assert split["train"] + split["val"] + split["test"] == tiles  # in natural order
    assert all(len(split[part]) >= max(1, count // 20 - 1) for part in nb.SPLITS) and "contiguous runs" in how


@pytest.mark.parametrize("count", range(4, 25))
@pytest.mark.parametrize("scenes", [1, 2, 3, 100])
def test_every_split_gets_a_tile_however_few_there_are(nb, defaults, count, scenes):
    tiles = fake(nb, sorted(f"s{i % scenes}_{i}" for i in range(count)))
    split, _ = split_of(nb, defaults, tiles)
    assert all(split.values()) and sorted(sum(split.values(), [])) == sorted(tiles)
    assert len(split["train"]) >= count / 2


def test_stems_without_underscore_are_scenes_of_their_own(nb, defaults):
    _, how = split_of(nb, defaults, fake(nb, [f"tile{i}" for i in range(50)]))
    assert "50 whole scenes" in how


@pytest.mark.parametrize(
    ("name", "group_by", "scene"),
    [
        ("images/jonkoping-c03_r512.tif", "auto", "images/jonkoping-c03"),
        ("images/austin1_12.tif", "auto", "images/austin1"),
        ("images/austin1_12.tif", r"^([a-z]+)", "austin"),
        ("images/austin1_12.tif", None, "images/austin1_12.tif"),
    ],
)
def test_scene_of(nb, name, group_by, scene):
    assert nb.scene_of(name, group_by) == scene


def test_regex_that_does_not_match_names_the_file(nb):
    with pytest.raises(ValueError, match="group_by.*vienna_1.png"):
        nb.scene_of("images/vienna_1.png", r"(austin)")


def test_split_from_a_file(nb, defaults, tmp_path):
    tiles = fake(nb, [f"a_{i}" for i in range(6)])
    names = {"train": [t.image for t in tiles[:3]] + ["gone.png"], "val": [tiles[4].image], "test": [tiles[5].image]}
    path = tmp_path / "split.json"
    path.write_text(json.dumps(names))
    config = nb.make_config(**defaults | {"split": str(path)})
    split, how = nb.split_from_file(tiles, config)
    assert Counter({part: len(split[part]) for part in split}) == Counter(train=3, val=1, test=1)
    assert "6 tiles" in how
    for text in ("not json", "[]", '{"train": []}', json.dumps(names | {"test": ["gone.png"]})):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"split = .*split\.json"):
            nb.split_from_file(tiles, config)


def test_real_tiles_split_by_block(nb, defaults, real_tiles, tmp_path):
    config = nb.make_config(**defaults | {"root": real_tiles, "save_dir": str(tmp_path)})
    split, _ = nb.split_by_scene(nb.verify_dataset(config)[0], config)
    blocks = {part: {Path(t.image).stem.split("_")[0] for t in split[part]} for part in nb.SPLITS}
    assert not blocks["train"] & (blocks["val"] | blocks["test"]) and not blocks["val"] & blocks["test"]
    assert all(abs(len(split[p]) / 712 - share) < 0.02 for p, share in zip(nb.SPLITS, config.split, strict=True))


# ---- the sample


def test_sample_is_the_same_every_time_and_its_labels_fit(nb):
    image, label = nb.draw_scene(3, 256)
    again, label_again = nb.draw_scene(3, 256)
    assert np.array_equal(image, again) and np.array_equal(label, label_again)
    assert image.shape == (256, 256, 3) and image.dtype == np.uint8 and set(np.unique(label)) == {0, 1}
    assert 0.03 < label.mean() < 0.4
    assert not np.array_equal(nb.draw_scene(4, 256)[0], image)
