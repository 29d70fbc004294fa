"""Section 12: prediction, counts, threshold, scorecard, intervals, label suspects."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from torch import nn

CPU = torch.device("cpu")


def blobs(seed, shape=(60, 90), share=0.3):
    """A random mask of rounded pieces, and the same a little changed."""
    rng = np.random.default_rng(seed)
    field, other = (ndimage.gaussian_filter(rng.standard_normal(shape), 4) for _ in range(2))
    near = field + 0.35 * other
    return field > np.quantile(field, 1 - share), near > np.quantile(near, 1 - share)


# ---- boundaries and objects


@pytest.mark.parametrize("shape", [(60, 90), (256, 256), (5, 300), (1, 1)])
def test_boundary_is_what_its_authors_define(nb, shape):
    """Within 2 % of the diagonal of the outline, the picture's edge included: distances by SciPy."""
    true, predicted = blobs(1, shape)
    for size in (None, 64):  # of windows of 64 pixels, their diagonal counts
        width = max(1, round(0.02 * np.hypot(*(min(side, size or side) for side in shape))))
        bands = []
        for mask in (true, predicted):
            depth = ndimage.distance_transform_cdt(np.pad(mask, 1), "chessboard")[1:-1, 1:-1]
            bands.append(mask & (depth <= width))
        assert np.array_equal(nb.boundary(true, width), bands[0])
        counts = (bands[0] & bands[1]).sum(), (bands[0] | bands[1]).sum()
        assert nb.boundary_counts(true, predicted, size) == counts


def test_boundary_counts_by_hand(nb):
    true = np.zeros((50, 50), bool)
    true[10:20, 10:20] = True  # the band is 1 pixel wide: an outline of 36 pixels
    assert nb.boundary_counts(true, true, None) == (36, 36)
    assert nb.boundary_counts(true, np.roll(true, 1, 1), None) == (
        18,
        54,
    )  # top and bottom rows share 9 each
    assert nb.boundary_counts(true, ~np.ones_like(true), None) == (0, 36)


def slow_matches(true, predicted):
    """Match pieces with the loops of the definition; pairs above 0.5 cannot conflict."""
    (ours, m), (theirs, n) = (ndimage.label(mask, np.ones((3, 3))) for mask in (true, predicted))
    matches = 0
    for i in range(1, m + 1):
        for j in range(1, n + 1):
            shared = ((ours == i) & (theirs == j)).sum()
            matches += shared > 0.5 * (((ours == i) | (theirs == j)).sum())
    return matches, m, n


@pytest.mark.parametrize("seed", range(12))
def test_objects_match_as_defined(nb, seed):
    true, predicted = blobs(seed)
    assert nb.object_counts(true, predicted) == slow_matches(true, predicted)


def test_objects_by_hand(nb):
    row = [[1, 1, 1, 1, 0, 1, 0, 0, 1]]
    assert nb.object_counts(np.array(row) > 0, np.array(row) > 0) == (3, 3, 3)
    halves = np.array([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]]) > 0
    true = np.array([[1, 1, 1, 1]]) > 0
    assert nb.object_counts(true, np.array([[1, 1, 0, 0]]) > 0) == (
        1,
        1,
        1,
    )  # exactly 0.5 is a match
    assert nb.object_counts(true, np.array([[1, 0, 0, 1]]) > 0) == (0, 1, 2)
    assert nb.object_counts(halves, ~halves & False) == (0, 2, 0)
    assert nb.object_counts(np.eye(3) > 0, np.eye(3) > 0) == (1, 1, 1)  # corners connect


def test_a_piece_has_one_partner_at_most(nb):
    true = np.zeros((4, 9), bool)
    true[:2, :4] = True
    assert nb.object_counts(true, true | np.roll(true, 2, 0)) == (
        1,
        1,
        1,
    )  # twice as large: IoU 0.5
    two = true | np.roll(true, 5, 1)
    assert nb.object_counts(two, two | (np.arange(9) < 5)) == (
        0,
        2,
        1,
    )  # two roofs predicted as one


# ---- the scorecard


def score_of(nb, label, roof, threshold=0.5):
    """The counts of a tile from its label and the probability of roof."""
    return nb.score_tile(
        label.astype(np.uint8), np.stack([1 - roof, roof]).astype(np.float32), threshold
    )


def test_scorecard_by_hand(nb):
    label = np.zeros((10, 10), np.uint8)
    label[2:6, 2:6] = 1
    roof = np.zeros((10, 10))
    roof[2:6, 4:8] = 0.9  # half of the 16 pixels found, 8 false alarms
    card = nb.scorecard(score_of(nb, label, roof), ["background", "rooftop"])
    assert card["iou"]["rooftop"] == 8 / 24 and card["iou"]["background"] == 76 / 92
    assert card["precision"]["rooftop"] == card["recall"]["rooftop"] == card["f1"]["rooftop"] == 0.5
    assert card["pixel_accuracy"] == 84 / 100 and card["roof_area_error"] == 0
    assert card["object_f1"] == {"rooftop": 0.0}  # IoU 1/3
    assert card["boundary_iou"]["rooftop"] == 4 / 20  # outlines of 12 pixels share two ends of 2


