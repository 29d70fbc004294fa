"""Inputs as people bring them: coordinates, no data, bands, scenes, footprints, names, weights."""

import json
import os
import shutil
import subprocess
import sys
import threading
import unicodedata
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import rasterio
import segmentation_models_pytorch as smp
import shapely
import torch
from faulty import picture, save, save_tiff
from kernels import same
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp
from rasterio.transform import from_bounds, from_origin
from safetensors.torch import save_file
from test_map import PLAIN, Bright, read, town

CPU = torch.device("cpu")
UTM = "EPSG:32633"
ENGINEERING = (
    'LOCAL_CS["site",UNIT["metre",1,AUTHORITY["EPSG","9001"]],AXIS["Easting",EAST],'
    'AXIS["Northing",NORTH]]'
)
COUNT = 12


@pytest.fixture
def write(settings):
    """A function that writes tiles of noise with a bright roof, and their labels."""

    def go(image_options=lambda n: {}, label_options=lambda n: {}, change=None, count=COUNT):
        root = Path(settings["root"])
        for n in range(count):
            image, label = picture(f"t{n}")
            if change:
                image, label = change(n, image, label)
            stem = f"area{n}_1"
            path = root / settings["images_dir"] / f"{stem}.tif"
            save_tiff(path, image.transpose(2, 0, 1), **image_options(n))
            path = root / settings["labels_dir"] / f"{stem}_label.tif"
            save_tiff(path, label[None], **label_options(n))
        return root

    return go


@pytest.fixture
def verify(nb, settings):
    """A function that verifies the tiles: the tile set."""
    return lambda **changes: nb.verify_dataset(nb.make_config(**settings | changes))


def place(n, **options):
    """Where a tile lies."""
    return {"crs": UTM, "transform": from_origin(5e5 + 100 * n, 6.4e6, 0.3, 0.3)} | options


# ---- coordinates


@pytest.mark.parametrize("side", [0.3, 3e-6])
def test_coordinates_without_a_system_tell_places_but_no_metres(nb, write, verify, side):
    write(lambda n: {"transform": from_origin(500 * n * side, 50, side, side)})
    tile_set = verify()
    kinds = set(tile_set.report["kind"])
    assert kinds == {"coordinates without a system"} and len(tile_set.tiles) == COUNT
    assert "ground_resolution" in tile_set.report["detail"][0]
    assert nb.trained_resolution(tile_set.tiles, tile_set.config) is None
    _, shared = nb.shared_ground(tile_set.tiles[:4], tile_set.tiles[3:])
    assert shared == pytest.approx(1 / 9, abs=0.02)
    known = verify(ground_resolution=0.3)
    assert nb.trained_resolution(known.tiles, known.config) == 0.3


@pytest.mark.parametrize(
    "grid",
    [from_origin(0, 0, 1, 1), from_origin(0, 64, 1, 1), rasterio.Affine(1, 0, 0, 0, 1, 0)],
    ids=["down", "up", "identity"],
)
def test_tiles_that_carry_their_pixel_grid_have_no_place(nb, write, verify, grid):
    write(lambda n: {"transform": grid})
    tile_set = verify(split=[0.5, 0.25, 0.25])
    assert all(tile.place is None for tile in tile_set.tiles)
    split = nb.split_dataset(tile_set, tile_set.config)
    assert len(split.parts["train"]) == COUNT // 2
    assert nb.trained_resolution(tile_set.tiles, tile_set.config) is None


def test_a_label_in_a_system_of_no_place_is_read_pixel_by_pixel(nb, write, verify):
    write(place, lambda n: place(n + 5000, crs=rasterio.crs.CRS.from_wkt(ENGINEERING)))
    tile_set = verify()
    assert len(tile_set.tiles) == COUNT
    assert set(tile_set.report["kind"]) == {"unknown coordinate system"}
    for n, tile in enumerate(tile_set.tiles):
        assert np.array_equal(nb.read_tile(tile)[1], picture(f"t{n}")[1] > 0)


# ---- no data


def whiten(n, image, label):
    """Every second roof is white."""
    if n % 2:
        image[label > 0] = 255
    return image, label


def test_roof_on_no_data_is_told_with_what_helps(nb, write, verify, capsys):
    write(lambda n: place(n, nodata=255), place, whiten)
    tile_set = verify()
    text = capsys.readouterr().out
    assert "WARNING: roof on no data, in 6 tiles." in text
    assert "area1_1.tif: 100% of its roof" in text and "rio edit-info --unset-nodata" in text
    hidden = tile_set.report[tile_set.report["kind"] == "roof on no data"]
    assert len(hidden) == 6 and "no data inside the picture" in set(tile_set.report["kind"])
    assert sum(tile.hidden_roof > 0 for tile in tile_set.tiles) == 6
    assert max(len(tile.hidden) for tile in tile_set.tiles) <= 2  # codes are kept, not pixels


def test_no_data_along_the_edge_is_no_cause_for_alarm(nb, write, verify, capsys):
    def crop(n, image, label):
        image[:, :1], label[:, :1] = 0, 0
        return np.maximum(image, 1) * (np.arange(64) > 0)[None, :, None].astype(np.uint8), label

    write(lambda n: place(n, nodata=0), place, crop)
    tile_set = verify()
    assert tile_set.report.empty and "WARNING" not in capsys.readouterr().out


# ---- bands


