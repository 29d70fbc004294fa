"""Section 13: a scene of any size becomes a mask, without seams, and goes on where it was cut off."""

import json
import threading
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from faulty import save, save_tiff
from rasterio.transform import from_origin

CPU = torch.device("cpu")
UTM = {"crs": "EPSG:32633", "transform": from_origin(500_000, 6_400_000, 0.3, 0.3)}
PLAIN = {"scales": {"uint8": [0, 255]}, "ground_resolution": None}


class Bright(torch.nn.Module):
    """A model that is sure of roof where the image is bright."""

    def forward(self, images):
        roof = 20.0 * (images.mean(1) > 0) - 10
        return torch.stack([-roof, roof], 1)


class Constant(torch.nn.Module):
    """A model that says 0.3 everywhere."""

    def forward(self, images):
        probability = torch.full_like(images[:, 0], 0.3)
        return torch.stack([torch.log(1 - probability), torch.log(probability)], 1)


@pytest.fixture
def predictor(nb, settings):
    """A function that makes a predictor of a model."""

    def make(model=None, **changes):
        config = nb.make_config(**settings | {"batch_size": 8})
        options = {"tta": False, "threshold": 0.5} | changes
        return nb.Predictor([model or Bright()], config, CPU, "fp32", **options)

    return make


