"""Single roofs: what labels tell of them, the outline's target and loss, how roofs are separated and counted."""

from pathlib import Path
from types import SimpleNamespace

import cv2
import geopandas as gpd
import numpy as np
import pytest
import torch
from faulty import save, save_tiff
from rasterio.transform import from_origin
from scipy import ndimage
from shapely import box

CPU = torch.device("cpu")
UTM = "EPSG:32633"
COUNT, SIDE = 8, 64


def houses(number):
    """Numbers of houses (H, W): a row of three that share walls, one alone; in other places each time."""
    rng = np.random.default_rng(number)
    x, y = rng.integers(2, 8, 2)
    numbers = np.zeros((SIDE, SIDE), np.int32)
    for n in range(3):
        numbers[y : y + 20, x + 16 * n : x + 16 * n + 16] = n + 1
    numbers[y + 28 : y + 46, x : x + 18] = 4
    return numbers


def photo(number):
    """An image (H, W, 3) uint8: noise, lighter on roofs, each of its own brightness."""
    rng = np.random.default_rng(100 + number)
    light = np.array([0, 150, 90, 120, 140])[houses(number)]
    return np.uint8(rng.integers(0, 60, (SIDE, SIDE, 3)) + light[..., None])


def rims(numbers, width):
    """Pixels of houses (H, W) that lie within a width of anything else: bool."""
    side = 2 * width + 1
    lowest, highest = (f(numbers, side) for f in (ndimage.minimum_filter, ndimage.maximum_filter))
    return (numbers > 0) & (lowest != highest)


@pytest.fixture
def verify(nb, settings):
    """A function that writes labels by their content, and verifies them: the tile set."""

    def go(label, **changes):
        root = Path(settings["root"])
        for n in range(COUNT):
            save(root / settings["images_dir"] / f"area{n}_1.png", photo(n))
            pixels = label(houses(n))
            pixels = pixels.astype(
                np.int32 if pixels.ndim == 2 and pixels.max() > 255 else np.uint8
            )
            path = root / settings["labels_dir"] / f"area{n}_1_label.png"
            save(path, pixels)
        return nb.verify_dataset(nb.make_config(**settings | changes))

    return go


def same_parts(one, other):
    """True if two numberings (H, W) divide the pixels alike."""
    if not np.array_equal(one > 0, other > 0):
        return False
    pairs = np.unique(np.stack([one[one > 0], other[one > 0]]), axis=1)
    return pairs.shape[1] == len(np.unique(pairs[0])) == len(np.unique(pairs[1]))


# ---- what labels tell


def place(number):
    """Where a tile lies."""
    return from_origin(500_000 + 100 * number, 6_400_000, 0.5, 0.5)


@pytest.fixture
def footprints(nb, settings):
    """Georeferenced tiles, and one file with a polygon for each house: the tile set."""
    root = Path(settings["root"])
    polygons = []
    for n in range(COUNT):
        path = root / settings["images_dir"] / f"area{n}_1.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tiff(path, photo(n).transpose(2, 0, 1), crs=UTM, transform=place(n))
        for number in range(1, 5):
            rows, columns = (axis.tolist() for axis in np.nonzero(houses(n) == number))
            corners = [(columns[0], rows[0]), (columns[-1] + 1, rows[-1] + 1)]
            (left, top), (right, bottom) = (place(n) * corner for corner in corners)
            polygons.append(box(left, bottom, right, top))
    gpd.GeoSeries(polygons, crs=UTM).to_file(root / "town.geojson")
    config = nb.make_config(**settings | {"labels_dir": "town.geojson"})
    return nb.verify_dataset(config)


def test_footprints_tell_every_house(nb, footprints, capsys):
    assert len(footprints.tiles) == COUNT
    for n, tile in enumerate(footprints.tiles):
        assert same_parts(nb.read_single_roofs(tile), houses(n))
        assert np.array_equal(nb.read_tile(tile)[1], houses(n) > 0)
    table = nb.explain_label_codes(footprints.tiles, footprints.config)
    assert table["tiles"].to_list() == [COUNT, COUNT] and set(table.index) == {0, 255}
    text = nb.count_single_roofs(footprints.tiles)
    assert text == f"{4 * COUNT} single roofs in the tiles, {3 * COUNT} of them touch another"


def test_numbers_of_buildings_tell_every_house(nb, verify):
    tiles = verify(lambda numbers: 10 * numbers, class_values=[0, "other"]).tiles
    for n, tile in enumerate(tiles):
        assert same_parts(nb.read_single_roofs(tile), houses(n))