@pytest.mark.parametrize(
    "names, bands",
    [
        (["blue", "green", "red", "nir"], [3, 2, 1]),
        (["B02", "B03", "B04", "B08"], [3, 2, 1]),
        (["Band 1 - Blue", "Band 2 - Green", "Band 3 - Red", "Band 4 - Red Edge"], [3, 2, 1]),
        (["R", "G", "B"], [1, 2, 3]),
        (["nir", "red", "green"], []),
        (["", "", ""], []),
        (["red", "red", "green", "blue"], []),
    ],
)
def test_bands_are_known_by_their_names(nb, names, bands):
    assert nb.find_named_bands(names) == bands


def test_a_scene_of_blue_green_red_maps_like_one_of_red_green_blue(nb, tmp_path, mapper, capsys):
    rng = np.random.default_rng(0)
    image, _ = town(150, 200)
    image = image // np.uint8([1, 2, 9]) + rng.integers(0, 9, image.shape, np.uint8)
    folder = tmp_path / "scenes"
    save_tiff(folder / "rgb.tif", image.transpose(2, 0, 1), **place(0))
    bands = np.concatenate([image[..., ::-1], image[..., :1]], 2).transpose(2, 0, 1)
    options = place(0) | {"photometric": "MINISBLACK"}
    save_tiff(folder / "bgrn.tif", bands, **options)
    with rasterio.open(folder / "bgrn.tif", "r+") as file:
        file.descriptions = ("blue", "green", "red", "nir")
        file.colorinterp = [ColorInterp.gray] + 3 * [ColorInterp.undefined]
    maps = mapper(Reddish())
    masks = [read(mask)[0] for mask in maps.masks.values()]
    assert np.array_equal(*masks) and 0.05 < (masks[0][0] == 1).mean() < 0.9
    assert maps.table.loc["bgrn.tif", "bands"] == "3, 2, 1"
    assert "more bands than colours" in capsys.readouterr().out


class Reddish(torch.nn.Module):
    """A model that is sure of roof where red is much brighter than blue."""

    def forward(self, images):
        roof = 20.0 * (images[:, 0] - images[:, 2] > 1.5) - 10
        return torch.stack([-roof, roof], 1)


# ---- scenes


@pytest.fixture
def mapper(nb, settings, tmp_path):
    """A function that maps what is in the folder scenes by a model: the maps."""

    def go(model=None, **changes):
        config = nb.make_config(**settings | {"scenes": str(tmp_path / "scenes")} | changes)
        by = nb.Predictor([model or Bright()], config, CPU, "fp32", tta=False, threshold=0.5)
        split = nb.Split(config=config, tile_set=None, parts={}, how="")
        choice = nb.Choice(split, [], PLAIN, by)
        return nb.map_scenes(choice, nb.Session(config, CPU, "fp32", False))

    return go


def test_no_scene_ends_the_run_whatever_it_raises(nb, tmp_path, mapper, monkeypatch, capsys):
    image, _ = town(100, 100)
    for name in ("a", "b", "c"):
        save_tiff(tmp_path / f"scenes/{name}.tif", image.transpose(2, 0, 1), **place(0))
    polygonize = nb.polygonize_mask

    def fail(path, *words):
        if path.name == "b_mask.tif":
            raise RuntimeError("a driver's own error")
        return polygonize(path, *words)

    monkeypatch.setattr(nb, "polygonize_mask", fail)
    maps = mapper()
    assert list(maps.table.index) == ["a.tif", "c.tif"]
    text = capsys.readouterr().out
    assert f"left out: {tmp_path}/scenes/b.tif: a driver's own error" in text
    assert len(nb.show_largest_map(maps))


def test_a_scene_with_a_world_file_is_mapped_in_its_own_coordinates(nb, tmp_path, mapper, capsys):
    image, roofs = town(120, 160)
    save(tmp_path / "scenes/photo.jpg", image, quality=95)
    (tmp_path / "scenes/photo.jgw").write_text("0.3\n0\n0\n-0.3\n500000.15\n5799999.85\n")
    shapely_box = gpd.GeoSeries([shapely.box(500_000, 5_799_900, 500_010, 5_800_000)], crs=UTM)
    shapely_box.to_file(tmp_path / "scenes/photo.geojson")
    maps = mapper()
    (found,) = maps.roofs.values()
    left, bottom, right, top = found.total_bounds
    assert found.crs is None and 499_999.9 < left and right < 500_048.1
    assert 5_799_963.9 < bottom and top < 5_800_000.1
    assert maps.table.loc["photo.jpg", "unit"] == "square pixels"
    assert maps.table.loc["photo.jpg", "area_m2"] == pytest.approx(roofs.sum(), rel=0.05)
    text = capsys.readouterr().out
    assert "ground_resolution" in text and "photo.geojson cannot be laid over it" in text
    assert found.union_all().area == pytest.approx(0.09 * found["area_m2"].sum(), rel=1e-3)
    assert len(nb.show_largest_map(maps))


def test_a_scene_in_coordinates_of_no_place_is_like_one_without(nb, tmp_path, mapper, capsys):
    image, _ = town(100, 120)
    crs = rasterio.crs.CRS.from_wkt(ENGINEERING)
    grid = from_origin(1000, 2000, 0.3, 0.3)
    save_tiff(tmp_path / "scenes/a.tif", image.transpose(2, 0, 1), crs=crs, transform=grid)
    maps = mapper()
    (found,) = maps.roofs.values()
    assert found.crs is None and found.total_bounds[0] >= 1000 and len(found)
    assert "site is no place on the ground" in capsys.readouterr().out
    assert len(nb.show_largest_map(maps))


