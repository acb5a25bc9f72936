"""The methods that run in JAX. Each has one compiled step for all learning rates."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

import flora_jax
from experiments import optimizers
from experiments.bench import setting
from experiments.bench.baselines.methods import EXACT, INSIDE, INT8, PROJECTION_GAP, Size
from flora_jax.chain import products, storage
from flora_jax.chain.leaf_plan import leaf_plans
from flora_jax.chain.plan import tree_bytes
from flora_jax.memory.compiled import compiled_bytes
from flora_jax.models import decoder
from flora_jax.models.families import outline as outline_of
from flora_jax.models.load import load as load_checkpoint
from flora_jax.models.save import save as save_checkpoint

ADAFACTOR = 0.015
"""Peak learning rate of what is no matrix, where the grid is of that of the matrices."""
STATES: dict[str, storage.StateDtype] = {"flora-int8": "int8", "flora-int4": "int4"}
"""What sketches are kept in, where it is not float32. A rank that is eight times as large takes the same bytes in int4."""
LONG = 10**6
"""Number of optimizer steps of a schedule that does not end within a measurement."""


def matrices(params: Any, numbers: Any) -> Any:
    """Gives `numbers` for each matrix inside the layers, and None for all else."""

    def of(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path)
        return numbers if "layer" in name and "norm" not in name and leaf.ndim > 1 else None

    return jax.tree_util.tree_map_with_path(of, params)


def galore(rate: Any, rank: int) -> optax.GradientTransformation:
    """GaLore acts on the matrices of the layers, and Adam on the rest."""
    return contrib.galore(
        rate,
        rank=rank,
        update_proj_gap=PROJECTION_GAP,
        weight_dimension_numbers=lambda params: matrices(
            params, contrib.GaLoreDimensionNumbers(0, 1)
        ),
    )


def muon(rate: Any) -> optax.GradientTransformation:
    """Muon acts on the matrices of the layers, stacked or not, and AdamW on the rest, at the same rate.

    Updates have the root mean square of Adam's, 0.2 (Liu et al., arXiv 2502.16982).
    """
    numbers = contrib.MuonDimensionNumbers(-2, -1)
    return contrib.muon(
        rate,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=lambda params: matrices(params, numbers),
    )


def build(
    key: str, size: Size, peak: Any, optimizer_steps: int
) -> tuple[optax.GradientTransformation, flora_jax.Projection | None]:
    """Gives the transformation of a method, and Flora's projection or None."""
    if key in EXACT:
        rate = optimizers.cosine(peak, optimizer_steps * size.accumulation)
        if key != "exact-muon":
            return optax.adafactor(rate), None
        others = optimizers.cosine(ADAFACTOR, optimizer_steps * size.accumulation)
        return flora_jax.sketched_muon(rate, adafactor_learning_rate=others), None
    rate = optimizers.cosine(peak, optimizer_steps)
    if key in ("flora", "flora-int8", "flora-int4", "flora-larger"):
        return optimizers.build(
            "flora",
            rate,
            accumulation=size.accumulation,
            rank=8 * size.rank if key == "flora-int4" else size.rank,
            matrices=optimizers.cosine(optimizers.MATRICES, optimizer_steps),
            embedding="whole",  # as all others have them
            head="whole",
            side="larger" if key == "flora-larger" else "input",
            state_dtype=STATES.get(key, "float32"),
        )
    if key == "flora-paper":
        return optimizers.build(
            "flora_adafactor",
            rate,
            accumulation=size.accumulation,
            rank=size.rank,
            side="larger",
            distribution="gaussian",
            shrink=False,
            resample=1,
        )
    inner = {"galore": partial(galore, rank=size.rank), "muon": muon}.get(key, optax.adafactor)
    return optax.MultiSteps(inner(rate), size.accumulation).gradient_transformation(), None


def outline(size: Size) -> tuple[decoder.Decoder, Any]:
    """Gives a model with each layer on its own, and the shapes of its params."""
    model = setting.small(size.width, size.layers, dtype=jnp.float32, scan=False, remat=False)
    return model, outline_of(model)


def init_of(key: str, size: Size, model: decoder.Decoder) -> Any:
    """Gives the function that makes a state from params."""
    tx, _ = build(key, size, 0.0, LONG)
    if key not in INSIDE:
        return tx.init
    step = inside(key, partial(decoder.loss, model), tx)
    windows = jax.ShapeDtypeStruct((size.batch, size.length + 1), jnp.int32)
    return lambda params: step.init(params, windows)


