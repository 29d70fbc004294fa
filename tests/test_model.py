"""Model, weights, loss, metrics, training."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from sklearn.metrics import accuracy_score, f1_score, jaccard_score, precision_score, recall_score
from torch import nn

CPU = torch.device("cpu")


# ---- model and weights


def test_default_model_has_the_true_number_of_parameters(nb, defaults):
    model = nb.build_model(*(defaults[name] for name in ("architecture", "encoder_name", "num_classes")))
    assert sum(p.numel() for p in model.parameters()) == 26_677_842
    with torch.no_grad():
        assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 2, 64, 64)


@pytest.fixture(scope="module")
def resnet50():
    """A state dict as torchvision makes it, its classifier included."""
    torch.manual_seed(1)
    return torchvision.models.resnet50().state_dict()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_from_a_local_file(nb, tmp_path, resnet50, suffix):
    path = str(tmp_path / f"resnet50{suffix}")
    (save_file if suffix == ".safetensors" else torch.save)(resnet50, path)
    model = nb.build_model("DeepLabV3Plus", "resnet50", 2)
    assert not torch.equal(model.encoder.layer4[2].conv3.weight, resnet50["layer4.2.conv3.weight"])
    assert nb.load_encoder_weights(model, "resnet50", path) == path
    own = model.encoder.state_dict()
    assert all(torch.equal(own[name], value) for name, value in resnet50.items() if not name.startswith("fc."))


def test_weights_of_another_encoder_are_refused(nb, tmp_path, resnet50):
    path = str(tmp_path / "resnet50.pth")
    torch.save(resnet50, path)
    model = nb.build_model("DeepLabV3Plus", "resnet18", 2)
    with pytest.raises(ValueError, match=r"resnet50\.pth.*does not fit resnet18"):
        nb.load_encoder_weights(model, "resnet18", path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_weights_file_that_is_none_is_named(nb, tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(b"this is not a weights file")
    with pytest.raises(ValueError, match=f"weights{suffix}"):
        nb.load_encoder_weights(nb.build_model("DeepLabV3Plus", "resnet18", 2), "resnet18", str(path))


def test_without_the_hub_random_weights_and_a_loud_warning(nb, capsys):
    """Real: the hub's client runs with no cache and in offline mode."""
    model = nb.build_model("DeepLabV3Plus", "resnet18", 2)
    before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    loaded = nb.load_encoder_weights(model, "resnet18", "imagenet")
    if loaded == "imagenet":
        pytest.skip("the hub's cache on this machine holds the weights")
    assert loaded == "random (imagenet could not be fetched)"
    assert "WARNING" in (text := capsys.readouterr().out) and "RANDOM" in text
    assert all(torch.equal(value, before[name]) for name, value in model.encoder.state_dict().items())


# ---- loss


def logits_for(label, sure=20.0, classes=2):
    return sure * nn.functional.one_hot(label, classes).permute(0, 3, 1, 2).float()


@pytest.fixture
def half():
    label = torch.zeros(2, 16, 16, dtype=torch.long)
    label[:, :8] = 1
    return label


def test_loss_of_perfect_and_inverted_masks(nb, half):
    loss = nb.CombinedLoss(0.6, 0.4)
    assert loss(logits_for(half), half).item() == pytest.approx(0, abs=1e-6)
    assert loss(logits_for(1 - half), half).item() == pytest.approx(0.6 * 20 + 0.4, rel=1e-5)
    assert nb.CombinedLoss(1, 0)(logits_for(1 - half), half).item() == pytest.approx(20, rel=1e-5)
    assert nb.CombinedLoss(0, 1)(logits_for(1 - half), half).item() == pytest.approx(1, rel=1e-5)


def test_loss_on_empty_masks_is_finite_and_minds_false_alarms(nb, half):
    loss, empty = nb.CombinedLoss(0.6, 0.4), torch.zeros_like(half)
    assert loss(logits_for(empty), empty).item() == pytest.approx(0, abs=1e-6)
    assert loss(logits_for(half), empty).item() > 5


