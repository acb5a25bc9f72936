"""MaxText: `opt_type: flora` in its configuration, its train step, its meshes and its checkpoints.

    python3 -m flora_jax.trainers.maxtext config.yml opt_type=flora flora_rank=256

It is MaxText's own pre-training with `register()` before it, so all of MaxText's keys hold. MaxText has no hook for an optimizer: functions of
it are wrapped, at one version and with one source each, and anything else is refused.
"""

# pyright: reportMissingImports=false

import hashlib
import importlib.metadata
import inspect
from collections.abc import Callable, Sequence
from functools import partial, wraps
from types import FunctionType, SimpleNamespace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core.spmd import logical_axis_rules
from jax.sharding import PartitionSpec

from flora_jax.chain.flora import ADVISED, KAPPA, flora
from flora_jax.chain.plan import Plan
from flora_jax.chain.plan import plan as plan_of
from flora_jax.chain.project import cycle as cycle_of
from flora_jax.chain.projection import Projection
from flora_jax.chain.sketch import without_cycle
from flora_jax.fused.value_and_grad import value_and_grad
from flora_jax.rounding import Rounding
from flora_jax.trainers import nnx as flora_nnx
from flora_jax.trainers.axis_names import (
    METADATA,
    STACKS,
    WIDTH,
    of_state,
    owner_of,
    with_axis_names,
)
from flora_jax.trainers.schedule import in_micro_steps

VERSION = "0.2.5"
"""The version of MaxText that is tested."""
SOURCES = {
    "maxtext.configs.pyconfig.initialize": "84250c413ca3828b",
    "maxtext.optimizers.optimizers.get_optimizer": "cc6c85a6e9c9e15c",
    "maxtext.trainers.pre_train.train.train_step": "e68464f0c15a65b7",
    "maxtext.trainers.pre_train.train.loss_fn": "7a97c1cc3bd1b19a",
    "maxtext.utils.gradient_accumulation.gradient_accumulation_loss_and_grad": "7807d0b23ab33c3c",
    "maxtext.common.train_state_nnx.TrainStateNNX": "37c21d71c4f020bf",
    "maxtext.utils.sharding.get_nnx_var_named_sharding_with_scan_axis": "bf12c050597d3693",
}
"""The beginnings of the SHA-256 of the sources that are wrapped or relied on."""
LAYERS = STACKS | {"dense_layers", "moe_layers", "local_layers"}
"""MaxText's names of axes of which each index is a matrix of its own."""
EMBED = WIDTH | {"embed_attn", "embed_vocab", "embed_router"}
"""MaxText's names of the axis of the states between layers."""


def check_version() -> None:
    """Raises an ImportError unless the installed MaxText is the one that is tested."""
    try:
        found = importlib.metadata.version("maxtext")
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if found != VERSION:
        raise ImportError(f"flora_jax.trainers.maxtext needs maxtext {VERSION}, found {found}")


check_version()

from absl import app  # noqa: E402
from maxtext.common import train_state_nnx  # noqa: E402
from maxtext.configs import pyconfig, types  # noqa: E402
from maxtext.optimizers import optimizers  # noqa: E402
from maxtext.trainers.pre_train import train  # noqa: E402
from maxtext.utils import (  # noqa: E402
    gradient_accumulation,
    maxtext_utils,
    model_creation_utils,
    sharding,
)


class FloraConfig(types.MaxTextConfig):
    """MaxText's configuration, and the keys of `opt_type: flora`.

    Attributes:
      opt_type: One of MaxText's optimizers, or `flora`.
      flora_rank: The rank of the projections: an int, or a fraction of the smaller side of each matrix.
      flora_preset: The variant of the method, as in `flora_jax.flora`: `paper` or `advised`.
      flora_fused: Whether gradients are compressed inside the backward pass, and applied leaf by leaf.
      flora_accumulation_steps: The number of MaxText's steps in an optimizer step, beside `gradient_accumulation_steps`.
      flora_momentum: The decay of the momentum; by default the preset's.
      flora_resample_every: The number of optimizer steps that share a projection; by default the preset's.
      flora_distribution: The distribution of the projections; by default the preset's.
      flora_side: The side of each matrix that is projected; by default the preset's.
      flora_min_dim: The least size of a side of a matrix that is compressed.
      flora_seed: The seed of the projections.
      flora_state_dtype: The dtype of sketches in the state.
      flora_rounding: How new bfloat16 params are rounded, in the fused step.
      flora_skip_nonfinite: Whether to leave out steps whose gradients have a NaN or an infinity.
      flora_weight_decay_rate: The weight decay, as in `optax.adafactor`.
    """

    opt_type: types.OptimizerType | Literal["flora"] = types.OptimizerType.ADAMW
    flora_rank: int | float | None = None
    flora_preset: Literal["paper", "advised"] = "paper"
    flora_fused: bool = True
    flora_accumulation_steps: int = 1
    flora_momentum: float | None = None
    flora_resample_every: int | None = None
    flora_distribution: str | None = None
    flora_side: str | None = None
    flora_min_dim: int = 128
    flora_seed: int = 0
    flora_state_dtype: str = "float32"
    flora_rounding: str = "nearest"
    flora_skip_nonfinite: bool = False
    flora_weight_decay_rate: float | None = None