def test_ignored_pixels_count_nowhere(nb):
    label, roof = (mask.astype(float) for mask in blobs(3))
    whole = score_of(nb, label, roof)
    ignored = label.copy()
    ignored[:, :30] = nb.IGNORE_INDEX
    part = score_of(nb, ignored, roof)
    changed = roof.copy()
    changed[:, :30] = 1 - changed[:, :30]
    for counts, others in zip(part, score_of(nb, ignored, changed), strict=True):
        assert np.array_equal(counts, others)
    assert part.confusion.sum() == part.histogram.sum() == 60 * 60 < whole.confusion.sum()


def test_classes_that_do_not_occur_are_left_out(nb):
    empty = score_of(nb, np.zeros((8, 8)), np.zeros((8, 8)))
    card = nb.scorecard(empty, ["background", "rooftop"])
    assert (
        card["iou"] == {"background": 1.0}
        and card["object_f1"] == {}
        and card["roof_area_error"] is None
    )
    assert card["boundary_iou"] == {"background": 1.0} and card["miou"] == 1.0


def test_counts_of_a_set_are_added_before_they_are_divided(nb):
    tiles = [
        score_of(nb, *(mask.astype(float) for mask in blobs(seed, share=share)))
        for seed, share in ((1, 0.5), (2, 0.1))
    ]
    card = nb.scorecard(nb.add_up(tiles), ["background", "rooftop"])
    hits, union = (
        sum(of(tile.confusion) for tile in tiles)
        for of in (lambda c: c[1, 1], lambda c: c.sum() - c[0, 0])
    )
    assert card["iou"]["rooftop"] == pytest.approx(hits / union)
    alone = [nb.scorecard(tile, ["background", "rooftop"])["iou"]["rooftop"] for tile in tiles]
    assert card["iou"]["rooftop"] != pytest.approx(np.mean(alone), abs=1e-3)


def test_three_classes_are_scored_one_by_one(nb):
    rng = np.random.default_rng(0)
    label, predicted = rng.integers(0, 3, (2, 40, 40))
    probability = np.eye(3)[predicted].transpose(2, 0, 1).astype(np.float32)
    score = nb.score_tile(label.astype(np.uint8), probability, None)
    card = nb.scorecard(score, ["ground", "roof", "water"])
    for number, name in enumerate(["ground", "roof", "water"]):
        one, other = label == number, predicted == number
        assert card["iou"][name] == pytest.approx((one & other).sum() / (one | other).sum())
    assert set(card["object_f1"]) == {"roof", "water"}
    assert score.histogram[1].sum() == (label > 0).sum()


# ---- the threshold


@pytest.mark.parametrize("seed", range(4))
def test_threshold_from_the_histogram_is_the_best_of_all(nb, seed):
    rng = np.random.default_rng(seed)
    label, _ = blobs(seed)
    roof = np.clip(0.3 * label + rng.uniform(0, 0.6, label.shape), 0, 1)
    histogram = score_of(nb, label.astype(float), roof).histogram
    roof = roof.astype(np.float32)
    slow = [
        ((roof >= k / 100) & label).sum() / ((roof >= k / 100) | label).sum() for k in range(100)
    ]
    assert nb.iou_by_threshold(histogram) == pytest.approx(slow, abs=2e-3)
    chosen = nb.best_threshold(histogram)
    assert slow[round(100 * chosen)] == pytest.approx(max(slow[1:]), abs=2e-3)
    tile = score_of(nb, label.astype(float), roof, chosen)
    assert nb.scorecard(tile, ["b", "r"])["iou"]["r"] == pytest.approx(max(slow[1:]), abs=2e-3)


def test_of_equally_good_thresholds_the_middle_one(nb):
    histogram = np.zeros((2, 100), int)
    histogram[0, 5], histogram[1, 95] = 10, 10
    assert nb.best_threshold(histogram) == 0.5


# ---- prediction


class Lopsided(nn.Module):
    """A model that sees directions: logits from the gradient along x."""

    def __init__(self, gain=1.0):
        super().__init__()
        self.gain = gain

    def forward(self, images):
        slope = self.gain * (images - images.roll(1, 3)).mean(1)
        return torch.stack([-slope, slope], 1)


def test_views_are_turned_back_before_they_are_averaged(nb):
    images = torch.randn(2, 3, 16, 16)
    averaged = nb.Predictor([Lopsided()], CPU, "fp32", tta=True)
    slow = 0
    for turns in range(4):
        for axes in ((), (3,)):
            view = images.rot90(turns, (2, 3)).flip(axes)
            slow = slow + Lopsided()(view).softmax(1).flip(axes).rot90(-turns, (2, 3)) / 8
    assert torch.allclose(averaged(images), slow, atol=1e-6)
    assert torch.allclose(
        averaged(images.rot90(1, (2, 3))), averaged(images).rot90(1, (2, 3)), atol=1e-6
    )
    plain = nb.Predictor([Lopsided()], CPU, "fp32")
    assert torch.allclose(plain(images), Lopsided()(images).softmax(1))
    assert not torch.allclose(plain(images), averaged(images), atol=1e-2)


