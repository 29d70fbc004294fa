"""How good the notebook is on ground that it never saw: train on all places but some, test on those.

usage: python tests/benchmarks/unseen.py path/to/tiles [name=value ...]
           [--leave-out REGEX] [--seeds 1 2] [--out folder]

The whole notebook is run for every place and seed. A tile's place is its file name up to the first
"-", its scene the name up to the first "_". Test tiles are those whose names the regex finds; without
one, three places are left out in turn. Of each other place a tenth of the scenes, at least one,
validates. Any setting of the notebook may be given, as name=value. Prints a row a run, and means.
"""

import argparse
import ast
import json
import random
import sys
from collections import defaultdict
from pathlib import Path

import nbformat
import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[1]))
import nbtools

PLACES = ["^zanzibar", "^(?:banepa|catanduanes)", "^jonkoping-c(?:0[6-9]|1)"]
SHARE = 0.1  # of the scenes of a place validate


def split_of(images: list[Path], root: Path, left_out: str, seed: int) -> dict[str, list[str]]:
    """A split.json's content: names below root by part."""
    names = pd.Series([path.relative_to(root).as_posix() for path in images])
    stems = pd.Series([path.stem for path in images])
    test = stems.str.contains(left_out)
    scenes = stems[~test].str.partition("_")[0].unique()
    places = defaultdict(list)
    for scene in sorted(scenes):
        places[scene.partition("-")[0]].append(scene)
    rng = random.Random(seed)
    judges = [s for of in places.values() for s in rng.sample(of, max(1, round(SHARE * len(of))))]
    judged = stems.str.partition("_")[0].isin(judges)
    parts = {"train": ~test & ~judged, "val": ~test & judged, "test": test}
    return {part: names[chosen].tolist() for part, chosen in parts.items()}


def setting(text: str) -> tuple[str, object]:
    """name=value, the value a file, a literal, or else text."""
    name, _, value = text.partition("=")
    if Path(value).is_file():
        return name, str(Path(value).resolve())
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def one_run(root: Path, left_out: str, seed: int, out: Path, given: dict) -> dict:
    """Run the notebook with a place left out; what is reported of it."""
    default = nbtools.settings() | given
    folder = root / default["images_dir"]
    out.mkdir(parents=True, exist_ok=True)
    split = split_of(sorted(folder.iterdir()), root, left_out, seed)
    Path(out, "split.json").write_text(json.dumps(split))
    given = {"scenes": str(out / "none"), "save_dir": str(out)} | given
    own = {"root": str(root), "split": str(out / "split.json"), "seed": seed}
    notebook = nbtools.run(nbtools.NOTEBOOK, out, **own, **given)
    nbformat.write(notebook, out / "executed.ipynb")
    metrics = json.loads(Path(out, "metrics.json").read_text())
    low, high = metrics["intervals"]["iou"]["rooftop"]
    row = {"left out": left_out, "seed": seed, "tiles": metrics["tiles"]}
    row |= {"roof IoU": metrics["iou"]["rooftop"], "low": low, "high": high}
    row |= {"boundary IoU": metrics["boundary_iou"]["rooftop"]}
    return row | {"object F1": metrics["object_f1"]["rooftop"], "threshold": metrics["threshold"]}


def main() -> None:
    """Run what is asked for, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("settings", nargs="*", type=setting)
    parser.add_argument("--leave-out", nargs="*", default=PLACES)
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--out", type=Path, default=Path("unseen"))
    options = parser.parse_args()
    rows = []
    for number, left_out in enumerate(options.leave_out):
        for seed in options.seeds:
            out = options.out.resolve() / f"{number}-{seed}"
            rows.append(
                one_run(options.root.resolve(), left_out, seed, out, dict(options.settings))
            )
            print(pd.DataFrame(rows[-1:]).to_string(index=False, float_format="%.3f"), flush=True)
    table = pd.DataFrame(rows)
    by_place = table.groupby("left out", sort=False)["roof IoU"].agg(["mean", "min", "max"])
    print(by_place.to_string(float_format="%.3f"))
    print(f"mean of the places {by_place['mean'].mean():.3f}")


if __name__ == "__main__":
    main()