def test_ground_control_points_are_said_to_be_ignored(tmp_path, mapper, capsys):
    image, _ = town(100, 120)
    path = tmp_path / "scenes/a.tif"
    save_tiff(path, image.transpose(2, 0, 1))
    corners = [(0, 0), (0, 120), (100, 0), (100, 120)]
    points = [GroundControlPoint(r, c, 15 + c * 5e-6, 57 - r * 3e-6) for r, c in corners]
    with rasterio.open(path, "r+") as file:
        file.gcps = points, rasterio.crs.CRS.from_epsg(4326)
    maps = mapper()
    assert maps.table.loc["a.tif", "unit"] == "square pixels"
    assert "ground control points" in (text := capsys.readouterr().out) and "gdalwarp" in text


def mosaic(folder, source, relative=1):
    """A mosaic of one sheet, 60 x 50 pixels."""
    part = f'<SourceFilename relativeToVRT="{relative}">{source}</SourceFilename>'
    bands = ""
    for number, colour in enumerate(("Red", "Green", "Blue"), 1):
        content = f"<ColorInterp>{colour}</ColorInterp><SimpleSource>{part}"
        content += f"<SourceBand>{number}</SourceBand></SimpleSource>"
        bands += f'<VRTRasterBand dataType="Byte" band="{number}">{content}</VRTRasterBand>'
    head = '<VRTDataset rasterXSize="60" rasterYSize="50"><SRS>EPSG:32633</SRS>'
    grid = "<GeoTransform>500000, 0.3, 0, 6400000, 0, -0.3</GeoTransform>"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mosaic.vrt").write_text(f"{head}{grid}{bands}</VRTDataset>")


def test_a_mosaic_of_local_files_is_a_scene(nb, tmp_path, mapper):
    image, _ = town(50, 60)
    save_tiff(tmp_path / "sheets/a.tif", image.transpose(2, 0, 1), **place(0))
    mosaic(tmp_path / "scenes", "../sheets/a.tif")
    shutil.copy(tmp_path / "sheets/a.tif", tmp_path / "scenes/sheet.tif")
    maps = mapper()
    masks = [read(mask)[0] for mask in maps.masks.values()]
    assert len(masks) == 2 and np.array_equal(*masks) and (masks[0][0] == 1).any()
    save_tiff(tmp_path / "sheets/a.tif", 0 * image.transpose(2, 0, 1), **place(0))
    again = mapper()  # its sheet has changed
    assert not (read(again.masks[tmp_path / "scenes/mosaic.vrt"])[0][0] == 1).any()


@pytest.mark.parametrize(("side", "refused"), [(40_000, False), (70_000, True)])
def test_a_mosaic_may_be_as_large_as_a_geotiff(nb, tmp_path, side, refused):
    """Its sheets are read block by block, while a PNG of 40,000² is decoded as a whole."""
    save_tiff(tmp_path / "sheets/a.tif", town(50, 60)[0].transpose(2, 0, 1), **place(0))
    mosaic(tmp_path / "scenes", "../sheets/a.tif")
    path = tmp_path / "scenes/mosaic.vrt"
    size = f'rasterXSize="{side}" rasterYSize="{side}"'
    path.write_text(path.read_text().replace('rasterXSize="60" rasterYSize="50"', size))
    with nb.open_raster(path) as scene:
        kinds = [fault.kind for fault in nb.check_raster_file(scene, label=False)]
    assert ("too large" in kinds) == refused


@pytest.mark.parametrize(
    "source", ["/vsicurl/http://localhost:9/a.tif", "http://localhost:9/a.tif", "a.txt", "b.vrt"]
)
def test_a_mosaic_of_anything_else_is_left_out(nb, tmp_path, mapper, capsys, source):
    mosaic(tmp_path / "scenes", source, relative=0)
    assert mapper().table.empty
    assert "left out: " in (text := capsys.readouterr().out) and "mosaic.vrt" in text
    with pytest.raises(ValueError, match="mosaic.vrt"):
        nb.open_raster(tmp_path / "scenes/mosaic.vrt")


def test_a_mosaic_hidden_in_a_tiff_is_left_out(nb, tmp_path, mapper):
    mosaic(tmp_path / "hidden", "/vsicurl/http://localhost:9/a.tif")
    (tmp_path / "hidden/mosaic.vrt").rename(tmp_path / "hidden/sheet.tif")
    mosaic(tmp_path / "scenes", "../hidden/sheet.tif")
    assert mapper().table.empty
    with pytest.raises(ValueError, match="sheet.tif"):
        nb.open_raster(tmp_path / "scenes/mosaic.vrt")


def test_scenes_of_one_name_are_told_apart_by_their_folders(nb, tmp_path, mapper):
    image, _ = town(60, 60)
    for flight in ("flight1", "flight2"):
        path = tmp_path / f"scenes/{flight}/odm_orthophoto.tif"
        save_tiff(path, image.transpose(2, 0, 1), **place(0))
    maps = mapper()
    names = ["flight1_odm_orthophoto", "flight2_odm_orthophoto"]
    assert [mask.name for mask in maps.masks.values()] == [f"{name}_mask.tif" for name in names]
    folder = next(iter(maps.masks.values())).parent
    assert all((folder / f"{name}_roofs.gpkg").is_file() for name in names)


