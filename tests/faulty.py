"""A folder of tiles with every kind of fault; run it to see the verification's table.

usage: python tests/faulty.py path/to/new/folder
"""

import sys
from pathlib import Path

import numpy as np
import rasterio
from PIL import Image

SIDE = 64


def picture(name: str) -> tuple[np.ndarray, np.ndarray]:
    """A noisy image (H, W, 3) with a bright square, and its label (H, W) of 0 and 255."""
    rng = np.random.default_rng([*name.encode()])
    image, label = rng.integers(0, 60, (SIDE, SIDE, 3), np.uint8), np.zeros((SIDE, SIDE), np.uint8)
    x, y = rng.integers(2, SIDE // 2, 2)
    label[y : y + 24, x : x + 24] = 255
    image[label == 255] += 150
    return image, label


def save(path: Path, pixels: np.ndarray, **options: object) -> None:
    """Write pixels as an image file, its folder too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def save_tiff(path: Path, bands: np.ndarray, **options: object) -> None:
    """Write bands (B, H, W) of any type as a GeoTIFF."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size = {
        "count": len(bands),
        "height": bands.shape[1],
        "width": bands.shape[2],
        "dtype": bands.dtype,
    }
    with rasterio.open(path, "w", driver="GTiff", **size | options) as raster:
        raster.write(bands)


