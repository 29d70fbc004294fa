"""Section 12: prediction, counts, threshold, scorecard, intervals, label suspects."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from torch import nn

CPU = torch.device("cpu")
NAMES = ["background", "rooftop"]


def blobs(seed, shape=(60, 90), share=0.3):
    """A random mask of rounded pieces, and the same a little changed."""
    rng = np.random.default_rng(seed)
    field, other = (ndimage.gaussian_filter(rng.standard_normal(shape), 4) for _ in range(2))
    near = field + 0.35 * other
    return field > np.quantile(field, 1 - share), near > np.quantile(near, 1 - share)


# ---- boundaries and objects


@pytest.mark.parametrize("shape", [(60, 90), (256, 256), (5, 300), (1, 1)])
def test_boundary_is_what_its_authors_define(nb, shape):
    """Within 2 % of the diagonal of the outline, the picture's edge included: by SciPy."""
    true, predicted = blobs(1, shape)
    width = max(1, round(0.02 * np.hypot(*shape)))
    bands = []
    for mask in (true, predicted):
        depth = ndimage.distance_transform_cdt(np.pad(mask, 1), "chessboard")[1:-1, 1:-1]
        bands.append(mask & (depth <= width))
    counts = (bands[0] & bands[1]).sum(), (bands[0] | bands[1]).sum()
    assert nb.boundary_counts(true, predicted) == counts


def test_boundary_counts_by_hand(nb):
    true = np.zeros((50, 50), bool)
    true[10:20, 10:20] = True  # the band is 1 pixel wide: an outline of 36 pixels
    assert nb.boundary_counts(true, true) == (36, 36)
    assert nb.boundary_counts(true, np.roll(true, 1, 1)) == (18, 54)  # rows share 9 above, 9 below
    assert nb.boundary_counts(true, ~np.ones_like(true)) == (0, 36)


def slow_matches(true, predicted):
    """Object TP, FP, FN by the loops of the definition; pairs above 0.5 cannot conflict."""
    (ours, m), (theirs, n) = (ndimage.label(mask, np.ones((3, 3))) for mask in (true, predicted))
    matches = 0
    for i in range(1, m + 1):
        for j in range(1, n + 1):
            shared = ((ours == i) & (theirs == j)).sum()
            matches += shared > 0.5 * (((ours == i) | (theirs == j)).sum())
    return matches, n - matches, m - matches


def match(nb, true, predicted):
    """TP, FP, FN of the connected components of two masks."""
    masks = (np.asarray(mask, np.uint8) for mask in (true, predicted))
    return nb.object_counts(*(nb.components_of_classes(mask) for mask in masks))


@pytest.mark.parametrize("seed", range(12))
def test_objects_match_as_defined(nb, seed):
    true, predicted = blobs(seed)
    assert match(nb, true, predicted) == slow_matches(true, predicted)


def test_objects_by_hand(nb):
    row = [[1, 1, 1, 1, 0, 1, 0, 0, 1]]
    assert match(nb, row, row) == (3, 0, 0)
    halves = [[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]]
    true = [[1, 1, 1, 1]]
    assert match(nb, true, [[1, 1, 0, 0]]) == (1, 0, 0)  # exactly 0.5 is a match
    assert match(nb, true, [[1, 0, 0, 1]]) == (0, 2, 1)
    assert match(nb, halves, np.zeros((3, 4))) == (0, 0, 2)
    assert match(nb, np.eye(3), np.eye(3)) == (1, 0, 0)  # corners connect


def test_single_roofs_match_by_their_numbers(nb):
    row = np.array([[1, 1, 2, 2, 2, 0, 7, 7]])
    assert nb.object_counts(row, row) == (3, 0, 0)
    assert nb.object_counts(row, np.minimum(row, 1)) == (0, 1, 3)  # all as one: IoU 3/7 at best
    halves = np.array([[5, 5, 5, 5]]), np.array([[3, 3, 4, 4]])
    assert nb.object_counts(*halves) == (1, 1, 0)  # both halves reach 0.5, one roof is found
    assert nb.object_counts(*halves[::-1]) == (1, 0, 1)


