"""The CUDA path, rehearsed without a GPU: fake tensors know device, type and shape, and hold no numbers.

PyTorch refuses to compute with tensors of two devices, fake ones too: whatever is left on the CPU by
mistake raises here as it would on a GPU. Backward passes need a driver; gradients of ones stand for them.
A fake weight can be neither copied nor moved in place, as PyTorch does it: that has a stand-in, too.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import rasterio
import torch
import torch.cuda.amp.common
from kernels import same
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
)

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
BATCHES = 3
NUMBERS = "\\.numpy\\(\\) is not supported for tensor subclasses"  # asked for at a pass's end
DATA = {"split": {}, "files": "", "scales": {}, "ground_resolution": None, "seen": []}


class Loader:
    """Some batches on the CPU, of a training or another set, like a real loader's."""

    def __init__(self, train: bool) -> None:
        self.dataset = type("Set", (), {"train": train, "__len__": lambda _: 400})()
        self.given = 0

    def __len__(self) -> int:
        return 100  # so that the pass looks at no figure before its end

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        for _ in range(BATCHES):
            self.given += 1
            labels = torch.zeros(4, 64, 64, dtype=torch.long)
            yield [torch.randn(4, 3, 64, 64), labels, labels]


def copy_fake(tensor: FakeTensor, memo: dict) -> torch.Tensor:
    """In place of a copy by its storage, which a fake tensor lacks."""
    copied = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        copied = nn.Parameter(copied, tensor.requires_grad)
    memo[id(tensor)] = copied
    return copied


def convert(module: nn.Module, function: Callable, recurse: bool = True) -> nn.Module:
    """In place of nn.Module._apply, which swaps what lies behind a fake weight, and cannot."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                new = nn.Parameter(function(weight.detach()), weight.requires_grad)
                part._parameters[name] = new
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = function(buffer)
    return module


@pytest.fixture
def config(nb: ModuleType, defaults: dict) -> object:
    """Settings of a small model."""
    small = {"encoder_name": "resnet18", "encoder_weights": None, "batch_size": 4, "image_size": 64}
    return nb.make_config(**defaults | small)


def asks_for_a_driver() -> bool:
    """Whether this PyTorch wants a driver for fake tensors on CUDA; 2.8 does, 2.14 does not."""
    if torch.torch_version.TorchVersion(torch.__version__) >= (2, 14):
        return False
    try:
        with FakeTensorMode():
            torch.ones(1).to(CUDA)
    except RuntimeError as error:
        return "driver" in str(error)
    return False


@pytest.fixture
def fake(nb: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The notebook among fake tensors."""
    if asks_for_a_driver():
        pytest.skip("this PyTorch cannot pretend to have CUDA without a driver")
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(FakeTensor, "__deepcopy__", copy_fake, raising=False)
    monkeypatch.setattr(nn.Module, "_apply", convert)
    with FakeTensorMode():
        yield nb


def devices(tensors: object) -> set[str]:
    """The types of the devices where tensors lie."""
    return {tensor.device.type for tensor in tensors}


def start(
    nb: ModuleType, config: object, precision: str, monkeypatch: pytest.MonkeyPatch
) -> object:
    """A run on CUDA whose backward passes leave gradients of ones."""
    run = nb.Run(config, CUDA, precision, DATA)

    def backward(loss: torch.Tensor, *_: object) -> None:
        assert loss.device.type == "cuda"
        for weight in run.model.parameters():
            weight.grad = torch.ones_like(weight)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    return run


# ---- training


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_a_pass_runs_on_cuda_up_to_its_figures(fake, config, monkeypatch, precision, train):
    run, loader = start(fake, config, precision, monkeypatch), Loader(train)
    logits, features, forward = [], [], fake.forward_pass
    monkeypatch.setattr(
        fake, "forward_pass", lambda *words: logits.append(forward(*words)) or logits[-1]
    )
    for model in (run.model, run.ema):
        model.encoder.conv1.register_forward_hook(lambda _, __, seen: features.append(seen))
    with pytest.raises(RuntimeError, match=NUMBERS):
        fake.one_pass(run, loader, fake.CombinedLoss(0.6, 0.4, 0.5))
    assert loader.given == BATCHES == len(logits)
    assert {(one.device.type, tuple(one.shape)) for one in logits} == {("cuda", (4, 3, 64, 64))}
    assert [one.dtype for one in features] == BATCHES * [fake.DTYPES[precision]]
    assert run.scaler.is_enabled() and run.statistics.device.type == "cuda"
    # Operations on lists of tensors do not look at the devices of fake ones
    states = [run.model.state_dict(), run.ema.state_dict(), *run.optimizer.state.values()]
    assert devices(value for state in states for value in state.values()) == {"cuda"}
    assert bool(run.optimizer.state) == train
    assert {weight.dtype for weight in run.ema.parameters()} == {torch.float32}