RAMP = {"class_values": [[0, 3], [1, 2]]}
SOLARIS = {"class_values": ["other", ["#FF0000", "#FFFF00"]]}


def ramp(numbers, width=2):
    """0 ground, 1 building, 2 its rim, 3 ground between buildings that are near."""
    near = ndimage.maximum_filter(numbers, 11) != ndimage.minimum_filter(
        np.where(numbers, numbers, 99), 11
    )
    label = np.where(rims(numbers, width), 2, numbers > 0)
    return np.where((numbers == 0) & near & (ndimage.maximum_filter(numbers, 11) > 0), 3, label)


def solaris(numbers):
    """Footprints red, their rims yellow, contacts blue."""
    label = ramp(numbers)
    return np.stack([255 * np.isin(label, [1, 2]), 255 * (label == 2), 255 * (label == 3)], axis=2)


@pytest.mark.parametrize(
    "label, values", [(ramp, RAMP), (lambda n: ramp(n, 4), RAMP), (solaris, SOLARIS)]
)
def test_rims_tell_every_house(nb, verify, label, values):
    tiles = verify(label, **values).tiles
    assert len(tiles) == COUNT
    for n, tile in enumerate(tiles):
        assert same_parts(nb.read_single_roofs(tile), houses(n))


def kinds(numbers):
    """Two kinds of roofs: the one in the middle of the row, and all others."""
    return np.where(numbers == 2, 2, numbers > 0)


def panels(numbers):
    """Roofs 1, solar panels on some of them 2."""
    inside = (numbers > 0) & ~rims(numbers, 4)
    return np.where(inside & (numbers != 2), 2, numbers > 0)


@pytest.mark.parametrize(
    "label, values",
    [
        (lambda numbers: 255 * (numbers > 0), [0, 255]),
        (kinds, [0, "other"]),
        (kinds, [0, [1, 2]]),
        (panels, [0, [1, 2]]),
        (panels, [0, "other"]),
        (lambda numbers: cv2.blur(np.uint8(255 * (numbers > 0)), (5, 5)), [0, "other"]),
    ],
)
def test_other_labels_are_not_taken_for_single_roofs(nb, verify, label, values):
    tiles = verify(label, class_values=values).tiles
    assert all(nb.read_single_roofs(tile) is None for tile in tiles)
    assert "do not tell" in nb.count_single_roofs(tiles)


# ---- what the model is taught


def taught(nb, tile_set, augmentation="none"):
    """A training item of the first tile, and its outline by the definition."""
    config = nb.replace(tile_set.config, augmentation=augmentation)
    data = nb.RooftopDataset(tile_set.tiles[:1], config, train=True)
    _, label, roofs = data[1, 0]
    return label, roofs, nb.outline_of_roofs(label[None], roofs[None])[0]


def test_footprints_teach_the_walls_between_houses(nb, footprints):
    label, roofs, outline = taught(nb, footprints)
    assert same_parts(roofs.numpy(), houses(0))
    assert np.array_equal(outline, slow_outline(roofs.numpy()))
    alone = nb.outline_of_roofs(label[None])[0]
    assert outline.sum() > alone.sum()


@pytest.mark.parametrize("augmentation", ["standard", "strong"])
def test_roofs_are_moved_as_their_label(nb, footprints, augmentation):
    for epoch in range(1, 20):
        config = nb.replace(footprints.config, augmentation=augmentation)
        _, label, roofs = nb.RooftopDataset(footprints.tiles[:1], config, train=True)[epoch, 0]
        assert torch.equal(roofs > 0, label > 0) and len(roofs.unique()) > 2


@pytest.mark.parametrize(
    "label, values",
    [(lambda n: 10 * n, {"class_values": [0, "other"]}), (ramp, RAMP), (solaris, SOLARIS)],
)
def test_every_kind_of_label_that_tells_roofs_apart_teaches_it(nb, verify, label, values):
    tile_set = verify(label, **values)
    for index in range(3):
        data = nb.RooftopDataset(tile_set.tiles[index : index + 1], tile_set.config)
        _, label, roofs = data[1, 0]
        assert torch.equal(roofs > 0, label == 1)
        assert same_parts(roofs.numpy(), houses(index))