def test_a_piece_has_one_partner_at_most(nb):
    true = np.zeros((4, 9), bool)
    true[:2, :4] = True
    twice = true | np.roll(true, 2, 0)  # twice as large: IoU 0.5
    assert match(nb, true, twice) == (1, 0, 0)
    two = true | np.roll(true, 5, 1)
    one = two | (np.arange(9) < 5)  # two roofs predicted as one
    assert match(nb, two, one) == (0, 1, 2)


# ---- the scorecard


def counts_of(nb, label, roof, threshold=0.5):
    """The counts (8, 2) of a tile from its label and the probability of roof."""
    probability = np.stack([1 - roof, roof]).astype(np.float32)
    return nb.count_tile(label.astype(np.uint8), nb.classify_pixels(probability, threshold), 2)


def named(nb, counts, names, scenes=(0,)):
    """What metrics.json holds of the counts (N, 8, C) of tiles in scenes, or (8, C) of one."""
    config = SimpleNamespace(class_names=names, seed=42)
    return nb.metrics_with_intervals(counts.reshape(-1, 8, len(names)), list(scenes), config)


def histogram_of(nb, label, roof):
    return nb.roof_histogram(label.astype(np.uint8), roof.astype(np.float32))


def random_counts(nb, n=6):
    """The counts of tiles with blobs, the roofs of the last two missed and not there: (N, 8, 2)."""
    tiles = [counts_of(nb, *(mask.astype(float) for mask in blobs(seed))) for seed in range(n - 2)]
    label = blobs(9)[0].astype(float)
    tiles += [counts_of(nb, of, np.zeros_like(label)) for of in (label, np.zeros_like(label))]
    return np.stack(tiles)


def test_scorecard_by_hand(nb):
    label = np.zeros((10, 10), np.uint8)
    label[2:6, 2:6] = 1
    roof = np.zeros((10, 10))
    roof[2:6, 4:8] = 0.9  # half of the 16 pixels found, 8 false alarms
    card = named(nb, counts_of(nb, label, roof), NAMES)
    assert card["iou"] == {"rooftop": 8 / 24, "background": 76 / 92}
    assert [card[name]["rooftop"] for name in ("precision", "recall", "f1")] == [0.5, 0.5, 0.5]
    assert card["pixel_accuracy"] == 84 / 100 and card["roof_area_error"] == 0
    assert card["roof_iou"] == 8 / 24 and card["miou"] == pytest.approx((8 / 24 + 76 / 92) / 2)
    assert card["object_f1"] == {"rooftop": 0.0}  # IoU 1/3
    assert card["boundary_iou"]["rooftop"] == 4 / 20  # outlines of 12 pixels share two ends of 2


def test_roof_area_error_tells_too_much_from_too_little(nb):
    label, roof = np.zeros((10, 10)), np.zeros((10, 10))
    label[:4], roof[:3] = 1, 1
    assert nb.scorecard(counts_of(nb, label, roof))["roof_area_error"] == -1 / 4
    assert nb.scorecard(counts_of(nb, roof, label))["roof_area_error"] == pytest.approx(1 / 3)


def test_ignored_pixels_count_nowhere(nb):
    label, roof = (mask.astype(float) for mask in blobs(3))
    whole, ignored, changed = counts_of(nb, label, roof), label.copy(), roof.copy()
    ignored[:, :30] = nb.IGNORE_INDEX
    changed[:, :30] = 1 - changed[:, :30]
    part, histogram = counts_of(nb, ignored, roof), histogram_of(nb, ignored, roof)
    assert np.array_equal(part, counts_of(nb, ignored, changed))
    assert np.array_equal(histogram, histogram_of(nb, ignored, changed))
    tp, fp, fn = part[:3].sum(1)
    assert tp + fn == tp + fp == histogram.sum() == 60 * 60 < whole[[0, 2]].sum()


def test_classes_that_do_not_occur_are_left_out(nb):
    empty = counts_of(nb, np.zeros((8, 8)), np.zeros((8, 8)))
    card = named(nb, empty, NAMES)
    assert card["iou"] == {"background": 1.0} and card["object_f1"] == {}
    assert card["roof_area_error"] is None and card["roof_iou"] is None
    assert card["boundary_iou"] == {"background": 1.0} and card["miou"] == 1.0


