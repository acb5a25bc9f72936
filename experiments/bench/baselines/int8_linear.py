"""Linear layers of torch with weights in int8, in the form that the optimizers of q-galore-torch and apollo-torch take.

Such an optimizer takes parameters of `uint8` with the scales and zeros of each group of numbers, and reads their
gradient from `float_grad`, which the backward pass adds to. Their packages have no layer that does this.
"""

from typing import Any

import torch

GROUP = 256
"""Numbers that share a scale, as in the scripts of Q-GaLore."""


class _Product(torch.autograd.Function):
    """The product of inputs `(..., in)` with a weight `(out, in)` that is made float only while it is used."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Any) -> torch.Tensor:
        ctx.weight = weight
        ctx.save_for_backward(x)
        return x @ opened(weight, x.dtype).T

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[torch.Tensor, None]:
        (of_output,), (x,), weight = cotangents, ctx.saved_tensors, ctx.weight
        grad = of_output.flatten(0, -2).T @ x.flatten(0, -2)
        weight.float_grad = grad if weight.float_grad is None else weight.float_grad + grad
        return of_output @ opened(weight, of_output.dtype), None


class Int8Linear(torch.nn.Module):
    """A linear layer without bias, whose weight begins as the nearest int8 to that of another."""

    def __init__(self, layer: torch.nn.Linear):
        super().__init__()
        assert layer.bias is None
        numbers, scales, zeros = _rounded(layer.weight.data)
        weight: Any = torch.nn.Parameter(numbers, requires_grad=False)
        weight.scales, weight.zeros, weight.group_size = scales, zeros, GROUP
        weight.stochastic_round, weight.float_grad = True, None
        self.weight = weight

    def forward(self, x: torch.Tensor) -> Any:
        return _Product.apply(x, self.weight)


def quantize(model: torch.nn.Module) -> None:
    """Puts int8 weights in place of those of all linear layers inside the layers of a model."""
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, Int8Linear(module))


def opened(weight: Any, dtype: torch.dtype) -> torch.Tensor:
    """Gives the weight that the integers stand for."""
    groups = weight.data.to(dtype).reshape(-1, weight.group_size)
    return ((groups - weight.zeros) * weight.scales).reshape(weight.shape)


def _rounded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gives integers from 0 to 255, and for each group the scale and the integer that stands for zero."""
    groups = weight.reshape(-1, GROUP)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scales = (high - low).clamp(min=1e-5) / 255
    zeros = (-low / scales).round().clamp(0, 255)
    numbers = (groups / scales).round() + zeros
    return numbers.clamp(0, 255).to(torch.uint8).reshape(weight.shape), scales, zeros
