"""The comparison with baselines rests on this: JAX's and torch's processes train the same model on the same data."""

import numpy as np
import pytest
import torch

from experiments import text
from experiments.bench.baselines import in_jax, in_torch, int8_linear, methods

SIZE = methods.Size(width=128, layers=2, batch=2, length=16, rank=8, accumulation=2)


@pytest.mark.long
def test_the_same_training_in_both(tmp_path):
    """Adafactor over accumulated gradients has the same losses for four optimizer steps, and after them."""
    folder, corpus = tmp_path / "weights", text.load()
    in_jax.save(folder, SIZE)
    runs = [
        in_jax.Run("multisteps", SIZE, folder, optimizer_steps=4),
        in_torch.Run("torch", SIZE, folder, optimizer_steps=4),
    ]
    losses = []
    for run in runs:
        run.reset(0.03, folder)
        own = [run.step(SIZE.windows(corpus, i)) for i in range(8)]
        losses.append([*own, run.evaluate(SIZE.held_out(corpus)[0])])
    assert losses[0][-1] < losses[0][0] - 0.1
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-3)


def test_a_linear_layer_in_int8():
    """Its weight is that of another to half a step; output and gradients are those of the weight that it stands for."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 32, bias=False)
    made = int8_linear.Int8Linear(layer)
    assert made.weight.dtype == torch.uint8
    weight = made.weight.data.numpy().astype(np.float64).reshape(-1, int8_linear.GROUP)
    scales, zeros = (getattr(made.weight, name).numpy() for name in ("scales", "zeros"))
    weight = ((weight - zeros) * scales).reshape(32, 64)
    error = np.abs(weight - layer.weight.detach().numpy()).reshape(-1, int8_linear.GROUP)
    assert (error <= 0.5001 * scales).all() and error.max() > 0.4 * scales.min()
    x = torch.randn(2, 3, 64, requires_grad=True)
    cotangents = [np.random.default_rng(i).normal(size=(2, 3, 32)) for i in range(2)]
    for cotangent in cotangents:
        made(x).backward(torch.tensor(cotangent, dtype=torch.float32))
    inputs = x.detach().numpy().astype(np.float64)
    np.testing.assert_allclose(made(x).detach(), inputs @ weight.T, rtol=1e-5, atol=1e-5)
    total = sum(cotangents)
    assert x.grad is not None
    np.testing.assert_allclose(x.grad, total @ weight, rtol=1e-5, atol=1e-5)
    expected = np.einsum("abo,abi->oi", total, inputs)
    np.testing.assert_allclose(made.weight.float_grad, expected, rtol=1e-5, atol=1e-5)


def test_only_matrices_inside_the_layers_are_in_int8(tmp_path):
    in_jax.save(tmp_path / "weights", SIZE)
    run = in_torch.Run("torch", SIZE, tmp_path / "weights")
    int8_linear.quantize(run.model)
    narrow = {n for n, p in run.model.named_parameters() if p.dtype == torch.uint8}
    assert len(narrow) == 7 * SIZE.layers
    assert all(".layers." in name and name.endswith("proj.weight") for name in narrow)


def test_bytes_of_torch(tmp_path):
    """Between micro-steps there are gradients and Adafactor's factors; at the worst moment, params and more."""
    folder, corpus = tmp_path / "weights", text.load()
    in_jax.save(folder, SIZE)
    run = in_torch.Run("torch", SIZE, folder, optimizer_steps=4)
    for i in range(3):
        run.step(SIZE.windows(corpus, i))
    params = sum(4 * p.numel() for p in run.model.parameters())
    factors = sum(4 * (sum(p.shape) if p.dim() == 2 else p.numel()) for p in run.model.parameters())
    scalars = 4 * len(list(run.model.parameters()))  # a root mean square of each
    assert run.state_bytes() == params + factors + scalars
    run.step(SIZE.windows(corpus, 3))
    windows = SIZE.windows(corpus, 4)
    assert run.peak_bytes(windows) > 2 * params + factors
    assert not run.sample()
