"""What label values, bands and names mean: decided over the whole set, or the run stops."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import rasterio.shutil
from faulty import save, save_tiff
from PIL import Image
from rasterio.transform import from_origin

COUNT, SIDE = 12, 64
UTM = "EPSG:32633"


def roofs(number: int) -> np.ndarray:
    """A mask (H, W) bool with a few rectangles."""
    rng, mask = np.random.default_rng(number), np.zeros((SIDE, SIDE), bool)
    for x, y in rng.integers(2, SIDE - 22, (3, 2)):
        mask[y : y + 18, x : x + 20] = True
    return mask


def photo(number: int) -> np.ndarray:
    """An image (H, W, 3) uint8 of noise, lighter on roofs."""
    rng = np.random.default_rng(100 + number)
    return (rng.integers(0, 90, (SIDE, SIDE, 3)) + 150 * roofs(number)[..., None]).astype(np.uint8)


TRUTH = np.mean([roofs(number) for number in range(COUNT)])


def spot(number: int) -> dict:
    """Georeference of a tile, far from the others."""
    return {"crs": UTM, "transform": from_origin(500_000 + 100 * number, 6_400_000, 0.5, 0.5)}


@pytest.fixture
def write(settings):
    """A function that writes the tiles; image and label are what writes a file at a path."""

    def write_all(label=None, image=None, name="{folder}/area{n}_1{end}"):
        label = label or (
            lambda path, mask, n: save(path.with_suffix(".png"), np.uint8(255 * mask))
        )
        image = image or (lambda path, pixels, n: save(path.with_suffix(".png"), pixels))
        root = Path(settings["root"])
        for n in range(COUNT):
            for how, pixels, folder, end in (
                (image, photo(n), settings["images_dir"], ""),
                (label, roofs(n), settings["labels_dir"], "_label"),
            ):
                path = root / name.format(folder=folder, n=n, end=end)
                path.parent.mkdir(parents=True, exist_ok=True)
                how(Path(f"{path}.x"), pixels, n)
        return root

    return write_all


@pytest.fixture
def verify(nb, settings):
    """A function that verifies the tiles under changed settings: tiles, report, config."""

    def go(**changes):
        config = nb.make_config(**settings | changes)
        assert not nb.needs_sample(config)
        return *nb.inspect_dataset(config), config

    return go


def labels_read(nb, tiles, config):
    """The labels as the model meets them, in the order of the tiles' numbers."""
    return [nb.read_tile(tile)[1] for tile in tiles]


def png(values):
    """What writes a label of values (a function of mask and number) as PNG."""
    return lambda path, mask, n: save(path.with_suffix(".png"), values(mask, n))


def tif(values, **options):
    """What writes a label of values as GeoTIFF."""

    def write(path, mask, n):
        bands = values(mask, n)
        bands = bands[None] if bands.ndim == 2 else np.moveaxis(bands, 2, 0)
        save_tiff(path.with_suffix(".tif"), bands, **spot(n), **options)

    return write


def indexed(colours):
    """What writes a label of 0 and 1 with a palette."""

    def write(path, mask, n):
        picture = Image.fromarray(mask.astype(np.uint8), "P")
        picture.putpalette([*colours, *[0] * (768 - len(colours))])
        picture.save(path.with_suffix(".png"))

    return write


def painted(mask, roof, ground=(0, 0, 0)):
    """A label in two colours."""
    return np.where(mask[..., None], np.uint8(roof), np.uint8(ground))


def smoothed(mask, n):
    """A label of 0 and 255 with grey edges."""
    large = Image.fromarray(np.uint8(255 * mask)).resize((3 * SIDE, 3 * SIDE), Image.NEAREST)
    return np.asarray(large.rotate(1).rotate(-1).resize((SIDE, SIDE), Image.BILINEAR))


def clear(mask, n):
    """Red roofs on a transparent ground."""
    return np.dstack([painted(mask, (200, 0, 0)), np.uint8(255 * mask)])


def jpeg(high, quality):
    return lambda path, mask, n: save(
        path.with_suffix(".jpg"), np.uint8(high * mask), quality=quality
    )


UNDERSTOOD = {
    "0 and 255": png(lambda m, n: np.uint8(255 * m)),
    "0 and 1": png(lambda m, n: np.uint8(m)),
    "0 and 200": png(lambda m, n: np.uint8(200 * m)),
    "0 and 1 in three bands": png(lambda m, n: np.dstack([m] * 3).astype(np.uint8)),
    "one bit": png(lambda m, n: m),
    "one bit in a TIFF": lambda path, m, n: save(path.with_suffix(".tif"), m),
    "one bit, white stored as 0": lambda path, m, n: save(
        path.with_suffix(".tif"), m, compression="group4", tiffinfo={262: 0}
    ),
    "eight bits, white stored as 0": tif(lambda m, n: np.uint8(255 * ~m), photometric="MINISWHITE"),
    "float on nodata": tif(lambda m, n: np.where(m, 1, -9999).astype(np.float32), nodata=-9999),
    "float on not-a-number": tif(
        lambda m, n: np.where(m, 1, np.nan).astype(np.float32), nodata=np.nan
    ),
    "1 on nodata 255": tif(lambda m, n: np.where(m, 1, 255).astype(np.uint8), nodata=255),
    "255 on nodata 0": tif(lambda m, n: np.uint8(255 * m), nodata=0),
    "int32": tif(lambda m, n: np.int32(70_000 * m)),
    "red on black": png(lambda m, n: painted(m, (255, 0, 0))),
    "red on transparent": png(clear),
    "palette of VOC": indexed([0, 0, 0, 128, 0, 0]),
    "palette, roof first": indexed([0, 0, 0, 255, 255, 255]),
    "smoothed": png(smoothed),
    "JPEG of 0 and 255": jpeg(255, 75),
    "JPEG of 0 and 255, poor": jpeg(255, 50),
    "JPEG of 0 and 1": jpeg(1, 90),
}


