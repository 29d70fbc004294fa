"""fp16 learns as well as fp32: its scale, its rounding, and what comes of a training."""

import sys
from pathlib import Path

import pytest
import torch
from halves import HALVES, TensorCores
from torch.nn.functional import conv2d

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import precision


@pytest.mark.parametrize("kind", HALVES)
def test_convolutions_of_halves_are_added_up_in_fp32(kind):
    """The yardstick itself: exact sums, rounded once, and none of it where nothing is a half."""
    torch.manual_seed(0)
    image, weight = torch.randn(2, 64, 9, 9).to(kind), torch.randn(8, 64, 3, 3).to(kind)
    image.requires_grad_(), weight.requires_grad_()
    exact = [value.detach().double().requires_grad_() for value in (image, weight)]
    with TensorCores() as cores:
        out = conv2d(image, weight, padding=1)
        out.float().square().sum().backward()
        conv2d(*(value.float() for value in exact))
    assert cores.rounded == 2
    truth = conv2d(*exact, padding=1)
    truth.backward(2 * out.detach().double())
    half_a_step = torch.finfo(kind).eps / 2
    pairs = [(out, truth), (image.grad, exact[0].grad), (weight.grad, exact[1].grad)]
    for ours, true in pairs:
        assert ours.dtype == kind
        error = (ours.double() - true).abs()
        assert (error <= 1.01 * half_a_step * true.abs() + 1e-3 * half_a_step * true.std()).all()


def test_the_sample_is_learnt_as_well_in_fp16(nb):
    """A small model, in as many epochs: to within two points of roof IoU."""
    changes = {"encoder_name": "tu-resnet10t", "epochs": 4, "seed": 42}
    whole, in_fp32, _ = precision.train(nb, "fp32", **changes)
    half, in_fp16, rounded = precision.train(nb, "fp16", **changes)
    assert (whole.precision, half.precision) == ("fp32", "fp16")
    assert whole.scaler.get_scale() == 1 < half.scaler.get_scale() and rounded > 1000
    assert in_fp32 > 0.75 and abs(in_fp16 - in_fp32) < 0.02
