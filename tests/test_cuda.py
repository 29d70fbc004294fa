"""The CUDA path, rehearsed without a GPU: fake tensors know device, type and shape, and hold no numbers.

PyTorch refuses to compute with tensors of two devices, fake ones too: whatever is left on the CPU by
mistake raises here as it would on a GPU. Backward passes need a driver; gradients of ones stand for them.
"""

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
import torch.cuda.amp.common
from torch._subclasses.fake_tensor import FakeTensorMode

CUDA = torch.device("cuda")
BATCHES = 3
NUMBERS = "\\.numpy\\(\\) is not supported for tensor subclasses"  # asked for at a pass's end


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


@pytest.fixture
def config(nb: ModuleType, defaults: dict) -> object:
    """Settings of a small model."""
    small = {"encoder_name": "resnet18", "encoder_weights": None, "batch_size": 4, "image_size": 64}
    return nb.make_config(**defaults | small)


@pytest.fixture
def fake(nb: ModuleType, config: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The notebook among fake tensors, its models on CUDA."""
    build = nb.build_model

    def on_cuda(config: object = config) -> torch.nn.Module:
        with CUDA:
            return build(config)

    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(nb, "build_model", on_cuda)
    monkeypatch.setattr(nb, "move_to_device", lambda model, device: model)  # it is there
    monkeypatch.setattr(nb, "deepcopy", lambda model: on_cuda())  # fake weights cannot be copied
    with FakeTensorMode():
        yield nb


def start(
    nb: ModuleType, config: object, precision: str, monkeypatch: pytest.MonkeyPatch
) -> object:
    """A run on CUDA whose backward passes leave gradients of ones."""
    data = {"split": {}, "files": "", "scales": {}, "ground_resolution": None, "seen": []}
    run = nb.Run(config, CUDA, precision, data)

    def backward(loss: torch.Tensor, *_: object) -> None:
        assert loss.device.type == "cuda"
        for weight in run.model.parameters():
            weight.grad = torch.ones_like(weight)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    return run


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
    assert {weight.dtype for weight in run.ema.parameters()} == {torch.float32}


@pytest.mark.parametrize("left", ["labels", "statistics", "counts"])
def test_what_is_left_on_the_cpu_is_noticed(fake, config, monkeypatch, left):
    """So that the rehearsal above cannot pass by looking away."""
    run = start(fake, config, "fp32", monkeypatch)
    if left == "labels":
        gather = fake.gather_batch
        monkeypatch.setattr(
            fake, "gather_batch", lambda batch: gather(batch if batch.ndim == 4 else batch.cpu())
        )
    elif left == "statistics":
        run.statistics = torch.zeros_like(run.statistics, device="cpu")
    else:
        count = fake.count_pixels
        monkeypatch.setattr(fake, "count_pixels", lambda *words: count(*words).cpu())
    with pytest.raises(RuntimeError, match="(?i)device"):
        fake.one_pass(run, Loader(True), fake.CombinedLoss(0.6, 0.4, 0.5))


@pytest.mark.parametrize("tta", [False, True])
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_windows_are_predicted_on_cuda_and_come_back(fake, config, precision, tta):
    """An ensemble of two, in one view or in eight of three sizes."""
    models = [fake.build_model().eval() for _ in range(2)]
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
    sides = {fake.scaled_side(scale, 64) for scale in (fake.SCALES if tta else [1])}
    assert {images.shape[-1] for images in inputs} == sides