def build(root: Path) -> dict[str, tuple[str, str]]:
    """Fill a folder; the kind and the action that each file name must be reported with."""
    images, labels, expected = root / "images/images", root / "label/label", {}

    def pair(
        stem: str,
        kind: str = "",
        action: str = "left out",
        image: object = None,
        label: object = None,
    ) -> tuple:
        """Write a pair; an image or label may be pixels, or a suffix with what writes the file."""
        pixels, truth = picture(stem)
        paths = []
        for folder, given, default, end in (
            (images, image, pixels, ""),
            (labels, label, truth, "_label"),
        ):
            if isinstance(given, tuple):
                path = folder / f"{stem}{end}{given[0]}"
                path.parent.mkdir(parents=True, exist_ok=True)
                given[1](path)
            else:
                path = folder / f"{stem}{end}.png"
                save(path, default if given is None else given)
            paths.append(path)
        if kind:
            expected[paths[label is not None].name] = (kind, action)
        return tuple(paths)

    for i in range(6):
        pair(f"good_{i}")
    pixels, truth = picture("x")
    # partners
    pair("lonely_1")[1].unlink()
    expected["lonely_1.png"] = ("image without label", "left out")
    save(labels / "stray_1_label.png", truth)
    expected["stray_1_label.png"] = ("label without image", "left out")
    pair("twice_1", "several files for one tile")
    save(labels / "twice_1_label.tif", truth)
    # files that cannot be read
    for number, (suffix, keep) in enumerate(
        [(".png", 0.5), (".jpg", 0.5), (".tif", 0.5), (".webp", 0.5), (".png", 0)]
    ):
        pair(f"cut_{number}", "unreadable", image=(suffix, lambda path: save(path, pixels)))
        path = images / f"cut_{number}{suffix}"
        path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    pair("text_1", "unreadable", image=(".png", lambda path: path.write_text("no image")))
    small = truth[: SIDE // 2]
    pair("small_1", "size mismatch", label=small)
    expected["small_1.png"] = expected.pop("small_1_label.png")
    # pixels
    used = {"L": "grey image", "P": "palette image", "LA": "image with alpha", "1": "grey image"}
    for mode, kind in used.items():
        action = "alpha = 0 is no data" if mode == "LA" else "used as RGB"
        pair(
            f"mode{mode}_1",
            kind,
            action,
            image=np.asarray(Image.fromarray(picture(f"mode{mode}_1")[0]).convert(mode)),
        )
        Image.fromarray(picture(f"mode{mode}_1")[0]).convert(mode).save(
            images / f"mode{mode}_1.png"
        )
    transparent = np.dstack([picture("clear_1")[0], np.full((SIDE, SIDE), 255, np.uint8)])
    transparent[:, :16, 3] = 0
    pair("clear_1", "image with alpha", "alpha = 0 is no data", image=transparent)
    deep = picture("deep_1")[0].astype(np.uint16) * 16
    for stem, bands in (("deep_1", np.moveaxis(deep, 2, 0)), ("deep_2", deep[None, ..., 0] // 2)):
        pair(
            stem,
            "pixels not of 8 bits",
            "used",
            image=(".tif", lambda path, bands=bands: save_tiff(path, bands)),
        )
    floating = np.moveaxis(pixels, 2, 0).astype(np.float32)
    many = np.concatenate([np.moveaxis(pixels, 2, 0), pixels[None, ..., 0]])
    options = {"photometric": "MINISBLACK"}
    write = (".tif", lambda path: save_tiff(path, floating))
    pair("float_1", "pixels not of 8 bits", "used", image=write)
    pair(
        "four_1",
        "more bands than colours",
        "1, 2, 3 used",
        image=(".tif", lambda path: save_tiff(path, many, alpha="NO", **options)),
    )
    for number, suffix in enumerate((".jpg", ".tif")):
        ink = Image.fromarray(pixels).convert("CMYK")
        pair(
            f"ink_{number}", "unusable pixels", image=(suffix, lambda path, ink=ink: ink.save(path))
        )
    white = (
        ".tif",
        lambda path: save_tiff(path, 255 - pixels[None, ..., 0], photometric="MINISWHITE"),
    )
    pair("white_1", "white stored as 0", "inverted", image=white)
    exif = Image.Exif()
    exif[0x112] = 3
    pair(
        "turned_1",
        "orientation tag",
        "turned",
        image=(".jpg", lambda path: save(path, pixels, exif=exif)),
    )
    place = {"crs": "EPSG:32633", "transform": rasterio.transform.from_origin(500000, 0, 0.5, 0.5)}
    pair("away_1", image=(".tif", lambda path: save_tiff(path, np.moveaxis(pixels, 2, 0), **place)))
    (labels / "away_1_label.png").unlink()
    place["transform"] = rasterio.transform.from_origin(500100, 0, 0.5, 0.5)
    save_tiff(labels / "away_1_label.tif", truth[None], **place)
    expected["away_1_label.tif"] = ("label elsewhere", "left out")
    pair("blank_1", "blank image", image=np.zeros((SIDE, SIDE, 3), np.uint8))
    pair("void_1", "no data", image=np.dstack([pixels[::-1], np.zeros((SIDE, SIDE), np.uint8)]))
    jpeg = (".tif", lambda path: Image.fromarray(picture("wrong_1")[0]).save(path, format="JPEG"))
    pair("wrong_1", "wrong content for the suffix", "read by its content", image=jpeg)
    pair("twin_1", image=picture("good_0")[0])
    expected["twin_1.png"] = ("identical images", "left out")
    # labels
    pair("three_1", label=np.dstack([truth, truth, truth]))
    smooth = truth.copy()
    smooth[truth != np.roll(truth, 1, 0)] = 128
    smooth[truth != np.roll(truth, 1, 1)] = 100
    pair("smooth_1", "smoothed label", "the nearer class", label=smooth)
    whole = (".tif", lambda path: save_tiff(path, np.full((1, SIDE, SIDE), 0.5, np.float32)))
    pair("half_1", "unreadable", label=whole)
    expected["half_1.png"] = expected.pop("half_1_label.tif")
    pair("empty_1", "label without roof", "used", label=truth * 0)
    pair("full_1", "label without background", "used", label=truth * 0 + 255)
    # names
    for stem in ("with space_1", "Dächer_1"):
        pair(stem)
    pair("loud_1", image=(".PNG", lambda path: save(path, picture("loud_1")[0])))
    pair("district/inner_1")
    for name in (".hidden_1.png", "thumb_1.png", "Thumbs.db"):
        (images / name).write_bytes(b"whatever")
        expected[name] = ("hidden file or thumbnail", "passed over")
    (images / "notes.txt").write_text("not an image")
    expected["notes.txt"] = ("not an image file", "passed over")
    (images / ".thumbnails").mkdir()
    save(images / ".thumbnails" / "good_0.png", pixels)
    return expected


if __name__ == "__main__":
    import nbtools

    folder = Path(sys.argv[1])
    build(folder)
    nb = nbtools.load()
    settings = nbtools.settings() | {
        "root": str(folder),
        "save_dir": str(folder / "results"),
        "image_size": SIDE,
    }
    tiles, report = nb.inspect_dataset(nb.make_config(**settings))
    print(f"{len(tiles)} usable images, {len(report)} findings")
    table = report.groupby(["kind", "action"])["file"]
    table = table.agg(
        files="size", first=lambda names: ", ".join(Path(name).name for name in names[:3])
    )
    print(table.to_string())