@pytest.mark.parametrize("left", ["labels", "statistics", "counts", "model"])
def test_what_is_left_on_the_cpu_is_noticed(fake, config, monkeypatch, left):
    """So that the rehearsal above cannot pass by looking away."""
    if left == "model":
        monkeypatch.setattr(fake, "place_model", lambda model, device: model)
        with pytest.raises(RuntimeError, match="(?i)device"):
            start(fake, config, "fp32", monkeypatch)
        return
    run = start(fake, config, "fp32", monkeypatch)
    if left == "labels":
        gather = fake.gather_batch
        monkeypatch.setattr(
            fake, "gather_batch", lambda batch: gather(batch if batch.ndim == 4 else batch.cpu())
        )
    elif left == "statistics":
        run.statistics = torch.zeros_like(run.statistics, device="cpu")
    elif left == "counts":
        count = fake.count_pixels
        monkeypatch.setattr(fake, "count_pixels", lambda *words: count(*words).cpu())
    with pytest.raises(RuntimeError, match="(?i)device"):
        fake.one_pass(run, Loader(True), fake.CombinedLoss(0.6, 0.4, 0.5))


@pytest.mark.parametrize("tta", [False, "few", True])
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_windows_are_predicted_on_cuda_and_come_back(fake, config, precision, tta):
    """An ensemble of two, in one view or in several of three sizes."""
    models = [fake.move_to_device(fake.build_model(config), CUDA).eval() for _ in range(2)]
    predictor = fake.Predictor(models, config, CUDA, precision, tta=tta, wall_depth=0.3)
    inputs, features = [], []
    for model in models:
        model.register_forward_pre_hook(lambda _, images: inputs.append(images[0]))
        model.encoder.conv1.register_forward_hook(lambda _, __, seen: features.append(seen))
    probabilities = predictor(torch.randn(5, 3, 64, 64))
    assert probabilities.device.type == "cpu" and probabilities.shape == (5, 3, 64, 64)
    assert probabilities.dtype == torch.float32
    assert {images.device.type for images in inputs} == {"cuda"}
    assert {seen.dtype for seen in features} == {fake.DTYPES[precision]}
    sides = {fake.scaled_side(scale, 64) for scale in fake.VIEWS[tta]}
    assert {images.shape[-1] for images in inputs} == sides


def write_scene(path: Path) -> Path:
    """A small GeoTIFF."""
    rng = np.random.default_rng(0)
    with rasterio.open(path, "w", driver="GTiff", width=90, height=70, count=3, dtype="uint8") as f:
        f.write(rng.integers(0, 255, (3, 70, 90), np.uint8))
    return path


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize("left", [False, True])
def test_a_scenes_rows_are_predicted_on_cuda(nb, config, tmp_path, request, left):
    """Windows are cut and blended on the CPU; with a model that was left there, it raises."""
    path = write_scene(tmp_path / "scene.tif")
    fake = request.getfixturevalue("fake")
    model = fake.move_to_device(fake.build_model(config), CPU if left else CUDA).eval()
    predictor = fake.Predictor([model], config, CUDA, "fp16", tta=True, wall_depth=0.3)
    outputs = []
    model.register_forward_hook(lambda _, __, logits: outputs.append(logits.device.type))
    with rasterio.open(path) as scene:
        rows = fake.predict_scene_rows(scene, (0, 255), predictor, 0)
        with pytest.raises(RuntimeError, match="(?i)device|input type" if left else NUMBERS):
            next(rows)
    assert set(outputs) == (set() if left else {"cuda"})


# ---- checkpoints that cross devices


@pytest.fixture
def cpu_run(nb: ModuleType, config: object) -> object:
    """A run on the CPU, with real numbers, after a step."""
    run = nb.Run(config, CPU, "fp32", DATA)
    for weight in run.model.parameters():
        weight.grad = torch.ones_like(weight)
    run.optimizer.step()
    return run


def test_a_checkpoint_of_a_cpu_goes_on_on_cuda(nb, cpu_run, config, monkeypatch, request):
    content = nb.make_checkpoint(cpu_run, nb.STATES)
    fake = request.getfixturevalue("fake")
    run = start(fake, config, "fp16", monkeypatch)
    fake.restore_run(run, content)
    assert run.precision == "fp32" and not run.history
    for part in (run.model, run.ema):
        assert devices(part.state_dict().values()) == {"cuda"}
    states = run.optimizer.state.values()
    assert devices(value for state in states for value in state.values()) == {"cuda"}
    with pytest.raises(RuntimeError, match=NUMBERS):
        fake.one_pass(run, Loader(True), fake.CombinedLoss(0.6, 0.4, 0.5))