def test_an_ensemble_averages_probabilities(nb):
    images = torch.randn(1, 3, 16, 16)
    models = [Lopsided(1), Lopsided(4)]
    alone = [nb.Predictor([model], CPU, "fp32")(images) for model in models]
    assert torch.allclose(nb.Predictor(models, CPU, "fp32")(images), sum(alone) / 2)


def test_a_checkpoint_of_other_classes_is_refused(nb, settings):
    config = nb.make_config(**settings)
    run = nb.start_run(config, CPU, "fp32")
    run.history.append({"epoch": 1, "val_loss": 1.0, "val_iou": 0.5})
    nb.save_epoch(run, config, {}, {"iou"})
    file = str(Path(config.save_dir) / nb.BEST_FILES["iou"])
    model, _ = nb.load_model(Path(file), CPU, {"class_names": config.class_names})
    assert not model.training
    with pytest.raises(
        ValueError, match=r"best_model_iou.pt has class_names = .*rooftop.* this run .*solar panel"
    ):
        nb.load_model(Path(file), CPU, {"class_names": ["background", "solar panel"]})


# ---- intervals


def test_intervals_agree_with_scipy(nb, settings):
    """Tiles of one size: pixel accuracy is a mean over tiles, which SciPy can bootstrap as well."""
    rng = np.random.default_rng(1)
    tiles = [
        score_of(nb, np.zeros((10, 10)), (rng.random((10, 10)) < q).astype(float))
        for q in rng.uniform(0, 0.6, 40)
    ]
    accuracies = [tile.confusion[0, 0] / 100 for tile in tiles]
    found = nb.intervals(tiles, [0] * 40, nb.make_config(**settings))["pixel_accuracy"]
    expected = stats.bootstrap(
        [accuracies], np.mean, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert (
        found == pytest.approx(list(expected), abs=0.01)
        and found[0] < np.mean(accuracies) < found[1]
    )


def test_intervals_are_drawn_over_scenes_where_there_are_ten(nb, settings):
    """Four like tiles in each of ten scenes: tiles would pretend to know twice as much."""
    rng, config = np.random.default_rng(1), nb.make_config(**settings)
    shares = np.repeat(rng.uniform(0, 0.6, 10), 4)
    tiles = [
        score_of(nb, np.zeros((10, 10)), (np.arange(100).reshape(10, 10) < 100 * q).astype(float))
        for q in shares
    ]
    wide = nb.intervals(tiles, np.repeat(range(10), 4).tolist(), config)["pixel_accuracy"]
    narrow = nb.intervals(tiles, np.repeat(range(5), 8).tolist(), config)[
        "pixel_accuracy"
    ]  # five: over tiles
    assert np.diff(wide) > 1.6 * np.diff(narrow)
    assert wide == nb.intervals(tiles, np.repeat(range(10), 4).tolist(), config)["pixel_accuracy"]


def test_intervals_have_the_names_of_the_scorecard(nb, settings):
    config = nb.make_config(**settings)
    tiles = [score_of(nb, *(mask.astype(float) for mask in blobs(seed))) for seed in range(6)]
    card, ends = (
        nb.scorecard(nb.add_up(tiles), config.class_names),
        nb.intervals(tiles, range(6), config),
    )
    for metric, value in card.items():
        pairs = (
            [(value[name], ends[metric][name]) for name in value]
            if isinstance(value, dict)
            else [(value, ends[metric])]
        )
        assert all(low <= figure <= high for figure, (low, high) in pairs)
    roofless = [score_of(nb, np.zeros((8, 8)), np.zeros((8, 8)))] * 4
    assert "roof_area_error" not in nb.intervals(roofless, range(4), config)


# ---- label suspects


def test_suspects_are_whole_objects_over_which_a_sure_model_and_the_label_disagree(nb):
    label, roof = np.zeros((60, 60), np.uint8), np.full((60, 60), 0.02)
    label[5:15, 5:15] = 1  # labelled, and the model is sure there is none
    roof[30:40, 30:42] = 0.97  # claimed with certainty, not in the label
    label[45:55, 5:15], roof[45:55, 5:15] = 1, 0.95  # agreed
    roof[5:15, 40:50] = 0.7  # claimed without certainty
    roof[55:58, 50:53] = 0.99  # too small
    label[20:24, 40:55], roof[20:24, 40:55] = nb.IGNORE_INDEX, 0.99
    found = sorted(nb.find_suspects("tile", label, np.stack([1 - roof, roof])))
    assert [(s.pixels, s.box) for s in found] == [(100, (5, 5, 10, 10)), (120, (30, 30, 12, 10))]
    assert ["no roof here?", "roof missing in the label?"] == [s.what for s in found]
    assert [s.probability for s in found] == pytest.approx([0.02, 0.97])
