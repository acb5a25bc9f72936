"""The comparison with baselines rests on this: JAX's and torch's processes train the same model on the same data."""

import numpy as np
import pytest

from experiments import text
from experiments.bench.baselines import in_jax, in_torch, methods

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
