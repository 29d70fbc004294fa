"""Model, weights, loss, metrics, training."""

import copy
import gc
import json
import math
import socketserver
import subprocess
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from kernels import same
from safetensors.torch import save_file
from sklearn.metrics import accuracy_score, f1_score, jaccard_score, precision_score, recall_score
from torch import nn

CPU = torch.device("cpu")


# ---- model and weights


def test_default_model_has_the_true_number_of_parameters(nb, defaults):
    for weight, parameters, channels in ((0.0, 26_677_842, 2), (0.5, 26_677_842 + 257, 3)):
        model = nb.build_model(nb.make_config(**defaults | {"outline_weight": weight}))
        assert sum(p.numel() for p in model.parameters()) == parameters
        with torch.no_grad():
            assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, channels, 64, 64)


@pytest.fixture(scope="module")
def resnet50():
    """A state dict as torchvision makes it, its classifier included."""
    torch.manual_seed(1)
    return torchvision.models.resnet50().state_dict()


@pytest.fixture
def untrained(nb, settings):
    """A function that makes a model of an encoder, and the settings that name its weights."""

    def make(encoder, weights):
        config = nb.make_config(
            **settings | {"encoder_name": encoder, "encoder_weights": str(weights)}
        )
        return nb.build_model(config), config

    return make


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_from_a_local_file(nb, untrained, tmp_path, resnet50, suffix):
    path = str(tmp_path / f"resnet50{suffix}")
    (save_file if suffix == ".safetensors" else torch.save)(resnet50, path)
    model, config = untrained("resnet50", path)
    assert not torch.equal(model.encoder.layer4[2].conv3.weight, resnet50["layer4.2.conv3.weight"])
    assert nb.load_encoder_weights(model, config) == path
    own = model.encoder.state_dict()
    named = [name for name in resnet50 if not name.startswith("fc.")]
    assert all(torch.equal(own[name], resnet50[name]) for name in named)