def test_plain_labels_teach_their_own_edges(nb, verify):
    tile_set = verify(lambda numbers: 255 * (numbers > 0), class_values=[0, 255])
    label, roofs, outline = taught(nb, tile_set, "standard")
    assert torch.equal(label, roofs)
    assert torch.equal(outline, nb.outline_of_roofs(label[None])[0])


# ---- the outline's target and loss


def slow_outline(labels):
    """The definition, pixel by pixel: is another known class within two pixels?"""
    outline = np.zeros_like(labels)
    for y, x in np.argwhere((labels > 0) & (labels != 255)):
        around = labels[max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3]
        outline[y, x] = np.any((around != labels[y, x]) & (around != 255))
    return np.where(labels == 255, 255, outline)


@pytest.mark.parametrize("seed", range(4))
def test_outlines_are_two_pixels_wide_in_every_view(nb, seed):
    rng = np.random.default_rng(seed)
    coarse = rng.choice([0, 0, 1, 2, 255], (8, 9))
    labels = coarse.repeat(6, 0).repeat(6, 1)
    expected = slow_outline(labels)
    for turns in range(4):
        for flip in (False, True):
            view = np.rot90(labels, turns)
            truth = np.rot90(expected, turns)
            if flip:
                view, truth = view[:, ::-1], truth[:, ::-1]
            found = nb.outline_of_roofs(torch.tensor(view.copy())[None])[0]
            assert np.array_equal(found, truth)


@pytest.mark.parametrize("seed", range(4))
def test_numbers_draw_an_outline_between_roofs_that_touch(nb, seed):
    rng = np.random.default_rng(seed)
    coarse = rng.choice([0, 0, 0, 7, 300, 301, 70_000], (8, 9))
    roofs = coarse.repeat(6, 0).repeat(6, 1)
    labels = np.int64(roofs > 0)
    labels[rng.random(labels.shape) < 0.02] = 255
    expected = slow_outline(np.where(labels == 255, 255, roofs))
    found = nb.outline_of_roofs(torch.tensor(labels)[None], torch.tensor(roofs)[None])[0]
    assert np.array_equal(found, expected)
    assert (found != nb.outline_of_roofs(torch.tensor(labels)[None])[0]).any()


def test_a_tiles_edge_and_ignored_pixels_make_no_outline(nb):
    assert not nb.outline_of_roofs(torch.ones(1, 9, 9, dtype=torch.long)).any()
    labels = torch.ones(1, 9, 9, dtype=torch.long)
    labels[:, :, :3] = nb.IGNORE_INDEX
    found = nb.outline_of_roofs(labels)
    assert (found[:, :, :3] == nb.IGNORE_INDEX).all() and not found[:, :, 3:].any()