def test_loss_of_a_batch_without_any_counted_pixel_is_zero(nb):
    logits = torch.randn(2, 2, 8, 8, requires_grad=True)
    loss = nb.CombinedLoss(0.6, 0.4)(logits, torch.full((2, 8, 8), nb.IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().sum() == 0


def test_loss_is_fp32_and_passes_over_ignored_pixels(nb, half):
    loss, logits = nb.CombinedLoss(0.6, 0.4), torch.randn(2, 2, 16, 16)
    assert loss(logits.bfloat16(), half).dtype == torch.float32
    hidden = half.clone()
    hidden[:, :, 8:] = nb.IGNORE_INDEX
    assert loss(logits, hidden).item() == pytest.approx(loss(logits[..., :8], half[..., :8]).item(), rel=1e-5)


# ---- metrics


def scored(nb, truth, guess, names):
    return nb.scores(nb.confusion_matrix(torch.tensor(truth), torch.tensor(guess), len(names)), names)


@pytest.mark.parametrize("classes", [2, 3])
def test_metrics_agree_with_scikit_learn(nb, classes):
    rng = np.random.default_rng(classes)
    truth, guess = rng.integers(0, classes, (2, 5000))
    names = [f"c{i}" for i in range(classes)]
    result = scored(nb, truth, guess, names)
    assert result["pixel_accuracy"] == pytest.approx(accuracy_score(truth, guess))
    functions = {"iou": jaccard_score, "precision": precision_score, "recall": recall_score, "f1": f1_score}
    for name, function in functions.items():
        assert list(result[name].values()) == pytest.approx(function(truth, guess, average=None))
    assert result["miou"] == pytest.approx(jaccard_score(truth, guess, average="macro"))


def test_metrics_by_hand(nb):
    result = scored(nb, [0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0], ["background", "rooftop"])
    assert result["iou"] == pytest.approx({"background": 3 / 5, "rooftop": 1 / 3})
    assert result["precision"]["rooftop"] == result["recall"]["rooftop"] == result["f1"]["rooftop"] == 1 / 2


def test_a_class_that_is_neither_there_nor_predicted_is_left_out(nb):
    result = scored(nb, [0, 0], [0, 0], ["background", "rooftop"])
    assert result["iou"] == {"background": 1.0} and result["miou"] == 1.0
    assert nb.roof_iou(result, ["background", "rooftop"]) is None


def test_a_false_alarm_or_a_miss_alone_scores_zero_and_not_nan(nb):
    for truth, guess in (([0, 0], [0, 1]), ([0, 1], [0, 0])):
        result = scored(nb, truth, guess, ["background", "rooftop"])
        assert [result[name]["rooftop"] for name in ("iou", "precision", "recall", "f1")] == [0, 0, 0, 0]


def test_ignored_pixels_do_not_count(nb):
    result = scored(nb, [0, 1, nb.IGNORE_INDEX], [0, 1, 0], ["background", "rooftop"])
    assert result["iou"] == {"background": 1.0, "rooftop": 1.0}


def test_counts_are_added_up_before_they_are_divided(nb):
    score = nb.RunningScore(["background", "rooftop"], CPU)
    empty, roof = torch.zeros(1, 4, 4, dtype=torch.long), torch.ones(1, 4, 4, dtype=torch.long)
    noisy = empty.clone()
    noisy[0, 0] = 1
    score.add(torch.tensor(1.0), logits_for(noisy), empty)  # 4 false alarms
    score.add(torch.tensor(2.0), logits_for(torch.cat([roof] * 3)), torch.cat([roof] * 3))  # 48 hits
    result = score.result()
    assert result["roof_iou"] == pytest.approx(48 / 52) and result["loss"] == pytest.approx((1 + 3 * 2) / 4)


def test_false_alarms_without_any_roof_give_no_roof_iou(nb):
    """Else a validation set without roofs would choose the first epoch with a false alarm."""
    score = nb.RunningScore(["background", "rooftop"], CPU)
    empty = torch.zeros(1, 4, 4, dtype=torch.long)
    score.add(torch.tensor(1.0), logits_for(1 - empty), empty)
    assert score.result()["roof_iou"] is None


# ---- training


@pytest.fixture
def prepared(nb, settings, write_pair):
    """Config, run, data sets and split names on eight small tiles."""
    for i in range(8):
        write_pair(f"s{i}_{i}")
    config = nb.make_config(**settings | {"split": [0.5, 0.25, 0.25], "augmentation": "none"})
    tiles = nb.find_scenes(nb.verify_dataset(config)[0], config.group_by)
    split, _ = nb.split_by_scene(tiles, config)
    sets = {part: nb.RooftopDataset(split[part], config, part == "train") for part in nb.SPLITS}
    names = {p: [tile.name for tile in split[p]] for p in nb.SPLITS}
    return config, nb.start_run(config, CPU, "fp32"), sets, {"split": names, "files": ""}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_batch_can_be_learned_by_heart(nb, prepared, precision):
    config, _, sets, _ = prepared
    run, loss_fn = nb.start_run(config, CPU, precision), nb.CombinedLoss(0.6, 0.4)
    first = nb.train_one_epoch(run, nb.make_loader(sets["train"], CPU), loss_fn, config)
    for _ in range(40):
        last = nb.train_one_epoch(run, nb.make_loader(sets["train"], CPU), loss_fn, config)
    assert last["loss"] < 0.15 * first["loss"] and last["roof_iou"] > 0.9


@pytest.mark.parametrize(
    ("architecture", "encoder"),
    [("DeepLabV3Plus", "mit_b0"), ("DeepLabV3Plus", "efficientnet-b0"), ("Unet", "mobilenet_v2")],
)
def test_other_models_train_and_load(nb, prepared, architecture, encoder):
    config, _, sets, names = prepared
    config = replace(config, architecture=architecture, encoder_name=encoder, epochs=1)
    run = nb.start_run(config, CPU, "bf16")
    history = nb.fit(run, sets, nb.CombinedLoss(0.6, 0.4), config, names)
    assert math.isfinite(history[0]["train_loss"])
    model, _ = nb.load_model(Path(config.save_dir) / nb.LAST_FILE, CPU, {})
    assert type(model).__name__ == architecture


def test_fp16_trains_with_a_gradient_scaler(nb, prepared):
    config, _, sets, _ = prepared
    run = nb.start_run(config, CPU, "fp16")
    before = run.model.segmentation_head[0].weight.detach().clone()
    assert run.scaler.is_enabled() and run.scaler.get_scale() > 1
    for _ in range(3):
        result = nb.train_one_epoch(run, nb.make_loader(sets["train"], CPU), nb.CombinedLoss(0.6, 0.4), config)
    assert math.isfinite(result["loss"]) and not torch.equal(before, run.model.segmentation_head[0].weight)


def test_gradients_are_clipped(nb, prepared, monkeypatch):
    config, run, sets, _ = prepared
    norms = []
    step = run.optimizer.step

    def spy(*args, **kwargs):
        norms.append(nn.utils.get_total_norm([p.grad for p in run.model.parameters()]).item())
        return step(*args, **kwargs)

    monkeypatch.setattr(run.optimizer, "step", spy)
    nb.train_one_epoch(
        run, nb.make_loader(sets["train"], CPU), nb.CombinedLoss(600, 400), replace(config, gradient_clip=0.5)
    )
    assert norms and all(norm <= 0.501 for norm in norms)


def test_evaluation_changes_nothing(nb, prepared):
    config, run, sets, _ = prepared
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    loss_fn = nb.CombinedLoss(0.6, 0.4)
    results = [nb.evaluate(run, nb.make_loader(sets["val"], CPU), loss_fn, config) for _ in range(2)]
    assert results[0] == results[1]
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())


def test_same_seed_same_training(nb, prepared):
    config, _, sets, _ = prepared
    weights = []
    for _ in range(2):
        run = nb.start_run(config, CPU, "fp32")
        nb.train_one_epoch(run, nb.make_loader(sets["train"], CPU), nb.CombinedLoss(0.6, 0.4), config)
        weights.append(run.model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.fixture
def scripted(nb, prepared, monkeypatch):
    """Run fit() on given validation results instead of real epochs; return history and learning rates."""
    config, run, sets, names = prepared

    def play(losses, ious, **changes):
        results = iter(zip(losses, ious, strict=True))
        same = {"pixel_accuracy": 0.5, "miou": 0.5}

        def validate(*_):
            loss, iou = next(results)
            return same | {"loss": loss, "roof_iou": iou}

        monkeypatch.setattr(nb, "train_one_epoch", lambda *_: same | {"loss": 1.0, "roof_iou": 0.5, "skipped": 0})
        monkeypatch.setattr(nb, "evaluate", validate)
        return nb.fit(run, sets, None, replace(config, epochs=len(losses), **changes), names)

    return play


def test_early_stopping_waits_for_both_loss_and_iou(scripted):
    losses = [1.0, 0.9, 0.95, 0.95, 0.95, 0.95, 0.95, 0.95]
    ious = [0.1, 0.2, 0.2, 0.3, 0.3, 0.3, 0.3, 0.3]  # better once more in epoch 4
    assert len(scripted(losses, ious, early_stopping_patience=3)) == 7


def test_training_goes_on_while_loss_alone_gets_better(scripted):
    assert len(scripted([1 - i / 10 for i in range(8)], [0.5] * 8, early_stopping_patience=2)) == 8


def test_no_roof_in_validation_leaves_the_loss_to_judge(nb, scripted, settings):
    history = scripted([1.0, 0.8, 0.9, 0.9], [None] * 4, early_stopping_patience=2)
    assert len(history) == 4 and nb.best_epoch(history, "iou") == 0 and nb.best_epoch(history, "loss") == 2
    assert not (Path(settings["save_dir"]) / nb.BEST_FILES["iou"]).exists()
    assert (Path(settings["save_dir"]) / nb.BEST_FILES["loss"]).exists()


def test_learning_rate_falls_on_a_plateau(scripted):
    history = scripted([0.5] * 14, [0.1] * 14, early_stopping_patience=50)
    assert [row["learning_rate"] for row in history] == [1e-3] * 7 + [5e-4] * 6 + [2.5e-4]


def test_learning_rate_stops_at_its_floor(nb, prepared):
    run = nb.start_run(replace(prepared[0], lr_patience=0, min_lr=3e-4), CPU, "fp32")
    rates = []
    for _ in range(5):
        run.scheduler.step(1.0)
        rates.append(run.optimizer.param_groups[0]["lr"])
    assert rates == [1e-3, 5e-4, 3e-4, 3e-4, 3e-4]


def test_best_files_are_of_their_epochs(nb, scripted, settings):
    scripted([0.9, 0.5, 0.7, 0.8], [0.1, 0.2, 0.6, 0.4], early_stopping_patience=9)
    saved = {
        kind: torch.load(Path(settings["save_dir"]) / nb.BEST_FILES[kind], weights_only=True)
        for kind in ("loss", "iou")
    }
    assert (saved["loss"]["epoch"], saved["iou"]["epoch"]) == (2, 3)
    assert saved["iou"]["metrics"]["val_iou"] == 0.6


def test_checkpoint_round_trip_needs_no_network(nb, prepared, monkeypatch):
    config, run, sets, names = prepared
    config = replace(config, encoder_weights="imagenet")
    history = nb.fit(run, sets, nb.CombinedLoss(0.6, 0.4), config, names)
    monkeypatch.setattr(
        "segmentation_models_pytorch.encoders.hf_hub_download", lambda *a, **k: pytest.fail("asked the hub")
    )
    path = Path(config.save_dir) / nb.LAST_FILE
    model, saved = nb.load_model(path, CPU, {})
    own = run.model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
    assert not model.training
    keys = {
        "format",
        "model",
        "config",
        "class_names",
        "epoch",
        "metrics",
        "precision",
        "split",
        "files",
        "history",
        "encoder_weights",
        "versions",
    }
    assert keys | {"optimizer", "scheduler", "scaler"} == set(saved)
    assert saved["config"] == json.loads(json.dumps(nb.asdict(config))) and saved["history"] == history
    assert saved["split"] == names["split"] and saved["encoder_weights"] == "random" and saved["epoch"] == 2
    assert not list(Path(config.save_dir).glob("*.part"))


def test_memory_estimate_grows_with_the_batch(nb, settings):
    model = nb.build_model("DeepLabV3Plus", "resnet18", 2)
    small, large = (nb.training_memory(model, CPU, "fp32", batch, 64) for batch in (2, 8))
    weights = nb.BYTES_A_WEIGHT * sum(p.numel() for p in model.parameters())
    assert large - weights == pytest.approx(4 * (small - weights)) and small > weights


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_estimate_is_near_what_a_step_takes(nb, precision):
    """Measured: the memory held between forward and backward, by the allocations that PyTorch reports."""
    model = nb.build_model("DeepLabV3Plus", "resnet18", 2)
    images = torch.randn(4, 3, 128, 128).to(memory_format=torch.channels_last)
    with torch.profiler.profile(profile_memory=True) as profile, nb.autocast(CPU, precision):
        model(images).float().sum()
        logits = model(images)  # what the second forward holds is still held when the profile ends
    held = sum(event.self_cpu_memory_usage for event in profile.key_averages())
    optimizing = (18 if precision == "fp32" else 16) * sum(p.numel() for p in model.parameters())  # no copy in fp32
    estimate = nb.training_memory(model, CPU, precision, 4, 128) - optimizing
    assert logits.requires_grad and 0.8 < estimate / held < 1.25