def test_two_scenes_of_one_name_stop_the_run_in_section_1(nb, tmp_path, settings):
    image, _ = town(60, 60)
    save(tmp_path / "scenes/a.png", image)
    save(tmp_path / "scenes/A.tif", image)
    with pytest.raises(ValueError, match="another scene is called"):
        nb.list_scenes(nb.make_config(**settings | {"scenes": str(tmp_path / "scenes")}))


def test_a_web_maps_tile_lies_where_its_name_says(nb, tmp_path, mapper):
    image, _ = town(256, 256)
    save(tmp_path / "scenes/19/281900/154800.png", image)
    maps = mapper()
    (found,) = maps.roofs.values()
    side = 2 * 20037508.342789244 / 2**19
    left, top = 281900 * side - 20037508.342789244, 20037508.342789244 - 154800 * side
    bounds = shapely.box(left, top - side, left + side, top)
    assert found.crs == "EPSG:3857" and found.within(bounds.buffer(0.5)).all()
    assert found.total_bounds[2] - found.total_bounds[0] > 0.8 * side
    assert maps.table.loc["19_281900_154800.png", "unit"] == "m²"


@pytest.mark.parametrize(
    "name", ["survey_12_03_2024", "ortho_20-11-2023", "Shot_2024-01-05_16-05-33", "tyrol_12_0_512"]
)
def test_dates_times_and_offsets_are_no_places(nb, tmp_path, mapper, name):
    save(tmp_path / f"scenes/{name}.png", town(80, 80)[0])
    table = mapper().table
    assert table["unit"].tolist() == ["square pixels"] and table["area_m2"].sum() < 80 * 80
    assert nb.web_map_place(name) is None
    assert nb.web_map_place("OAM_19_281900_154800") is not None


def test_a_coordinate_system_without_a_place_measures_nothing(tmp_path, mapper):
    save_tiff(tmp_path / "scenes/a.tif", town(80, 80)[0].transpose(2, 0, 1), crs=UTM)
    maps = mapper()
    assert maps.table["unit"].tolist() == ["square pixels"]
    assert next(iter(maps.roofs.values())).crs is None


def test_another_scene_of_one_name_size_and_time_is_mapped_anew(nb, tmp_path, mapper):
    for folder, seed in (("scenes", 0), ("others", 1)):
        path = tmp_path / folder / "a.bmp"
        save(path, town(120, 120, seed)[0])
        os.utime(path, (1.7e9, 1.7e9))
    assert path.stat().st_size == (tmp_path / "scenes/a.bmp").stat().st_size
    first = mapper().table["area_m2"].sum()
    second = mapper(scenes=str(tmp_path / "others")).table["area_m2"].sum()
    assert first != second


def test_roofs_that_were_edited_are_kept_when_a_scene_is_mapped_again(tmp_path, mapper, capsys):
    save_tiff(tmp_path / "scenes/a.tif", town(120, 120)[0].transpose(2, 0, 1), **place(0))
    folder = next(iter(mapper().masks.values())).parent
    mapper()
    assert len(list(folder.glob("*.gpkg"))) == 1  # as they were written: no copy
    package = folder / "a_roofs.gpkg"
    gpd.read_file(package).assign(verdict="checked").to_file(package)
    later = package.stat().st_mtime + 5
    os.utime(package, (later, later))
    capsys.readouterr()
    mapper(min_roof_area=3.0)
    (copy,) = folder.glob("a_roofs_edited_*.gpkg")
    assert str(copy) in capsys.readouterr().out
    assert (gpd.read_file(copy)["verdict"] == "checked").all()
    assert gpd.read_file(package)["verdict"].isna().all()


def test_edited_roofs_that_cannot_be_copied_stay(nb, tmp_path, mapper, capsys):
    save(tmp_path / "scenes/a.png", town(120, 120)[0])
    package = next(iter(mapper().masks.values())).with_name("a_roofs.gpkg")
    package.write_bytes(b"what QGIS left")
    os.utime(package, (4e9, 4e9))
    assert mapper().table.empty
    assert "a_roofs.gpkg was edited, and could not be copied" in capsys.readouterr().out
    assert package.read_bytes() == b"what QGIS left"
    assert not list(package.parent.glob("*_edited_*"))


def test_tables_and_points_beside_a_scene_are_no_footprints(tmp_path, mapper, capsys):
    image, roofs = town(120, 160)
    save_tiff(tmp_path / "scenes/a.tif", image.transpose(2, 0, 1), **place(0))
    shapes = rasterio.features.shapes(np.uint8(roofs), roofs, transform=place(0)["transform"])
    polygons = [shapely.geometry.shape(shape) for shape, _ in shapes]
    gpd.GeoSeries(polygons, crs=UTM).to_file(tmp_path / "scenes/a.geojson")
    (tmp_path / "scenes/a.csv").write_text("gcp,x,y,z\n1,500000,6400000,3\n")
    points = gpd.GeoSeries(polygons, crs=UTM).centroid
    points.to_file(tmp_path / "scenes/a.shp")
    table = mapper().table
    assert table["true_roofs"].tolist() == [len(polygons)] and table["f1"].min() > 0.9
    (tmp_path / "scenes/a.geojson").unlink()
    capsys.readouterr()
    assert "f1" not in mapper().table
    text = capsys.readouterr().out
    assert "a.shp: it holds points" in text and "a.csv: it has no shapes" in text