@pytest.mark.parametrize("label", UNDERSTOOD.values(), ids=UNDERSTOOD.keys())
def test_two_codes_of_which_one_is_ground_are_understood(nb, write, verify, label):
    write(label)
    tiles, _, config = verify()
    assert len(tiles) == COUNT
    for tile, read in zip(tiles, labels_read(nb, tiles, config), strict=True):
        number = int(Path(tile.key).stem.removeprefix("area").partition("_")[0])
        assert (read == roofs(number)).mean() > 0.95
    table = nb.explain_label_codes(tiles, config)
    assert set(table["read as"]) == {"background", "rooftop"}


def areas(*values):
    """A label of blocks of values, 1 on roofs."""

    def write(mask, n):
        blocks = np.random.default_rng(n).choice(values, (4, 4))
        return np.where(mask, 1, blocks.repeat(16, 0).repeat(16, 1)).astype(np.uint8)

    return png(write)


def ramp(mask, n):
    """RAMP's multimask: 0, building 1, its rim 2, close contact 3."""
    core = mask & np.roll(mask, 2, 0) & np.roll(mask, -2, 0)
    label = np.where(core, 1, 2 * mask).astype(np.uint8)
    label[:2, :20] = 3
    return label


def dubai(mask, n):
    """Colours of six classes; a building is #3C1098."""
    colours = np.uint8([(132, 41, 246), (110, 193, 228), (254, 221, 58), (155, 155, 155)])
    blocks = np.random.default_rng(n).integers(0, 4, (4, 4)).repeat(16, 0).repeat(16, 1)
    return painted(mask, (60, 16, 152), colours[blocks])


def outlined(mask, n):
    """Roofs of 1 with an outline of 2, one pixel wide."""
    core = mask.copy()
    for step, axis in ((1, 0), (-1, 0), (1, 1), (-1, 1)):
        core &= np.roll(mask, step, axis)
    return np.where(core, 1, 2 * mask).astype(np.uint8)


UNCLEAR = {
    "an outline with a number of its own": (png(outlined), 'class_values = [0, "other"]'),
    "1 and 255": (
        png(lambda m, n: np.where(m, 255, 1).astype(np.uint8)),
        "class_values = [1, 255]",
    ),
    "1 and 2": (png(lambda m, n: np.uint8(m + 1)), "class_values = [2, 1]"),
    "0, 1 and 255": (areas(0, 255), "class_values = [0, 1]; ignore_value = 255"),
    "five values": (areas(0, 2, 3, 4), 'class_values = ["other", 1]'),
    "RAMP": (tif(ramp), 'class_values = ["other", 1]'),
    "six colours": (png(dubai), "class_values = [\"other\", '#3C1098']"),
    "bands that differ": (
        png(lambda m, n: np.uint8(255 * np.dstack([m, np.roll(m, 4, 0), 0 * m]))),
        "class_values = [\"other\", '#FFFF00']",
    ),
    "ground alone": (png(lambda m, n: np.uint8(0 * m)), "no roof in any label"),
    "roof alone": (png(lambda m, n: np.uint8(255 + 0 * m)), "None is 0 or no data"),
    "building numbers": (
        png(lambda m, n: np.uint8(m * (20 + 9 * n))),
        'class_values = [0, "other"]',
    ),
}


@pytest.mark.parametrize(("label", "line"), UNCLEAR.values(), ids=UNCLEAR.keys())
def test_anything_else_stops_with_what_was_found_and_what_to_set(write, verify, label, line):
    write(label)
    with pytest.raises(ValueError, match="labels hold .*%") as caught:
        verify()
    assert line in str(caught.value) and "Set in section 1.1" in str(caught.value)


THREE = png(lambda m, n: np.uint8(255 * np.dstack([m, np.roll(m, 4, 0), 0 * m])))
NAMED = {
    "RAMP": (tif(ramp), {"class_values": [[0, 3], [1, 2]]}),
    "Dubai": (png(dubai), {"class_values": ["other", "#3C1098"]}),
    "Dubai with a grey": (
        png(lambda m, n: painted(m, (155, 155, 155), (60, 16, 152))),
        {"class_values": ["other", "#9B9B9B"]},
    ),
    "LandCover.ai": (areas(0, 2, 3, 4), {"class_values": ["other", 1]}),
    "LoveDA": (areas(0, 2, 3), {"class_values": ["other", 1], "ignore_value": 0}),
    "solaris": (THREE, {"class_values": ["other", ["#FF0000", "#FFFF00"]]}),
    "ISPRS": (
        png(lambda m, n: painted(m, (0, 0, 255), (255, 255, 255))),
        {"class_values": ["other", "#0000FF"]},
    ),
    "CVAT": (png(lambda m, n: painted(m, (250, 50, 83))), {"class_values": [0, "#FA3253"]}),
    "building numbers": (
        tif(lambda m, n: np.uint16(m * (60_000 + n))),
        {"class_values": [0, "other"]},
    ),
    "inverted": (png(lambda m, n: np.uint8(255 * ~m)), {"class_values": [255, 0]}),
    "inverted JPEG": (
        lambda path, m, n: save(path.with_suffix(".jpg"), np.uint8(255 * ~m), quality=80),
        {"class_values": [255, 0]},
    ),
    "nodata by name": (
        tif(lambda m, n: np.where(m, 1, 255).astype(np.uint8), nodata=255),
        {"class_values": [255, 1]},
    ),
    "numbers of a palette": (indexed([9, 9, 9, 128, 0, 0]), {"class_values": [0, 1]}),
    "colours of a palette": (indexed([9, 9, 9, 128, 0, 0]), {"class_values": [9, "#800000"]}),
}