def test_metrics_leave_out_what_there_is_not(nb):
    """Of a class: its name. Of all classes: None. Alike for a figure and for both of its ends."""
    label, names = np.zeros((2, 8, 8), np.uint8), ["ground", "roof", "water"]
    label[0, 2:6, 2:6], label[1, :4] = 2, nb.IGNORE_INDEX
    card = named(nb, np.stack([nb.count_tile(one, 0 * one, 3) for one in label]), names, (0, 1))
    for figures in (card, card["intervals"]):
        assert set(figures["iou"]) == {"ground", "water"} and set(figures["object_f1"]) == {"water"}
        assert figures["roof_iou"] is not None
    assert card["iou"] == {"ground": 80 / 96, "water": 0.0} and card["roof_iou"] == 0
    assert card["intervals"]["f1"]["water"] == [0, 0] and card["roof_area_error"] == -1
    assert card["roof_area_error_by_tile"] == [-1, -1, -1]  # of the only tile with a roof
    empty = named(nb, np.stack([nb.count_tile(0 * label[0], 0 * label[0], 3)] * 2), names, (0, 1))
    for figures in (empty, empty["intervals"]):
        assert figures["roof_iou"] is None and figures["roof_area_error"] is None
        assert figures["object_f1"] == {} and set(figures["iou"]) == {"ground"}
    assert empty["roof_area_error_by_tile"] is None
    for of in (card, empty):
        assert json.loads(json.dumps(of, allow_nan=False)) == of


def test_counts_of_a_set_are_added_before_they_are_divided(nb):
    tiles, hits, union = [], 0, 0
    for seed, share in ((1, 0.5), (2, 0.1)):
        true, found = blobs(seed, share=share)
        tiles.append(counts_of(nb, true, found.astype(float)))
        hits, union = hits + (true & found).sum(), union + (true | found).sum()
    iou = nb.scorecard(sum(tiles))["iou"][1]
    assert iou == pytest.approx(hits / union)
    alone = [nb.scorecard(tile)["iou"][1] for tile in tiles]
    assert iou != pytest.approx(np.mean(alone), abs=1e-3)


