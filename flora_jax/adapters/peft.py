"""PEFT: LoRA in the files of Hugging Face PEFT, `adapter_model.safetensors` and `adapter_config.json`.

| PEFT (`nn.Linear`, weight out × in) | here (weight in × out) |
|---|---|
| `base_model.model.<module>.lora_A.weight`, `(r, in)` | the factor of the input side, transposed |
| `base_model.model.<module>.lora_B.weight`, `(out, r)` | the factor of the output side, transposed |
| `lora_alpha`, `alpha_pattern` (`use_rslora` false) | `Adapter.scale` times the rank |

Each index of a stacked leaf is a module. This needs `safetensors` (`pip install flora-jax[adapters]`).
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from flora_jax.adapters.lora import pair_factors
from flora_jax.adapters.low_rank import Adapter, from_matrices, plans_of, specs, to_matrices
from flora_jax.chain.projection import Projection
from flora_jax.chain.sketch import Spec

WEIGHTS, CONFIG, PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."

Modules = Callable[[str, int | None], str]
"""A function from a leaf's path, and a layer's index in a stacked leaf, to the torch module's name."""


def module_name(path: str, index: int | None) -> str:
    """Returns the names of the path joined by dots, without a last `kernel`, `weight` or `embedding`."""
    names = path.split("/")
    if names[-1] in ("kernel", "weight", "embedding"):
        names = names[:-1]
    return ".".join([*names, *([] if index is None else [str(index)])])


def save(
    folder: Path | str,
    adapter: Adapter,
    params: Any,
    adapter_params: Any,
    *,
    modules: Modules = module_name,
    base_model: str | None = None,
) -> None:
    """Writes LoRA's factors and settings, so that `peft.PeftModel.from_pretrained` can read them.

    Each file is written beside the old one, and then replaces it.

    Args:
      folder: The folder, which is created if it does not exist.
      adapter: The `Adapter` that `lora` or `prune` returned.
      params: The params of the model, or their shapes.
      adapter_params: The params of the adapter, `{path: {"down", "up"}}`.
      modules: A function that gives the names of torch modules.
      base_model: The value of PEFT's `base_model_name_or_path`.

    Raises:
      ValueError: Two weights have the same module name, or a weight has more than one batch axis.
    """
    from safetensors.flax import save_file

    tensors, ranks, alphas = {}, {}, {}
    known = specs(adapter.projection, params)
    sides = _sides(adapter.projection, params)
    for path, own in adapter_params.items():
        spec = known[path]
        down, up = to_matrices(spec, own["down"], own["up"])
        pair = (down, up) if sides[path] == "input" else (_transposed(up), _transposed(down))
        for index, at, module in _modules(spec, modules):
            del index
            if module in ranks:
                raise ValueError(
                    f"modules must give each weight its own name, found {module!r} twice"
                )
            a, b = (_transposed(factor[at]) for factor in pair)
            tensors[f"{PREFIX}{module}.lora_A.weight"] = jnp.asarray(a)
            tensors[f"{PREFIX}{module}.lora_B.weight"] = jnp.asarray(b)
            ranks[module], alphas[module] = spec.rank, adapter.scale(spec) * spec.rank
    rank, alpha = (max(found.values(), default=1) for found in (ranks, alphas))
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _plain(alpha),
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "r": rank,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: _plain(a) for name, a in alphas.items() if a != alpha},
        "target_modules": sorted(ranks),
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    new_weights, new_config = (folder / f"{name}.new" for name in (WEIGHTS, CONFIG))
    save_file(tensors, new_weights, metadata={"format": "pt"})
    new_config.write_text(json.dumps(config, indent=2, sort_keys=True))
    for new, name in ((new_weights, WEIGHTS), (new_config, CONFIG)):
        _to_disk(new)
        os.replace(new, folder / name)