@pytest.mark.parametrize(("label", "named"), NAMED.values(), ids=NAMED.keys())
def test_what_class_values_names_is_taken_as_said(nb, write, verify, label, named):
    write(label)
    tiles, _, config = verify(**named)
    for tile, read in zip(tiles, labels_read(nb, tiles, config), strict=True):
        number = int(Path(tile.key).stem.removeprefix("area").partition("_")[0])
        counted = read != nb.IGNORE_INDEX
        assert (read == roofs(number))[counted].mean() > 0.97 and counted.mean() > 0.3
        assert (read[roofs(number)] == 1).mean() > 0.9


def test_a_value_that_no_class_names_stops(write, verify):
    write(areas(0, 2, 3))
    for values in ([0, 1], [0, 3]):
        with pytest.raises(ValueError, match="no class has the label value [23]"):
            verify(class_values=values)


def test_a_class_without_a_pixel_stops_two_classes(write, verify):
    write(png(lambda m, n: np.uint8(255 * m)))
    with pytest.raises(ValueError, match="no pixel of any label is rooftop"):
        verify(class_values=["other", 7])


def test_label_values_that_are_no_whole_numbers_are_refused(write, verify):
    write(tif(lambda m, n: (0.5 * m).astype(np.float32)))
    with pytest.raises(ValueError, match="label values other than whole numbers"):
        verify()


def test_ignored_and_unseen_pixels_have_no_class(nb, write, verify):
    def strip(mask, n):
        label = np.uint8(255 * mask)
        label[:8] = 100
        return label

    def image(path, pixels, n):
        alpha = np.full((SIDE, SIDE), 255, np.uint8)
        alpha[16:24] = 0
        save(path.with_suffix(".png"), np.dstack([pixels, alpha]))

    write(png(strip), image)
    tiles, _, config = verify(ignore_value=100)
    read = nb.read_tile(tiles[0])[1]
    assert (read[:8] == nb.IGNORE_INDEX).all() and (read[16:24] == nb.IGNORE_INDEX).all()
    assert set(np.unique(read[24:])) <= {0, 1} and tiles[0].class_pixels.sum() == SIDE * 48


# ---- images


def four(pixels):
    near = 255 - pixels[..., 0]
    near[:16] = 0  # water
    return np.moveaxis(np.dstack([pixels, near]), 2, 0)


RGB = {"photometric": "RGB"}
IMAGES = {
    "NAIP": lambda path, p, n: save_tiff(path, four(p), alpha="UNSPECIFIED", **RGB),
    "NAIP, infrared called alpha": lambda path, p, n: save_tiff(path, four(p), alpha="YES", **RGB),
    "four bands of 16 bits": lambda path, p, n: save_tiff(path, four(p).astype(np.uint16) * 8),
    "16 bits": lambda path, p, n: save_tiff(path, np.moveaxis(p, 2, 0).astype(np.uint16) * 8),
    "int16": lambda path, p, n: save_tiff(path, np.moveaxis(p, 2, 0).astype(np.int16) * 10),
    "float": lambda path, p, n: save_tiff(path, np.moveaxis(p, 2, 0).astype(np.float32) / 255),
    "white stored as 0": lambda path, p, n: save_tiff(
        path, 255 - p[None, ..., 0], photometric="MINISWHITE"
    ),
    "JPEG 2000": lambda path, p, n: save(path.with_suffix(".jp2"), p),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images_are_read_as_cameras_and_satellites_give_them(nb, write, verify, name):
    def image(path, pixels, n):
        pixels = pixels.copy()
        if n == 3 and "16" in name:
            pixels = pixels.astype(np.uint16)
        IMAGES[name](path.with_suffix(".tif"), pixels, n)

    write(image=image)
    tiles, report, config = verify()
    assert len(tiles) == COUNT
    for tile in tiles:
        number = int(Path(tile.key).stem.removeprefix("area").partition("_")[0])
        read, truth = nb.read_tile(tile)[0].astype(int), photo(number).astype(int)
        truth = truth[..., :1] if name == "white stored as 0" else truth
        assert abs(read - truth).mean() < 12 and len(np.unique(read)) > 60
        assert abs(tile.class_pixels.sum() - SIDE**2) == 0  # nothing was taken for transparent
    said = {"NAIP": "more bands than colours", "NAIP, infrared called alpha": "image with alpha"}
    kind = said.get(name, "pixels not of 8 bits" if "16" in name or name == "float" else None)
    assert kind is None or (report["kind"] == kind).sum() == COUNT


def test_one_hot_pixel_does_not_blacken_all(nb, write, verify):
    def image(path, pixels, n):
        pixels = pixels.astype(np.uint16) * 8
        if n == 3:
            pixels[5, 5:25] = 65535
        save_tiff(path.with_suffix(".tif"), np.moveaxis(pixels, 2, 0))

    write(image=image)
    tiles, _, config = verify()
    assert len({tile.scale for tile in tiles}) == 1
    assert all(nb.read_tile(tile)[0].max() > 200 for tile in tiles)


@pytest.mark.parametrize("turn", range(2, 9))
@pytest.mark.parametrize("width", [64, 48])
def test_photographs_are_turned_as_their_camera_says(nb, settings, verify, turn, width):
    root, upright = Path(settings["root"]), {}
    back = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}  # the orientation that undoes it
    for n in range(4):
        pixels = photo(n)[:, :width]
        exif = Image.Exif()
        exif[0x112] = back[turn]
        stored = Image.fromarray(pixels)
        stored.getexif()[0x112] = back[turn]
        from PIL import ImageOps

        stored = ImageOps.exif_transpose(stored)
        exif[0x112] = turn
        path = root / f"images/images/area{n}_1.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        stored.save(path, quality=100, subsampling=0, exif=exif)
        save(root / f"label/label/area{n}_1_label.png", np.uint8(255 * roofs(n)[:, :width]))
        upright[n] = pixels
    tiles, report, config = verify()
    assert (report["kind"] == "orientation tag").sum() == 4
    for n, tile in enumerate(tiles):
        assert abs(nb.read_tile(tile)[0].astype(int) - upright[n]).mean() < 8