def test_scorecard_of_many_is_that_of_each(nb):
    """Tiles with, without and with missed roofs, in any number of dimensions."""
    counts = random_counts(nb)
    cards, grid = nb.scorecard(counts), nb.scorecard(counts.reshape(2, 3, 8, 2))
    for number, one in enumerate(counts):
        card = nb.scorecard(one)
        assert set(card) == set(cards) == set(grid)
        for name, value in card.items():
            np.testing.assert_array_equal(cards[name][number], value, name)
            np.testing.assert_array_equal(grid[name][number // 3, number % 3], value, name)
    assert np.isfinite(cards["roof_iou"][:-1]).all() and np.isnan(cards["roof_iou"][-1])


def test_three_classes_are_scored_one_by_one(nb):
    rng, names = np.random.default_rng(0), ["ground", "roof", "water"]
    label, predicted = rng.integers(0, 3, (2, 40, 40))
    probability = np.eye(3)[predicted].transpose(2, 0, 1).astype(np.float32)
    counts = nb.count_tile(label.astype(np.uint8), nb.classify_pixels(probability, None), 3)
    card = named(nb, counts, names)
    for number, name in enumerate(names):
        one, other = label == number, predicted == number
        assert card["iou"][name] == pytest.approx((one & other).sum() / (one | other).sum())
    assert set(card["object_f1"]) == {"roof", "water"}
    assert card["roof_iou"] == pytest.approx((card["iou"]["roof"] + card["iou"]["water"]) / 2)
    assert histogram_of(nb, label, probability[1:].sum(0))[1].sum() == (label > 0).sum()


# ---- the threshold


@pytest.mark.parametrize("seed", range(4))
def test_threshold_from_the_histogram_is_nearly_the_best_of_all(nb, seed):
    rng = np.random.default_rng(seed)
    label, _ = blobs(seed)
    roof = np.clip(0.3 * label + rng.uniform(0, 0.6, label.shape), 0, 1).astype(np.float32)
    histogram = histogram_of(nb, label, roof)
    masks = [roof >= k / 100 for k in range(100)]
    slow = [(mask & label).sum() / (mask | label).sum() for mask in masks]
    assert nb.iou_by_threshold(histogram) == pytest.approx(slow, abs=2e-3)
    chosen = nb.best_threshold(histogram)
    nearer = [slow[k] for k in range(1, 100) if abs(k - 20) < abs(100 * chosen - 20)]
    assert slow[round(100 * chosen)] >= nb.NEARLY_BEST * max(slow[1:]) - 2e-3
    assert max(nearer, default=0) < nb.NEARLY_BEST * max(slow[1:]) + 2e-3
    iou = nb.scorecard(counts_of(nb, label, roof, chosen))["iou"][1]
    assert iou == pytest.approx(slow[round(100 * chosen)], abs=2e-3)


@pytest.mark.parametrize("other, roof, chosen", [(5, 95, 0.2), (5, 10, 0.1), (50, 95, 0.51)])
def test_of_equally_good_thresholds_the_one_for_other_ground(nb, other, roof, chosen):
    histogram = np.zeros((2, 100), int)
    histogram[0, other], histogram[1, roof] = 10, 10
    assert nb.best_threshold(histogram) == chosen


def test_without_any_roof_a_threshold_is_chosen_all_the_same(nb):
    assert nb.best_threshold(np.ones((2, 100), int) * [[1], [0]]) == 0.2


# ---- prediction


class Lopsided(nn.Module):
    """A model that sees directions: logits from the gradient along x."""

    def __init__(self, gain=1.0):
        super().__init__()
        self.gain = gain

    def forward(self, images):
        slope = self.gain * (images - images.roll(1, 3)).mean(1)
        return torch.stack([-slope, slope], 1)


class Moody(nn.Module):
    """A model that calls every second window it meets roof, and the others not."""

    def __init__(self):
        super().__init__()
        self.met = 0

    def forward(self, images):
        roof = (torch.arange(len(images)) + self.met) % 2 * 100.0 - 50
        self.met += len(images)
        mood = roof[:, None, None].expand(-1, *images.shape[2:])
        return torch.stack([-mood, mood], 1)


@pytest.fixture
def predictor(nb, settings):
    """A function that makes a predictor of models, on the CPU."""
    config = nb.make_config(**settings)

    def make(*models, batch_size=4, tta=False):
        return nb.Predictor(list(models), replace(config, batch_size=batch_size), CPU, "fp32", tta)

    return make


@pytest.fixture
def pixelwise():
    """A model that answers each pixel by its colour alone."""
    torch.manual_seed(1)
    return nn.Conv2d(3, 2, 1)


def picture(height, width):
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)


def answer(nb, model, image):
    """What a model says of an image (H, W, 3) as a whole: (2, H, W)."""
    with torch.no_grad():
        return model(nb.TO_TENSORS(image=image)["image"][None]).softmax(1)[0].numpy()


def rotated(image, quarter_turns, axes):
    return image.rot90(quarter_turns, (-2, -1)).flip(axes)


def back(image, quarter_turns, axes):
    return image.flip(axes).rot90(-quarter_turns, (-2, -1))


@pytest.mark.parametrize(("tta", "count"), [("few", 4), (True, 8)])
def test_views_are_turned_back_before_they_are_averaged(nb, predictor, tta, count):
    """Flips and rotations, once each; the sizes by hand, of windows of 64 pixels."""
    images = torch.randn(2, 3, 64, 64)
    averaged = predictor(Lopsided(), tta=tta)
    slow, seen = 0, []
    for scale, side in ((1, 64), (0.75, 64), (1.5, 96)):
        for turns, axes in nb.VIEWS[tta].get(scale, []):
            view = rotated(images, turns, axes)
            view = torch.nn.functional.interpolate(view, side, mode="bilinear")
            one = torch.nn.functional.interpolate(Lopsided()(view).softmax(1), 64, mode="bilinear")
            slow = slow + back(one, turns, axes) / count
            seen.append(rotated(images[0, 0], turns, tuple(axis - 2 for axis in axes)))
    assert torch.allclose(averaged(images), slow, atol=1e-6)
    assert len({tuple(view.flatten().tolist()) for view in seen}) == count
    half_turned = averaged(images.rot90(2, (2, 3)))
    if tta is True:
        assert torch.allclose(half_turned, averaged(images).rot90(2, (2, 3)), atol=1e-6)
    plain = predictor(Lopsided())
    assert torch.allclose(plain(images), Lopsided()(images).softmax(1))
    assert not torch.allclose(plain(images), averaged(images), atol=1e-2)


@pytest.mark.parametrize(
    ("tta", "batches"),
    [
        (False, [(3, 256)]),
        ("few", [(8, 256), (4, 256)]),
        (True, [(4, 256), (2, 192), (2, 384)] * 3),
    ],
)
def test_views_of_another_size_are_smaller_and_larger(predictor, tta, batches):
    """Of a batch of eight no more pixels go through the model at once than of eight windows."""
    sides = []

    class Watching(nn.Module):
        def forward(self, images):
            sides.append((len(images), images.shape[-1]))
            return images[:, :2]

    found = predictor(Watching(), tta=tta, batch_size=8)(torch.randn(3, 3, 256, 256))
    assert sides == batches and all(count * side**2 <= 8 * 256**2 for count, side in sides)
    assert found.shape == (3, 2, 256, 256)
    assert torch.allclose(found.sum(1), torch.ones(3, 256, 256), atol=1e-6)


def test_an_ensemble_averages_probabilities(predictor):
    images = torch.randn(1, 3, 16, 16)
    models = [Lopsided(1), Lopsided(4)]
    alone = [predictor(model)(images) for model in models]
    assert torch.allclose(predictor(*models)(images), sum(alone) / 2)


@pytest.mark.parametrize("size", [32, 33, 64, 96, 250])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 65, 100, 150, 1000, 2048])
def test_the_weights_of_windows_add_up_to_one_at_every_pixel(nb, length, size):
    total, tapers = np.zeros(max(length, size)), nb.blend_weights(length, size)
    for start, weights in tapers:
        assert weights.shape == (size,) and (weights > 0).all()
        assert 0 <= start <= max(length - size, 0)
        total[start : start + size] += weights  # ValueError for a window that sticks out
    assert total == pytest.approx(np.ones_like(total), abs=1e-12)
    starts = [start for start, _ in tapers]
    assert starts == sorted(set(starts)) and (np.diff(starts) <= size - size // 4).all()
    assert (len(tapers) == 1) == (length <= size)


@pytest.mark.parametrize(
    ("batch_size", "tta"), [(2, False), (4, False), (32, False), (16, "few"), (16, True)]
)
@pytest.mark.parametrize("shape", [(150, 100), (100, 150), (65, 64), (150, 40), (10, 200)])
def test_blending_changes_no_answer_that_all_windows_share(
    nb, predictor, pixelwise, shape, batch_size, tta, views_of_one_size
):
    """The outermost pixels included, and a side that is shorter than a window."""
    image = picture(*shape)
    found = predictor(pixelwise, batch_size=batch_size, tta=tta).predict(image, cut=True)
    assert found.shape == (2, *shape)
    np.testing.assert_allclose(found, answer(nb, pixelwise, image), rtol=0, atol=1e-6)


def test_windows_that_disagree_are_blended_without_a_seam(predictor):
    found = predictor(Moody()).predict(picture(64, 300), cut=True)
    assert found[1, 32].min() < 0.01 and found[1, 32].max() > 0.99  # each has its say
    assert abs(np.diff(found[1])).max() < 0.12  # hard edges would be steps of 1
    assert found.sum(0) == pytest.approx(np.ones((64, 300)), abs=1e-6)


@pytest.mark.parametrize("shape", [(40, 30), (1, 1), (64, 64), (150, 100)])
def test_a_tile_seen_as_a_whole_is_answered_at_its_own_size(nb, predictor, pixelwise, shape):
    """Smaller than a window or larger: resized to one, and the answer back."""
    image, seen = picture(*shape), []
    pixelwise.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    found = predictor(pixelwise).predict(image, cut=False)
    assert found.shape == (2, *shape) and seen == [(1, 3, 64, 64)]
    smooth = cv2.INTER_AREA if max(shape) > 64 else cv2.INTER_LINEAR
    whole = answer(nb, pixelwise, cv2.resize(image, (64, 64), interpolation=smooth))
    back = nn.functional.interpolate(torch.from_numpy(whole)[None], shape, mode="bilinear")[0]
    np.testing.assert_allclose(found, back.numpy(), rtol=0, atol=1e-6)


def test_a_small_tile_is_answered_where_its_roofs_are(predictor):
    """A model that calls the bright pixels roof, on a tile whose bright part is known."""
    model = nn.Conv2d(3, 2, 1)
    nn.init.zeros_(model.bias)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([-20.0, 20.0]).reshape(2, 1, 1, 1))
    image = np.zeros((40, 30, 3), np.uint8)
    image[10:30, 5:15] = 255
    roof = predictor(model).predict(image, cut=False)[1]
    assert (roof[11:29, 6:14] > 0.9).all() and (roof[10:30, 5:15] > 0.4).all()
    outside = np.ones_like(roof, bool)
    outside[9:31, 4:16] = False
    assert (roof[outside] < 0.1).all()


