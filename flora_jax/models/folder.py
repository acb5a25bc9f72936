"""Folder: a checkpoint in Hugging Face's layout, as it is found; a stranger's, so that nothing in it is trusted.

No pickle is opened, no name leaves the folder, and what is damaged or quantized is refused before memory is taken.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from flora_jax.models.checkpoint import INDEX, ONE
from flora_jax.models.config import FILE, read
from flora_jax.models.tensor_file import Tensor, tensors_of

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
"""Endings of files that run code when they are read, and so are not."""
_WEIGHTS = (*PICKLES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot")


def opened(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the entries of `config.json` and the tensors of all files, by name; only headers are read.

    Raises:
      ValueError: A file is missing, damaged, a pickle, or its weights are quantized.
    """
    config = read(_file(folder, FILE))
    if config.get("quantization_config"):
        raise quantized(folder, f"quantization_config is {_method(config['quantization_config'])}")
    found: dict[str, Tensor] = {}
    for name, expected in files_of(folder).items():
        tensors = tensors_of(folder / name)
        missing = [key for key in expected if key not in tensors]
        if missing:
            raise ValueError(
                f"{missing[0]!r} is named by {folder / INDEX} and not in {folder / name}"
            )
        found |= tensors
    return config, found


def files_of(folder: Path) -> dict[str, list[str]]:
    """Returns the files of weights, each with the tensors that the index says it has; none where there is no index.

    Raises:
      ValueError: A file is missing, or the index cannot be read or names what is not a file of this folder.
    """
    if not (folder / INDEX).exists():
        _file(folder, ONE)
        return {ONE: []}
    try:
        where = json.loads((folder / INDEX).read_text())["weight_map"]
        named = {key: str(name) for key, name in where.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{folder / INDEX} must be a JSON object with weight_map, names of tensors with their "
            "files, found none"
        ) from error
    files: dict[str, list[str]] = {}
    for key, name in named.items():
        if name != Path(name).name or "\\" in name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{folder / INDEX} must name *.safetensors in its own folder, found {name!r}"
            )
        files.setdefault(name, []).append(key)
    for name in files:
        _file(folder, name)
    return files


def quantized(source: Path, how: str) -> ValueError:
    """Returns the error that says of a checkpoint that it is quantized, and how."""
    return ValueError(
        f"{source} is quantized ({how}); flora_jax trains checkpoints in bfloat16, float16 or "
        "float32: give the one that this was made from"
    )


def copy_companions(folder: Path, to: Path) -> None:
    """Copies what lies beside the weights: tokenizer, template, licence, and so on.

    Left out are the configuration and the weights in any format, with their indices; folders that hold weights,
    hidden folders, and those that are links.
    """
    for root, folders, names in os.walk(folder):
        here = Path(root)
        folders[:] = [name for name in folders if _is_companion_folder(here / name)]
        for name in names:
            first = here == folder and name == FILE
            if first or _is_of_weights(name) or not (here / name).is_file():
                continue
            target = to / here.relative_to(folder) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(here / name, target)


def _is_companion_folder(folder: Path) -> bool:
    if folder.name.startswith(".") or folder.is_symlink():
        return False
    return not any(_is_of_weights(file.name) for file in folder.iterdir())


def _is_of_weights(name: str) -> bool:
    return name.lower().removesuffix(".index.json").endswith(_WEIGHTS)


def _method(config: Any) -> str:
    if not isinstance(config, dict):
        return repr(config)
    old = any(config.get(name) for name in ("load_in_8bit", "load_in_4bit"))
    return str(config.get("quant_method", "bitsandbytes" if old else "of no named method"))


def _file(folder: Path, name: str) -> Path:
    file = folder / name
    if file.is_file():
        return file
    if name == ONE:
        pickles = sorted(x.name for x in folder.glob("*") if x.suffix in PICKLES)
        if pickles:
            raise ValueError(
                f"{folder} has its weights as a pickle only, {pickles[0]}, which may run code when "
                "it is read; convert it to safetensors"
            )
    raise ValueError(
        f"{file} is missing; a checkpoint is a folder with {FILE} and {ONE}, or a .gguf file"
    )