def test_a_georeferenced_image_is_not_turned(nb, settings, verify):
    """Its grid says how it lies, whatever an orientation tag says."""
    root = Path(settings["root"])
    for n in range(4):
        exif = Image.Exif()
        exif[0x112] = 3
        path = root / f"images/images/area{n}_1.jpg"
        save(path, photo(n), quality=100, subsampling=0, exif=exif)
        x, _, left, _, y, top, *_ = spot(n)["transform"]
        corner = [x, 0, 0, y, left + x / 2, top + y / 2]
        path.with_suffix(".jgw").write_text("\n".join(map(str, corner)))
        save(root / f"label/label/area{n}_1_label.png", np.uint8(255 * roofs(n)))
    tiles, report, config = verify()
    assert not any(nb.open_raster(tile.image).transform.is_identity for tile in tiles)
    for tile in tiles:
        truth = photo(int(tile.key[4])).astype(int)
        assert abs(nb.read_tile(tile)[0].astype(int) - truth).mean() < 8


@pytest.mark.parametrize("bits", [2, 4])
def test_images_of_few_bits_are_not_dark(nb, write, verify, bits):
    def image(path, pixels, n):
        grey = pixels[None, ..., 0] >> (8 - bits)
        save_tiff(path.with_suffix(".tif"), grey, nbits=bits)

    write(image=image)
    tiles, _, config = verify()
    assert max(nb.read_tile(tile)[0].max() for tile in tiles) > 200


def test_infrared_called_alpha_beside_missing_numbers(nb, write, verify):
    def image(path, pixels, n):
        bands = four(pixels).astype(np.float32)
        bands[:, :8] = np.nan
        save_tiff(path.with_suffix(".tif"), bands, photometric="RGB", alpha="YES")

    write(image=image)
    tiles, _, config = verify()
    for tile in tiles:
        pixels, label = nb.read_tile(tile)
        assert (label[:8] == nb.IGNORE_INDEX).all() and (label[8:] != nb.IGNORE_INDEX).all()


