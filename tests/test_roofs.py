"""Section 13, second half: roofs traced from a mask, their outlines, measures, score and files."""

import json
import os
import warnings
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import rasterio
import rasterio.features
import rasterio.warp
import shapely
from pyproj import Geod
from rasterio import Affine
from scipy import ndimage
from shapely import affinity

SCENE = Path(__file__).parents[2] / "shared" / "data" / "scene"
COLUMNS = ["area_m2", "perimeter_m", "confidence", "touches_edge"]
COLUMNS += ["neighbours", "block", "verdict", "geometry"]
GEOD = Geod(ellps="WGS84")
METRE = 1 / 111_320  # in degrees of latitude


def write_mask(path, roof, probability=None, void=None, outline=None, **georeference):
    """A mask as section 13 writes it: roof, probability * 250; 255 where there is no data.

    With an outline in 0-1, its probability * 250 is the third band.
    """
    bands = np.stack([roof, np.where(roof, 200, 20) if probability is None else probability])
    if outline is not None:
        bands = np.concatenate([bands, np.rint(250 * outline)[None]])
    if void is not None:
        bands[:, void] = 255
    blocks = {"tiled": True, "blockxsize": 128, "blockysize": 128}
    size = {"height": roof.shape[0], "width": roof.shape[1], "dtype": "uint8"}
    size["count"] = len(bands)
    with rasterio.open(
        path, "w", driver="GTiff", nodata=255, **size, **blocks, **georeference
    ) as out:
        out.write(bands.astype(np.uint8))
    return path


def burn(shapes, shape, transform=None):
    return rasterio.features.rasterize(
        shapes, shape, transform=transform or Affine.identity(), dtype="uint8"
    )


def ragged(true, shape, noise, seed=0):
    """The mask of polygons with outlines as uneven as a network draws them."""
    full = burn(true, shape)
    rng = np.random.default_rng(seed)
    wave = ndimage.gaussian_filter(rng.standard_normal(shape), 3)
    depth = ndimage.distance_transform_edt(full) - ndimage.distance_transform_edt(1 - full)
    return (ndimage.gaussian_filter(depth + wave * noise / wave.std(), 1) > 0).astype(np.uint8)


