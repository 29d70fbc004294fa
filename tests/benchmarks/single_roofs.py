"""How well roofs that touch are told apart: train on two thirds of a town, map the last third.

usage: python tests/benchmarks/single_roofs.py town.tif town.geojson [name=value ...]
           [--seeds 1 2] [--out folder]

The town is a GeoTIFF with a polygon for each building. Its eastern third is the scene that is mapped,
and judged by the polygons of the GeoPackage: matched one to one with the footprints at an IoU of 0.5,
both from 4 m² on. Any setting of the notebook may be given, as name=value. Prints a row a run:
F1, precision and recall of the single roofs, F1 if roofs that touch counted as one, and the IoU of all
roof ground; the first row is what a perfect mask's components would have.
"""

import argparse
from pathlib import Path

import geopandas as gpd
import nbformat
import numpy as np
import pandas as pd
import rasterio.features
import shapely
from rasterio.windows import Window
from unseen import nbtools, setting

TRAINED = 2 / 3  # of the town's width
LEAST_AREA = 4.0  # m²


def cut(town: Path, footprints: Path, folder: Path) -> tuple[Path, Path]:
    """Write the western part as training data, the eastern one as a scene: both folders."""
    root, scenes = folder / "data", folder / "scenes"
    with rasterio.open(town) as file:
        edge = round(TRAINED * file.width)
        parts = {root / "images" / "west.tif": (0, edge)}
        parts[scenes / "east.tif"] = (edge, file.width)
        for path, (left, right) in parts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            window = Window(left, 0, right - left, file.height)
            grid = {"width": window.width, "height": window.height}
            grid |= {"transform": file.window_transform(window), "crs": file.crs}
            with rasterio.open(path, "w", driver="GTiff", count=3, dtype="uint8", **grid) as part:
                part.write(file.read([1, 2, 3], window=window))
    polygons = footprints.read_bytes()
    Path(root, "labels").mkdir(exist_ok=True)
    Path(root, "labels", "town.geojson").write_bytes(polygons)
    Path(scenes, "east.geojson").write_bytes(polygons)
    return root, scenes


def true_roofs(scenes: Path) -> gpd.GeoSeries:
    """The footprints of the scene, cut to it, on a plane in metres."""
    with rasterio.open(scenes / "east.tif") as file:
        area, crs = shapely.box(*file.bounds), file.crs
    polygons = gpd.read_file(scenes / "east.geojson").to_crs(crs).geometry.make_valid()
    polygons = gpd.clip(polygons, area).explode(ignore_index=True)
    polygons = polygons[polygons.geom_type == "Polygon"]
    polygons = polygons.to_crs(polygons.estimate_utm_crs())
    return polygons[polygons.area >= LEAST_AREA]


def matches(found: np.ndarray, true: np.ndarray) -> tuple[float, float, float]:
    """F1, precision and recall of polygons, matched one to one at an IoU of 0.5."""
    tree = shapely.STRtree(true)
    mine, theirs = tree.query(found, "intersects")
    shared = shapely.area(shapely.intersection(found[mine], true[theirs]))
    union = shapely.area(found[mine]) + shapely.area(true[theirs]) - shared
    same = shared >= 0.5 * union
    hits = min(len(set(mine[same])), len(set(theirs[same])))
    return 2 * hits / (len(found) + len(true)), hits / max(len(found), 1), hits / len(true)


def judge(found: gpd.GeoDataFrame, true: gpd.GeoSeries) -> dict[str, float]:
    """What is reported of a map."""
    polygons = found.geometry.make_valid()
    f1, precision, recall = matches(polygons.to_numpy(), true.to_numpy())
    components = found.assign(geometry=polygons).dissolve("block").geometry.to_numpy()
    ground, truth = polygons.union_all(), true.union_all()
    row = {"F1": f1, "precision": precision, "recall": recall, "found": len(found)}
    row["F1 of components"] = matches(components, true.to_numpy())[0]
    return row | {"IoU of ground": ground.intersection(truth).area / ground.union(truth).area}


def perfect_mask(true: gpd.GeoSeries, scenes: Path) -> dict[str, float]:
    """What the connected components of a perfect mask of the scene's pixels would have."""
    with rasterio.open(scenes / "east.tif") as file:
        shape, transform, crs = file.shape, file.transform, file.crs
    grid = {"transform": transform, "dtype": "uint8"}
    mask = rasterio.features.rasterize(true.to_crs(crs), shape, **grid)
    traced = rasterio.features.shapes(mask, mask=mask, transform=transform)
    components = gpd.GeoSeries([shapely.geometry.shape(area) for area, _ in traced], crs=crs)
    components = components.to_crs(true.crs)
    components = components[components.area >= LEAST_AREA]
    f1, precision, recall = matches(components.to_numpy(), true.to_numpy())
    return {"F1": f1, "precision": precision, "recall": recall, "found": len(components)}


def main() -> None:
    """Run what is asked for, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("town", type=Path)
    parser.add_argument("footprints", type=Path)
    parser.add_argument("settings", nargs="*", type=setting)
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--out", type=Path, default=Path("single_roofs"))
    options = parser.parse_args()
    folder = options.out.resolve()
    root, scenes = cut(options.town, options.footprints, folder)
    true = true_roofs(scenes)
    rows = {f"perfect mask, {len(true)} roofs": perfect_mask(true, scenes)}
    data = {"root": str(root), "images_dir": "images", "labels_dir": "labels/town.geojson"}
    for seed in options.seeds:
        out = folder / f"seed-{seed}"
        out.mkdir(parents=True, exist_ok=True)
        own = {"scenes": str(scenes), "save_dir": str(out), "seed": seed}
        notebook = nbtools.run(nbtools.NOTEBOOK, out, **data, **own, **dict(options.settings))
        nbformat.write(notebook, out / "executed.ipynb")
        found = gpd.read_file(out / "scenes" / "east_roofs.gpkg").to_crs(true.crs)
        rows[f"seed {seed}"] = judge(found, true)
        print(pd.DataFrame(rows).T.to_string(float_format="%.3f"), flush=True)


if __name__ == "__main__":
    main()