def test_a_checkpoint_of_a_gpu_opens_without_one(nb, cpu_run, config, tmp_path, monkeypatch):
    """As CUDA writes it: each tensor is marked with its device."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        content = nb.make_checkpoint(cpu_run, nb.STATES)
    path = tmp_path / "rooftop_last.pt"
    path.write_bytes(content)
    with pytest.raises(RuntimeError, match="on a CUDA device"):  # it would not by itself
        torch.load(path, weights_only=True)
    run = nb.Run(config, CPU, "fp32", DATA)
    nb.restore_run(run, content)
    for key, name in nb.STATES.items():
        states = (getattr(one, name).state_dict() for one in (run, cpu_run))
        assert same(*states), key
    model = nb.load_model(path, CPU)
    assert same(dict(model.state_dict()), dict(cpu_run.ema.state_dict()))
    started = nb.make_config(**vars(config) | {"encoder_weights": str(path)})
    weights = nb.build_model(started)
    assert "rooftop_last.pt" in nb.load_encoder_weights(weights, started)
    assert same(dict(weights.state_dict()), dict(cpu_run.ema.state_dict()))


# ---- the other sections


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_a_step_is_timed_on_cuda_with_a_whole_batch(fake, config, monkeypatch, precision):
    """Section 3, up to the number that a GPU is waited for with."""
    model = fake.move_to_device(fake.build_model(config), CUDA)
    features = []
    model.encoder.conv1.register_forward_hook(lambda _, __, seen: features.append(seen))
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
    images = fake.random_batch(config, CUDA)
    assert images.shape == (4, 3, 64, 64)
    with pytest.raises(DataDependentOutputException):
        fake.time_one_step(model, images, precision)
    assert [one.dtype for one in features] == [fake.DTYPES[precision]]
    with pytest.raises(RuntimeError, match="(?i)device|input type"):
        fake.time_one_step(fake.build_model(config), images, precision)


def test_window_sizes_are_tried_without_any_device(fake, config):
    seen = []

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            if function is torch.nn.functional.conv2d:
                seen.append(result.device.type)
            return result

    with Spy():
        fake.check_model_accepts_window_sizes(config)
    assert set(seen) == {"meta"}


def test_batches_for_cuda_are_pinned(nb, config, monkeypatch):
    """PyTorch pins where there is a device; here its own function is given a batch."""
    from torch.utils.data._utils.pin_memory import pin_memory

    sample = (torch.zeros(3, 64, 64), torch.zeros(64, 64).long(), torch.zeros(64, 64).long())
    items = type("Items", (list,), {"train": False, "config": config})
    data = items([sample] * 4)
    monkeypatch.setattr(nb, "epoch_order", lambda data, epoch: range(4))
    monkeypatch.setattr(nb, "count_workers", lambda data, device: 0)
    loader = nb.make_loader(data, CUDA)
    assert loader.pin_memory and not nb.make_loader(data, CPU).pin_memory
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda one, *_: pinned.append(one) or one)
    (batch,) = nb.make_loader(data, CPU)
    pin_memory(batch)
    assert [one.shape for one in pinned] == [(4, 3, 64, 64), (4, 64, 64), (4, 64, 64)]


def test_a_model_on_cuda_is_exported_from_a_copy_on_the_cpu(fake, config):
    model = fake.move_to_device(fake.build_model(config), CUDA).eval()
    predictor = fake.Predictor([model], config, CUDA, "fp16")
    alone = fake.copy_predictor_to_cpu(predictor)
    (copied,) = alone.models
    assert (alone.device, alone.precision) == (CPU, "fp32")
    assert devices(copied.state_dict().values()) == {"cpu"}
    assert devices(model.state_dict().values()) == {"cuda"}
    network = fake.network_with_preprocessing(alone)
    assert network(torch.zeros(2, 3, 64, 64)).device.type == "cpu"
    with pytest.raises(RuntimeError, match="(?i)device"):
        fake.network_with_preprocessing(predictor)(torch.zeros(2, 3, 64, 64))


def test_on_several_gpus_normalisation_is_of_the_whole_batch(fake, config, monkeypatch):
    names = list(fake.build_model(config).state_dict())
    monkeypatch.setattr(fake, "WORLD_SIZE", 2)
    model = fake.place_model(fake.build_model(config), CUDA)
    norms = [part for part in model.modules() if hasattr(part, "running_mean")]
    assert norms and all(isinstance(part, nn.SyncBatchNorm) for part in norms)
    assert list(model.state_dict()) == names  # one GPU can use what several have trained
    assert devices(model.state_dict().values()) == {"cuda"}
    assert model.eval()(torch.zeros(2, 3, 64, 64, device=CUDA)).shape == (2, 3, 64, 64)
    alone = fake.place_model(fake.build_model(config), CPU)
    assert not any(isinstance(part, nn.SyncBatchNorm) for part in alone.modules())