def test_a_tile_that_was_saved_many_times_stops_nothing(nb, settings, verify, monkeypatch):
    """Pairs that are equal in every pixel are read side by side, and write no file in common."""
    root, kept, keep_pixels = Path(settings["root"]), [], nb.cache_pixels
    monkeypatch.setattr(
        nb, "cache_pixels", lambda *words: kept.append(keep_pixels(*words)) or kept[-1]
    )
    for n in range(200):
        save(root / f"images/images/area{n}_1.png", photo(n // 40))
        save(root / f"label/label/area{n}_1_label.png", np.uint8(255 * roofs(n // 40)))
    tiles, report, _ = verify()
    assert len(tiles) == 5 and (report["kind"] == "identical images").sum() == 195
    assert len(kept) == len(set(kept)) == 200


def test_edges_of_three_classes_of_which_one_is_absent_are_ignored(nb, write, verify):
    write(png(smoothed))
    three = {"num_classes": 3, "class_names": ["ground", "roof", "pool"]}
    tiles, _, config = verify(**three, class_values=[0, 255, 7])
    read = np.concatenate(labels_read(nb, tiles, config))
    assert set(np.unique(read)) == {0, 1, nb.IGNORE_INDEX}


# ---- pairs


@pytest.mark.parametrize(
    ("image", "label", "folders", "rule"),
    [
        ("images/img_{:03}.png", "masks/mask_{:03}.png", ("images", "masks"), "img_* and"),
        ("t/{}_sat.jpg", "t/{}_mask.png", ("t", "t"), "*_sat and labels *_mask"),
        ("t/tile_img_{0}_{0}.png", "t/tile_mask_{0}_{0}.png", ("t", "t"), "tile_img_* and"),
        ("t{}_json/img.png", "t{}_json/label.png", (".", "."), "t*_json/img and"),
        ("t/tile{}.jpg", "t/tile{}.png", ("t", "t"), "one name and two formats"),
        (
            "JPEGImages/a{}.jpg",
            "SegmentationClass/a{}.png",
            ("JPEGImages", "SegmentationClass"),
            "",
        ),
    ],
)
def test_pairs_as_tools_name_them(nb, settings, verify, image, label, folders, rule):
    root = Path(settings["root"])
    for n in range(COUNT):
        save(root / image.format(n), photo(n))
        save(root / label.format(n), np.uint8(255 * roofs(n)))
    tiles, _, config = verify(images_dir=folders[0], labels_dir=folders[1])
    pairs, faults, said = nb.pair_files(config)
    assert len(tiles) == len(pairs) == COUNT and not faults and rule in said
    read = {tile.image: nb.read_tile(tile)[1] for tile in tiles}
    for n in range(COUNT):
        assert np.array_equal(read[str(root / image.format(n))], roofs(n))


def test_labels_that_fit_no_image_are_not_paired_by_force(nb, settings):
    root = Path(settings["root"])
    for n in range(6):
        save(root / f"images/images/town{n}.png", photo(n))
        save(root / f"label/label/field{n + 5}.png", np.uint8(255 * roofs(n)))
    pairs, faults, _ = nb.pair_files(nb.make_config(**settings))
    assert not pairs and len(faults) >= 6
    with pytest.raises(ValueError, match="commonest is: image without label"):
        nb.inspect_dataset(nb.make_config(**settings))


def test_one_label_without_a_place_is_not_that_of_all_images(nb, settings, verify):
    root = Path(settings["root"])
    for n in range(COUNT):
        save(root / f"images/images/town{n}_1.png", photo(n))
    save(root / "label/label/mask.png", np.uint8(255 * roofs(0)))
    with pytest.raises(ValueError, match="do not say where they lie"):
        verify()
    (root / "label/label/mask.png").rename(root / "label/label/town3_1_label.png")
    with pytest.raises(ValueError, match="1 usable tiles"):  # only the one that it is named after
        verify()


def test_suffixes_that_are_not_known_are_named(nb, settings):
    root = Path(settings["root"])
    for folder in ("images/images", "label/label"):
        (root / folder).mkdir(parents=True)
        np.save(root / folder / "a.npy", photo(0))
    with pytest.raises(FileNotFoundError, match=r"\.npy files are not read"):
        nb.needs_sample(nb.make_config(**settings))


# ---- labels by place


def outlines(number, crs=UTM):
    """The roofs of a tile as polygons on the ground."""
    import geopandas
    from rasterio.features import shapes
    from shapely.geometry import shape

    grid = spot(number)["transform"]
    found = shapes(roofs(number).astype(np.uint8), roofs(number), transform=grid)
    return geopandas.GeoSeries([shape(of) for of, _ in found], crs=UTM).to_crs(crs)


def placed(path, pixels, n):
    save_tiff(path.with_suffix(".tif"), np.moveaxis(pixels, 2, 0), **spot(n))


def check(nb, tiles, config, tolerance=0.99):
    assert len(tiles) == COUNT
    for n, tile in enumerate(tiles):
        read = nb.read_tile(tile)[1]
        seen = read != nb.IGNORE_INDEX
        assert seen.mean() > 0.9 and (read == roofs(n))[seen].mean() > tolerance


@pytest.mark.parametrize("suffix", [".gpkg", ".geojson", ".shp"])
@pytest.mark.parametrize("crs", [UTM, "EPSG:4326", "EPSG:3857"])
def test_one_file_of_footprints_labels_all_images(nb, write, verify, suffix, crs):
    import geopandas
    import pandas

    root = write(image=placed)
    shutil.rmtree(root / "label")
    parts = [outlines(n, crs) for n in range(COUNT)]
    whole = geopandas.GeoDataFrame(geometry=pandas.concat(parts, ignore_index=True))
    whole.to_file(root / f"roofs{suffix}")
    tiles, _, config = verify(labels_dir=f"roofs{suffix}")
    check(nb, tiles, config)


def test_footprints_tile_by_tile_and_coordinates_that_cannot_be_degrees(nb, write, verify):
    root = write(image=placed)
    shutil.rmtree(root / "label")
    for n in range(COUNT):
        path = root / f"label/label/area{n}_1.geojson"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.loads(outlines(n).to_json())
        text.pop("crs", None)  # metres, in a format whose coordinates are degrees
        path.write_text(json.dumps(text))
    tiles, _, config = verify()
    check(nb, tiles, config)


def test_footprints_of_other_ground_label_nothing(nb, write, verify):
    root = write(image=placed)
    shutil.rmtree(root / "label")
    outlines(0).translate(90_000).to_file(root / "roofs.gpkg")
    with pytest.raises(ValueError, match="commonest is: label elsewhere"):
        verify(labels_dir="roofs.gpkg")


@pytest.mark.parametrize("crs", [UTM, "EPSG:4326"])
def test_a_label_raster_that_covers_many_chips_is_read_by_place(nb, write, verify, crs):
    root = write(image=placed)
    shutil.rmtree(root / "label")
    whole = np.zeros((1, SIDE + 40, 200 * COUNT + 100), np.uint8)
    for n in range(COUNT):
        whole[0, 20 : 20 + SIDE, 20 + 200 * n : 20 + 200 * n + SIDE] = 255 * roofs(n)
    place = {"crs": UTM, "transform": from_origin(499_990, 6_400_010, 0.5, 0.5)}
    save_tiff(root / "town.tif", whole, **place)
    if crs != UTM:
        with (
            rasterio.open(root / "town.tif") as town,
            rasterio.vrt.WarpedVRT(town, crs=crs) as there,
        ):
            rasterio.shutil.copy(there, root / "degrees.tif", driver="GTiff")
        (root / "degrees.tif").replace(root / "town.tif")
    tiles, _, config = verify(labels_dir="town.tif")
    check(nb, tiles, config, 0.99 if crs == UTM else 0.9)


def test_footprints_with_rows_that_are_no_polygons(nb, write, verify):
    """As OpenStreetMap and clipped layers have them: nothing, points, collections."""
    import geopandas
    import pandas
    import shapely

    root = write(image=placed)
    shutil.rmtree(root / "label")
    parts = [outlines(n) for n in range(COUNT)]
    odd = geopandas.GeoSeries([None, shapely.Point(500_000, 6_399_990), shapely.Polygon()], crs=UTM)
    bound = shapely.GeometryCollection([*parts[3], shapely.Point(500_300, 6_399_999)])
    parts[3] = geopandas.GeoSeries([bound], crs=UTM)
    whole = pandas.concat([odd, *parts], ignore_index=True)
    geopandas.GeoDataFrame(geometry=whole, crs=UTM).to_file(root / "roofs.gpkg")
    tiles, _, config = verify(labels_dir="roofs.gpkg")
    check(nb, tiles, config)


def test_footprints_that_may_be_something_else_are_refused(write, verify):
    root = write(image=placed)
    shutil.rmtree(root / "label")
    for layer in ("parcels", "buildings"):
        outlines(0).to_file(root / "two.gpkg", layer=layer)
    outlines(0).boundary.to_file(root / "lines.gpkg")
    for file, why in (("two", "layers .*parcels.*buildings"), ("lines", "holds lines")):
        with pytest.raises(ValueError, match=rf"{file}\.gpkg: it holds the {why}|{why}"):
            verify(labels_dir=f"{file}.gpkg")


def test_a_label_by_place_keeps_what_its_file_says(nb, write, verify):
    """White stored as 0, another pixel size, and no label beyond its edge."""

    def label(path, mask, n):
        grid = spot(n)
        if n % 3 == 0:
            wide = np.pad(mask, ((0, 0), (0, 10)))
            save_tiff(
                path.with_suffix(".tif"),
                np.uint8(255 * ~wide)[None],
                photometric="MINISWHITE",
                **grid,
            )
        elif n % 3 == 1:
            grid["transform"] = grid["transform"] * rasterio.Affine.scale(0.5)
            save_tiff(
                path.with_suffix(".tif"),
                np.uint8(255 * mask.repeat(2, 0).repeat(2, 1))[None],
                **grid,
            )
        else:
            save_tiff(path.with_suffix(".tif"), np.uint8(255 * mask[:, :60])[None], **grid)

    write(label, placed)
    tiles, _, config = verify()
    assert len(tiles) == COUNT
    for tile in tiles:
        n = int(tile.key.removeprefix("area").partition("_")[0])
        read = nb.read_tile(tile)[1]
        seen = read != nb.IGNORE_INDEX
        assert (read == roofs(n))[seen].mean() > 0.99
        assert seen[:, :60].all() and seen[:, 60:].all() == (n % 3 != 2)


def test_the_same_shape_on_another_grid_is_read_by_place(nb, write, verify):
    def label(path, mask, n):
        grid = spot(n)
        large = np.zeros((SIDE, SIDE), bool)
        large[:] = mask[np.arange(SIDE) * 6 // 5 % SIDE][:, np.arange(SIDE) * 6 // 5 % SIDE]
        grid["transform"] = grid["transform"] * rasterio.Affine.scale(1.2)
        save_tiff(path.with_suffix(".tif"), np.uint8(255 * large)[None], **grid)

    write(label, placed)
    tiles, _, config = verify()
    for n, read in enumerate(labels_read(nb, tiles, config)):
        assert (read == roofs(int(tiles[n].key[4:].partition("_")[0]))).mean() > 0.9


def test_a_number_that_is_roof_here_and_no_data_there_stops(write, verify):
    def label(path, mask, n):
        nodata = {"nodata": 255} if n % 2 else {}
        save_tiff(path.with_suffix(".tif"), np.uint8(255 * mask)[None], **nodata)

    write(label)
    with pytest.raises(ValueError, match="area1_1_label.tif says that 255 is no data"):
        verify()


def test_a_fill_value_that_no_file_declares_stops(write, verify):
    def image(path, pixels, n):
        pixels = np.moveaxis(pixels, 2, 0).astype(np.float32) / 255
        pixels[:, : 16 if n == 3 else 0] = -9999
        save_tiff(path.with_suffix(".tif"), pixels)

    write(image=image)
    with pytest.raises(ValueError, match="images hold -9999, far from all other values"):
        verify()


# ---- splits


def test_folders_of_an_official_split_are_kept(nb, settings, verify):
    root = Path(settings["root"])
    parts = ["train"] * 8 + ["valid"] * 2 + ["test"] * 2
    for n, part in enumerate(parts):
        save(root / part / "images" / f"{n:03}.png", photo(n))
        save(root / part / "masks" / f"{n:03}.png", np.uint8(255 * roofs(n)))
    folders = {"images_dir": "*/images", "labels_dir": "*/masks", "label_suffix": ""}
    tiles, _, config = verify(**folders)
    split, how = nb.split_tiles(nb.find_scenes(tiles, "auto"), config)
    assert [len(split[part]) for part in nb.SPLITS] == [8, 2, 2] and "official" in how
    assert all(tile.key.startswith("test/") for tile in split["test"])
    shutil.rmtree(root / "valid")
    tiles, _, config = verify(**folders, split=[0.6, 0.2, 0.2])
    split, how = nb.split_tiles(nb.find_scenes(tiles, "auto"), config)
    assert all(tile.key.startswith("test/") for tile in split["test"]) and len(split["test"]) == 2
    assert len(split["val"]) >= 1 and len(split["train"]) + len(split["val"]) == 8
    assert "val taken from its training tiles" in how


def test_tiles_that_overlap_never_lie_on_both_sides(nb, settings, verify):
    """Half a tile of stride, as export tools write it."""
    root = Path(settings["root"])
    for row in range(5):
        for column in range(8):
            n = 8 * row + column
            place = from_origin(500_000 + 16 * column, 6_400_000 - 16 * row, 0.5, 0.5)
            options = {"crs": UTM, "transform": place}
            image, label = np.moveaxis(photo(n), 2, 0), np.uint8(255 * roofs(n))[None]
            save_tiff(root / f"images/images/a_{n}.tif", image, **options)
            save_tiff(root / f"label/label/a_{n}_label.tif", label, **options)
    tiles, _, config = verify(split=[0.6, 0.2, 0.2])
    tiles = nb.find_scenes(tiles, "auto")
    split, how = nb.split_tiles(tiles, config)
    assert "that overlap judged ones are left out" in how and all(split.values())
    assert nb.shared_ground(split["train"], split["val"] + split["test"]) == (set(), 0)
    cut = nb.cut_scenes_in_three([[t] for t in tiles], [np.arange(len(tiles))], 0, config)
    assert nb.shared_ground(cut["train"], cut["val"] + cut["test"])[1] > 0.05


def test_overlapping_tiles_are_left_out_whatever_group_by_says(nb, settings, verify):
    root = Path(settings["root"])
    for n in range(30):
        options = {"crs": UTM, "transform": from_origin(500_000 + 16 * n, 6_400_000, 0.5, 0.5)}
        image, label = np.moveaxis(photo(n), 2, 0), np.uint8(255 * roofs(n))[None]
        save_tiff(root / f"images/images/a_{n}.tif", image, **options)
        save_tiff(root / f"label/label/a_{n}_label.tif", label, **options)
    tiles, _, config = verify(split=[0.6, 0.2, 0.2], group_by=None)
    split, how = nb.split_tiles(nb.find_scenes(tiles, None), config)
    assert "that overlap judged ones are left out" in how
    assert nb.shared_ground(split["train"], split["val"] + split["test"]) == (set(), 0)


def test_ground_is_compared_across_coordinate_systems_and_zooms(nb, settings, verify):
    root = Path(settings["root"])
    for n in range(4):
        for crs, name in ((UTM, "here"), ("EPSG:25833", "there")):
            options = spot(n) | {"crs": crs}
            image, label = np.moveaxis(photo(n + 50 * (name == "there")), 2, 0), roofs(n)
            save_tiff(root / f"images/images/{name}{n}_1.tif", image, **options)
            save_tiff(
                root / f"label/label/{name}{n}_1_label.tif", np.uint8(255 * label)[None], **options
            )
        save(root / f"images/images/18/1000/{5000 + n}.png", photo(20 + n))
        save(root / f"label/label/18/1000/{5000 + n}_label.png", np.uint8(255 * roofs(n)))
    save(root / "images/images/19/2001/10003.png", photo(30))
    save(root / "label/label/19/2001/10003_label.png", np.uint8(255 * roofs(30)))
    tiles = nb.find_scenes(verify()[0], "auto")
    by_key = {tile.key: tile for tile in tiles}
    assert all(by_key[f"here{n}_1"].scene == by_key[f"there{n}_1"].scene for n in range(4))
    on, shared = nb.shared_ground([by_key["18/1000/5001"]], [by_key["19/2001/10003"]])
    assert on == {0} and shared > 0.95


def test_a_part_taken_from_official_training_tiles_shares_no_ground(nb, settings, verify):
    root = Path(settings["root"])
    for n in range(30):
        part = "test" if n >= 24 else "train"
        options = {"crs": UTM, "transform": from_origin(500_000 + 16 * n, 6_400_000, 0.5, 0.5)}
        image, label = np.moveaxis(photo(n), 2, 0), np.uint8(255 * roofs(n))[None]
        save_tiff(root / part / f"images/a_{n}.tif", image, **options)
        save_tiff(root / part / f"masks/a_{n}.tif", label, **options)
    folders = {"images_dir": "*/images", "labels_dir": "*/masks", "label_suffix": ""}
    tiles, _, config = verify(**folders, split=[0.6, 0.2, 0.2])
    split, how = nb.split_tiles(nb.find_scenes(tiles, "auto"), config)
    assert "val taken from its training tiles" in how and "overlap" in how
    assert nb.shared_ground(split["train"], split["val"] + split["test"]) == (set(), 0)
    assert len(split["test"]) == 6


def test_names_of_a_web_map_are_places(nb, settings, verify):
    root = Path(settings["root"])
    for n in range(4):
        for x in (1000, 1001, 2000 + 10 * n):
            save(root / f"images/images/18/{x}/{5000 + n}.png", photo(3 * n + x))
            save(root / f"label/label/18/{x}/{5000 + n}_label.png", np.uint8(255 * roofs(n)))
    tiles = nb.find_scenes(verify()[0], "auto")
    scenes = {tile.key: tile.scene for tile in tiles}
    assert scenes["18/1000/5000"] == scenes["18/1001/5003"] != scenes["18/2000/5000"]


def test_what_was_verified_is_what_is_read_whatever_happens_to_the_files(nb, write, verify):
    root = write()
    tiles, _, config = verify()
    before = [nb.read_tile(tile) for tile in tiles]
    save(Path(tiles[0].image), 255 - photo(0))
    shutil.rmtree(root / "label")
    for tile, (image, label) in zip(tiles, before, strict=True):
        again = nb.read_tile(tile)
        assert np.array_equal(again[0], image) and np.array_equal(again[1], label)


def test_the_cache_holds_what_is_needed_and_is_not_written_again(nb, write, verify):
    root = write()
    tiles, _, config = verify()
    cache = Path(config.save_dir, "cache")
    made = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert set(made) == {tile.pixels for tile in tiles}
    (cache / "x.npy.part").write_bytes(b"cut off")
    save(root / "label/label/area0_1_label.png", np.uint8(255 * roofs(5)))
    save(root / "images/images/area1_1.png", 255 - photo(1))
    tiles, _, _ = verify()
    now = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert set(now) == {tile.pixels for tile in tiles} and len(set(now) - set(made)) == 2
    assert all(made[path] == time for path, time in now.items() if path in made)
    by_key = {tile.key: nb.read_tile(tile) for tile in tiles}
    assert np.array_equal(by_key["area0_1"][1], roofs(5))
    assert np.array_equal(by_key["area1_1"][0], 255 - photo(1))


# ---- sets without roofs, runs on other machines


def test_a_set_without_roofs_has_no_score(nb):
    import torch

    ground = torch.zeros(1, 8, 8, dtype=torch.long)
    result = nb.epoch_scores(torch.tensor(0.1), nb.count_pixels(ground, ground, 2))
    assert result["loss"] == pytest.approx(0.1)
    assert all(np.isnan(result[name]) for name in ("iou", "miou", "pixel_accuracy"))


def test_a_run_that_began_in_fp16_on_a_gpu_goes_on_in_the_cpus_precision(nb, start, capsys):
    import torch

    run, go = start(epochs=2, precision="auto")
    run.precision = "fp16"  # as CUDA would have it
    run.scaler = torch.amp.GradScaler("cpu")
    run.last_checkpoint = nb.make_checkpoint(run, nb.STATES)
    other, _ = start(epochs=2, precision="auto")
    other.last_checkpoint = run.last_checkpoint
    nb.restore_run(other, other.last_checkpoint)
    own = nb.choose_precision("auto", other.device)
    assert other.precision == own and other.scaler.get_scale() == 1
    path = Path(run.config.save_dir) / nb.LAST_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(run.last_checkpoint)
    again, _ = start(epochs=2, precision="auto")
    assert nb.resume_run(again) and again.precision == own
    assert f"going on after epoch 0 in {own}, begun in fp16" in capsys.readouterr().out
    explicit, _ = start(epochs=2, precision="fp16")  # as it was set
    explicit.last_checkpoint = run.last_checkpoint
    nb.restore_run(explicit, explicit.last_checkpoint)
    assert explicit.precision == "fp16"


def test_a_file_of_footprints_without_any_is_ground(nb, write, verify):
    root = write(image=placed)
    shutil.rmtree(root / "label")
    for n in range(COUNT):
        path = root / f"label/label/area{n}_1_label.geojson"
        path.parent.mkdir(parents=True, exist_ok=True)
        empty = '{"type": "FeatureCollection", "features": []}'
        path.write_text(empty if n == 4 else outlines(n, "EPSG:4326").to_json())
    tiles, report, config = verify()
    assert len(tiles) == COUNT and tiles[4].roof_share == 0
    assert (report["kind"] == "label without roof").sum() == 1


def test_a_photograph_in_place_of_a_label_is_refused(nb, write, verify):
    def label(path, mask, n):
        pixels = np.uint8(255 * mask)
        if n == 3:
            side = np.arange(SIDE)
            pixels = np.dstack([*np.meshgrid(side, side * 2), photo(n)[..., 0]]).astype(np.uint8)
            pixels = pixels.repeat(3, 0).repeat(3, 1)
            pixels = pixels + np.random.default_rng(0).integers(0, 99, pixels.shape, np.uint8)
        save(path.with_suffix(".png"), pixels)

    def image(path, pixels, n):
        save(path.with_suffix(".png"), pixels.repeat(3, 0).repeat(3, 1) if n == 3 else pixels)

    write(label, image)
    tiles, report, _ = verify()
    assert len(tiles) == COUNT - 1
    assert report["detail"].str.contains("is it a photograph").sum() == 1


def test_the_advice_for_inverted_labels_can_be_pasted(nb, settings, write_pair, capsys):
    """Labels of 0 and 1 in which most is roof: the line that is printed turns them round."""
    for number in range(4):
        write_pair(f"s{number}_1", low=1, high=0)
    config = nb.make_config(**settings)
    nb.show_meaning(nb.verify_dataset(config))
    advice = "NOTE: more roof than ground. Inverted? Then class_values = [1, 0]"
    assert advice in capsys.readouterr().out
    tile_set = nb.verify_dataset(nb.make_config(**settings | {"class_values": [1, 0]}))
    nb.show_meaning(tile_set)
    assert "NOTE" not in capsys.readouterr().out
    assert all(tile.roof_share < 0.5 for tile in tile_set.tiles)
