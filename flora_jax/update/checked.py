"""Checked: an update with sketches, whose failures inside of optax are said in a sentence."""

from types import TracebackType
from typing import Any

import jax
import optax

from flora_jax.chain import recorder, wrappers
from flora_jax.chain.sketch import is_sketch


def update(
    tx: optax.GradientTransformationExtraArgs,
    grads: Any,
    opt_state: Any,
    params: Any,
    extra_args: dict[str, Any],
) -> tuple[Any, Any]:
    """Returns `tx.update(grads, opt_state, params, **extra_args)`.

    Raises:
      ValueError: A sketch is of a leaf that no `project` in `tx` compresses, a transformation before it cannot
        take sketches, or the structure of the state changes because of them.
    """
    sketched = _sketches(grads)
    if not sketched:
        return tx.update(grads, opt_state, params, **extra_args)
    with recorder.recording() as handled:
        try:
            updates, state = tx.update(grads, opt_state, params, **extra_args)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            name = _failing(error.__traceback__)
            if name is None:
                raise
            known = handled | _compressed(tx, opt_state, params, extra_args, error)
            _refuse_unhandled([path for path in sketched if path not in known])
            raise ValueError(wrappers.way(name)) from error
    _refuse_unhandled(_sketches(updates))
    if kept := _sketches(state):
        raise ValueError(
            f"tx must keep the structure of its state, found the sketch of {kept[0]!r} in it: a "
            "transformation before flora_jax.project cannot take sketches; put it after "
            "flora_jax.decompress, as flora_jax.flora(None, optimizer=optax.chain(...))"
        )
    return updates, state


def _sketches(tree: Any) -> list[str]:
    """Returns the names of the weights of all sketches in a tree."""
    leaves = jax.tree.leaves(tree, is_leaf=is_sketch)
    return [leaf.spec.path for leaf in leaves if is_sketch(leaf)]


def _refuse_unhandled(paths: list[str]) -> None:
    if paths:
        raise ValueError(
            f"{paths[0]!r}: found a sketch, expected an ordinary gradient, since no flora_jax.project of tx "
            "compresses this leaf; leave it out of the projection with mask=, or use "
            "flora_jax.make_train_step"
        )


def _compressed(tx, opt_state, params, extra_args, error: Exception) -> set[str]:
    """Returns the leaves that `tx` compresses; raises the error where it fails for ordinary gradients too."""
    try:
        return recorder.compressed(tx, opt_state, params, **extra_args)
    except Exception:
        raise error from None


def _failing(traceback: TracebackType | None) -> str | None:
    """Returns the name of optax's transformation that failed; None where it was not one of optax's."""
    name = None
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if "flora_jax" in code.co_filename.replace("\\", "/").split("/"):
            name = None
        elif found := wrappers.name_of(code):
            name = found if code.co_name.startswith("update") else name
        traceback = traceback.tb_next
    return name