class Transformation(NamedTuple):
    """An optax transformation with what MaxText's step has to know of it.

    Attributes:
      init: Its function of the params.
      update: Its function of the gradients, the state and the params.
      projection: The `Projection` of its chain.
      fused: Whether the step takes fused gradients, and makes no tree of updates.
      rounding: How new bfloat16 params are rounded where it is fused.
    """

    init: Callable[..., Any]
    update: Callable[..., Any]
    projection: Projection
    fused: bool
    rounding: Rounding


def register() -> None:
    """Makes `opt_type: flora` and its keys known to MaxText's pre-training in this process.

    Other optimizers are as before. Call it before `maxtext.trainers.pre_train.train.main`, any number of times.

    Raises:
      RuntimeError: A function of MaxText that is wrapped has another source than that of the tested version.
    """
    _check_sources()
    if hasattr(train.train_step, "__wrapped__"):
        return
    pyconfig.initialize = _initialize(pyconfig.initialize)
    optimizers.get_optimizer = _get_optimizer(optimizers.get_optimizer)
    train.train_step = _train_step(train.train_step)
    state = train_state_nnx.TrainStateNNX
    state.apply_gradients = _apply_gradients(state.apply_gradients)


def main(argv: Sequence[str]) -> None:
    """Runs MaxText's pre-training, in which `opt_type: flora` is known.

    Args:
      argv: The arguments that MaxText's own `main` takes: the program's name, a `.yml` file, and `key=value`s.
    """
    register()
    train.main(argv)


def plan(argv: Sequence[str]) -> Plan:
    """Returns the plan of a run: which leaves are compressed, and how many bytes the state will take. Nothing is computed.

    Args:
      argv: The arguments of the run, as `main` takes them; `opt_type=flora` is among them.

    Raises:
      ValueError: A key is not valid.
    """
    register()
    config = pyconfig.initialize(list(argv))
    mesh = maxtext_utils.get_mesh_from_config(config)
    _, model = model_creation_utils.create_nnx_abstract_model(config, mesh)
    return plan_of(
        nnx.as_pure(nnx.state(model, nnx.Param)),
        projection_of(config, model),
        tx=optimizers.get_optimizer(config, lambda step: 1.0, model, mesh),
    )


def projection_of(config: Any, model: Any) -> Projection:
    """Returns the projection of a configuration, which takes stacks, sides, embeddings and heads from the names of MaxText's axes.

    Args:
      config: MaxText's configuration.
      model: The model, or its abstract model.

    Raises:
      ValueError: A key is not valid.
    """
    advised = config.flora_preset == "advised"
    transfers = KAPPA if config.flora_momentum is not None else 1
    steps = config.flora_resample_every or (ADVISED if advised else transfers)
    plain = Projection(
        config.flora_rank,
        distribution=config.flora_distribution or ("srtt" if advised else "gaussian"),
        side=config.flora_side or ("input" if advised else "larger"),
        resample_every=steps * config.flora_accumulation_steps,
        seed=config.flora_seed,
        min_dim=config.flora_min_dim,
    )
    params = nnx.state(model, nnx.Param)
    return with_axis_names(plain, params, stacks=LAYERS, width=EMBED)


def _wrapped() -> dict[str, Any]:
    """Returns what is wrapped, replaced or relied on, by name."""
    places = (
        (pyconfig, "initialize"),
        (optimizers, "get_optimizer"),
        (train, "train_step"),
        (train, "loss_fn"),
        (gradient_accumulation, "gradient_accumulation_loss_and_grad"),
        (train_state_nnx, "TrainStateNNX"),
        (sharding, "get_nnx_var_named_sharding_with_scan_axis"),
    )
    return {f"{module.__name__}.{name}": getattr(module, name) for module, name in places}