def rectangles(length, width, count=16, cell=420, seed=1):
    """Rectangles at any angle, one in each cell of a square grid; and the grid's shape."""
    rng, across = np.random.default_rng(seed), int(count**0.5)
    box = shapely.box(-length / 2, -width / 2, length / 2, width / 2)
    turned = [affinity.rotate(box, angle) for angle in rng.uniform(0, 90, count)]
    moves = [((i % across + 0.5) * cell + 0.3, (i // across + 0.5) * cell) for i in range(count)]
    return [affinity.translate(b, *m) for b, m in zip(turned, moves, strict=True)], (
        across * cell,
    ) * 2


def traced(mask):
    found = rasterio.features.shapes(mask, mask)
    return np.array(
        [shapely.geometry.shape(one) for one, _ in found if shapely.geometry.shape(one).area > 99]
    )


def right_share(shapes):
    """Share of corners within a degree of 90."""
    angles = []
    for one in shapes:
        for ring in (one.exterior, *one.interiors):
            points = np.array(ring.coords)[:-1] @ [1, 1j]
            turn = np.angle(
                (np.roll(points, -1) - points) / (points - np.roll(points, 1)), deg=True
            )
            angles.extend(abs(turn))
    return (abs(np.array(angles) - 90) < 1).mean()


def iou(one, other):
    shared = shapely.area(shapely.intersection(one, other))
    return shared / (shapely.area(one) + shapely.area(other) - shared)


def of_truth(shapes, true):
    """IoU of each polygon with the true one around its centre."""
    nearest = shapely.STRtree(true).nearest(shapely.centroid(shapes))
    return iou(shapes, np.array(true)[nearest])


# ---- measures on the ground

FEET = "EPSG:2263"  # New York, US feet


@pytest.mark.parametrize("turn", [0, 25], ids=["straight", "rotated"])
@pytest.mark.parametrize("up", [-1, 1], ids=["north-up", "south-up"])
@pytest.mark.parametrize(
    ("system", "lon", "lat"),
    [
        ("EPSG:3857", 14.1, 57.8),
        ("EPSG:4326", 14.1, 57.8),
        ("EPSG:32633", 14.1, 57.8),
        (FEET, -73.9, 40.7),
    ],
)
def test_areas_are_those_of_the_ground(nb, tmp_path, system, lon, lat, turn, up):
    """A roof of 40 x 25 m with a courtyard of 10 x 8 m, laid out by geodesics."""

    def laid(east, north):
        azimuth, away = np.degrees(np.arctan2(east, north)), np.hypot(east, north)
        x, y, _ = GEOD.fwd(lon, lat, azimuth, away)
        return tuple(np.ravel(rasterio.warp.transform("EPSG:4326", system, [x], [y])))

    def ring(w, h):
        return [laid(x * w / 2, y * h / 2) for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1))]

    roof = shapely.Polygon(ring(40, 25), [ring(10, 8)])
    metre = (np.subtract(laid(1, 0), laid(0, 0))[0], np.subtract(laid(0, 1), laid(0, 0))[1])
    grid = (
        Affine.translation(*laid(0, 0)) * Affine.scale(metre[0], metre[1]) * Affine.rotation(turn)
    )
    grid = grid * Affine.scale(0.1, 0.1 * up) * Affine.translation(-300, -280)
    mask = burn([roof], (560, 600), grid)
    path = write_mask(tmp_path / "m.tif", mask, crs=system, transform=grid)
    (found,) = nb.polygonize_mask(path, 4.0).itertuples()
    assert found.area_m2 == pytest.approx(40 * 25 - 10 * 8, rel=0.005)
    assert found.perimeter_m == pytest.approx(130, rel=0.005)
    assert iou(found.geometry, roof) > 0.98 and not found.touches_edge
    table = nb.polygonize_mask(path, 4.0)
    assert table.crs == system
    ring = shapely.orient_polygons(table.to_crs(4326).geometry[0])
    area, perimeter = GEOD.geometry_area_perimeter(ring)  # an ellipsoid's own measure
    assert (found.area_m2, found.perimeter_m) == pytest.approx((area, perimeter), rel=1e-3)
    assert nb.polygonize_mask(path, 925).empty and len(nb.polygonize_mask(path, 915)) == 1


def test_the_plane_holds_far_from_its_centre(nb, tmp_path):
    """40 km from a scene's centre areas and perimeters are those of the ellipsoid."""
    mask = np.zeros((1, 2000), np.uint8)
    mask[0, :50] = 1
    grid = Affine(0.001, 0, 10, 0, -0.001, 65)
    table = nb.polygonize_mask(
        write_mask(tmp_path / "m.tif", mask, crs="EPSG:4326", transform=grid), 4.0
    )
    area, perimeter = GEOD.geometry_area_perimeter(table.geometry[0])
    assert table.area_m2[0] == pytest.approx(area, rel=1e-4)
    assert table.perimeter_m[0] == pytest.approx(perimeter, rel=1e-4)


# ---- what is found


@pytest.fixture
def pixels(tmp_path):
    """A random mask across many blocks, its probabilities and its components."""
    rng = np.random.default_rng(5)
    mask = ndimage.gaussian_filter(rng.standard_normal((400, 500)), 6) > 0.02
    mask[150:250, 200:300] = False
    return mask, rng.integers(0, 251, mask.shape), ndimage.label(mask)


def test_every_component_is_a_roof(nb, tmp_path, pixels):
    """Numbers, areas, confidence and edges by SciPy, for outlines that lie across blocks."""
    mask, probability, (labels, count) = pixels
    void = np.zeros_like(mask)
    void[160:240, 210:290] = True
    void[100:170, 100:110] = True
    mask = mask & ~void
    labels, count = ndimage.label(mask)
    path = write_mask(tmp_path / "m.tif", mask, probability, void)
    found = nb.polygonize_mask(path, 0)
    which = range(1, count + 1)
    inner = ndimage.binary_erosion(~void, np.ones((3, 3)))  # outside of the raster is 0
    assert len(found) == count

    def key(areas, means):
        return sorted(zip(np.round(areas), np.round(means, 3), strict=True))

    areas, means = ndimage.sum(mask, labels, which), ndimage.mean(probability, labels, which) / 250
    assert np.allclose(key(found.area_m2, found.confidence), key(areas, means), atol=0.0011)
    cut = ndimage.maximum(~inner, labels, which)
    assert sorted(zip(found.area_m2.round(), found.touches_edge, strict=True)) == sorted(
        zip(areas, cut, strict=True)
    )
    assert list(found.columns) == COLUMNS and found.crs is None and found.is_valid.all()
    holes = shapely.get_num_interior_rings(found.geometry.to_numpy())
    background = ndimage.label(~mask, np.ones((3, 3)))[0]
    outer = set(
        np.unique(
            np.concatenate([background[0], background[-1], background[:, 0], background[:, -1]])
        )
    )
    assert holes.sum() == len(set(np.unique(background)) - outer - {0})
    assert len(nb.polygonize_mask(path, 300)) == (areas >= 300).sum() < count


@pytest.mark.parametrize("angle", [0, 10, 33, 71])
def test_edges_and_corners_of_any_grid(nb, tmp_path, angle):
    """What touches is found by pixels, whatever the coordinates; a common corner joins no roofs."""
    mask, void = np.zeros((2, 120, 150), np.uint8)
    void[:, 100:110] = void[60:70, 40:110] = 1
    boxes = {(0, 9, 10, 30): 1, (20, 9, 40, 30): 0, (40, 30, 60, 50): 0, (62, 50, 80, 60): 1}
    boxes |= {
        (70, 1, 100, 20): 1,
        (112, 1, 149, 20): 0,
        (112, 30, 150, 50): 1,
        (30, 80, 50, 119): 0,
    }
    boxes |= {(60, 80, 80, 120): 1, (20, 50, 40, 60): 1}
    for left, top, right, bottom in boxes:
        mask[top:bottom, left:right] = 1
    grid = Affine.translation(14, 57) * Affine.rotation(angle) * Affine.scale(3e-6, -2e-6)
    place = {"crs": "EPSG:4326", "transform": grid}
    found = nb.polygonize_mask(write_mask(tmp_path / "m.tif", mask, void=void > 0, **place), 1)
    centres = (
        found.affine_transform((~grid).to_shapely()).set_crs(None, allow_override=True).centroid
    )
    tree = shapely.STRtree([shapely.box(*box) for box in boxes])
    which = tree.query(centres.to_numpy(), "intersects")[1]
    assert sorted(which) == list(range(len(boxes)))
    assert found.touches_edge.to_list() == [bool(list(boxes.values())[i]) for i in which]


@pytest.mark.parametrize("shape", [(40, 50), (1, 300), (300, 1), (1, 1)])
@pytest.mark.parametrize("value", [0, 1, 255])
def test_masks_of_one_value(nb, tmp_path, shape, value):
    mask = np.full(shape, value)
    for place in ({}, {"crs": "EPSG:3857", "transform": Affine(1, 0, 9e5, 0, -1, 7e6)}):
        path = write_mask(tmp_path / "m.tif", mask, np.minimum(mask * 250, 255), **place)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            # affine 3.1 asks for "@" instead of "*", which rasterio and affine 2 do not know
            warnings.simplefilter("ignore", PendingDeprecationWarning)
            found = nb.polygonize_mask(path, 0.1)
            nb.write_roofs(found, tmp_path, "m")
        assert len(found) == (value == 1) and list(found.columns) == COLUMNS
        assert found.touches_edge.dtype == bool and found.touches_edge.all()
        assert (found.confidence == 1).all()
        assert len(gpd.read_file(tmp_path / "m_roofs.gpkg")) == len(found)
        if value == 1 and not place:
            assert iou(found.geometry[0], shapely.box(0, 0, *shape[::-1])) > 0.999
            assert found.area_m2[0] == np.prod(shape)


def houses(boxes, shape):
    """Numbers of houses (H, W) drawn from boxes, and their outline, two pixels wide: 0.9."""
    numbers = np.zeros(shape, np.int32)
    for number, (left, top, right, bottom) in enumerate(boxes, 1):
        numbers[top:bottom, left:right] = number
    around = np.ones((5, 5))
    inside = ndimage.minimum_filter(numbers, footprint=around)
    same = inside == ndimage.maximum_filter(numbers, footprint=around)
    return numbers, np.where((numbers > 0) & ~same, 0.9, 0.0)


TERRACE = [(20 + 30 * i, 20 + 2 * i, 50 + 30 * i, 60) for i in range(7)]  # steps of two pixels
PAIR = [(20, 100, 60, 140), (60, 110, 99, 150)]
ALONE = [(150, 100, 200, 150), (10, 180, 18, 186)]  # the last one has no core


@pytest.fixture
def terrace(tmp_path):
    """A mask with a row of seven houses, a pair, and two houses by themselves; its truth."""
    numbers, outline = houses(TERRACE + PAIR + ALONE, (200, 260))
    probability = np.where(numbers > 0, 240, 10)
    grid = Affine(0.3, 0, 500_000, 0, -0.3, 6_400_000)
    place = {"crs": "EPSG:32633", "transform": grid, "outline": outline}
    path = write_mask(tmp_path / "m.tif", numbers > 0, probability, **place)
    boxes = gpd.GeoSeries([shapely.box(*box) for box in TERRACE + PAIR + ALONE])
    return path, boxes.affine_transform(grid.to_shapely())


def test_roofs_that_share_walls_are_single_polygons(nb, terrace):
    path, true = terrace
    found = nb.polygonize_mask(path, 1.0)
    assert len(found) == len(true)
    order = true.sindex.query(found.centroid.to_numpy(), "intersects")[1]
    assert sorted(order) == list(range(len(true)))  # one polygon in each house
    assert iou(found.geometry.to_numpy(), true.to_numpy()[order]).min() > 0.9
    neighbours = np.array([1, 2, 2, 2, 2, 2, 1, 1, 1, 0, 0])
    assert (found.neighbours.to_numpy() == neighbours[order]).all()
    blocks = found.block.to_numpy()
    truth = np.array([0] * 7 + [1] * 2 + [2, 3])[order]
    assert len(set(zip(blocks, truth, strict=True))) == len(set(blocks)) == 4


def test_without_an_outline_roofs_that_touch_are_one(nb, terrace):
    path, true = terrace
    with rasterio.open(path) as file:
        profile, bands = file.profile, file.read([1, 2])
    with rasterio.open(path, "w", **profile | {"count": 2}) as file:
        file.write(bands)
    found = nb.polygonize_mask(path, 1.0)
    assert len(found) == 4 and (found.neighbours == 0).all()


def test_walls_stay_shared_and_no_roofs_overlap(nb, terrace):
    path, true = terrace
    found = nb.polygonize_mask(path, 1.0)
    polygons = found.geometry.to_numpy()
    walls = 0
    for i in range(len(polygons)):
        for j in range(i):
            assert polygons[i].intersection(polygons[j]).area < 1e-6
            if found.block[i] == found.block[j]:
                walls += polygons[i].buffer(1e-6).intersection(polygons[j].boundary).length > 3
    assert walls == 7  # six in the row, one in the pair


def test_roofs_do_not_depend_on_strips(nb, tmp_path, monkeypatch, pixels):
    """Of a random mask with random outlines, strips of any height give the same polygons."""
    mask, probability, _ = pixels
    rng = np.random.default_rng(6)
    outline = ndimage.gaussian_filter(rng.standard_normal(mask.shape), 2)
    outline = np.clip(outline * 4, 0, 1)
    probability = np.where(mask, 245, 5)
    path = write_mask(tmp_path / "m.tif", mask, probability, outline=outline)
    monkeypatch.setattr(nb, "LEAST_CORE", 30)
    whole = nb.polygonize_mask(path, 4, 0.1)
    assert whole.neighbours.sum() > 50 and len(whole) > 100
    for height in (10, 64, 97, 300):
        monkeypatch.setattr(nb, "STRIP_PIXELS", height * mask.shape[1])
        assert whole.equals(nb.polygonize_mask(path, 4, 0.1))


def test_sections_12_and_13_tell_the_same_roofs_apart(nb, tmp_path, monkeypatch, pixels):
    monkeypatch.setattr(nb, "LEAST_CORE", 30)
    mask, _, _ = pixels
    rng = np.random.default_rng(7)
    outline = np.clip(4 * ndimage.gaussian_filter(rng.standard_normal(mask.shape), 2), 0, 1)
    outline = np.rint(250 * outline) / 250
    path = write_mask(tmp_path / "m.tif", mask, np.where(mask, 245, 5), outline=outline)
    numbers = nb.separate_roofs(np.uint8(mask), np.where(mask, 0.98, 0.02), outline, 0.1)
    with rasterio.open(path) as file:
        traced = nb.trace_single_roofs(file, 0.1)[0]
    burnt = nb.burn_numbers(traced, rasterio.windows.Window(0, 0, *mask.shape[::-1]))
    pairs, pixels = np.unique(np.stack([numbers[mask], burnt[mask]]), axis=1, return_counts=True)
    assert len(np.unique(numbers[mask])) == len(traced) > 100
    largest = pd.Series(pixels).groupby(pairs[0]).max()
    assert largest.sum() > 0.99 * mask.sum()  # where two cores arrive at once, either may win


def test_small_roofs_keep_their_shape(nb, tmp_path):
    mask = np.zeros((200, 400), np.uint8)
    corners = [(10 + 20 * i, 10 + 20 * j) for i in range(9) for j in range(18)]
    for i, (y, x) in enumerate(corners):
        mask[y : y + 2 + i % 5, x : x + 2 + i % 7] = 1
    found = nb.polygonize_mask(write_mask(tmp_path / "m.tif", mask), 4)
    boxes = [shapely.box(x, y, x + 2 + i % 7, y + 2 + i % 5) for i, (y, x) in enumerate(corners)]
    assert of_truth(found.geometry.to_numpy(), boxes).min() >= 0.85


# ---- outlines


@pytest.mark.parametrize("noise", [0.7, 1.5])
def test_houses_are_squared(nb, noise):
    """Far more corners are right than in simplified outlines, as near to the truth."""
    true, shape = rectangles(75, 50, count=36, cell=130)
    rough = traced(ragged(true, shape, noise))
    drawn = nb.regularize_outlines(rough, 3)
    simplified = shapely.simplify(rough, 3)
    assert right_share(drawn) > max(0.4, right_share(simplified) + 0.35)
    assert np.median(of_truth(drawn, true)) >= np.median(of_truth(simplified, true))
    assert np.median(iou(drawn, rough)) > 0.9
    assert np.allclose(shapely.area(drawn), shapely.area(rough))


def diagonal(kind):
    if kind == "round":
        return shapely.Point(0, 0).buffer(45)
    if kind == "octagon":
        return shapely.Point(0, 0).buffer(50, quad_segs=2)
    return shapely.Polygon([(-60, -35), (60, -35), (35, 45)])


@pytest.mark.parametrize("kind", ["row", "round", "octagon", "triangle"])
@pytest.mark.parametrize("noise", [0.7, 1.5])
def test_rows_and_diagonals_do_not_get_worse(nb, kind, noise):
    if kind == "row":
        true, shape = rectangles(330, 50, count=25)
    else:
        shape = (750, 750)
        true = [
            affinity.translate(
                affinity.rotate(diagonal(kind), 17 * i),
                75 + 150 * (i % 5) + 0.3,
                75 + 150 * (i // 5),
            )
            for i in range(25)
        ]
    rough = traced(ragged(true, shape, noise))
    drawn, simplified = nb.regularize_outlines(rough, 3), shapely.simplify(rough, 3)
    ours, plain = of_truth(drawn, true), of_truth(simplified, true)
    assert np.median(ours) > np.median(plain) - 0.006 and ours.min() > plain.min() - 0.03
    corners = shapely.get_num_coordinates
    assert corners(drawn).sum() <= 1.1 * corners(simplified).sum()


def test_what_cannot_be_squared_is_simplified(nb, monkeypatch):
    """Outlines that come back torn, filled, moved, of more corners or not at all are not used."""
    house = shapely.box(0, 0, 60, 40) - shapely.box(20, 10, 30, 16)
    rough = np.array([affinity.translate(house, 100 * i) for i in range(8)])
    steps = [(x, y) for i in range(12) for x, y in ((10 * i, 10 * i), (10 * i + 10, 10 * i))]
    rough[2] = shapely.Polygon([*steps, (120, 200), (0, 200)])

    def spoil(frame, *_, **__):
        shapes = dict(zip(frame.roof, frame.geometry, strict=True))
        shapes[0] = shapely.Polygon(shapes[0].exterior)
        shapes[1] = affinity.translate(shapes[1], 15)
        shapes[2] = shapes[2] - shapely.box(0, 150, 120, 150.01)  # a MultiPolygon
        shapes[3] = shapely.segmentize(shapes[3], 1)
        whole, part = shapes[4], shapely.box(400, 0, 401, 40)
        shapes[4] = whole - part
        shapes[6] = affinity.scale(shapes[6], 1.01, 1.01, origin="centroid")
        frame = gpd.GeoDataFrame({"roof": shapes.keys()}, geometry=[*shapes.values()])
        torn = gpd.GeoDataFrame({"roof": [4]}, geometry=[part])
        return pd.concat([frame, torn]).query("roof != 5")

    monkeypatch.setattr(nb, "regularize_geodataframe", spoil)
    drawn = nb.regularize_outlines(rough, 3)
    assert all(
        one.equals(other) or iou(one, other) > 1 - 1e-9
        for one, other in zip(drawn, rough, strict=True)
    )
    assert (shapely.get_num_coordinates(drawn) == shapely.get_num_coordinates(rough)).all()


def test_batches_do_not_matter(nb, tmp_path, monkeypatch):
    true, shape = rectangles(75, 50, count=16, cell=130)
    path = write_mask(tmp_path / "m.tif", ragged(true, shape, 0.7))
    whole = nb.polygonize_mask(path, 4)
    monkeypatch.setattr(nb, "OUTLINE_BATCH", 5)
    assert whole.equals(nb.polygonize_mask(path, 4)) and len(whole) == 16


# ---- score

PLACE = {"crs": "EPSG:32633", "transform": Affine(0.5, 0, 5e5, 0, -0.5, 6.4e6)}


def on_map(*boxes):
    shapes = gpd.GeoSeries([shapely.box(*box) for box in boxes], crs=PLACE["crs"])
    return shapes.affine_transform(PLACE["transform"].to_shapely())


@pytest.fixture
def scene(nb, tmp_path):
    """Three roofs of 40 x 40 pixels (400 m²) and, at the right, ground that was not seen."""
    mask = np.zeros((200, 400), np.uint8)
    for x in (20, 100, 180):
        mask[50:90, x : x + 40] = 1
    void = np.zeros_like(mask, bool)
    void[:, 300:] = True
    path = write_mask(tmp_path / "m.tif", mask, void=void, **PLACE)
    return path, nb.polygonize_mask(path, 4.0)


@pytest.mark.parametrize("system", ["EPSG:32633", "EPSG:4326", "EPSG:3857"])
def test_score_by_hand(nb, tmp_path, scene, system):
    """Exact, by a third of the width aside (IoU 0.5), by half (IoU 1/3), missed; and some that do not count."""
    path, found = scene
    true = on_map(
        (20, 50, 60, 90), (20, 50, 60, 91),  # a footprint that was drawn twice matches once
        (113, 50, 153, 90), (200, 50, 240, 90), (20, 120, 40, 140),
        (310, 20, 350, 60), (-90, 20, -50, 60), (20, -60, 60, -10),  # where the scene shows nothing
        (60, 150, 63, 155),  # smaller than min_area
        (280, 100, 320, 120),  # half of it is seen
    )  # fmt: skip
    true.to_crs(system).to_file(tmp_path / "truth.gpkg")
    score = nb.score_against_footprints(found, tmp_path / "truth.gpkg", path, 4.0)
    assert score["roofs"] == 3 and score["true_roofs"] == 6
    assert score["area_m2"] == pytest.approx(1200, rel=2e-3)
    assert score["true_area_m2"] == pytest.approx(400 * 4 + 10 + 100 + 100, rel=2e-3)
    assert score[["precision", "recall", "f1"]].to_list() == pytest.approx([2 / 3, 2 / 6, 4 / 9])


def test_score_without_matches_or_roofs(nb, tmp_path, scene):
    path, found = scene
    on_map((310, 20, 350, 60)).to_file(tmp_path / "none.gpkg")
    on_map((20, 120, 40, 140)).to_file(tmp_path / "other.gpkg")
    none = nb.score_against_footprints(found[:0], tmp_path / "none.gpkg", path, 4.0)
    assert (
        none[["roofs", "true_roofs", "true_area_m2"]].to_list() == [0, 0, 0]
        and none.isna().sum() == 4
    )
    assert nb.score_against_footprints(found, tmp_path / "none.gpkg", path, 4.0)["precision"] == 0
    assert nb.score_against_footprints(found[:0], tmp_path / "other.gpkg", path, 4.0)["recall"] == 0
    on_map()[:0].to_file(tmp_path / "empty.geojson")
    assert (
        nb.score_against_footprints(found, tmp_path / "empty.geojson", path, 4.0)["true_roofs"] == 0
    )


def test_score_mends_footprints_and_needs_a_place(nb, tmp_path, scene):
    path, found = scene
    bow = shapely.Polygon([(20, 50), (50, 50), (60, 90), (60, 80), (20, 90)])
    bow = gpd.GeoSeries([bow], crs=PLACE["crs"]).affine_transform(PLACE["transform"].to_shapely())
    bow.to_file(tmp_path / "bow.gpkg")
    assert nb.score_against_footprints(found, tmp_path / "bow.gpkg", path, 4.0)["recall"] == 1
    nowhere = write_mask(tmp_path / "picture.tif", np.ones((9, 9)))
    with pytest.raises(ValueError, match="picture.tif has no coordinate system"):
        nb.score_against_footprints(found, tmp_path / "bow.gpkg", nowhere, 4.0)


@pytest.mark.parametrize(("noise", "least"), [(0, 0.97), (0.7, 0.95), (1.5, 0.9)])
def test_zanzibar(nb, tmp_path, noise, least):
    """The burnt footprints of a real place, and the same with ragged outlines, against the footprints."""
    if not SCENE.is_dir():
        pytest.skip(f"the real scene is not at {SCENE}")
    with rasterio.open(SCENE / "zanzibar_mask.tif") as source:
        mask, place = source.read(1) > 0, {"crs": source.crs, "transform": source.transform}
    if noise:
        mask = ragged(
            [g for g, v in rasterio.features.shapes(mask.astype(np.uint8)) if v], mask.shape, noise
        )
    path = write_mask(tmp_path / "m.tif", mask, **place)
    found = nb.polygonize_mask(path, 4.0)
    score = nb.score_against_footprints(found, SCENE / "zanzibar.geojson", path, 4.0)
    print(score.round(3).to_dict(), right_share(found.geometry))
    assert score["true_roofs"] == 121 and score["f1"] > least and score["precision"] >= 0.98
    assert score["area_m2"] == pytest.approx(score["true_area_m2"], rel=0.01)
    assert found.is_valid.all() and right_share(found.geometry) > 0.4


# ---- files


def test_files(nb, tmp_path, scene):
    _, found = scene
    nb.write_roofs(found, tmp_path / "scenes", "town.2")
    package = gpd.read_file(tmp_path / "scenes" / "town.2_roofs.gpkg")
    assert package.crs == PLACE["crs"] and package.geom_equals_exact(found, 1e-6).all()
    assert package.drop(columns="geometry").equals(found.drop(columns="geometry"))
    assert gpd.list_layers(tmp_path / "scenes" / "town.2_roofs.gpkg")["name"].to_list() == [
        "town.2_roofs"
    ]
    text = json.loads((tmp_path / "scenes" / "town.2_roofs.geojson").read_text())
    assert "crs" not in text and len(text["features"]) == 3
    shapes = gpd.read_file(tmp_path / "scenes" / "town.2_roofs.geojson")
    assert shapes.crs == "EPSG:4326" and abs(shapes.total_bounds[0] - 15) < 0.01
    assert (
        iou(shapes.to_crs(PLACE["crs"]).geometry.to_numpy(), found.geometry.to_numpy()).min()
        > 0.999
    )
    assert shapes.exterior.is_ccw.all()  # as the standard asks
    assert sorted(os.listdir(tmp_path / "scenes")) == ["town.2_roofs.geojson", "town.2_roofs.gpkg"]


def test_files_are_whole_or_not_at_all(nb, tmp_path, scene, monkeypatch):
    _, found = scene
    nb.write_roofs(found, tmp_path, "a")
    before = {p.name: p.read_bytes() for p in tmp_path.glob("a_*")}
    monkeypatch.setattr(
        nb.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    with pytest.raises(nb.CannotWrite, match="a_roofs.gpkg"):
        nb.write_roofs(found[:1], tmp_path, "a")
    assert before == {p.name: p.read_bytes() for p in tmp_path.glob("a_*")}


def test_pictures_are_written_in_pixels(nb, tmp_path):
    mask = np.zeros((90, 80), np.uint8)
    mask[20:60, 10:70] = 1
    found = nb.polygonize_mask(write_mask(tmp_path / "m.tif", mask), 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nb.write_roofs(found, tmp_path, "m")
    assert gpd.read_file(tmp_path / "m_roofs.gpkg").crs is None
    shape = shapely.geometry.shape(
        json.loads((tmp_path / "m_roofs.geojson").read_text())["features"][0]["geometry"]
    )
    assert iou(shape, shapely.box(10, 20, 70, 60)) > 0.999