def load(
    folder: Path | str, params: Any, *, modules: Modules = module_name, numbers: Any = None
) -> tuple[Adapter, dict[str, Any]]:
    """Reads what `save` or PEFT has written.

    Args:
      folder: The folder with the two files.
      params: The params of the model, or their shapes.
      modules: A function that gives the names of torch modules.
      numbers: The `weight_dimension_numbers` of the weights, as in `Projection`.

    Returns:
      A LoRA `Adapter` for the weights that the file has, and its params in the file's dtype.

    Raises:
      FileNotFoundError: One of the two files does not exist.
      ValueError: The settings are not those of plain LoRA, a module belongs to no weight, some layers of a
        stacked weight are missing or have another rank, or a shape does not fit.
    """
    from safetensors.flax import load_file

    folder = Path(folder)
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"a PEFT adapter needs {name}, found none in {folder}")
    config = json.loads((folder / CONFIG).read_text())
    _check_config(config)
    tensors = load_file(folder / WEIGHTS)
    rule = Projection(
        1, side="input", min_dim=1, embedding="whole", weight_dimension_numbers=numbers
    )
    everything = _all_specs(rule, params)
    left = {name for name in tensors if ".base_layer." not in name}  # copies of frozen weights
    pairs: dict[str, list[tuple[Any, Any]]] = {}
    scales: dict[str, float] = {}
    for path, spec in everything.items():
        found = []
        for _, _, module in _modules(spec, modules):
            names = [f"{PREFIX}{module}.lora_{side}.weight" for side in "AB"]
            if all(name in tensors for name in names):
                found.append((module, *(tensors[name] for name in names)))
                left -= set(names)
        if not found:
            continue
        wanted = len(list(_modules(spec, modules)))
        ranks = {a.shape[0] for _, a, _ in found}
        scale = {_scale(config, module, a.shape[0]) for module, a, _ in found}
        if len(found) != wanted or len(ranks) != 1 or len(scale) != 1:
            raise ValueError(
                f"{path!r} is stacked and needs {wanted} adapters of one rank and scale, found "
                f"{len(found)} of rank {' and '.join(map(str, sorted(ranks)))}"
            )
        for module, a, b in found:
            outputs = _entries(spec) // spec.size
            if a.shape[1] != spec.size or b.shape != (outputs, a.shape[0]):
                raise ValueError(
                    f"{path!r}: {module} must be {spec.size} x {outputs}, found factors of shapes "
                    f"{a.shape} and {b.shape}"
                )
        pairs[path] = [(a, b) for _, a, b in found]
        scales[path] = scale.pop()
    if left:
        raise ValueError(
            f"no weight of the params is {sorted(left)[0]!r}, nor {len(left) - 1} others"
        )
    projection = dataclasses.replace(
        rule,
        rank=lambda path, shape: pairs[path][0][0].shape[0] if path in pairs else 1,
        select=lambda path, shape: path in pairs,
    )
    own = {}
    for path, spec in specs(projection, params).items():
        a, b = (jnp.stack(side) for side in zip(*pairs[path], strict=True))
        if not spec.batch:
            a, b = a[0], b[0]
        pair = from_matrices(spec, _transposed(a), _transposed(b))
        own[path] = dict(zip(("down", "up"), pair, strict=True))

    def init(key: Any, params: Any) -> Any:
        del key, params
        return own

    def scale_of(spec: Spec) -> float:
        return scales[spec.path]

    return Adapter(init, pair_factors(projection, scale_of), projection, scale_of), own


def _sides(projection: Projection, params: Any) -> dict[str, str | None]:
    return {plan.path: plan.side for plan in plans_of(projection, params)}


def _all_specs(rule: Projection, params: Any) -> dict[str, Spec]:
    return {plan.path: plan.spec for plan in plans_of(rule, params) if plan.spec}


def _modules(spec: Spec, modules: Modules) -> Iterator[tuple[int | None, Any, str]]:
    """Yields the index, the position in the arrays, and the torch name of each matrix of a leaf."""
    if len(spec.batch) > 1:
        raise ValueError(
            f"{spec.path!r}: PEFT has matrices, found {len(spec.batch)} batch axes of shape {spec.shape}"
        )
    if not spec.batch:
        yield None, ..., modules(spec.path, None)
        return
    for index in range(spec.shape[spec.batch[0]]):
        yield index, index, modules(spec.path, index)


def _check_config(config: dict[str, Any]) -> None:
    """Raises a ValueError unless the settings are those of plain LoRA."""
    wanted = {"peft_type": ("LORA",), "bias": ("none", None)}
    for name, values in wanted.items():
        if config.get(name) not in values:
            raise ValueError(f"{name} must be {values[0]!r}, found {config.get(name)!r}")
    for name in ("use_dora", "modules_to_save", "layer_replication", "lora_bias", "use_qalora"):
        if config.get(name):
            raise ValueError(f"{name} must not be set, found {config[name]!r}")


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    """Returns `alpha / r`, or `alpha / √r`; patterns match the end of a module's name, as in PEFT."""
    alpha = config.get("lora_alpha", rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _entries(spec: Spec) -> int:
    """Returns the number of entries of one matrix of a leaf."""
    count = 1
    for axis, length in enumerate(spec.shape):
        count *= 1 if axis in spec.batch else length
    return count


def _transposed(matrix: Any) -> Any:
    return jnp.swapaxes(matrix, -1, -2)


def _plain(number: float) -> int | float:
    return int(number) if float(number).is_integer() else float(number)


def _to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