def test_the_outline_adds_its_own_loss(nb):
    torch.manual_seed(0)
    labels = torch.randint(0, 2, (2, 4, 4)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    labels[:, :5] = nb.IGNORE_INDEX
    logits = torch.randn(2, 3, 32, 32, requires_grad=True)
    plain = nb.CombinedLoss(0.6, 0.4)(logits[:, :2], labels)
    loss = nb.CombinedLoss(0.6, 0.4, 0.7)(logits, labels)
    truth = nb.outline_of_roofs(labels)
    valid = truth != nb.IGNORE_INDEX
    chance, target = logits[:, 2].sigmoid()[valid], truth[valid].float()
    entropy = torch.nn.functional.binary_cross_entropy(chance, target)
    dice = 1 - 2 * (chance * target).sum() / (chance.sum() + target.sum())
    assert loss.item() == pytest.approx(
        (plain + 0.7 * (0.6 * entropy + 0.4 * dice)).item(), rel=1e-4
    )
    loss.backward()
    assert not logits.grad[:, :, :5].any() and logits.grad[:, :, 5:].any(dim=(0, 2, 3)).all()


def test_the_outlines_loss_follows_the_numbers_of_roofs(nb):
    labels = torch.ones(1, 8, 16, dtype=torch.long)
    roofs = torch.arange(1, 3).repeat_interleave(8).expand(1, 8, 16)  # two houses, a wall between
    loss_fn = nb.CombinedLoss(0.6, 0.4, 0.5)
    logits = torch.zeros(1, 3, 8, 16)
    logits[:, 2] = torch.where(nb.outline_of_roofs(labels, roofs) == 1, 9.0, -9.0)
    wrong = loss_fn(logits, labels)
    assert loss_fn(logits, labels, roofs) < wrong - 0.2
    assert loss_fn(logits, labels, labels) == wrong


def test_a_pass_hands_the_numbers_to_the_loss(nb):
    run = SimpleNamespace(model=torch.nn.Identity(), device=CPU, precision="fp32", history=[])
    run.ema, run.statistics = run.model, torch.zeros(0)
    run.config = SimpleNamespace(num_classes=2)
    labels = torch.ones(2, 4, 4, dtype=torch.long)
    roofs, seen = 7 * labels, []
    data = type("Data", (list,), {"train": False})(range(2))
    loader = type("Loader", (list,), {"dataset": data})([(torch.zeros(2, 2, 4, 4), labels, roofs)])
    nb.one_pass(run, loader, lambda *words: seen.append(words) or torch.tensor(1.0))
    assert torch.equal(seen[0][1], labels) and torch.equal(seen[0][2], roofs)


def test_ignored_windows_cost_nothing(nb):
    labels = torch.full((2, 8, 8), nb.IGNORE_INDEX)
    logits = torch.randn(2, 3, 8, 8, requires_grad=True)
    loss = nb.CombinedLoss(0.6, 0.4, 0.5)(logits, labels)
    loss.backward()
    assert loss.item() == 0 and logits.grad.isfinite().all()


# ---- the model


@pytest.fixture
def two(nb, settings):
    """Models of one seed with and without an outline, and the config of the first."""
    config = nb.make_config(**settings)
    models = []
    for weight in (config.outline_weight, 0.0):
        torch.manual_seed(3)
        models.append(nb.build_model(nb.replace(config, outline_weight=weight)).eval())
    return *models, config


@pytest.mark.parametrize("architecture", ["DeepLabV3Plus", "Unet", "FPN"])
def test_the_classes_are_those_of_a_model_without_outline(nb, settings, architecture):
    config = nb.make_config(**settings | {"architecture": architecture})
    models = []
    for weight in (0.5, 0.0):
        torch.manual_seed(3)
        models.append(nb.build_model(nb.replace(config, outline_weight=weight)).eval())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits, plain = (model(images) for model in models)
    assert logits.shape == (2, 3, 64, 64) and torch.equal(logits[:, :2], plain)


def test_a_predictor_averages_the_outline_like_the_rest(nb, two):
    model, plain, config = two
    image = np.random.default_rng(1).integers(0, 256, (150, 130, 3), dtype=np.uint8)
    for tta in (False, "few", True):
        options = {"config": config, "device": CPU, "precision": "fp32", "tta": tta}
        found = nb.Predictor([model], wall_depth=0.1, **options).predict(image, cut=True)
        alone = nb.Predictor([plain], **options).predict(image, cut=True)
        assert found.shape == (3, 150, 130) and np.allclose(found[:2], alone, atol=1e-6)
        assert (found[2] >= 0).all() and (found[2] <= 1).all() and found[2].std() > 0
    window = image[:64, :64]
    found = nb.Predictor([model], wall_depth=0.1, **options).predict(window, cut=True)
    pixels = nb.TO_TENSORS(image=window)["image"][None]
    total = 0
    with torch.no_grad():
        for scale, views in nb.VIEWS[True].items():
            for view in views:
                size = nb.scaled_side(scale, 64)
                seen = torch.nn.functional.interpolate(
                    nb.apply_view(pixels, view), size, mode="bilinear"
                )
                outline = model(seen)[:, 2:].sigmoid()
                outline = torch.nn.functional.interpolate(outline, 64, mode="bilinear")
                total = total + nb.undo_view(outline, view)[0, 0]
    assert np.allclose(found[2], total / 8, atol=1e-5)


def test_an_older_model_counts_roofs_that_touch_as_one_and_says_so(nb, settings, tmp_path, capsys):
    paths = []
    for weight in (0.5, 0.0):
        run = nb.Run(nb.make_config(**settings | {"outline_weight": weight}), CPU, "fp32", {})
        saved = nb.torch.load(nb.io.BytesIO(nb.make_checkpoint(run, ["model"])), weights_only=True)
        if weight == 0:
            del saved["config"]["outline_weight"]  # as an older notebook wrote it
        paths.append(tmp_path / f"{weight}.pt")
        paths[-1].write_bytes(nb.to_checkpoint_bytes(saved | {"wall_depth": 0.1}))
    new, old = paths
    assert nb.load_wall_depth([new]) == 0.1 and capsys.readouterr().out == ""
    for files in ([old], [new, old]):
        assert nb.load_wall_depth(files) is None
        assert str(old) in capsys.readouterr().out
    assert nb.make_config(**settings | {"model": str(old)}).outline_weight == 0
    assert nb.load_model(old, CPU)
    tuned = nb.make_config(**settings | {"encoder_weights": str(old)})
    weights, source = nb.Run(tuned, CPU, "fp32", {}).model.state_dict(), nb.load_checkpoint(old)
    for name, value in source["model"].items():
        assert torch.equal(weights[name], value) or "num_batches" in name, name


# ---- separation and counting


def perfect(numbers):
    """The prediction that sees every house and its outline."""
    roof = numbers > 0
    outline = np.where(rims(numbers, 2), 0.95, 0.02)
    return np.uint8(roof), np.where(roof, 0.97, 0.01), outline


def test_houses_are_separated_up_to_their_walls(nb):
    numbers = np.zeros((60, 150), np.int32)
    for n in range(4):
        numbers[10 : 40 + 3 * n, 10 + 30 * n : 40 + 30 * n] = n + 1
    numbers[50:53, 100:104] = 5  # too small for a core
    found = nb.separate_roofs(*perfect(numbers), 0.3)
    assert found.max() == 5 and np.array_equal(found > 0, numbers > 0)
    for number in range(1, 6):
        mine = found == np.bincount(found[numbers == number]).argmax()
        assert (mine & (numbers == number)).sum() > 0.98 * (mine | (numbers == number)).sum()


def test_roofs_of_other_classes_are_other_roofs(nb):
    numbers = np.zeros((40, 80), np.int32)
    numbers[5:35, 5:40] = 1
    numbers[5:35, 40:75] = 2
    classes, roof, outline = perfect(numbers)
    blind = np.where(np.isin(np.arange(80), range(30, 50)), 0.0, outline)  # no line between them
    assert nb.separate_roofs(classes, roof, blind, 0.3).max() == 1
    found = nb.separate_roofs(np.uint8(numbers), roof, blind, 0.3)
    assert same_parts(found, numbers)


def test_separation_changes_no_pixel_of_the_mask(nb, monkeypatch):
    rng = np.random.default_rng(4)
    roof, outline = (ndimage.gaussian_filter(rng.random((90, 120)), 2) for _ in range(2))
    roof, outline = ((x - x.min()) / np.ptp(x) for x in (roof, outline))
    classes = np.uint8(roof > 0.5)
    monkeypatch.setattr(nb, "LEAST_CORE", 5)
    found = nb.separate_roofs(classes, roof, outline, 0.0)
    assert np.array_equal(found > 0, classes > 0)
    for number in np.unique(found[found > 0]):
        assert ndimage.label(found == number)[1] == 1  # each roof hangs together


def test_counts_are_by_single_roofs_where_they_are_known(nb, monkeypatch):
    numbers = houses(0)
    classes, roof, outline = perfect(numbers)
    label = np.uint8(numbers > 0)
    by_components = nb.count_tile(label, classes, 2)
    assert by_components[5:, 1].tolist() == [2, 0, 0]  # the row is one of two
    monkeypatch.setattr(nb, "LEAST_CORE", 20)
    single = nb.separate_roofs(classes, roof, outline, 0.3)
    assert nb.count_tile(label, classes, 2, numbers, single)[5:, 1].tolist() == [4, 0, 0]
    as_one = nb.components_of_classes(classes)
    assert nb.count_tile(label, classes, 2, numbers, as_one)[5:, 1].tolist() == [1, 1, 3]
    assert np.array_equal(nb.count_tile(label, classes, 2, numbers, as_one)[:5], by_components[:5])


class Seen(torch.nn.Module):
    """Sees what the photos show: roofs by their light, outlines where it changes."""

    def forward(self, images):
        light = images.mean(1, keepdim=True)
        light = torch.nn.functional.avg_pool2d(light, 3, 1, 1)
        roof = 20 * (light - light.mean((2, 3), keepdim=True))
        pool = torch.nn.functional.max_pool2d
        change = pool(light, 5, 1, 2) + pool(-light, 5, 1, 2)
        return torch.cat([-roof, roof, 20 * (change - 0.6)], 1)


def test_validation_chooses_depths_and_metrics_say_what_objects_are(nb, footprints, monkeypatch):
    monkeypatch.setattr(nb, "LEAST_CORE", 20)
    config = footprints.config
    predictor = nb.Predictor([Seen()], config, CPU, "fp32", wall_depth=0.1)
    tally = nb.score_tiles(predictor, footprints.tiles)
    components, single = (c.sum(0)[5:, 1] for c in (tally.components, tally.counts))
    assert components[0] < single[0] <= 4 * COUNT == single[0] + single[2]
    trials = nb.try_wall_depths(predictor, {"val": footprints.tiles})
    assert list(trials.index) == list(nb.TRIED_DEPTHS) and trials.between(0, 1).all()
    few = {"val": footprints.tiles[:1], "train": footprints.tiles[1:], "test": []}
    assert nb.try_wall_depths(predictor, few).equals(trials)  # training tiles fill up
    monkeypatch.setattr(nb, "JUDGED_TILES", 1)
    assert not nb.try_wall_depths(predictor, few).equals(trials)
    again = nb.score_tiles(nb.replace(predictor, wall_depth=0.3), footprints.tiles).counts.sum(0)
    assert trials[0.3] == pytest.approx(nb.scorecard(again)["object_f1"][1])
    table = nb.tabulate_trials([nb.Trial(predictor, tally)], True)
    row = table.iloc[0]
    assert row["F1 of components"] < row["F1 of single roofs"]
    plain = nb.replace(predictor, wall_depth=None)
    assert nb.try_wall_depths(plain, {"val": footprints.tiles}) is None
    split = nb.Split(footprints, config, {"test": footprints.tiles}, {})
    choice = nb.Choice(split, [Path("best.pt")], {}, predictor)
    monkeypatch.setattr(nb, "count_test_tiles_seen_in_training", lambda files, tiles: 0)
    assert nb.assemble_metrics(choice, footprints.tiles, tally.counts)["objects"] == "single roofs"


def test_the_wall_depth_with_the_highest_f1_is_chosen(nb):
    f1 = nb.pd.Series([0.30, 0.45, 0.30, 0.42, 0.44, 0.38], nb.TRIED_DEPTHS)
    assert nb.best_wall_depth(f1) == 0.3  # alone 0.1 is higher; with its neighbours it is not
    falling = f1.sort_values(ascending=False).set_axis(f1.index)
    assert nb.best_wall_depth(falling) == nb.TRIED_DEPTHS[0]
    assert nb.best_wall_depth(f1 * np.nan) == nb.WALL_DEPTH


def test_faint_walls_and_faint_roofs_have_their_own_levels(nb):
    """A roof of low certainty stays whole beside two that only a high level tells apart."""
    numbers = np.zeros((40, 120), np.int32)
    numbers[5:35, 5:35], numbers[5:35, 35:65], numbers[5:35, 65:115] = 1, 2, 3
    classes, roof, outline = perfect(numbers)
    roof = np.where(numbers == 3, 0.55, roof)
    wall = (np.abs(np.arange(120) - 34.5) < 3) & (numbers > 0)
    outline = np.where(wall, 0.3, outline)  # faint: 0.68 of certainty on the wall
    found = nb.separate_roofs(classes, roof, outline, 0.1)
    for number in (1, 2, 3):
        share = (found[numbers == number] == np.bincount(found[numbers == number]).argmax()).mean()
        assert share > 0.97
    assert found.max() == 3
    assert nb.separate_roofs(classes, roof, outline, 0.3).max() < 3  # too faint a wall


# ---- the sample


def test_the_samples_scene_has_a_footprint_for_each_house(nb, tmp_path):
    image, numbers = nb.paint_houses(nb.SAMPLE_SCENES, nb.SAMPLE_SCENE)
    _, label = nb.paint_suburb(nb.SAMPLE_SCENES, nb.SAMPLE_SCENE)
    gap = (numbers > 0) & (label == 0)
    assert not (label > (numbers > 0)).any() and 0 < gap.sum() < 0.05 * label.sum()
    labelled = ndimage.label(label, np.ones((3, 3)))[0]
    pairs = np.unique(np.stack([labelled, numbers])[:, label > 0], axis=1)
    assert len(np.unique(pairs[0])) == pairs.shape[1]  # no piece of the label is of two houses
    nb.write_sample_scene(tmp_path)
    polygons = gpd.read_file(tmp_path / "suburb.geojson")
    assert len(polygons) >= len(np.unique(numbers)) - 1 > ndimage.label(numbers)[1] + 20
    assert nb.count_touching(numbers) > 50