def test_weights_of_another_encoder_are_refused(nb, untrained, tmp_path, resnet50):
    path = str(tmp_path / "resnet50.pth")
    torch.save(resnet50, path)
    with pytest.raises(ValueError, match=r"resnet50\.pth.*does not fit resnet18"):
        nb.load_encoder_weights(*untrained("resnet18", path))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_weights_file_that_is_none_is_named(nb, untrained, tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(b"this is not a weights file")
    with pytest.raises(ValueError, match=f"weights{suffix}"):
        nb.load_encoder_weights(*untrained("resnet18", path))


def test_without_the_hub_random_weights_and_a_loud_warning(nb, untrained, capsys):
    """Real: the hub's client runs with no cache and in offline mode."""
    model, config = untrained("resnet18", "imagenet")
    before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    loaded = nb.load_encoder_weights(model, config)
    if loaded == "imagenet":
        pytest.skip("the hub's cache on this machine holds the weights")
    assert loaded == "random (imagenet could not be fetched)"
    assert "WARNING" in (text := capsys.readouterr().out) and "RANDOM" in text
    assert all(
        torch.equal(value, before[name]) for name, value in model.encoder.state_dict().items()
    )


def test_a_hub_that_does_not_answer_is_asked_once(nb, untrained, monkeypatch, tmp_path):
    """Real: a server that hangs up on every caller, and an empty cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    calls = []

    class HangsUp(socketserver.BaseRequestHandler):
        def handle(self):
            calls.append(1)

    with socketserver.TCPServer(("127.0.0.1", 0), HangsUp) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(nb.HUB, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setattr(nb, "OFFLINE", False)
        assert "could not be fetched" in nb.load_encoder_weights(*untrained("resnet18", "imagenet"))
        server.shutdown()
    assert len(calls) == 1 and nb.HUB.HF_HUB_OFFLINE


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
    left = loss(logits[..., :8], half[..., :8].contiguous())
    assert loss(logits, hidden).item() == pytest.approx(left.item(), rel=1e-5)


# ---- metrics


def scored(nb, truth, guess, classes=2):
    return nb.pixel_metrics(nb.count_pixels(torch.tensor(truth), torch.tensor(guess), classes))


@pytest.mark.parametrize("classes", [2, 3])
def test_metrics_agree_with_scikit_learn(nb, classes):
    rng = np.random.default_rng(classes)
    truth, guess = rng.integers(0, classes, (2, 5000))
    result = scored(nb, truth, guess, classes)
    assert result["pixel_accuracy"] == pytest.approx(accuracy_score(truth, guess))
    functions = {
        "iou": jaccard_score,
        "precision": precision_score,
        "recall": recall_score,
        "f1": f1_score,
    }
    for name, function in functions.items():
        assert result[name] == pytest.approx(function(truth, guess, average=None))
    ious = jaccard_score(truth, guess, average=None)
    assert result["miou"] == pytest.approx(ious.mean())
    assert result["roof_iou"] == pytest.approx(ious[1:].mean())


def test_metrics_by_hand(nb):
    result = scored(nb, [0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0])
    assert result["iou"] == pytest.approx([3 / 5, 1 / 3])
    assert [result[name][1] for name in ("precision", "recall", "f1")] == [1 / 2, 1 / 2, 1 / 2]


def test_a_class_that_is_neither_there_nor_predicted_is_left_out(nb):
    result = scored(nb, [0, 0], [0, 0])
    assert result["iou"] == pytest.approx([1, math.nan], nan_ok=True) and result["miou"] == 1
    assert math.isnan(result["roof_iou"])


def test_a_false_alarm_or_a_miss_alone_scores_zero_and_not_nan(nb):
    for truth, guess in (([0, 0], [0, 1]), ([0, 1], [0, 0])):
        result = scored(nb, truth, guess)
        assert [result[name][1] for name in ("iou", "precision", "recall", "f1")] == [0, 0, 0, 0]


def test_ignored_pixels_do_not_count(nb):
    result = scored(nb, [0, 1, nb.IGNORE_INDEX], [0, 1, 0])
    assert result["iou"].tolist() == [1, 1]


def judged(nb, batches, loss_fn):
    """What one_pass says of batches of logits and labels, as if a model had given the logits."""
    run = SimpleNamespace(model=nn.Identity(), device=CPU, precision="fp32", history=[])
    run.ema, run.statistics = run.model, torch.zeros(0)
    run.config = SimpleNamespace(num_classes=2)
    data = type("Data", (list,), {"train": False})(
        label for _, labels in batches for label in labels
    )
    triples = [(logits, labels, labels) for logits, labels in batches]
    loader = type("Loader", (list,), {"dataset": data})(triples)
    return nb.one_pass(run, loader, loss_fn)


def test_counts_are_added_up_before_they_are_divided(nb):
    empty = torch.zeros(1, 4, 4, dtype=torch.long)
    noisy, roofs = empty.clone(), torch.ones(3, 4, 4, dtype=torch.long)
    noisy[0, 0] = 1
    batches = [(logits_for(noisy), empty), (logits_for(roofs), roofs)]  # 4 false alarms, 48 hits
    result, _ = judged(nb, batches, lambda logits, *_: torch.tensor(1.0 + (len(logits) == 3)))
    assert result["iou"] == pytest.approx(48 / 52)
    assert result["loss"] == pytest.approx((1 + 3 * 2) / 4)


def test_false_alarms_without_any_roof_give_no_roof_iou(nb):
    """Else a validation set without roofs would choose the first epoch with a false alarm."""
    empty = torch.zeros(1, 4, 4, dtype=torch.long)
    result, _ = judged(nb, [(logits_for(1 - empty), empty)], nb.CombinedLoss(0.6, 0.4))
    assert math.isnan(result["iou"]) and math.isfinite(result["loss"])


def test_a_batch_whose_pixels_are_all_ignored_spoils_no_score(nb, half):
    batches = [(logits_for(half), half), (logits_for(half), torch.full_like(half, 255))]
    result, _ = judged(nb, batches, nb.CombinedLoss(0.6, 0.4))
    assert result["iou"] == 1 and result["loss"] == pytest.approx(0, abs=1e-6)


# ---- training


@pytest.fixture
def prepared(nb, settings, write_pair):
    """Config, split, and the loaders of training and validation, on eight small tiles."""
    for i in range(8):
        write_pair(f"s{i}_{i}")
    config = nb.make_config(**settings | {"split": [0.5, 0.25, 0.25], "augmentation": "none"})
    tiles = nb.find_scenes(nb.inspect_dataset(config)[0], config.group_by)
    split, _ = nb.split_tiles(tiles, config)
    sets = {part: nb.RooftopDataset(split[part], config, part == "train") for part in nb.SPLITS}
    return config, split, {part: nb.make_loader(sets[part], CPU) for part in ("train", "val")}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_batch_can_be_learned_by_heart(nb, prepared, precision):
    config, _, loaders = prepared
    run, loss_fn = nb.Run(config, CPU, precision, {}), nb.CombinedLoss(0.6, 0.4)
    first, _ = nb.one_pass(run, loaders["train"], loss_fn)
    for _ in range(40):
        last, skipped = nb.one_pass(run, loaders["train"], loss_fn)
    assert last["loss"] < 0.15 * first["loss"] and last["iou"] > 0.9 and skipped == 0


@pytest.mark.parametrize(
    ("architecture", "encoder"),
    [("DeepLabV3Plus", "mit_b0"), ("DeepLabV3Plus", "efficientnet-b0"), ("Unet", "mobilenet_v2")],
)
def test_other_models_train_and_load(nb, prepared, architecture, encoder):
    config, split, _ = prepared
    config = replace(config, architecture=architecture, encoder_name=encoder, epochs=1)
    history = nb.fit_with_recovery(nb.Run(config, CPU, "bf16", {}), split)
    assert math.isfinite(history[0]["train_loss"])
    model = nb.load_model(Path(config.save_dir) / nb.LAST_FILE, CPU)
    assert type(model).__name__ == architecture


@pytest.mark.parametrize(
    ("loaded", "generous"), [("imagenet", True), ("random (imagenet could not be fetched)", False)]
)
def test_colours_change_generously_where_weights_are_pretrained(
    nb, prepared, monkeypatch, loaded, generous
):
    config, split, _ = prepared
    run, grey = nb.Run(replace(config, augmentation="standard"), CPU, "fp32", {}), []
    run.config = replace(run.config, encoder_weights="imagenet")
    run.encoder_weights, one_pass = loaded, nb.one_pass

    def watched(run, loader, loss_fn):
        views = [loader.dataset.pixels(epoch, 0)[0] for epoch in range(40)]
        grey.append(any((view == view[..., :1]).all() for view in views))
        return one_pass(run, loader, loss_fn)

    monkeypatch.setattr(nb, "one_pass", watched)
    nb.fit_with_recovery(run, split)
    assert grey[0] == generous and not grey[1]  # training, validation


def test_fp16_trains_with_a_gradient_scaler(nb, prepared):
    config, _, loaders = prepared
    run = nb.Run(config, CPU, "fp16", {})
    before = run.model.segmentation_head[0].weight.detach().clone()
    assert run.scaler.is_enabled() and run.scaler.get_scale() > 1
    for _ in range(3):
        result, _ = nb.one_pass(run, loaders["train"], nb.CombinedLoss(0.6, 0.4))
    assert math.isfinite(result["loss"])
    assert not torch.equal(before, run.model.segmentation_head[0].weight)


def test_gradients_are_clipped(nb, prepared, monkeypatch):
    config, _, loaders = prepared
    run, norms = nb.Run(replace(config, gradient_clip=0.5), CPU, "fp32", {}), []
    step = run.optimizer.step

    def spy(*args, **kwargs):
        norms.append(nn.utils.get_total_norm([p.grad for p in run.model.parameters()]).item())
        return step(*args, **kwargs)

    monkeypatch.setattr(run.optimizer, "step", spy)
    nb.one_pass(run, loaders["train"], nb.CombinedLoss(600, 400))
    assert norms and all(norm <= 0.501 for norm in norms)


def test_the_model_is_the_late_average_of_what_is_learnt(nb, prepared, monkeypatch):
    config, split, _ = prepared
    run, seen, step = nb.Run(replace(config, batch_size=2), CPU, "fp32", {}), [], nb.train_step

    def watched(*words):
        taken = step(*words)
        state = run.model.state_dict().items()
        seen.append({k: v.double() for k, v in state if v.is_floating_point()})
        return taken

    monkeypatch.setattr(nb, "train_step", watched)
    nb.fit_with_recovery(run, split)
    total, state = len(seen), run.ema.state_dict()
    assert total > config.epochs  # the count of steps goes on from epoch to epoch
    epoch = total // len(run.history)
    assert epoch % 4  # an epoch's end averages fewer than four steps
    of_epoch = [*range(4, epoch, 4), epoch]
    used = [number * epoch + step for number in range(len(run.history)) for step in of_epoch]
    ends = list(zip([0, *used[:-1]], used, strict=True))
    for name in seen[0]:
        mean = sum((end**7 - start**7) / total**7 * seen[end - 1][name] for start, end in ends)
        torch.testing.assert_close(state[name].double(), mean, rtol=1e-4, atol=1e-5, msg=name)
    assert not same(seen[-1], {k: v.double() for k, v in state.items() if k in seen[-1]})


def test_what_is_kept_is_what_was_judged(nb, prepared):
    config, split, loaders = prepared
    config = replace(config, learning_rate=1e-2)  # steps that differ from their average
    run, loss_fn = nb.Run(config, CPU, "fp32", {}), nb.CombinedLoss(0.6, 0.4, config.outline_weight)
    history = nb.fit_with_recovery(run, split)
    for file in (*nb.BEST_FILES.values(), nb.LAST_FILE):
        path = Path(config.save_dir) / file
        again = nb.Run(config, CPU, "fp32", {})
        again.ema = nb.load_model(path, CPU)
        row = history[nb.load_checkpoint(path)["epoch"] - 1]
        judged, _ = nb.one_pass(again, loaders["val"], loss_fn)
        assert judged["loss"] == pytest.approx(row["val_loss"], rel=1e-5), file


def test_evaluation_changes_nothing(nb, prepared):
    config, _, loaders = prepared
    run, loss_fn = nb.Run(config, CPU, "fp32", {}), nb.CombinedLoss(0.6, 0.4, config.outline_weight)
    parts = run.ema, run.model
    before = [{k: v.clone() for k, v in part.state_dict().items()} for part in parts]
    results = [nb.one_pass(run, loaders["val"], loss_fn) for _ in range(2)]
    assert results[0] == results[1]
    assert same(before, [dict(part.state_dict()) for part in parts])


def test_same_seed_same_training(nb, prepared):
    config, _, loaders = prepared
    weights = []
    for _ in range(2):
        run = nb.Run(config, CPU, "fp32", {})
        nb.one_pass(run, loaders["train"], nb.CombinedLoss(0.6, 0.4))
        weights.append(run.ema.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.fixture
def scripted(nb, prepared, monkeypatch):
    """Run fit() on given validation results instead of real epochs; return the history."""
    config, split, _ = prepared

    def play(losses, ious, **changes):
        results = iter(zip(losses, ious, strict=True))
        same = {"pixel_accuracy": 0.5, "miou": 0.5}

        def one_pass(run, loader, loss_fn):
            loss, iou = (1.0, 0.5) if loader.dataset.train else next(results)
            return same | {"loss": loss, "iou": iou}, 0

        monkeypatch.setattr(nb, "one_pass", one_pass)
        config_of_run = replace(config, epochs=len(losses), **changes)
        return nb.fit_with_recovery(nb.Run(config_of_run, CPU, "fp32", {}), split)

    return play


def test_early_stopping_waits_for_both_loss_and_iou(scripted):
    losses = [1.0, 0.9, 0.95, 0.95, 0.95, 0.95, 0.95, 0.95]
    ious = [0.1, 0.2, 0.2, 0.3, 0.3, 0.3, 0.3, 0.3]  # better once more in epoch 4
    assert len(scripted(losses, ious, early_stopping_patience=3)) == 7


def test_training_goes_on_while_loss_alone_gets_better(scripted):
    assert len(scripted([1 - i / 10 for i in range(8)], [0.5] * 8, early_stopping_patience=2)) == 8


def test_no_roof_in_validation_leaves_the_loss_to_judge(nb, scripted, settings):
    history = scripted([1.0, 0.8, 0.9, 0.9], [math.nan] * 4, early_stopping_patience=2)
    assert len(history) == 4
    assert nb.best_epoch(history, "iou") == 0 and nb.best_epoch(history, "loss") == 2
    assert not (Path(settings["save_dir"]) / nb.BEST_FILES["iou"]).exists()
    assert (Path(settings["save_dir"]) / nb.BEST_FILES["loss"]).exists()


def test_learning_rate_falls_on_a_plateau(scripted):
    history = scripted([0.5] * 14, [0.1] * 14, early_stopping_patience=50)
    assert [row["learning_rate"] for row in history] == [1e-3] * 7 + [5e-4] * 6 + [2.5e-4]


def test_learning_rate_stops_at_its_floor(nb, prepared):
    run = nb.Run(replace(prepared[0], lr_patience=0, min_lr=3e-4), CPU, "fp32", {})
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
    config, split, _ = prepared
    names = {part: [tile.name for tile in split[part]] for part in nb.SPLITS}
    run = nb.Run(config, CPU, "fp32", {"split": names, "files": "x"})
    run.config = config = replace(config, encoder_weights="imagenet")
    history = nb.fit_with_recovery(run, split)
    monkeypatch.setattr(
        "segmentation_models_pytorch.encoders.hf_hub_download",
        lambda *a, **k: pytest.fail("asked the hub"),
    )
    path = Path(config.save_dir) / nb.LAST_FILE
    model, saved, own = nb.load_model(path, CPU), nb.load_checkpoint(path), run.ema.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
    assert not model.training
    keys = "format model learner config class_names epoch metrics precision split files history"
    keys += " encoder_weights versions optimizer scheduler scaler run"
    assert set(keys.split()) == set(saved)
    assert saved["config"] == json.loads(json.dumps(nb.asdict(config)))
    assert saved["history"] == history
    assert saved["split"] == names and saved["files"] == "x"
    assert saved["encoder_weights"] == "random" and saved["epoch"] == 2
    assert not list(Path(config.save_dir).glob("*.part"))


def test_a_placed_model_is_the_same_model(nb, settings):
    """Answers, gradients and names of weights; the far-reaching layers get channel after channel."""
    config = nb.make_config(**settings | {"image_size": 128})
    plain = nb.build_model(config).eval()  # no dropout
    placed = copy.deepcopy(
        nb.move_to_device(copy.deepcopy(plain), CPU)
    )  # as a run's average is made
    placed.load_state_dict(plain.state_dict())
    images, met = torch.randn(4, 3, 128, 128), []
    for layer in placed.decoder.aspp.modules():
        if isinstance(layer, nn.Conv2d) and layer.dilation[0] > 1:
            layer.register_forward_pre_hook(lambda _, x: met.append(x[0].is_contiguous()))
            met.append(layer.weight.stride(1) == 9)  # of one channel: strides tell, flags do not
    for model in (plain, placed):
        model(images.to(memory_format=torch.channels_last)).logsumexp(1).mean().backward()
    assert met == 6 * [True]
    ours, theirs = (dict(model.named_parameters()) for model in (plain, placed))
    assert list(ours) == list(theirs)
    for name in ours:
        assert torch.allclose(ours[name].grad, theirs[name].grad, atol=1e-5), name
    with torch.no_grad():
        assert torch.allclose(plain(images), placed(images), atol=1e-5)


# ---- what a training step takes


def test_memory_estimate_grows_with_the_batch(nb, settings):
    batches = {n: nb.make_config(**settings | {"batch_size": n}) for n in (4, 16)}
    tables = [nb.time_training_steps(config, CPU, ["fp32"]) for config in batches.values()]
    small, large = (2**30 * table.loc["fp32", "GiB per batch"] for table in tables)
    model = nb.build_model(batches[4])
    weights = nb.BYTES_PER_WEIGHT * sum(p.numel() for p in model.parameters())
    assert large - weights == pytest.approx(4 * (small - weights)) and small > weights


def test_a_precision_that_runs_out_of_memory_has_no_figures_and_the_others_do(
    nb, settings, monkeypatch
):
    autocast = nb.autocast

    def full(device, precision):
        if precision == "fp32":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return autocast(device, precision)

    monkeypatch.setattr(nb, "autocast", full)
    costs = nb.time_training_steps(nb.make_config(**settings), CPU, ["fp32", "bf16"])
    assert costs.loc["fp32"].isna().all() and (costs.loc["bf16"] > 0).all()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_estimate_is_near_what_a_step_takes(nb, settings, precision):
    """Measured: the memory held between forward and backward, as PyTorch reports allocations."""
    config = nb.make_config(**settings | {"image_size": 128})
    model, images = nb.build_model(config), torch.randn(config.batch_size, 3, 128, 128)
    images = images.to(memory_format=torch.channels_last)
    with torch.profiler.profile(profile_memory=True) as profile, nb.autocast(CPU, precision):
        model(images).float().sum()
        logits = model(images)  # what the second forward holds is still held when the profile ends
    held = sum(event.self_cpu_memory_usage for event in profile.key_averages())
    costs = nb.time_training_steps(config, CPU, [precision]).loc[precision]
    beside = nb.BYTES_PER_WEIGHT - 2 * (precision == "bf16")  # bytes a weight beside its copy
    weights = sum(p.numel() for p in model.parameters())
    estimate = 2**30 * costs["GiB per batch"] - beside * weights
    assert logits.requires_grad and 0.8 < estimate / held < 1.25 and costs["seconds per window"] > 0


@pytest.mark.parametrize("batch", [4, 8])
def test_section_3_counts_the_windows_that_an_epoch_has(nb, settings, write_pair, batch):
    """13 tiles, 7 to train and 3 each to judge: of those 7 a batch of 4 leaves three for later."""
    for i in range(13):
        write_pair(f"s{i}_1")
    config = nb.make_config(**settings | {"split": [0.54, 0.23, 0.23], "batch_size": batch})
    tiles = nb.find_scenes(nb.inspect_dataset(config)[0], config.group_by)
    split, _ = nb.split_tiles(tiles, config)
    train, val = (nb.RooftopDataset(split[p], config, p == "train") for p in ("train", "val"))
    seen = sum(len(images) for images, *_ in nb.make_loader(train, CPU)) + len(val) / 3
    assert nb.windows_per_epoch(tiles, config) == pytest.approx(seen, abs=0.2)
    assert seen == {4: 5, 8: 8}[batch]


def test_the_model_of_section_3_is_gone_when_its_costs_are_known(nb, settings, monkeypatch):
    built, build = [], nb.build_model

    def remembered(config):
        model = build(config)
        built.append(weakref.ref(model))
        return model

    monkeypatch.setattr(nb, "build_model", remembered)
    costs = nb.time_training_steps(nb.make_config(**settings), CPU, ["fp32", "bf16"])
    assert list(costs.index) == ["fp32", "bf16"] and (costs > 0).all(axis=None)
    gc.collect()
    assert built and all(reference() is None for reference in built)


KEPT = """
import resource, sys, psutil, torch
sys.path.insert(0, sys.argv[1])
import nbtools

nb, process = nbtools.load(), psutil.Process()
before = process.memory_info().rss
faults = []
with nb.keep_freed_memory(torch.device(sys.argv[2])):
    for _ in range(6):
        start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24), torch.ones(2**26)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start)
    kept = process.memory_info().rss - before
torch.ones(2**28)  # more than lies free in one piece
print(min(faults), kept / 2**20, (process.memory_info().rss - before) / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems hand out memory in other ways")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_on_a_cpu_memory_is_asked_for_once_and_let_go_in_the_end(device):
    """A page that the system clears is a fault, of 320 MiB 81,920; small things may part a round's."""
    command = [sys.executable, "-c", KEPT, str(Path(__file__).parent), device]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    faults, kept, left = map(float, answer.split())
    if device == "cpu":
        assert faults < 1000 and kept > 200
    else:
        assert faults > 50_000 and kept < 100
    assert left < 50


def test_where_the_c_library_is_another_nothing_happens(nb, monkeypatch):
    monkeypatch.setattr(nb.ctypes, "CDLL", lambda _: object())
    inside = []
    with nb.keep_freed_memory(CPU):
        inside.append("another C library")
    monkeypatch.setattr(nb.sys, "platform", "win32")
    monkeypatch.setattr(nb.ctypes, "CDLL", lambda _: pytest.fail("Windows has no such library"))
    with nb.keep_freed_memory(CPU):
        inside.append("Windows")
    assert inside == ["another C library", "Windows"]