def town(height, width, seed=0):
    """An image (H, W, 3) that is bright on roofs, and these (H, W) bool."""
    rng, roofs = np.random.default_rng(seed), np.zeros((height, width), bool)
    for _ in range(max(2, height * width // 1500)):
        y, x = rng.integers(0, height), rng.integers(0, width)
        roofs[y : y + 12, x : x + 17] = True
    return np.where(roofs, 230, 20).astype(np.uint8)[..., None].repeat(3, 2), roofs


def read(mask):
    with rasterio.open(mask) as file:
        facts = {"layout": file.tags(ns="IMAGE_STRUCTURE").get("LAYOUT"), "grid": file.transform}
        return file.read(), facts | {"crs": file.crs, "scales": file.scales, "nodata": file.nodata}


@pytest.mark.parametrize(("height", "width"), [(150, 333), (64, 64), (200, 20), (20, 200), (90, 1)])
@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_every_pixel_of_a_scene_is_predicted_like_any_other(
    nb, tmp_path, predictor, height, width, suffix
):
    image, roofs = town(height, width)
    path = tmp_path / f"town{suffix}"
    if suffix == ".tif":
        save_tiff(path, np.moveaxis(image, 2, 0), **UTM)
    else:
        save(path, image)
    (found, probability), file = read(nb.map_scene(path, predictor(), PLAIN))
    assert np.array_equal(found, roofs)
    assert np.array_equal(probability > 125, roofs) and set(np.unique(probability)) <= {0, 250}
    assert file["scales"] == (1, 1 / 250) and file["nodata"] == 255 and file["layout"] == "COG"
    if suffix == ".tif":
        assert (file["crs"], file["grid"]) == (UTM["crs"], UTM["transform"])


def test_blending_adds_up_to_one_everywhere(nb, tmp_path, predictor):
    save(tmp_path / "a.png", town(170, 210)[0])
    (_, probability), _ = read(nb.map_scene(tmp_path / "a.png", predictor(Constant()), PLAIN))
    assert set(np.unique(probability)) == {75}


@pytest.mark.parametrize(("row", "depth"), [(0, None), (1, 0.3), (3, 0.3), (5, None)])
def test_a_map_that_was_cut_off_goes_on_and_is_the_same(
    nb, tmp_path, settings, predictor, monkeypatch, row, depth
):
    predictor = partial(predictor, wall_depth=depth)
    model = nb.build_model(nb.make_config(**settings)).eval()
    save(tmp_path / "a.png", np.random.default_rng(0).integers(0, 255, (333, 150, 3), np.uint8))
    whole, _ = read(nb.map_scene(tmp_path / "a.png", predictor(model), PLAIN))
    Path(settings["save_dir"], "scenes", "a_mask.tif").unlink()
    calls, predict = [], nb.Predictor.predict

    def counted(*words, **named):
        calls.append(1)
        if len(calls) == row + 1:
            raise KeyboardInterrupt
        return predict(*words, **named)

    monkeypatch.setattr(nb.Predictor, "predict", counted)
    with pytest.raises(KeyboardInterrupt):
        nb.map_scene(tmp_path / "a.png", predictor(model), PLAIN)
    again, _ = read(nb.map_scene(tmp_path / "a.png", predictor(model), PLAIN))
    rows = len(nb.blend_weights(333, 64))
    assert len(whole) == (2 if depth is None else 3)
    assert np.array_equal(whole, again) and len(calls) == rows + 1 + min(2, row)
    folder = Path(settings["save_dir"], "scenes")
    assert [path.name for path in folder.iterdir()] == ["a_mask.tif"]


@pytest.fixture
def cut_off(nb, monkeypatch):
    """A function that maps a scene until a row of windows is reached, where it is stopped."""

    def stop(row, *words):
        calls, predict = [], nb.Predictor.predict

        def counted(*words, **named):
            calls.append(1)
            if len(calls) > row:
                raise KeyboardInterrupt
            return predict(*words, **named)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(nb.Predictor, "predict", counted)
            nb.map_scene(*words)

    return stop


@pytest.fixture
def scene(nb, tmp_path, settings, predictor):
    """A scene of seven rows of windows, and its whole mask, which is taken away again."""
    save(tmp_path / "a.png", town(333, 150)[0])
    mask = nb.map_scene(tmp_path / "a.png", predictor(), PLAIN)
    bands, _ = read(mask)
    mask.unlink()
    return tmp_path / "a.png", bands


def test_a_map_begun_with_other_settings_in_between_has_no_hole(nb, scene, predictor, cut_off):
    path, whole = scene
    cut_off(4, path, predictor(), PLAIN)
    cut_off(0, path, predictor(threshold=0.7), PLAIN)
    again, _ = read(nb.map_scene(path, predictor(), PLAIN))
    assert np.array_equal(whole, again)


@pytest.mark.parametrize("broken", ["a_probability.tif", "a_mask.draft.tif"])
def test_what_a_full_disk_left_broken_is_replaced(
    nb, scene, settings, predictor, cut_off, capsys, broken
):
    path, whole = scene
    cut_off(4, path, predictor(), PLAIN)
    file = Path(settings["save_dir"], "scenes", broken)
    file.write_bytes(b"II*\0" + (5000).to_bytes(4, "little"))  # its directory is not there
    again, _ = read(nb.map_scene(path, predictor(), PLAIN))
    assert np.array_equal(whole, again)
    assert ("it is begun anew" in capsys.readouterr().out) == (broken == "a_probability.tif")
    assert [path.name for path in file.parent.iterdir()] == ["a_mask.tif"]


@pytest.mark.parametrize("full_at", ["row", "copy"])
def test_a_full_disk_is_named_and_spoils_nothing(
    nb, scene, settings, predictor, monkeypatch, full_at
):
    path, whole = scene
    mask = nb.map_scene(path, predictor(threshold=0.7), PLAIN)
    older, calls = mask.read_bytes(), []
    copy, open_raster = rasterio.shutil.copy, rasterio.open

    def cut_short(source, target, **options):
        """As GDAL does at times, without an error."""
        copy(source, target, **options)
        content = Path(target).read_bytes()
        Path(target).write_bytes(content[: 2 * len(content) // 3])

    @contextmanager
    def half_of(file, raster):
        with raster:
            yield raster
        content = Path(file).read_bytes()
        Path(file).write_bytes(content[: len(content) // 2])

    def without_room(file, mode="r", **options):
        raster = open_raster(file, mode, **options)
        calls.append(mode)
        return half_of(file, raster) if mode == "r+" and calls.count("r+") == 4 else raster

    with monkeypatch.context() as patch, pytest.raises(nb.CannotWrite, match="MB left: make room"):
        if full_at == "copy":
            patch.setattr(rasterio.shutil, "copy", cut_short)
        else:
            patch.setattr(rasterio, "open", without_room)
        nb.map_scene(path, predictor(), PLAIN)
    assert mask.read_bytes() == older
    again, _ = read(nb.map_scene(path, predictor(), PLAIN))
    assert np.array_equal(whole, again)


@pytest.mark.parametrize("kind", ["soft edge", "infrared"])
def test_all_blocks_of_a_scene_agree_what_its_alpha_band_is(
    nb, tmp_path, settings, predictor, capsys, kind
):
    """A transparent collar whose edge is smooth hides; infrared that is called alpha does not."""
    image, roofs = town(700, 600)
    y, x = np.mgrid[:700, :600]
    alpha = np.clip(128 + 40 * (x - 0.2 * y - 100), 0, 255)
    if kind == "infrared":
        alpha = np.where(y < 520, 0, np.random.default_rng(0).integers(0, 255, (700, 600)))
    bands = [*np.moveaxis(np.where(roofs[..., None], image, 20), 2, 0), alpha.astype(np.uint8)]
    options = {"photometric": "RGB", "alpha": "YES", "tiled": True}
    save_tiff(tmp_path / "a.tif", np.array(bands), **options, **UTM)
    (found, _), _ = read(nb.map_scene(tmp_path / "a.tif", predictor(), PLAIN))
    hidden = (alpha.astype(np.uint8) == 0) & (kind == "soft edge")
    assert np.array_equal(found == 255, hidden)
    assert np.array_equal(found == 1, roofs & ~hidden)
    said = "alpha = 0 is no data" if kind == "soft edge" else "no transparency, not read"
    assert said in capsys.readouterr().out


class Fixed(torch.nn.Module):
    """A model that gives all pixels the same probabilities."""

    def __init__(self, probabilities):
        super().__init__()
        self.logits = torch.tensor(probabilities).log()[:, None, None]

    def forward(self, images):
        return self.logits.expand(len(images), -1, *images.shape[2:])


@pytest.mark.parametrize(
    ("probabilities", "is_roof"), [([0.4, 0.35, 0.25], 0), ([0.3, 0.4, 0.3], 1), ([0.1, 0, 0.9], 1)]
)
def test_of_several_classes_the_likeliest_wins_as_in_the_score(
    nb, tmp_path, settings, probabilities, is_roof
):
    classes = {"class_names": ["ground", "flat", "pitched"], "class_values": [0, 1, 2]}
    config = nb.make_config(**settings | classes | {"num_classes": 3, "batch_size": 8})
    options = {"tta": False, "threshold": None}
    predictor = nb.Predictor([Fixed(probabilities)], config, CPU, "fp32", **options)
    image = town(90, 70)[0]
    save(tmp_path / "a.png", image)
    (found, _), _ = read(nb.map_scene(tmp_path / "a.png", predictor, PLAIN))
    scored = predictor.predict(image, cut=True).argmax(0) > 0
    assert (found == is_roof).all() and (scored == is_roof).all()


def test_the_next_row_is_read_while_the_model_works(nb, tmp_path, predictor, monkeypatch):
    """One row ahead and no further; nothing is read any more after an interrupt."""
    save(tmp_path / "a.png", np.random.default_rng(0).integers(0, 255, (333, 150, 3), np.uint8))
    rows = len(nb.blend_weights(333, 64))
    tops, seen, read_row, predict = [], [], nb.read_row_of_windows, nb.Predictor.predict

    def noted(*words):
        tops.append(words[-1])
        return read_row(*words)

    monkeypatch.setattr(nb, "read_row_of_windows", noted)

    def watched(*words, **named):
        seen.append(1)
        started = time.monotonic()
        while len(tops) < min(len(seen) + 1, rows):  # never, if rows were read in turn
            assert time.monotonic() < started + 20
            time.sleep(0.01)
        time.sleep(0.05)
        assert len(tops) == min(len(seen) + 1, rows)
        if len(seen) == stop:
            raise KeyboardInterrupt
        return predict(*words, **named)

    monkeypatch.setattr(nb.Predictor, "predict", watched)
    threads, stop = threading.active_count(), 3
    with pytest.raises(KeyboardInterrupt):
        nb.map_scene(tmp_path / "a.png", predictor(Constant()), PLAIN)
    assert threading.active_count() == threads
    tops, seen, stop = [], [], None
    nb.map_scene(tmp_path / "a.png", predictor(Constant()), PLAIN)
    assert tops == sorted(tops) and threading.active_count() == threads


def test_the_third_band_is_the_outline_as_a_tile_has_it(nb, tmp_path, settings, predictor):
    model = nb.build_model(nb.make_config(**settings)).eval()
    image = np.random.default_rng(0).integers(0, 255, (140, 150, 3), np.uint8)
    save(tmp_path / "a.png", image)
    mapper = predictor(model, wall_depth=0.3)
    bands, file = read(nb.map_scene(tmp_path / "a.png", mapper, PLAIN))
    tile = mapper.predict(image, cut=True)
    assert np.abs(bands[1:] - 250 * tile[1:]).max() <= 0.51 and np.ptp(bands[2]) > 1
    assert file["scales"] == (1, 1 / 250, 1 / 250)


def test_what_is_mapped_is_not_mapped_again_unless_something_changed(
    nb, tmp_path, predictor, monkeypatch
):
    path = tmp_path / "a.png"
    save(path, town(100, 100)[0])
    calls, map_rows = [], nb.map_window_rows
    monkeypatch.setattr(nb, "map_window_rows", lambda *words: calls.append(1) or map_rows(*words))
    for changes, count in (({}, 1), ({}, 1), ({"threshold": 0.4}, 2), ({"tta": True}, 3)):
        nb.map_scene(path, predictor(**changes), PLAIN)
        assert len(calls) == count
    save(path, town(100, 120, 1)[0])
    nb.map_scene(path, predictor(tta=True), PLAIN)
    assert len(calls) == 4


def test_what_a_scene_does_not_show_has_no_data(nb, tmp_path, predictor):
    image, roofs = town(150, 200)
    clear = np.dstack([image, np.full((150, 200), 255, np.uint8)])
    clear[:40, :, 3] = 0
    save(tmp_path / "a.png", clear)
    (found, probability), _ = read(nb.map_scene(tmp_path / "a.png", predictor(), PLAIN))
    assert (found[:40] == 255).all() and (probability[:40] == 255).all()
    assert np.array_equal(found[40:], roofs[40:])


@pytest.mark.parametrize("factor", [0.5, 2, 1.1])
def test_a_scene_of_another_resolution_is_read_at_that_of_the_training(
    nb, tmp_path, predictor, monkeypatch, capsys, factor
):
    image, roofs = town(240, 300)
    image, roofs = (of.repeat(2, 0).repeat(2, 1) for of in (image, roofs))
    save_tiff(tmp_path / "a.tif", np.moveaxis(image, 2, 0), **UTM)
    seen, map_rows = [], nb.map_window_rows
    monkeypatch.setattr(
        nb,
        "map_window_rows",
        lambda view, *words: seen.append(view.shape) or map_rows(view, *words),
    )
    data = PLAIN | {"ground_resolution": 0.3 / factor}
    (found, _), file = read(nb.map_scene(tmp_path / "a.tif", predictor(), data))
    near = 1 if factor == 1.1 else factor
    assert np.allclose(seen[0], np.multiply([480, 600], near), atol=2)
    assert ("it is read resampled" in capsys.readouterr().out) == (factor != 1.1)
    assert found.shape == roofs.shape and (found == roofs).mean() > 0.97
    assert file["grid"] == UTM["transform"]


def test_the_resolution_of_the_training_comes_from_the_tiles(nb, settings, capsys):
    for n in range(4):
        grid = UTM | {"transform": from_origin(500_000 + 1000 * n, 6_400_000, 0.3, 0.3)}
        image, roofs = town(100, 100, n)
        root = Path(settings["root"])
        save_tiff(root / f"images/images/a_{n}.tif", np.moveaxis(image, 2, 0), **grid)
        save_tiff(root / f"label/label/a_{n}_label.tif", np.uint8(255 * roofs)[None], **grid)
    tiles, config = {}, {}
    for mode in ("tile", "resize"):
        config[mode] = nb.make_config(**settings | {"large_images": mode})
        tiles[mode] = nb.inspect_dataset(config[mode])[0]
    assert nb.trained_resolution(tiles["tile"], config["tile"]) == pytest.approx(0.3, rel=0.005)
    resized = nb.trained_resolution(tiles["resize"], config["resize"])
    assert resized == pytest.approx(0.3 * 100 / 64, rel=0.005)  # as the model sees it
    assert nb.trained_resolution([], config["tile"]) is None
    nb.warn_of_resized_tiles(tiles["resize"], config["resize"])
    assert "NOTE" not in capsys.readouterr().out  # scenes will be resized alike
    for tile in tiles["resize"]:
        tile.place = None
    for mode in ("tile", "resize"):
        nb.warn_of_resized_tiles(tiles[mode], config[mode])
        said = capsys.readouterr().out
        assert ("tiles are resized by 0.64 for the model" in said) == (mode == "resize")
    known = nb.replace(config["tile"], ground_resolution=0.5)
    assert nb.trained_resolution(tiles["tile"], known) == pytest.approx(0.3, rel=0.005)
    known = nb.replace(config["resize"], ground_resolution=0.5)  # these tiles do not say
    assert nb.trained_resolution(tiles["resize"], known) == pytest.approx(0.5 * 100 / 64)
    tiles["tile"][0].place = None
    tiles["tile"][0].measured = False
    known = nb.replace(config["tile"], ground_resolution=0.5)
    assert nb.trained_resolution(tiles["tile"][:1], known) == 0.5  # of a tile, as it is


def test_other_pixels_are_scaled_as_in_training_or_refused(nb, tmp_path, predictor):
    image, roofs = town(100, 100)
    save_tiff(tmp_path / "a.tif", np.moveaxis(image, 2, 0).astype(np.uint16) * 16, **UTM)
    with pytest.raises(ValueError, match=r"a\.tif has uint16 pixels, the model was trained on"):
        nb.map_scene(tmp_path / "a.tif", predictor(), PLAIN)
    data = PLAIN | {"scales": {"uint16": [0, 255 * 16]}}
    assert np.array_equal(read(nb.map_scene(tmp_path / "a.tif", predictor(), data))[0][0], roofs)


@pytest.mark.parametrize("how", ["truncated", "empty", "text", "complex"])
def test_a_scene_that_cannot_be_read_is_named(nb, tmp_path, predictor, how):
    path = tmp_path / "a.png"
    save(path, np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8))
    data = path.read_bytes()
    path.write_bytes({"truncated": data[:9000], "empty": b"", "text": b"no"}.get(how, data))
    if how == "complex":
        path = tmp_path / "a.tif"
        save_tiff(path, np.ones((1, 50, 50), np.complex64))
    with pytest.raises(ValueError, match=rf"a\{path.suffix}"):
        nb.map_scene(path, predictor(), PLAIN)


@pytest.mark.parametrize(
    ("crs", "step", "latitude", "said"),
    [
        ("EPSG:4326", 3e-6, 60, "pixels are not square, 0.50 times as wide as high"),
        ("EPSG:4326", 3e-6, 10, None),
        ("EPSG:32633", 0.3, 6_400_000, None),
        (None, 0.3, 6_400_000, None),
    ],
)
def test_pixels_that_are_not_square_on_the_ground_are_named(
    nb, tmp_path, predictor, capsys, crs, step, latitude, said
):
    image, roofs = town(90, 80)
    grid = {"crs": crs, "transform": from_origin(15, latitude, step, step)}
    save_tiff(tmp_path / "a.tif", np.moveaxis(image, 2, 0), **grid)
    (found, _), _ = read(nb.map_scene(tmp_path / "a.tif", predictor(), PLAIN))
    out = capsys.readouterr().out
    assert np.array_equal(found, roofs)
    assert said in out if said else "square" not in out


def test_a_south_up_scene_keeps_its_grid(nb, tmp_path, predictor):
    image, roofs = town(120, 150)
    grid = rasterio.Affine(0.3, 0, 500_000, 0, 0.3, 6_400_000)
    save_tiff(tmp_path / "a.tif", np.moveaxis(image, 2, 0), crs="EPSG:32633", transform=grid)
    mask = nb.map_scene(tmp_path / "a.tif", predictor(), PLAIN)
    (found, _), file = read(mask)
    assert file["grid"] == grid and np.array_equal(found, roofs)
    assert len(nb.polygonize_mask(mask, 0))


def test_a_folder_of_scenes_is_measured_and_scored(nb, tmp_path, settings, predictor):
    nb.write_sample_scene(tmp_path)
    (path,) = nb.list_scenes(nb.make_config(**settings | {"scenes": str(tmp_path)}))
    by = predictor()
    roofs, row = nb.polygonize_and_score(
        nb.map_scene(path, by, PLAIN), by.config.min_roof_area, path
    )
    assert row["roofs"] == len(roofs) and row["unit"] == "m²" and 0 <= row["recall"] <= 1
    made = {file.name for file in Path(settings["save_dir"], "scenes").iterdir()}
    assert made == {"suburb_mask.tif", "suburb_roofs.gpkg", "suburb_roofs.geojson"}
    held = json.loads(Path(settings["save_dir"], "scenes/suburb_roofs.geojson").read_text())
    assert len(held["features"]) == len(roofs)


def test_scenes_are_a_folder_or_one_file_and_have_names_of_their_own(nb, tmp_path, settings):
    def scenes(path):
        return nb.list_scenes(nb.make_config(**settings | {"scenes": str(path)}))

    folder = tmp_path / "scenes [2024]"
    for name in ("b.png", "a.tif", "deep/c.jpg", "notes.txt", "thumb_1.png"):
        save(folder / name, town(30, 30)[0]) if "txt" not in name else (folder / name).touch()
    assert [path.name for path in scenes(folder)] == ["a.tif", "b.png", "c.jpg"]
    assert scenes(folder / "b.png") == {folder / "b.png": "b"}
    assert scenes(tmp_path / "nowhere") == {}
    save(folder / "b.tif", town(30, 30)[0])
    with pytest.raises(ValueError, match="another scene is called b too; rename one"):
        scenes(folder)


def test_all_scenes_are_mapped_and_an_unfit_one_is_left_out(
    nb, tmp_path, settings, predictor, capsys
):
    folder, by = tmp_path / "scenes", predictor()
    config = nb.replace(by.config, scenes=str(folder))
    session = nb.Session(config, CPU, "fp32", False)
    split = nb.Split(config=config, tile_set=None, parts={}, how="")
    empty = {"trials": None, "histogram": None, "suspects": []}
    choice = nb.Choice(split=split, files=[], checkpoint=PLAIN, predictor=by, **empty)
    maps = nb.map_scenes(choice, session)
    assert maps.roofs == {} and maps.table.empty and nb.show_largest_map(maps).empty
    assert f"no map of a scene in {folder}: put a GeoTIFF there" in capsys.readouterr().out
    save(folder / "few.png", town(70, 70)[0])
    save(folder / "many.png", town(200, 200)[0])
    (folder / "text.png").write_text("no")
    maps = nb.map_scenes(choice, session)
    text = capsys.readouterr().out
    assert "left out: " in text and "text.png" in text
    assert f"maps are in {config.save_dir}/scenes" in text
    assert list(maps.table.index) == ["few.png", "many.png"]
    assert [path.name for path in maps.roofs] == ["few.png", "many.png"]
    assert maps.table["roofs"].to_list() == [len(roofs) for roofs in maps.roofs.values()]
    shown = nb.show_largest_map(maps)
    assert shown.equals(maps.roofs[folder / "many.png"].drop(columns="geometry").head())