def test_a_checkpoint_of_other_classes_is_refused(nb, settings):
    config = nb.make_config(**settings)
    run = nb.Run(config, CPU, "fp32", {})
    run.history.append({"epoch": 1, "val_loss": 1.0, "val_iou": 0.5, "seconds": 1.0})
    nb.keep_finished_epoch(run, ["iou"])
    file = Path(config.save_dir) / nb.BEST_FILES["iou"]
    assert not nb.load_model(file, CPU, class_names=config.class_names).training
    refusal = "best_model_iou.pt cannot be used: it has class_names = .*rooftop.* this run .*solar"
    with pytest.raises(ValueError, match=refusal + " panel"):
        nb.load_model(file, CPU, class_names=["background", "solar panel"])


# ---- intervals


def striped(nb, shares, change=np.copy):
    """Counts (N, 8, 2) of roofless tiles with a share of false alarms."""
    order = np.arange(100).reshape(10, 10) / 100
    found = [(change(order) < share).astype(float) for share in shares]
    return np.stack([counts_of(nb, np.zeros((10, 10)), roof) for roof in found])


def test_intervals_agree_with_scipy(nb, settings):
    """Tiles of one size: pixel accuracy is a mean over tiles, which SciPy can bootstrap as well."""
    rng = np.random.default_rng(1)
    counts = striped(nb, rng.uniform(0, 0.6, 40), lambda order: rng.random(order.shape))
    accuracies = counts[:, 0, 0] / 100
    found = named(nb, counts, NAMES, [0] * 40)["intervals"]["pixel_accuracy"]
    expected = stats.bootstrap(
        [accuracies], np.mean, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert found == pytest.approx(list(expected), abs=0.01)
    assert found[0] < np.mean(accuracies) < found[1]


def test_intervals_are_drawn_over_scenes_where_there_are_ten(nb, settings):
    """Four like tiles in each of ten scenes: tiles would pretend to know twice as much."""
    counts = striped(nb, np.repeat(np.random.default_rng(1).uniform(0, 0.6, 10), 4))

    def ends(*scenes):
        return named(nb, counts, NAMES, np.repeat(*scenes))["intervals"]["pixel_accuracy"]

    wide, narrow = ends(range(10), 4), ends(range(5), 8)  # five scenes: over tiles
    assert np.diff(wide) > 1.6 * np.diff(narrow)
    assert np.array_equal(wide, ends(range(10), 4))


def test_intervals_have_the_names_of_the_scorecard(nb):
    """They enclose its figures, and are missing where those are."""
    counts = random_counts(nb)
    card = named(nb, counts, NAMES, range(len(counts)))
    assert set(nb.scorecard(counts)) == set(card["intervals"])
    for metric, ends in card["intervals"].items():
        values = card[metric] if isinstance(card[metric], dict) else {"": card[metric]}
        ends = ends if isinstance(ends, dict) else {"": ends}
        assert values and set(values) == set(ends)
        assert all(ends[name][0] <= value <= ends[name][1] for name, value in values.items())
    roofless = np.stack([counts_of(nb, np.zeros((8, 8)), np.zeros((8, 8)))] * 4)
    ends = named(nb, roofless, NAMES, range(4))["intervals"]
    assert ends["roof_area_error"] is None and ends["iou"] == {"background": [1.0, 1.0]}


# ---- label suspects


def test_suspects_are_areas_where_a_sure_model_and_the_label_disagree(nb):
    label, roof = np.zeros((60, 60), np.uint8), np.full((60, 60), 0.02)
    label[5:15, 5:15] = 1  # labelled, and the model is sure there is none
    roof[30:40, 30:42] = 0.97  # claimed with certainty, not in the label
    label[45:55, 5:15], roof[45:55, 3:15] = 1, 0.95  # agreed but for a sliver along the outline
    roof[5:15, 40:50] = 0.7  # claimed without certainty
    roof[53:59, 50:56] = 0.99  # too small
    label[20:26, 40:55], roof[20:26, 40:55] = nb.IGNORE_INDEX, 0.99
    found = sorted(nb.find_suspects("tile", label, roof), key=lambda suspect: suspect[1])
    assert found == [("tile", 100, [5, 5, 10, 10]), ("tile", 120, [30, 30, 12, 10])]


def test_the_box_of_a_suspect_is_in_the_picture_whatever_the_size_of_the_tile(
    nb, settings, monkeypatch
):
    """A row shows the whole tile, or what lies round the box."""
    image, label = np.full((900, 1300, 3), 9, np.uint8), np.zeros((900, 1300), np.uint8)
    rows = []
    monkeypatch.setattr(nb, "read_tile", lambda tile: (image, label))
    monkeypatch.setattr(nb, "uses_windows", lambda tile, config: True)
    monkeypatch.setattr(nb, "show_grid", lambda *words: rows.append(words))
    model = nn.Conv2d(3, 2, 1)
    predictor = nb.Predictor([model], nb.make_config(**settings), CPU, "fp32")
    tile = SimpleNamespace(name="images/a_1.png", rims=None)
    shown = nb.pd.DataFrame([(tile, 120, [1000, 700, 12, 10])], columns=["tile", "pixels", "box"])
    nb.show_predictions(shown, predictor)
    nb.show_predictions(shown[["tile", "pixels"]], predictor)
    nb.show_predictions(shown[:0], predictor)
    (pictures, titles, _, count), (whole, *_), (nothing, *_) = rows
    assert nothing == []
    assert count == 1 and titles == ["a_1", "truth", "prediction", "pixels 120"]
    assert all(picture.shape == image.shape for picture in whole)
    assert {picture.shape for picture in pictures} == {(456, 512, 3)}
    white = np.argwhere((pictures[3] == 255).all(2))
    assert 0 < white[:, 0].min() < white[:, 0].max() < 455 and len(white) < 200
    assert (whole[3] != 255).any(2).all()


# ---- what was chosen is what is scored


@pytest.fixture
def chosen(nb, start):
    """A function that trains on twelve tiles, and chooses: (choice, run, split, session)."""

    def make(**changes):
        run, go = start(epochs=1, **changes)
        go()
        tiles = nb.find_scenes(nb.inspect_dataset(run.config)[0], run.config.group_by)
        parts, how = nb.split_tiles(tiles, run.config)
        tile_set = nb.TileSet(run.config, tiles, nb.pd.DataFrame())
        split = nb.Split(run.config, tile_set, parts, how)
        session = nb.Session(run.config, CPU, "fp32", False)
        run.data["ground_resolution"] = 0.3
        return nb.choose_on_validation(run, split, session), run, split, session

    return make


def test_a_wall_depth_is_chosen_anew_and_written_for_the_best_model_alone(
    nb, chosen, monkeypatch, tmp_path
):
    choice, run, split, session = chosen()
    (file,) = choice.files
    began_with, best = [], {"depth": 0.15}

    def tried(predictor, parts):
        began_with.append(predictor.wall_depth)
        return nb.pd.Series(abs(nb.np.array(nb.TRIED_DEPTHS) - best["depth"]), nb.TRIED_DEPTHS) * -1

    monkeypatch.setattr(nb, "try_wall_depths", tried)
    for _ in range(2):  # the cell is run again
        again = nb.choose_on_validation(run, split, session)
        assert again.predictor.wall_depth == nb.load_checkpoint(file)["wall_depth"] == 0.15
    assert began_with == [nb.WALL_DEPTH] * 2  # what the file says by now does not count
    other = tmp_path / "other.pt"
    other.write_bytes(file.read_bytes())
    run.config = replace(run.config, ensemble=[str(other)])
    best["depth"] = 0.4
    words = replace(split, config=run.config), replace(session, config=run.config)
    together = nb.choose_on_validation(run, *words)
    assert together.predictor.wall_depth == 0.4 and len(together.predictor.models) == 2
    assert nb.load_checkpoint(file)["wall_depth"] == 0.15


@pytest.mark.parametrize(
    ("wanted", "judged", "used"),
    [(True, "few", "few"), ("few", True, "few"), (True, False, False), (False, True, False)],
)
def test_a_model_is_used_with_no_more_views_than_it_was_judged_with(
    nb, predictor, wanted, judged, used
):
    start = predictor(Lopsided())
    start = replace(start, config=replace(start.config, tta=wanted))
    assert nb.apply_threshold_and_tta(start, {"tta": judged}, []).tta == used


def test_what_is_chosen_is_written_into_the_models_file(nb, chosen, capsys):
    choice, run, split, session = chosen(tta=True)
    said = capsys.readouterr().out
    assert list(choice.trials["tta"]) == [False, True] and set(choice.trials["models"]) == {1}
    assert choice.predictor.threshold == nb.best_threshold(choice.histogram)
    assert f"threshold {choice.predictor.threshold}, tta True" in said
    saved = nb.load_checkpoint(choice.files[0])
    written = saved["threshold"], saved["tta"], saved["ground_resolution"]
    assert written == (choice.predictor.threshold, True, 0.3)
    assert choice.config == run.config and choice.ground_resolution == 0.3
    assert choice.histogram.sum() == sum(tile.class_pixels.sum() for tile in split.parts["val"])
    again = nb.choose_on_validation(run, split, session)
    assert again.trials.equals(choice.trials)
    fixed = replace(session, config=replace(run.config, threshold=0.77))
    run.config = fixed.config
    split = replace(split, config=fixed.config)
    assert nb.choose_on_validation(run, split, fixed).predictor.threshold == 0.77
    assert nb.load_checkpoint(choice.files[0])["threshold"] == written[0]
    run.history = []
    with pytest.raises(ValueError, match="no epoch is finished yet: run section 10's cell again"):
        nb.choose_on_validation(run, split, fixed)


def test_only_the_chosen_model_is_scored(nb, chosen):
    """A better model that training has found since is not scored by another one's choice."""
    choice, run, split, session = chosen(tta=False)
    score = nb.score_test_set(choice)
    file = Path(run.config.save_dir, "metrics.json")
    assert json.loads(file.read_text()) == score.metrics
    assert score.metrics["tiles"] == len(score.tiles) == len(split.parts["test"])
    low, high = score.metrics["intervals"]["roof_iou"]
    line = f"{score.metrics['roof_iou']:.3f} ({low:.3f} to {high:.3f})"
    assert score.table.loc["roof_iou", "all classes"] == line
    line = score.table.loc["object_f1"]
    assert line["background"] == "" and line["rooftop"].startswith(
        f"{score.metrics['object_f1']['rooftop']:.3f} ("
    )
    before = file.read_bytes()
    for newer in ({"epoch": 2}, {"config": choice.checkpoint["config"] | {"seed": 1}}):
        content = choice.checkpoint | newer
        choice.files[0].write_bytes(nb.to_checkpoint_bytes(content))
        with pytest.raises(ValueError, match="newer best model: run section 12.3's cell again"):
            nb.score_test_set(choice)
    assert file.read_bytes() == before
    nb.score_test_set(nb.choose_on_validation(run, split, session))
