"""fp16 and bf16 as a GPU's tensor cores compute them, on any CPU and at the speed of fp32."""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

HALVES = (torch.float16, torch.bfloat16)
CONVOLUTIONS = (
    torch.ops.aten.convolution.default,
    torch.ops.aten.convolution_backward.default,
)


class TensorCores(TorchDispatchMode):
    """Convolutions of halves: their products are added up in fp32, and the sum is rounded to a half.

    A CPU without such instructions does the same twenty times as slowly, or with sums of halves.
    All else is left to PyTorch. `rounded` counts the convolutions, so that a test can see that some were.
    """

    rounded = 0

    def __torch_dispatch__(
        self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        """Compute one operation."""
        kind = args[0].dtype if function in CONVOLUTIONS else None
        if kind not in HALVES:
            return function(*args, **kwargs or {})
        self.rounded += 1
        result = function(*(cast(value, kind, torch.float32) for value in args), **kwargs or {})
        if isinstance(result, tuple):
            return tuple(cast(value, torch.float32, kind) for value in result)
        return result.to(kind)


def cast(value: object, old: torch.dtype, new: torch.dtype) -> object:
    """A tensor of the old type in the new one; anything else as it is."""
    of_old_type = isinstance(value, torch.Tensor) and value.dtype == old
    return value.to(new) if of_old_type else value