def inside(key: str, loss: Any, tx: optax.GradientTransformation) -> Any:
    """Gives the step that updates each weight inside the backward pass; weights in int8 are rounded at random."""
    rounding = "stochastic" if key in INT8 else "nearest"
    return flora_jax.make_train_step(loss, tx, update="backward", rounding=rounding)


def save(folder: Path, size: Size, seed: int = 0) -> None:
    """Writes the weights that all methods begin from, unless the folder exists."""
    if folder.exists():
        return
    model = setting.small(size.width, size.layers, dtype=jnp.float32)
    tokens = jnp.zeros((1, 8), jnp.int32)
    save_checkpoint(folder, model, jax.jit(model.init)(jax.random.key(seed), tokens)["params"])


def load(folder: Path) -> Any:
    """Reads the weights that `save` wrote, each layer on its own, as numpy arrays."""
    model, params = load_checkpoint(folder)
    stacked = params.pop("layers")
    for i in range(model.shape.layers):
        params[f"layer_{i}"] = jax.tree.map(lambda x, i=i: x[i], stacked)
    return params


def step_of(key: str, size: Size, model: decoder.Decoder, optimizer_steps: int = LONG) -> Any:
    """Gives the step `(params, state, windows, peak) -> (params, state, loss)`, under `jit`."""
    loss = partial(decoder.loss, model)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, windows, peak):
        tx, projection = build(key, size, peak, optimizer_steps)
        if key in INSIDE:
            return inside(key, loss, tx)(params, state, windows)
        if projection is None or key == "flora-paper":
            value, grads = jax.value_and_grad(loss)(params, windows)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value
        grad_fn = flora_jax.value_and_grad(loss, projection)
        value, grads = grad_fn(params, windows, cycle=flora_jax.cycle(state))
        return *flora_jax.apply_gradients(tx, grads, state, params), value

    return step


class Run:
    """A method that trains, from the weights of the checkpoint in `folder`."""

    def __init__(self, key: str, size: Size, folder: Path, optimizer_steps: int = LONG):
        model, self.shapes = outline(size)
        self.key, self.size = key, size
        _, self.projection = build(key, size, 0.0, optimizer_steps)
        self._init = jax.jit(init_of(key, size, model))
        self._step = step_of(key, size, model, optimizer_steps)
        loss = partial(decoder.loss, model)
        self._loss = jax.jit(lambda params, windows: loss(flora_jax.from_int8(params), windows))
        self._sample = jax.jit(self._projections)
        self._compiled: Any = None
        self.reset(1e-3, folder)

    def reset(self, rate: float, folder: Path) -> None:
        """Begins anew from the weights in `folder`, with this peak learning rate."""
        self.params = jax.tree.map(jnp.array, load(folder))
        self.state = self._init(self.params)
        if self.key in INT8:
            self.params = flora_jax.to_int8(self.params)
        self.rate = jnp.float32(rate)

    def compiled(self, windows: np.ndarray) -> Any:
        """Gives the step's program for such windows, which the first call compiles."""
        if self._compiled is None:
            arguments = (self.params, self.state, windows, self.rate)
            self._compiled = self._step.lower(*arguments).compile()
        return self._compiled

    def step(self, windows: np.ndarray) -> float:
        compiled = self.compiled(windows)
        self.params, self.state, loss = compiled(self.params, self.state, windows, self.rate)
        return float(jax.block_until_ready((self.params, self.state, loss))[2])

    def evaluate(self, windows: np.ndarray) -> float:
        return float(self._loss(self.params, windows))

    def state_bytes(self) -> int:
        """Counts the bytes of all that is kept between micro-steps beside the params."""
        return tree_bytes(self.state)

    def peak_bytes(self, windows: np.ndarray) -> int:
        """Counts arguments, results and temporaries of the compiled step, which includes the optimizer step."""
        return compiled_bytes(self.compiled(windows))

    def sample(self) -> bool:
        """Samples every `A` once; gives False where the method has none."""
        if self.projection is None:
            return False
        jax.block_until_ready(self._sample(jnp.int32(0)))
        return True

    def _projections(self, cycle: jax.Array) -> list[jax.Array]:
        assert self.projection is not None
        plans = leaf_plans(self.shapes, self.projection)
        return [products.sample(plan.spec, cycle) for plan in plans if plan.spec]