@pytest.mark.parametrize("changes", [{"threshold": 0.7}, {"model": "m.pt"}, {"save_dir": "other"}])
def test_a_choice_of_other_settings_is_not_used(nb, tmp_path, settings, changes):
    config = nb.make_config(**settings | {"scenes": str(tmp_path / "scenes")})
    by = nb.Predictor([Bright()], config, CPU, "fp32", tta=False, threshold=0.5)
    choice = nb.Choice(nb.Split(config, None, {}, ""), [], PLAIN, by)
    session = nb.Session(nb.replace(config, **changes), CPU, "fp32", False)
    for use in (nb.map_scenes, nb.export_model):
        with pytest.raises(ValueError, match=f"{next(iter(changes))} changed since section 12"):
            use(choice, session)


def test_maps_are_not_put_among_the_scenes(nb, tmp_path, settings):
    folder = tmp_path / "p"
    for scenes in (folder / "scenes", folder / "scenes/town.tif"):
        words = settings | {"save_dir": str(folder), "scenes": str(scenes)}
        with pytest.raises(ValueError, match="scenes = .* must be another folder than"):
            nb.make_config(**words)


def test_maps_below_the_images_are_no_tiles_nor_scenes(nb, write, settings, tmp_path):
    root = write(place)
    footprints = gpd.GeoSeries([shapely.box(5e5, 6.4e6 - 9, 5e5 + 2000, 6.4e6)], crs=UTM)
    footprints.to_file(root / "roofs.gpkg")
    words = {"images_dir": ".", "labels_dir": "roofs.gpkg", "save_dir": str(root / "models")}
    words |= {"scenes": str(root / "images")}
    image = town(64, 64)[0].transpose(2, 0, 1)
    save_tiff(root / "models/scenes/town_mask.tif", image, **place(3))
    config = nb.make_config(**settings | words)
    assert not any("models" in str(path) for path in nb.find_files(config, "images_dir")[0])
    config = nb.replace(config, scenes=str(root))
    assert len(nb.list_scenes(config)) == 2 * COUNT  # images and labels, no map
    config = nb.replace(config, images_dir="models/scenes")  # unless they are asked for
    assert len(nb.find_files(config, "images_dir")[0]) == 1


def test_what_is_passed_over_is_listed_with_the_reason(tmp_path, mapper, capsys):
    (tmp_path / "scenes").mkdir()
    (tmp_path / "scenes/points.laz").touch()
    assert mapper().table.empty
    text = capsys.readouterr().out
    assert "points.laz" in text and ".tif" in text and ".vrt" in text