def _check_sources() -> None:
    """Raises a RuntimeError where a function of MaxText is another than in the tested version."""
    for name, wrapped in _wrapped().items():
        found = hashlib.sha256(inspect.getsource(wrapped).encode()).hexdigest()[:16]
        if found != SOURCES[name]:
            raise RuntimeError(
                f"{name} must have the source that it has in maxtext {VERSION} ({SOURCES[name]}), found another ({found})"
            )


def _initialize(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def initialize(argv: Any = None, config_class: Any = types.MaxTextConfig, **kwargs: Any) -> Any:
        own = FloraConfig if config_class is types.MaxTextConfig else config_class
        config = original(argv, config_class=own, **kwargs)
        if config.opt_type == "flora":
            _check(config)
        return config

    return initialize


def _check(config: Any) -> None:
    """Raises a ValueError for what flora cannot do in MaxText, or was not tested with."""
    if config.flora_rank is None:
        raise ValueError("flora_rank must be given with opt_type=flora, found none")
    for key in ("flora_accumulation_steps", "flora_resample_every"):
        if (value := getattr(config, key)) is not None and value < 1:
            raise ValueError(f"{key} must be an int of at least 1, found {value}")
    accumulates = config.flora_fused and config.gradient_accumulation_steps > 1
    in_steps = "take flora_accumulation_steps in the place of gradient_accumulation_steps"
    never = (
        ("skip_step_on_spikes", "take flora_skip_nonfinite"),
        ("trainable_parameters_mask", "all params are trained"),
        ("enable_diloco", "take one replica"),
        ("use_tunix_gradient_accumulation", "take gradient_accumulation_steps alone"),
        ("shard_optimizer_over_data", "sketches are sharded as their weights are"),
        ("optimizer_memory_host_offload", "its state is a sketch on the device"),
        ("parameter_memory_host_offload", "keep the params on the device"),
        ("using_pipeline_parallelism", "take other axes of the mesh"),
        ("compiled_trainstep_file", "let the step compile"),
    )
    fused = (("quantization", "take flora_fused=false"),)
    accumulated = (
        ("routed_bias", in_steps),
        ("te_moe_block", in_steps),
        ("moe_dropless_fallback", in_steps),
        ("moe_log_max_load_ratio", in_steps),
        ("log_required_ragged_buffer_factor", in_steps),
    )
    keys = [*never, *(fused if config.flora_fused else ()), *(accumulated if accumulates else ())]
    for key, instead in keys:
        if value := getattr(config, key):
            raise ValueError(
                f"{key} must not be set with opt_type=flora, found {getattr(value, 'value', value)}; {instead}"
            )
    if config.lora.enable_lora:
        raise ValueError(
            "lora.enable_lora must be false with opt_type=flora, found True; all params are trained"
        )


def _get_optimizer(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def get_optimizer(
        config: Any, learning_rate_schedule: Any, model: Any = None, mesh: Any = None
    ) -> Any:
        if config.opt_type != "flora":
            return original(config, learning_rate_schedule, model, mesh=mesh)
        if model is None or mesh is None:
            raise ValueError("get_optimizer must have the model and the mesh with opt_type=flora")
        projection = projection_of(config, model)
        tx = flora(
            in_micro_steps(learning_rate_schedule, config.flora_accumulation_steps),
            projection=projection,
            accumulation_steps=config.flora_accumulation_steps,
            momentum=config.flora_momentum,
            preset=config.flora_preset,
            state_dtype=config.flora_state_dtype,
            skip_nonfinite=config.flora_skip_nonfinite,
            weight_decay_rate=config.flora_weight_decay_rate,
        )
        init = partial(_laid_out, tx.init, mesh, config.logical_axis_rules)
        return Transformation(
            init, tx.update, projection, config.flora_fused, config.flora_rounding
        )

    return get_optimizer


def _laid_out(init: Callable[[Any], Any], mesh: Any, rules: Any, params: Any) -> Any:
    """Returns the state, whose variables say how they are sharded, each by the axes of its own shape.

    MaxText lays out an array of the state by the names of its weight's axes, whatever its own shape is.
    """
    owners = {}
    with logical_axis_rules(rules):
        for path, one in jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_variable):
            if _is_variable(one):
                named = sharding.get_nnx_var_named_sharding_with_scan_axis(one, mesh).get_value()
                owners[path] = (one.get_value().shape, named)

    def of(path: Any, one: Any) -> Any:
        owner = owner_of(path, owners)
        value: Any = one.get_value() if _is_variable(one) else None
        if owner is None or not hasattr(value, "shape"):  # a count, or masked
            return one
        shape, named = owner
        spec = PartitionSpec(*of_state(path, value.shape, shape, named.spec, mesh))
        left_out = (*METADATA, nnx.PARTITION_NAME, "param_scan_axis")
        metadata = {key: x for key, x in one.get_metadata().items() if key not in left_out}
        return type(one)(value, **metadata, out_sharding=spec)

    return jax.tree_util.tree_map_with_path(of, init(params), is_leaf=_is_variable)


def _train_step(original: Any) -> Callable[..., Any]:
    @wraps(original)
    def train_step(
        model: Any,
        config: Any,
        state_mesh_shardings: Any,
        params_shardings: Any,
        state: Any,
        data: Any,
        dropout_rng: Any = None,
    ) -> Any:
        args = (config, state_mesh_shardings, params_shardings, state, data, dropout_rng)
        optimizer = nnx.merge(model, state).optimizer if config.opt_type == "flora" else None
        if optimizer is None or not optimizer.tx.fused:
            return original(model, *args)
        gradient = partial(
            _value_and_grad,
            optimizer.tx.projection,
            cycle_of(nnx.as_pure(optimizer.opt_state)),
            params_shardings if config.shard_mode == types.ShardMode.AUTO else None,
        )
        names = {
            **original.__globals__,
            "jax": SimpleNamespace(**{**vars(jax), "value_and_grad": gradient}),
            "gradient_accumulation_loss_and_grad": partial(_accumulated, gradient),
        }
        fused = FunctionType(
            original.__code__, names, original.__name__, original.__defaults__, original.__closure__
        )
        return fused(model, *args)

    return train_step


def _value_and_grad(
    projection: Projection,
    cycle: Any,
    shardings: Any,
    fun: Callable[..., Any],
    argnums: Any = 0,
    has_aux: bool = False,
) -> Callable[..., Any]:
    """Returns `jax.value_and_grad` as MaxText's step calls it, with sketches in the places of gradients."""
    gradient = value_and_grad(fun, projection, argnums, has_aux, shardings)

    def of(*args: Any) -> tuple[Any, Any]:
        value, grads = gradient(*args, cycle=cycle)
        return value, without_cycle(grads)

    return of


def _accumulated(
    value_and_grad: Callable[..., Any],
    loss_fn: Callable[..., Any],
    config: Any,
    model: Any,
    params: Any,
    params_shardings: Any,
    data: Any,
    dropout_rng: Any,
) -> tuple[Any, Any, Any]:
    """Returns loss, auxiliary data and gradients of all tokens of the micro-batches, as MaxText does; sums are of sketches."""
    del params, params_shardings, dropout_rng
    steps = config.gradient_accumulation_steps
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params: Any, rest: Any, batch: Any) -> tuple[Any, Any]:
        local = nnx.merge(graph, params, rest, copy=True)
        value, aux = loss_fn(local, config, batch, None, None, is_train=True)
        return value, (aux, nnx.state(local, nnx.Not(nnx.Param)))

    gradient = value_and_grad(loss, has_aux=True)

    def micro_step(carry: Any, batch: Any) -> tuple[Any, Any]:
        total, rest = carry
        (_, (aux, rest)), grads = gradient(params, rest, batch)
        return (jax.tree.map(jnp.add, total, grads), rest), aux

    batches = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, steps, *x.shape[1:]), 1, 0), data)
    shapes = jax.eval_shape(gradient, params, rest, jax.tree.map(lambda x: x[0], batches))[1]
    zeros = jax.tree.map(jnp.zeros_like, shapes)
    (grads, rest), aux = jax.lax.scan(micro_step, (zeros, rest), batches)
    nnx.update(model, rest)
    aux = jax.tree.map(lambda x: jnp.sum(x, 0), aux)
    means = ("moe_lb_loss", "indexer_loss", "mtp_loss")
    aux = {**aux, **{key: aux[key] / steps for key in means}}
    tokens = jnp.maximum(aux["total_weights"], 1)  # without tokens all gradients are zero
    grads = jax.tree.map(lambda x: (x / tokens).astype(x.dtype), grads)
    return aux["xent_sum"] / tokens + sum(aux[key] for key in means), aux, grads


def _apply_gradients(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def apply_gradients(self: Any, grads: Any, **kwargs: Any) -> Any:
        tx = getattr(self.optimizer, "tx", None)
        if not isinstance(tx, Transformation) or not tx.fused:
            return original(self, grads, **kwargs)
        flora_nnx.apply_gradients(self.model, self.optimizer, grads, rounding=tx.rounding)

    return apply_gradients


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


if __name__ == "__main__":
    app.run(main)
