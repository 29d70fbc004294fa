"""Images larger than a window or a tile: windows, the cache, one orthophoto, blended scoring."""

import json
import math
from pathlib import Path

import faulty
import numpy as np
import pytest
import torch
from faulty import save, save_tiff
from PIL import Image

import nbtools

CPU = torch.device("cpu")


@pytest.fixture
def write_raster(nb, settings):
    """A function that writes a drawn scene as one image with its label below root."""

    def write(
        stem: str, width: int, height: int, suffix: str = ".png", seed: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        image, label = (
            pixels[:height, :width] for pixels in nb.paint_suburb(seed, max(width, height))
        )
        for folder, pixels, end in (
            ("images_dir", image, ""),
            ("labels_dir", 255 * label, settings["label_suffix"]),
        ):
            save(Path(settings["root"]) / settings[folder] / f"{stem}{end}{suffix}", pixels)
        return image, label

    return write


def verified(nb, settings, **changes):
    config = nb.make_config(**settings | changes)
    return nb.find_scenes(nb.inspect_dataset(config)[0], config.group_by), config


@pytest.fixture
def whole(nb, monkeypatch):
    """Few rasters are otherwise cut into small tiles at once."""
    monkeypatch.setattr(
        nb, "tile_boxes", lambda raster, side: [(0, 0, raster.width, raster.height)]
    )


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_windows_cover_an_image_without_padding(nb, settings, write_raster, whole, suffix):
    image, label = write_raster("a_1", 150, 100, suffix)
    (tile,), config = verified(nb, settings)
    data = nb.RooftopDataset([tile], config)
    corners = [corner for _, corner in data.windows]
    assert corners == [(x, y) for y in (0, 36) for x in (0, 64, 86)]  # the last shifted inwards
    for index, (x, y) in enumerate(corners):
        pixels, numbers, _ = data.pixels(0, index)
        assert np.array_equal(pixels, image[y : y + 64, x : x + 64])
        assert np.array_equal(numbers, label[y : y + 64, x : x + 64])


def test_only_what_is_narrower_than_a_window_is_padded(nb, settings, write_raster, whole):
    image, label = write_raster("a_1", 400, 40)
    (tile,), config = verified(nb, settings)
    data = nb.RooftopDataset([tile], config)
    assert [corner for _, corner in data.windows] == [(x, 0) for x in (*range(0, 384, 64), 336)]
    pixels, numbers, _ = data.pixels(0, 6)
    assert np.array_equal(pixels[:40], image[:, 336:]) and np.array_equal(
        numbers[:40], label[:, 336:]
    )
    assert np.array_equal(pixels[40:], image[:15:-1, 336:])  # mirrored
    assert (numbers[40:] == nb.IGNORE_INDEX).all()


@pytest.mark.parametrize(("side", "count"), [(64, 1), (66, 1), (96, 2), (128, 4), (260, 17)])
def test_an_epoch_shows_as_many_windows_as_fill_the_area(nb, settings, write_pair, side, count):
    """A tile that is a little larger than a window does not cost four of them."""
    for number in range(4):
        write_pair(f"s_{number}", side=side)
    tiles, config = verified(nb, settings)
    assert len(nb.RooftopDataset(tiles, config, train=True)) == 4 * count
    covering = [len(nb.window_corners(tile, config, cover=True)) for tile in tiles]
    assert set(covering) == {math.ceil(side / 64) ** 2}


def test_training_windows_lie_anywhere_inside_and_move(nb, settings, write_raster, whole):
    image, _ = write_raster("a_1", 150, 100)
    (tile,), config = verified(nb, settings, augmentation="none")
    data = nb.RooftopDataset([tile], config, train=True)
    views = [data.pixels(epoch, 0) for epoch in range(40)]
    windows = np.lib.stride_tricks.sliding_window_view(image, (64, 64), axis=(0, 1))[..., 0, :, :]
    places = set()
    for pixels, label, _ in views:
        matches = np.argwhere((windows == pixels[..., 0]).all(axis=(2, 3)))
        assert len(matches) == 1 and (label != nb.IGNORE_INDEX).all()
        places.add(tuple(matches[0]))
    assert len(places) > 30 and max(y for y, _ in places) > 30 and max(x for _, x in places) > 70
    assert np.array_equal(data.pixels(3, 0)[0], views[3][0])


def test_resize_shrinks_instead(nb, settings, write_raster):
    write_raster("a_1", 150, 100)
    write_raster("a_2", 64, 64)
    for i in range(3):
        write_raster(f"b_{i}", 40, 40, seed=i)
    tiles, config = verified(nb, settings, large_images="resize")
    data = nb.RooftopDataset(tiles, config)
    items = [data[0, index] for index in range(len(data))]
    assert len(data) == 5 and all(image.shape == (3, 64, 64) for image, *_ in items)
    tiles, config = verified(nb, settings)
    assert len(nb.RooftopDataset(tiles, config)) == 6 + 4


def test_a_large_file_of_any_kind_is_read_tile_by_tile(nb, settings, monkeypatch):
    monkeypatch.setattr(nb, "MAX_SIDE", 100)
    image, label = nb.paint_suburb(1, 150)
    root = Path(settings["root"])
    for suffix in (".png", ".jpg", ".tif"):
        save(
            root / settings["images_dir"] / f"a{suffix[1:]}_1{suffix}",
            image + np.uint8(len(suffix)),
        )
        save(root / settings["labels_dir"] / f"a{suffix[1:]}_1_label.png", 255 * label)
    blocks = {"tiled": True, "blockxsize": 64, "blockysize": 64}
    tiled = np.moveaxis(image[::-1], 2, 0)
    save_tiff(root / settings["images_dir"] / "tiled_1.tif", tiled, **blocks)
    save_tiff(
        root / settings["labels_dir"] / "tiled_1_label.tif", 255 * label[None, ::-1], **blocks
    )
    tiles, config = verified(nb, settings)
    assert len(tiles) == 3 * 4  # those of the TIFF have the pixels of the PNG
    for tile in tiles:
        x, y, width, height = tile.box
        path = root / tile.name.partition("#")[0]
        pixels, numbers = nb.read_tile(tile)
        truth = np.asarray(Image.open(path))[y : y + height, x : x + width]
        assert abs(pixels.astype(int) - truth).mean() < (1 if path.suffix == ".jpg" else 1e-9)
        own = label[::-1] if "tiled" in tile.name else label
        assert np.array_equal(numbers, own[y : y + height, x : x + width])
        part = nb.read_tile(tile, 20, 30, 16)
        assert np.array_equal(part[0], pixels[30:46, 20:36])
        assert np.array_equal(part[1], numbers[30:46, 20:36])


def test_pixels_without_data_have_no_class(nb, settings, whole):
    image, label = nb.paint_suburb(1, 150)
    clear = np.dstack([image, np.full((150, 150), 255, np.uint8)])
    clear[:50, :, 3] = 0
    save(Path(settings["root"]) / settings["images_dir"] / "a_1.png", clear)
    save(Path(settings["root"]) / settings["labels_dir"] / "a_1_label.png", 255 * label)
    (tile,), config = verified(nb, settings)
    pixels, numbers = nb.read_tile(tile)
    assert (numbers[:50] == nb.IGNORE_INDEX).all() and (pixels[:50] == 0).all()
    assert np.array_equal(pixels[50:], image[50:]) and tile.class_pixels.sum() == 100 * 150


def covered(tiles, width, height):
    """How often each pixel of a raster lies in a tile."""
    counts = np.zeros((height, width), int)
    for tile in tiles:
        x, y, across, down = tile.box
        counts[y : y + down, x : x + across] += 1
    return counts


@pytest.mark.parametrize(("width", "height"), [(700, 100), (100, 700), (300, 300), (130, 192)])
def test_one_raster_is_noted_as_small_tiles(nb, settings, write_raster, width, height):
    _, label = write_raster("ortho", width, height)
    tiles, config = verified(nb, settings)
    assert (covered(tiles, width, height) == 1).all()
    for tile in tiles:
        x, y, across, down = tile.box
        assert 64 <= across < 128 and 64 <= down < 128
        assert tile.name == f"images/images/ortho.png#{x},{y},{across},{down}"
        own = label[y : y + down, x : x + across]
        assert tile.class_pixels.tolist() == [(own == 0).sum(), (own == 1).sum()]
        assert np.array_equal(nb.read_tile(tile)[1], own)
    split, how = nb.split_tiles(tiles, config)
    assert "1 scenes are too few" in how and all(split.values())
    assert sum(split.values(), []) == tiles  # contiguous, in their order
    file = Path(settings["root"]) / "parts.json"
    file.write_text(json.dumps({part: [tile.name for tile in split[part]] for part in nb.SPLITS}))
    config = nb.make_config(**settings | {"split": str(file)})
    assert nb.split_tiles(tiles, config)[0] == split


def test_no_tile_is_larger_than_the_bound(nb, settings, write_raster, monkeypatch):
    monkeypatch.setattr(nb, "MAX_SIDE", 100)
    for number in range(3):
        write_raster(f"city{number}", 330, 150, seed=number)
    tiles, config = verified(nb, settings)
    assert len(tiles) == 3 * 4 * 2 and max(max(tile.box[2:]) for tile in tiles) <= 100
    for number in range(3):
        own = [tile for tile in tiles if f"city{number}" in tile.name]
        assert (covered(own, 330, 150) == 1).all() and len({tile.scene for tile in own}) == 1
    assert len({tile.scene for tile in tiles}) == 3
    split, how = nb.split_tiles(tiles, nb.make_config(**settings | {"split": [0.4, 0.3, 0.3]}))
    assert "3 whole scenes" in how
    names = {part: [f"images/images/city{i}.png"] for i, part in enumerate(nb.SPLITS)}
    file = Path(settings["root"]) / "official.json"  # of whole rasters
    file.write_text(json.dumps(names))
    split, _ = nb.split_tiles(tiles, nb.make_config(**settings | {"split": str(file)}))
    assert [len(split[part]) for part in nb.SPLITS] == [8, 8, 8]


def test_all_windows_of_a_raster_stay_together(nb, settings, write_raster):
    for i in range(12):
        write_raster(f"city{i}", 150, 100, seed=i)
    tiles, config = verified(nb, settings)
    split, how = nb.split_tiles(tiles, config)
    assert "12 whole scenes" in how
    assert sorted(len(split[part]) for part in nb.SPLITS) == [1, 1, 10]
    assert sum(len(nb.RooftopDataset(split[part], config)) for part in nb.SPLITS) == 12 * 6


class Lookup(torch.nn.Module):
    """A model that knows the truth: sure of roof where the image is bright."""

    def forward(self, images):
        roof = 20.0 * (images.mean(1) > 0) - 10
        return torch.stack([-roof, roof], 1)


def test_a_tile_of_many_windows_is_scored_as_one(nb, settings, whole, views_of_one_size):
    """Roofs that cross borders of windows are one object, and such borders no boundary."""
    _, label = nb.paint_suburb(1, 150)
    label = label[:100]
    for folder, pixels, end in (
        ("images_dir", np.dstack([label] * 3), ""),
        ("labels_dir", label, "_label"),
    ):
        save(Path(settings["root"]) / settings[folder] / f"a_1{end}.png", 255 * pixels)
    (tile,), config = verified(nb, settings)
    predictor = nb.Predictor([Lookup()], config, CPU, "fp32", tta=True)
    (counts,), *_ = nb.score_tiles(predictor, [tile])
    tp, fp, fn, intersection, union, object_tp, object_fp, object_fn = counts
    assert not fp.any() and not fn.any() and tp.sum() == label.size
    count = nb.cv2.connectedComponents(label)[0] - 1
    assert object_tp[1] == count and not object_fp.any() and not object_fn.any()
    assert (intersection == union).all()


@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 56), (200, 130)])
def test_predictions_come_at_the_labels_own_size(nb, settings, height, width):
    pixels = faulty.picture("a")[0].repeat(4, 0).repeat(3, 1)[:height, :width]
    for large_images in ("resize", "tile"):
        config = nb.make_config(**settings | {"large_images": large_images})
        model = nb.build_model(config).eval()
        predictor = nb.Predictor([model], config, CPU, "fp32", tta=True)
        cut = large_images == "tile" and max(height, width) > 64
        probability = predictor.predict(pixels, cut)
        assert probability.shape == (2, height, width)
        assert np.allclose(probability.sum(0), 1, atol=1e-5)


def test_one_orthophoto_with_its_mask_is_enough(tmp_path, settings, write_raster):
    """A GeoTIFF and its mask, through the whole notebook."""
    write_raster("ortho", 500, 200, ".tif")
    small = {
        "root": settings["root"],
        "image_size": 64,
        "batch_size": 4,
        "epochs": 1,
        "num_workers": 1,
    }
    model = {"encoder_name": "resnet18", "encoder_weights": None, "save_dir": str(tmp_path / "out")}
    text = nbtools.printed(nbtools.run(nbtools.NOTEBOOK, tmp_path, **small, **model))
    assert "1 scenes are too few: the row of all tiles is cut in three" in text
    split = json.loads((tmp_path / "out" / "split.json").read_text())
    assert all(name.startswith("images/images/ortho.tif#") for name in sum(split.values(), []))
    assert len(sum(split.values(), [])) == 7 * 3
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["tiles"] == len(split["test"]) and 0 <= metrics["pixel_accuracy"] <= 1
    assert torch.load(tmp_path / "out" / "rooftop_last.pt", weights_only=True)["split"] == split
