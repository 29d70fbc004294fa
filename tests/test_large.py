"""Images larger than a tile: windows, the cache, one orthophoto, scoring of stitched images."""

import json
from pathlib import Path

import faulty
import numpy as np
import pytest
import torch
from faulty import save
from PIL import Image

import nbtools

CPU = torch.device("cpu")


@pytest.fixture
def write_raster(nb, settings):
    """A function that writes a drawn scene as one image with its label below root."""

    def write(stem: str, width: int, height: int, suffix: str = ".png", seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
        image, label = (pixels[:height, :width] for pixels in nb.draw_scene(seed, max(width, height)))
        for folder, pixels, end in (("images_dir", image, ""), ("labels_dir", 255 * label, settings["label_suffix"])):
            save(Path(settings["root"]) / settings[folder] / f"{stem}{end}{suffix}", pixels)
        return image, label

    return write


def verified(nb, settings, **changes):
    config = nb.make_config(**settings | changes)
    return nb.find_scenes(nb.verify_dataset(config)[0], config.group_by), config


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_windows_cover_an_image_once_and_ignore_what_lies_beyond(nb, settings, write_raster, suffix):
    image, label = write_raster("a_1", 150, 100, suffix)
    (tile,), config = verified(nb, settings)
    data = nb.RooftopDataset([tile], config)
    assert len(data) == 3 * 2
    stitched, seen = np.zeros((128, 192, 3), int), np.full((128, 192), -1)
    for index, (_, (x, y)) in enumerate(data.windows):
        pixels, numbers = data.pixels(0, index)
        stitched[y : y + 64, x : x + 64], seen[y : y + 64, x : x + 64] = pixels, numbers
    assert np.array_equal(stitched[:100, :150], image) and np.array_equal(seen[:100, :150], label)
    assert (seen[100:] == nb.IGNORE_INDEX).all() and (seen[:, 150:] == nb.IGNORE_INDEX).all()


def test_training_windows_lie_anywhere_inside_and_move(nb, settings, write_raster):
    image, _ = write_raster("a_1", 150, 100)
    (tile,), config = verified(nb, settings, augmentation="none")
    data = nb.RooftopDataset([tile], config, train=True)
    views = [data.pixels(epoch, 0) for epoch in range(40)]
    windows = np.lib.stride_tricks.sliding_window_view(image, (64, 64), axis=(0, 1))[..., 0, :, :]
    places = set()
    for pixels, label in views:
        matches = np.argwhere((windows == pixels[..., 0]).all(axis=(2, 3)))
        assert len(matches) == 1 and (label != nb.IGNORE_INDEX).all()
        places.add(tuple(matches[0]))
    assert len(places) > 30 and max(y for y, _ in places) > 30 and max(x for _, x in places) > 70
    assert np.array_equal(data.pixels(3, 0)[0], views[3][0])


def test_resize_shrinks_instead(nb, settings, write_raster):
    write_raster("a_1", 150, 100)
    write_raster("a_2", 64, 64)
    for i in range(3):
        write_raster(f"b_{i}", 40, 40)
    tiles, config = verified(nb, settings, large_images="resize")
    data = nb.RooftopDataset(tiles, config)
    assert len(data) == 5 and all(image.shape == (3, 64, 64) for image, *_ in (data[0, i] for i in range(5)))
    tiles, config = verified(nb, settings)
    assert len(nb.RooftopDataset(tiles, config)) == 6 + 4


def test_large_png_and_jpeg_are_copied_once_into_the_cache(nb, settings, monkeypatch):
    monkeypatch.setattr(nb, "WHOLE_PIXELS", 5000)
    image, label = nb.draw_scene(1, 150)
    root = Path(settings["root"])
    for suffix in (".png", ".jpg"):
        save(root / settings["images_dir"] / f"a{suffix[1:]}_1{suffix}", image)
        save(root / settings["labels_dir"] / f"a{suffix[1:]}_1_label.png", 255 * label)
    blocks = {"tiled": True, "blockxsize": 64, "blockysize": 64}
    faulty.save_tiff(root / settings["images_dir"] / "tiled_1.tif", np.moveaxis(image, 2, 0), **blocks)
    faulty.save_tiff(root / settings["labels_dir"] / "tiled_1_label.tif", 255 * label[None], **blocks)
    tiles, config = verified(nb, settings)
    cache = Path(config.save_dir) / "cache"
    assert len(list(cache.iterdir())) == 4 and not list(cache.glob("*.part"))
    made = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    by_stem = {Path(tile.name).stem: tile for tile in tiles}
    assert Path(by_stem["tiled_1"].image).parent.name == "images"
    png, jpeg = (nb.read_tile(by_stem[stem], config, (70, 70), 64) for stem in ("apng_1", "ajpg_1"))
    assert np.array_equal(png[0], image[70:134, 70:134]) and np.array_equal(png[1], label[70:134, 70:134])
    lossy = np.asarray(Image.open(root / settings["images_dir"] / "ajpg_1.jpg"))
    assert abs(jpeg[0].astype(int) - lossy[70:134, 70:134]).mean() < 1  # decoders differ a little
    verified(nb, settings)
    assert made == {path: path.stat().st_mtime_ns for path in cache.iterdir()}  # not made again
    save(root / settings["images_dir"] / "apng_1.png", 255 - image)  # a file that has changed is
    tiles, _ = verified(nb, settings)
    changed = next(tile for tile in tiles if "apng" in tile.name)
    assert np.array_equal(nb.read_tile(changed, config)[0], 255 - image)


def test_pixels_without_data_stay_so_in_the_cache(nb, settings, monkeypatch):
    monkeypatch.setattr(nb, "WHOLE_PIXELS", 5000)
    image, label = nb.draw_scene(1, 150)
    clear = np.dstack([image, np.full((150, 150), 255, np.uint8)])
    clear[:50, :, 3] = 0
    save(Path(settings["root"]) / settings["images_dir"] / "a_1.png", clear)
    save(Path(settings["root"]) / settings["labels_dir"] / "a_1_label.png", 255 * label)
    (tile,), config = verified(nb, settings)
    assert "cache" in tile.image
    assert (nb.read_tile(tile, config)[1][:50] == nb.IGNORE_INDEX).all() and sum(tile.class_pixels) == 100 * 150


@pytest.mark.parametrize(("width", "height"), [(700, 100), (100, 700), (300, 300), (130, 128)])
def test_one_raster_is_cut_into_parts_that_cover_it(nb, settings, write_raster, width, height):
    _, label = write_raster("ortho", width, height)
    tiles, config = verified(nb, settings)
    split, how = nb.split_by_scene(tiles, config)
    assert "cut into three parts" in how and [len(split[part]) for part in nb.SPLITS] == [1, 1, 1]
    covered = np.zeros((height, width), int)
    for (part,) in split.values():
        covered[part.y : part.y + part.height, part.x : part.x + part.width] += 1
        own = label[part.y : part.y + part.height, part.x : part.x + part.width]
        assert part.class_pixels == ((own == 0).sum(), (own == 1).sum())
        assert part.name == f"images/images/ortho.png#{part.x},{part.y},{part.width},{part.height}"
    assert (covered == 1).all()
    longer = [(part.width if width >= height else part.height) for (part,) in split.values()]
    assert min(longer) >= min(64, max(width, height) // 3)  # no part narrower than a window
    file = Path(settings["root"]) / "parts.json"
    file.write_text(json.dumps({part: [split[part][0].name] for part in nb.SPLITS}))
    again, _ = nb.split_from_file(tiles, nb.make_config(**settings | {"split": str(file)}))
    assert again == split


def test_all_windows_of_a_raster_stay_together(nb, settings, write_raster):
    for i in range(12):
        write_raster(f"city{i}", 150, 100, seed=i)
    tiles, config = verified(nb, settings)
    split, how = nb.split_by_scene(tiles, config)
    assert "12 whole scenes" in how and sorted(len(split[part]) for part in nb.SPLITS) == [1, 1, 10]
    assert sum(len(nb.RooftopDataset(split[part], config)) for part in nb.SPLITS) == 12 * 6


def test_a_stitched_image_is_scored_as_one(nb, settings, write_raster):
    """Roofs that cross the borders of windows are one object, and borders of windows no boundary."""
    image, label = write_raster("a_1", 150, 100)
    (tile,), config = verified(nb, settings)

    def oracle(images):
        """Look up the true label by the window's pixels."""
        found = torch.zeros(len(images), 2, 64, 64)
        for y in range(0, 100, 64):
            for x in range(0, 150, 64):
                own, truth = nb.read_input(tile, config, (x, y))
                if torch.equal(nb.TO_TENSORS(image=own)["image"], images[0]):
                    found[0, 1] = torch.from_numpy(truth == 1)
                    found[0, 0] = 1 - found[0, 1]
        return found

    seen, probability = nb.predict_tile(oracle, tile, config)
    assert np.array_equal(seen, label) and np.array_equal(probability[1] > 0.5, label == 1)
    score = nb.score_tile(seen, probability, 0.5)
    pieces = nb.cv2.connectedComponents(label)[0] - 1
    assert score.objects[1].tolist() == [pieces] * 3 and score.boundary[1][0] == score.boundary[1][1]


@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 56), (200, 130)])
def test_predictions_come_at_the_labels_own_size(nb, settings, write_pair, height, width):
    for i in range(4):
        save(Path(settings["root"]) / settings["images_dir"] / f"a_{i}.png", faulty.picture("a")[0][:height, :width])
        save(
            Path(settings["root"]) / settings["labels_dir"] / f"a_{i}_label.png",
            faulty.picture("a")[1][:height, :width],
        )
    tiles, config = verified(nb, settings, large_images="resize")
    predictor = nb.Predictor([nb.start_run(config, CPU, "fp32").model.eval()], CPU, "fp32", tta=True)
    label, probability = nb.predict_tile(predictor, tiles[0], config)
    assert probability.shape == (2, *label.shape) and label.shape == (min(height, 64), min(width, 64))
    assert np.allclose(probability.sum(0), 1, atol=1e-5)


def test_one_orthophoto_with_its_mask_is_enough(tmp_path, settings, write_raster):
    """A GeoTIFF and its mask, through the whole notebook."""
    write_raster("ortho", 500, 200, ".tif")
    small = {"root": settings["root"], "image_size": 64, "batch_size": 4, "epochs": 1, "num_workers": 1}
    model = {"encoder_name": "resnet18", "encoder_weights": None, "save_dir": str(tmp_path / "out")}
    text = nbtools.printed(nbtools.run(nbtools.NOTEBOOK, tmp_path, **small, **model))
    assert "each raster cut into three parts" in text and "cut into windows of 64 pixels: 1 images" in text
    split = json.loads((tmp_path / "out" / "split.json").read_text())
    assert split["test"] == ["images/images/ortho.tif#436,0,64,200"]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["tiles"] == 1 and 0 <= metrics["pixel_accuracy"] <= 1
    assert torch.load(tmp_path / "out" / "rooftop_last.pt", weights_only=True)["split"] == split