def test_a_score_says_how_many_footprints_lie_on_no_data(nb, tmp_path, mapper, capsys):
    image, roofs = town(120, 160)
    image[roofs] = np.where(np.arange(roofs.sum()) < roofs.sum() // 2, 255, 200)[:, None]
    options = place(0, nodata=255)
    save_tiff(tmp_path / "scenes/a.tif", image.transpose(2, 0, 1), **options)
    shapes = rasterio.features.shapes(np.uint8(roofs), roofs, transform=options["transform"])
    polygons = [shapely.geometry.shape(shape) for shape, _ in shapes]
    gpd.GeoSeries(polygons, crs=UTM).to_file(tmp_path / "scenes/a.geojson")
    maps = mapper()
    text = capsys.readouterr().out
    hidden = len(polygons) - int(maps.table.loc["a.tif", "true_roofs"])
    assert hidden > 0 and f"{hidden} footprints of a.geojson lie on no data: not scored" in text
    assert "no data inside the picture" in text


@pytest.mark.parametrize("crs", ["EPSG:3832", "EPSG:4326"])
def test_roofs_across_180_degrees_are_cut_there(nb, tmp_path, crs):
    """EPSG:3832 is a plane around 150° E; in degrees a scene goes on beyond 180."""
    middle = {"EPSG:3832": 3339584.7, "EPSG:4326": 180}[crs]
    side = {"EPSG:3832": 1.0, "EPSG:4326": 1e-5}[crs]
    row = [shapely.box(x, 0, x + 12, 12) for x in (-30, -6, 18)]
    roofs = gpd.GeoDataFrame({"area_m2": 3 * [144.0]}, geometry=row)
    shapes = roofs.scale(side, side, origin=(0, 0)).translate(middle)
    nb.write_roofs(roofs.set_geometry(shapes).set_crs(crs), tmp_path, "a")
    features = json.loads((tmp_path / "a_roofs.geojson").read_text())["features"]
    kinds = [feature["geometry"]["type"] for feature in features]
    assert kinds == ["Polygon", "MultiPolygon", "Polygon"]
    written = gpd.read_file(tmp_path / "a_roofs.geojson")
    bounds = written.explode().bounds
    assert (bounds["maxx"] - bounds["minx"] < 1e-3).all()
    assert bounds["minx"].min() >= -180 and bounds["maxx"].max() <= 180
    assert np.sign(written.geometry[0].centroid.x) == 1 == -np.sign(written.geometry[2].centroid.x)
    assert written.area.max() < 1.05 * written.area.min()


# ---- labels


def ones(n, image, label):
    """The first tile's roofs are 1 instead of 255."""
    return image, np.uint8(label > 0) if n == 0 else label


def stray(n, image, label):
    """A corner of the first tile's label is 77."""
    if n == 0:
        label[:8, :8] = 77
    return image, label


@pytest.mark.parametrize("change, code", [(ones, "1"), (stray, "77")])
def test_a_few_odd_labels_are_left_out_by_name(nb, write, verify, capsys, change, code):
    write(place, place, change)
    tile_set = verify()
    assert len(tile_set.tiles) == COUNT - 1
    (fault,) = tile_set.report.to_dict("records")
    assert fault["kind"] == "odd label values" and "area0_1_label.tif" in fault["file"]
    assert code in fault["detail"] and fault["action"] == "left out"
    assert "WARNING: odd label values, in 1 tiles" in capsys.readouterr().out


def test_more_odd_labels_stop_the_run_and_are_named(write, verify):
    def change(n, image, label):
        return ones(n // 3, image, label)

    write(place, place, change)
    with pytest.raises(ValueError, match=r"which label values are roof") as caught:
        verify()
    assert "first area0_1_label.tif" in str(caught.value)


def test_names_compare_as_people_see_them(nb, settings, verify):
    root = Path(settings["root"])
    for n in range(COUNT):
        image, label = picture(f"t{n}")
        name = f"Jönköping-{n}_0"
        decomposed = unicodedata.normalize("NFD", name)
        save(root / settings["images_dir"] / f"{decomposed}.png", image)
        save(root / settings["labels_dir"] / f"{name}_label.png", label)
    assert len(verify().tiles) == COUNT


def test_backslashes_that_became_tabs_are_recognised(nb, settings):
    config = nb.make_config(**settings | {"root": "D:\tiles\new"})
    with pytest.raises(FileNotFoundError, match=r"write r'\.\.\.'"):
        nb.needs_sample(config)


def test_a_wrong_folder_is_named_by_its_absolute_path(nb, settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = nb.make_config(**settings | {"root": "elsewhere"})
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "elsewhere/images/images")):
        nb.needs_sample(config)


# ---- footprints


@pytest.fixture
def roofs(write):
    """Tiles with coordinates, and the polygon of each one's roof."""
    root = write(place, place)
    polygons = []
    for n in range(COUNT):
        with rasterio.open(root / f"label/label/area{n}_1_label.tif") as file:
            label = file.read(1)
            shapes = rasterio.features.shapes(label, label > 0, transform=file.transform)
            polygons += [shapely.geometry.shape(shape) for shape, _ in shapes]
    shutil.rmtree(root / "label/label")
    return gpd.GeoDataFrame({"name": ["教学楼"] * len(polygons)}, geometry=polygons, crs=UTM)


def fits(nb, tile_set):
    """True if each tile's label is what was drawn."""
    labels = [nb.read_tile(tile)[1] for tile in tile_set.tiles]
    return len(labels) == COUNT and all(
        np.array_equal(label, picture(f"t{n}")[1] > 0) for n, label in enumerate(labels)
    )


@pytest.mark.parametrize(
    "suffix", ["fgb", "kml", "zip", "geojsonl", "csv", "gpkg", "shp", "geojson", "ndjson"]
)
def test_footprints_are_read_from_the_files_that_are_downloaded(
    nb, settings, roofs, verify, suffix
):
    path = Path(settings["root"], "label", f"roofs.{suffix}")
    degrees = roofs.to_crs("EPSG:4326")
    if suffix == "csv":
        table = pd.DataFrame({"confidence": 0.9, "geometry": degrees.geometry.to_wkt()})
        table.to_csv(path, index=False)
    elif suffix == "zip":
        roofs.to_file(path.with_name("roofs.shp.zip"), driver="ESRI Shapefile")
        path.with_name("roofs.shp.zip").rename(path)
    else:
        drivers = {"geojsonl": "GeoJSONSeq", "ndjson": "GeoJSONSeq", "kml": "KML"}
        degrees.to_file(path, driver=drivers.get(suffix))
    assert fits(nb, verify(labels_dir=f"label/roofs.{suffix}"))


def test_a_shapefile_of_a_wrong_encoding_is_read(nb, settings, roofs, verify):
    path = Path(settings["root"], "label", "roofs.shp")
    roofs.to_file(path, encoding="gbk")
    path.with_suffix(".cpg").write_text("UTF-8")
    assert fits(nb, verify(labels_dir="label/roofs.shp"))


def test_geoparquet_is_read_or_says_what_reads_it(nb, settings, roofs, verify):
    path = Path(settings["root"], "label", "roofs.parquet")
    try:
        roofs.to_parquet(path)
    except ImportError:
        path.write_bytes(b"PAR1")
        with pytest.raises(ValueError, match="pip install pyarrow"):
            verify(labels_dir="label/roofs.parquet")
        return
    assert fits(nb, verify(labels_dir="label/roofs.parquet"))


def test_a_large_file_is_read_once_and_near_the_images_only(
    nb, settings, roofs, verify, monkeypatch
):
    far = roofs.translate(5e4, 5e4)
    path = Path(settings["root"], "label", "state.gpkg")
    pd.concat([roofs.geometry, *[far] * 50]).to_file(path)
    read_file, seen = gpd.read_file, []

    def count(*words, **options):
        seen.append(read_file(*words, **options))
        return seen[-1]

    monkeypatch.setattr(gpd, "read_file", count)
    assert fits(nb, verify(labels_dir="label/state.gpkg"))
    assert len(seen) == 1 and len(seen[0]) == len(roofs)


def test_swapped_axes_are_recognised(nb, settings, roofs, verify):
    degrees = roofs.to_crs("EPSG:4326").geometry
    swapped = shapely.transform(degrees.to_numpy(), lambda x, y: (y, x), interleaved=False)
    path = Path(settings["root"], "label", "roofs.gpkg")
    gpd.GeoSeries(swapped, crs="EPSG:4326").to_file(path)
    with pytest.raises(ValueError, match="latitude and longitude look swapped"):
        verify(labels_dir="label/roofs.gpkg")


def test_degrees_that_claim_to_be_metres_are_recognised(nb, settings, roofs, verify):
    degrees = roofs.to_crs("EPSG:4326").set_crs(UTM, allow_override=True)
    degrees.to_file(Path(settings["root"], "label", "roofs.gpkg"))
    with pytest.raises(ValueError, match="look like degrees"):
        verify(labels_dir="label/roofs.gpkg")


def test_footprints_of_another_town_are_said_to_be_elsewhere(nb, settings, roofs, verify):
    roofs.translate(5e4, 0).to_file(Path(settings["root"], "label", "roofs.gpkg"))
    with pytest.raises(ValueError, match=r"label elsewhere.*km away"):
        verify(labels_dir="label/roofs.gpkg")


# ---- two runs in one folder


def test_a_model_that_another_run_has_written_is_not_taken_for_ones_own(nb, start, settings):
    one, go_one = start()
    two, go_two = start(seed=7)
    go_one()
    go_two()
    file = nb.find_best_model_file(one, one.config)
    checkpoint = nb.load_checkpoint(file)
    with pytest.raises(ValueError, match="another run.*save_dir of its own"):
        nb.check_file_of_run(file, checkpoint, one)
    nb.check_file_of_run(file, checkpoint, two)
    again, _ = start(seed=7)
    assert nb.resume_run(again) and again.id == two.id != one.id


def test_a_folder_in_which_another_process_trains_is_not_used(nb, start, settings):
    run, go = start()
    folder = Path(run.config.save_dir)
    folder.mkdir(parents=True, exist_ok=True)
    code = "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(1, flush=True)"
    code += "; input()"
    words = [sys.executable, "-c", code, str(folder / "training.lock")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline()
        with pytest.raises(RuntimeError, match="another run is training.*another save_dir"):
            go()
        other.kill()
        other.wait()
    assert len(go()) == 2  # it left no lock behind


# ---- weights


@pytest.fixture
def weights(settings):
    """The weights of a plain model of smp."""
    torch.manual_seed(5)
    return smp.DeepLabV3Plus(settings["encoder_name"], encoder_weights=None).state_dict()


def prefixed(state, prefix):
    """The same weights under longer names."""
    return {prefix + key: value for key, value in state.items()}


SHAPES = {
    "plain.pth": lambda s: s,
    "parallel.pth": lambda s: prefixed(s, "module."),
    "lightning.ckpt": lambda s: {"state_dict": prefixed(s, "model."), "epoch": 3},
    "tutorial.pt": lambda s: {"model_state_dict": s, "epoch": 3},
    "wrapped.pt": lambda s: {"model": prefixed(s, "module.")},
    "compiled.pth": lambda s: prefixed(s, "_orig_mod."),
    "flair.pth": lambda s: prefixed(s, "model.seg_model."),
    "encoder.pth": lambda s: {
        key.removeprefix("encoder."): value for key, value in s.items() if "encoder." in key
    },
}


@pytest.mark.parametrize("name", SHAPES)
def test_weights_are_taken_as_other_tools_save_them(nb, settings, tmp_path, weights, name):
    path = tmp_path / "weights" / name
    path.parent.mkdir()
    torch.save(SHAPES[name](weights), path)
    config = nb.make_config(**settings | {"encoder_weights": str(path)})
    model = nb.build_model(config)
    assert nb.load_encoder_weights(model, config) == str(path)
    loaded = model.state_dict()
    first = [key for key in weights if key.startswith("encoder.") and "num_batches" not in key]
    assert all(torch.equal(loaded[key], weights[key]) for key in first)


def test_weights_that_do_not_fit_say_what_they_hold(nb, settings, tmp_path):
    torch.save({"layers.first.kernel": torch.zeros(3)}, tmp_path / "other.pth")
    config = nb.make_config(**settings | {"encoder_weights": str(tmp_path / "other.pth")})
    with pytest.raises(ValueError, match=r"holds layers\.first\.kernel.*expected are encoder\."):
        nb.load_encoder_weights(nb.build_model(config), config)


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as a download asks for."""

    files: dict = {}
    asked: list = []

    def do_HEAD(self):
        """Say how large a file is, and which version."""
        self.answer(False)

    def do_GET(self):
        """Send a file."""
        self.answer(True)

    def answer(self, with_content):
        self.asked.append(self.path)
        content = self.files.get(self.path)
        self.send_response(404 if content is None else 200)
        self.send_header("ETag", '"abc"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if with_content and content:
            self.wfile.write(content)

    def log_message(self, *words):
        """Be quiet."""


@pytest.fixture
def hub(nb, tmp_path, monkeypatch):
    """A hub on this machine, and a cache of its own."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(nb.HUB, "ENDPOINT", place)
    template = place + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(nb.HUB, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(nb, "OFFLINE", False)
    monkeypatch.setattr(nb.HUB, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(nb.HUB, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(Hub, "files", {})
    monkeypatch.setattr(Hub, "asked", [])
    yield server
    server.shutdown()


def test_weights_come_from_the_hub_by_name_and_stay(nb, settings, tmp_path, weights, hub):
    save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path / "w.safetensors")
    Hub.files["/owner/roofs/resolve/main/deep/w.safetensors"] = (
        tmp_path / "w.safetensors"
    ).read_bytes()
    wanted = settings | {"encoder_weights": "hf://owner/roofs/deep/w.safetensors"}
    config = nb.make_config(**wanted)
    assert config.encoder_weights.endswith("w.safetensors") and os.path.isfile(
        config.encoder_weights
    )
    model = nb.build_model(config)
    nb.load_encoder_weights(model, config)
    key = "encoder.conv1.weight"
    assert same(model.state_dict()[key], weights[key])
    hub.shutdown()
    hub.server_close()
    assert nb.make_config(**wanted).encoder_weights == config.encoder_weights  # from the cache


@pytest.mark.parametrize("setting", ["encoder_weights", "model"])
def test_weights_that_the_hub_does_not_have_are_named(nb, settings, hub, setting):
    with pytest.raises(ValueError, match=rf"{setting} = 'hf://owner/roofs/no.pt' could not be"):
        nb.make_config(**settings | {setting: "hf://owner/roofs/no.pt"})


def test_the_extents_of_places_are_in_degrees(nb, write, verify):
    write(place, place)
    pairs, _, _ = nb.pair_files(verify().config)
    left, bottom, right, top = nb.find_ground_extent(pairs)
    assert 14.9999 < left < right < 15.03 and 57.7 < bottom < top < 57.8
    assert from_bounds(left, bottom, right, top, 10, 10).a > 0


# ---- the interactive map


def test_an_interactive_map_is_one_file_of_the_scene_and_its_roofs(nb, tmp_path, mapper):
    image, _ = town(300, 200)
    save_tiff(tmp_path / "scenes/a.tif", image.transpose(2, 0, 1), **place(0))
    save_tiff(tmp_path / "scenes/b.tif", image[:100].transpose(2, 0, 1), **place(90))
    save(tmp_path / "scenes/c.png", image)
    maps = mapper()
    shown = nb.show_interactive_map(maps)
    folder = next(iter(maps.masks.values())).parent
    assert {path.name for path in folder.glob("*.html")} == {"a_map.html", "b_map.html"}
    text = (folder / "a_map.html").read_text()
    assert "data:image/webp;base64," in text and "tile.openstreetmap" not in text
    assert text.count('"area_m2":') == len(maps.roofs[tmp_path / "scenes/a.tif"])
    assert "data:image/webp" in shown._repr_html_()  # what a notebook shows
    left, bottom, right, top = maps.roofs[tmp_path / "scenes/a.tif"].to_crs(4326).total_bounds
    (south, west), (north, east) = shown.get_bounds()
    assert west - 1e-6 < left < right < east + 1e-6
    assert south - 1e-6 < bottom < top < north + 1e-6


def test_a_browser_gets_the_largest_roofs_of_many(nb, tmp_path, mapper, monkeypatch, capsys):
    image, _ = town(300, 200)
    save_tiff(tmp_path / "scenes/a.tif", image.transpose(2, 0, 1), **place(0))
    monkeypatch.setattr(nb, "MAX_DRAWN", 3)
    maps = mapper()
    nb.show_interactive_map(maps)
    (mask,) = maps.masks.values()
    assert mask.with_name("a_map.html").read_text().count('"area_m2":') == 3
    count = maps.table.loc["a.tif", "roofs"]
    assert f"the 3 largest of {count} roofs are drawn" in capsys.readouterr().out


def test_scenes_without_a_place_have_no_interactive_map(nb, tmp_path, mapper, capsys):
    save(tmp_path / "scenes/c.png", town(100, 100)[0])
    assert nb.show_interactive_map(mapper()) is None
    assert "no interactive map" in capsys.readouterr().out


@pytest.mark.parametrize("options", [{}, {"crs": UTM}], ids=["no system", "UTM"])
def test_tiles_that_all_claim_one_place_are_not_taken_to_overlap(nb, write, verify, options):
    write(lambda n: options | {"transform": from_origin(5e5, 6.4e6, 0.3, 0.3)})
    tile_set = verify(split=[0.5, 0.25, 0.25])
    assert "one place for all tiles" in set(tile_set.report["kind"])
    assert len(nb.split_dataset(tile_set, tile_set.config).parts["train"]) == COUNT // 2


def test_a_scene_whose_footprints_cannot_be_used_is_mapped(nb, tmp_path, mapper, capsys):
    image, _ = town(100, 100)
    save_tiff(tmp_path / "scenes/a.tif", image.transpose(2, 0, 1), **place(0))
    near = gpd.GeoSeries([shapely.box(500_001, 6_399_990, 500_009, 6_399_999)], crs=UTM)
    for shapes, reason in (
        (near.boundary, "it holds lines"),
        (near.translate(9e4), "other ground"),
    ):
        shapes.to_file(tmp_path / "scenes/a.gpkg")
        maps = mapper()
        assert "a.tif" in maps.table.index and "true_roofs" not in maps.table
        assert reason in (text := capsys.readouterr().out) and "no score: " in text


def test_a_run_is_told_in_section_1_before_it_writes_anything(nb, settings, write_pair):
    for n in range(4):
        write_pair(f"s{n}_1")
    folder = Path(settings["save_dir"])
    folder.mkdir(parents=True)
    lock = nb.FileLock(folder / "training.lock")
    with lock, pytest.raises(RuntimeError, match="another run is training"):
        nb.start_session(**settings)
    assert {path.name for path in folder.iterdir()} == {"training.lock"}
    assert nb.start_session(**settings).config.save_dir == str(folder)
