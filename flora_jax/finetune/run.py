"""A run: plan, train, validate, save, export.

In the shape descriptions `B` is a micro-batch, `T` a sequence.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from flora_jax.finetune import layout, methods, report, sizes
from flora_jax.finetune.batches import Data, prepare
from flora_jax.finetune.checkpoints import Checkpoints
from flora_jax.finetune.settings import Settings
from flora_jax.finetune.stopping import Stopped, told_to_stop
from flora_jax.finetune.tokenizer import Tokenizer
from flora_jax.models import decoder, families, generate, gguf_tokenizer, gpt2
from flora_jax.models.config import shape_of
from flora_jax.models.gguf_file import open_gguf
from flora_jax.models.load import load, opened
from flora_jax.models.save import save
from flora_jax.sharding.state import state_shardings

ARRAYS = ("tokens", "segments", "positions")
"""The arrays of a micro-batch that are `(B, T)`."""
SCORED = ("targets", "weights", "places")
"""Those that are `(B, K)`: the tokens that count, their weights and their places in the sequence."""
ROUND = 64
"""`K` is a multiple of this."""
PARTS = 10
"""Validations, and checkpoints, of a run by default."""


class Problem(NamedTuple):
    """A model and a method on a mesh.

    Attributes:
      settings: The settings.
      mesh: The mesh.
      model: The Flax module.
      outline: The shapes of its params, with shardings.
      method: The method.
      steps: The number of optimizer steps.
      scored: `K`, the most tokens of a sequence whose loss counts; logits of others are not computed.
    """

    settings: Settings
    mesh: Mesh
    model: Any
    outline: Any
    method: methods.Method
    steps: int
    scored: int

    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of a micro-batch."""
        size, length = self.settings.batch, self.settings.length
        place = layout.of_batch(self.mesh, size)
        lengths = {**dict.fromkeys(ARRAYS, length), **dict.fromkeys(SCORED, self.scored)}
        shapes = {
            name: jax.ShapeDtypeStruct(
                (size, n), jnp.float32 if name == "weights" else jnp.int32, sharding=place
            )
            for name, n in lengths.items()
        }
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        return {**shapes, "share": jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)}

    def started(self) -> tuple[Any, Any]:
        """Returns the shapes of the frozen params and of the state, with shardings."""
        frozen, state = jax.eval_shape(self.method.init, self.outline, self.batch())
        if frozen is not None:
            frozen = self.outline
        return frozen, self._placed(state)

    def _placed(self, state: Any) -> Any:
        """Gives each leaf of the state the sharding that follows from those of the params."""
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        put = lambda x, s=everywhere: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
        if "params" not in state or self.mesh.size == 1:
            return jax.tree.map(put, state)
        placed = {name: jax.tree.map(put, part) for name, part in state.items()}
        placed["params"] = self.outline
        found = jax.tree.leaves(state_shardings(self.method.tx, self.outline))
        leaves, structure = jax.tree.flatten(state.get("opt_state"))
        if len(found) == len(leaves):
            placed["opt_state"] = jax.tree.unflatten(structure, map(put, leaves, found))
        return placed

    def measured(self) -> sizes.Sizes:
        """Compiles the step and returns what it takes."""
        frozen, state = self.started()
        batch = self.batch()
        with jax.set_mesh(self.mesh):
            lowered = self.method.lower(frozen, state, batch)
            return sizes.measure(lowered, frozen, state, batch)


def shape_for(settings: Settings, config: dict[str, Any], mesh: Mesh) -> Any:
    """Returns the shape of the model of a `config.json`, as this run trains it.

    Raises:
      ValueError: The model is none that writes text, or asks for what the models here have not.
    """
    kind: Any = settings.dtype
    if kind == "auto":
        kind = "float32" if jax.default_backend() == "cpu" else None
    shape = shape_of(config, kind)
    if not isinstance(shape, decoder.Shape | gpt2.Shape):
        raise ValueError(
            f"model must be a decoder to be fine-tuned, found model_type {shape.model_type!r}"
        )
    limit = shape.positions if isinstance(shape, gpt2.Shape) else None
    if limit is not None and settings.length > limit:
        raise ValueError(
            f"length must be at most {limit}, the positions of this model, found {settings.length}"
        )
    over: tuple[Any, ...] = ()
    if mesh.size > 1:
        over = (layout.BATCH, "model") if isinstance(shape, decoder.Shape) else (layout.BATCH,)
        if isinstance(shape, decoder.Shape) and shape.key_heads % mesh.shape["model"]:
            raise ValueError(
                f"mesh: model must divide the {shape.key_heads} key heads of this model, found "
                f"{mesh.shape['model']}"
            )
    return dataclasses.replace(shape, remat=settings.remat, sharded=over)


def problem(
    settings: Settings, config: dict[str, Any], mesh: Mesh, steps: int, most: int
) -> Problem:
    """Returns the model and the method that the settings ask for; nothing is compiled or read.

    Args:
      settings: The settings.
      config: The model's configuration.
      mesh: The mesh.
      steps: The number of optimizer steps.
      most: The most tokens of a sequence whose loss counts.
    """
    if settings.batch % layout.parts(mesh):
        raise ValueError(
            f"batch must be a multiple of the mesh's data x fsdp, {layout.parts(mesh)}, found {settings.batch}"
        )
    model = families.module(shape_for(settings, config, mesh))
    outline = families.outline(model)
    outline = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        outline,
        layout.of_params(mesh, outline),
    )
    method = methods.build(settings, partial(loss, model), model, outline, steps)
    scored = min(settings.length, -(-most // ROUND) * ROUND)
    return Problem(settings, mesh, model, outline, method, steps, scored)


def loss(model: Any, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """Returns a micro-batch's part of the mean loss of an optimizer step, nats a token that counts.

    The mean over the micro-batches of a step is the mean over all of its tokens: `share` is the part of
    the step's tokens that are in this micro-batch, times the number of micro-batches.
    """
    return _mean(model, params, batch) * batch["share"]


def _mean(model: Any, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    found: Any = model.apply(
        {"params": params},
        batch["tokens"],
        batch["targets"],
        batch["weights"],
        positions=batch["positions"],
        segments=batch["segments"],
        places=batch["places"],
    )
    return found


def finetune(settings: Settings, console: Console) -> dict[str, Any]:
    """Runs, or goes on, and returns the figures of the final table.

    Raises:
      Stopped: The run was told to stop by SIGTERM or Ctrl-C; the state is saved.
      ValueError: Something of the user's does not fit; the sentence says what.
    """
    source = Path(settings.model)
    if settings.out.exists():
        raise ValueError(f"out: {settings.out} is there already; give another folder with --out")
    config, _ = opened(source)
    mesh = layout.make_mesh(settings.mesh)
    shape = shape_for(settings, config, mesh)
    tokenizer = tokenizer_of(source)
    tokenizer.check(shape.vocabulary)
    data = _data(settings, tokenizer, console)
    steps = _steps(settings, data)
    most = max(data.train.most, data.validation.most)
    given = problem(settings, config, mesh, steps, most)
    planned = _plan(given, config, console)
    if settings.plan_only:
        return {"planned": planned._asdict()}
    return _train(given, data, tokenizer, planned, console)


def tokenizer_of(source: Path) -> Tokenizer:
    """Returns the tokenizer of a checkpoint's folder or of a `.gguf` file."""
    if not source.is_file():
        return Tokenizer.load(source)
    metadata = open_gguf(source).metadata
    found = gguf_tokenizer.tokenizer_of(metadata)
    ids = {
        name: found.tokenizer.token_to_id(found.specials[f"{name}_token"])
        for name in ("bos", "eos", "pad")
        if f"{name}_token" in found.specials
    }
    return Tokenizer(found.tokenizer, **ids, template=found.template)


def _data(settings: Settings, tokenizer: Tokenizer, console: Console) -> Data:
    with console.status("Reading the data") as status:
        data = prepare(
            settings.data,
            tokenizer,
            length=settings.length,
            loss=settings.loss,
            held_out=settings.held_out,
            validation=settings.validation or None,
            cache=settings.run / "data",
            seed=settings.seed,
            pack=settings.packed,
            too_long=settings.too_long,
            progress=lambda done, total: status.update(f"Tokenizing {done:,} of {total:,}"),
        )
    for line in data.report:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return data


def _steps(settings: Settings, data: Data) -> int:
    if settings.steps is not None:
        return settings.steps
    rows = settings.batch * settings.accumulated
    return max(1, math.ceil(data.train.rows * settings.epochs / rows))


def _plan(given: Problem, config: dict[str, Any], console: Console) -> sizes.Sizes:
    """Shows what the step takes, and refuses it where it does not fit.

    Raises:
      ValueError: It does not fit; the sentence says what does.
    """
    settings = given.settings
    with console.status("Compiling the step, to know what it takes"):
        size = given.measured()
    room = sizes.capacity(settings)
    console.print(report.plan(settings, given.model.shape.model_type, size, room, given.steps))
    if room is None or size.total <= room:
        return size

    def other(settings: Settings) -> sizes.Sizes | None:
        try:
            return problem(settings, config, given.mesh, given.steps, given.scored).measured()
        except (ValueError, jax.errors.JaxRuntimeError):
            return None

    with console.status("It does not fit. Looking for what does"):
        found = sizes.fitting(settings, room, other)
    said = ", or ".join(f"{flags} ({x.total / sizes.GIB:.2f} GiB)" for flags, x in found)
    raise ValueError(
        f"this does not fit: {size.total / sizes.GIB:.2f} GiB on each device, which has {room / sizes.GIB:.2f}; "
        + (f"what fits: {said}" if said else "no smaller setting was found that fits")
    )


def _source_digest(source: Path) -> str:
    """Returns a digest of a checkpoint's configuration and of the sizes of its files."""
    files = [source] if source.is_file() else sorted(source.glob("*.safetensors"))
    sums = hashlib.sha256()
    for file in files:
        sums.update(f"{file.name} {file.stat().st_size};".encode())
    if source.is_dir():
        sums.update((source / "config.json").read_bytes())
    return sums.hexdigest()[:16]


def _train(
    given: Problem, data: Data, tokenizer: Tokenizer, planned: sizes.Sizes, console: Console
) -> dict[str, Any]:
    settings, mesh, method = given.settings, given.mesh, given.method
    source = Path(settings.model)
    kept = {**settings.kept(), "model": _source_digest(source), "data": data.digest}
    checkpoints = Checkpoints(settings.run, {**kept, "steps": given.steps}, keep=2)
    shardings = jax.tree.map(lambda x: x.sharding, given.outline)
    dtype = jax.tree.leaves(given.outline)[0].dtype
    with console.status("Reading the weights"):
        _, params = load(source, dtype, shardings)
    evaluate = _evaluation(given, data)
    show = report.Log(settings.run, console)
    with jax.set_mesh(mesh):
        before = evaluate(params)
        first_answers = _answers(given, data, tokenizer, params)
        frozen_shapes, state_shapes = given.started()
        del frozen_shapes
        example = _put(given, next(iter(data.batches(settings.batch, settings.seed))), 1.0)
        places = jax.tree.map(lambda x: x.sharding, state_shapes)
        frozen, state = None, None
        if "own" in state_shapes:
            frozen = params
            make = jax.jit(lambda p, b: method.init(p, b)[1], out_shardings=places)
            state = make(params, example)
        else:
            rest = jax.jit(
                lambda p, b: {k: v for k, v in method.init(p, b)[1].items() if k != "params"},
                out_shardings={k: v for k, v in places.items() if k != "params"},
            )(params, example)
            state = {**rest, "params": params}
    del params
    batches = data.batches(settings.batch, settings.seed)
    history: dict[str, Any] = {
        "train": [],
        "validation": [],
        "seconds": 0.0,
        "answers": first_answers,
    }
    history["data"] = batches.get_state()
    first, state, history = checkpoints.restore(state, history)
    batches.set_state(history["data"])
    for sentence in checkpoints.passed_over:
        console.print(f"Passed over {sentence}.", markup=False)
    if first:
        console.print(f"Going on from step {first} of {given.steps}.")
    elif before is not None:
        history["validation"].append((0, before))
    show.begin(history, first)
    trained = _loop(
        given, frozen, state, first, batches, history, evaluate, checkpoints, show, planned
    )
    with jax.set_mesh(mesh):
        params = method.params(frozen, trained)
        answers = _answers(given, data, tokenizer, params)
    with console.status(f"Writing {settings.out}"):
        save(settings.out, _unsharded(given.model), params, like=source)
        _save_adapter(given, trained)
    figures = {
        "method": settings.method,
        "before": history["validation"][0][1] if history["validation"] else None,
        "after": history["validation"][-1][1] if history["validation"] else None,
        "seconds": history["seconds"],
        "steps": given.steps,
        "tokens": history["train"][-1][0] if history["train"] else 0,
        "planned": planned._asdict(),
        "device": jax.devices()[0].device_kind,
        "answers": [
            {**start, "after": end["text"]}
            for start, end in zip(history["answers"], answers, strict=True)
        ],
        "history": {name: history[name] for name in ("train", "validation")},
    }
    if jax.process_index() == 0:
        show.end(settings, figures)
    return figures


def _unsharded(model: Any) -> Any:
    return families.module(dataclasses.replace(model.shape, sharded=()))


def _save_adapter(given: Problem, state: Any) -> None:
    """Writes LoRA's factors for PEFT beside the checkpoints, where the method is one that PEFT reads."""
    if given.method.adapter is None or given.settings.method not in ("lora", "rslora"):
        return
    from flora_jax.adapters import peft
    from flora_jax.models.checkpoint import layout_of

    rules = layout_of(given.model.shape).rules(given.model.shape)

    def module(path: str, index: int | None) -> str:
        return rules[path].name.format(i=index).removesuffix(".weight")

    own = state["own"]
    if given.model.shape.__class__ is decoder.Shape and given.model.shape.experts is not None:
        return  # PEFT has experts of another form
    if jax.process_count() > 1:
        own = multihost_utils.process_allgather(own, tiled=True)
    if jax.process_index() == 0:
        outline = families.outline(given.model)
        peft.save(
            given.settings.run / "adapter",
            given.method.adapter,
            outline,
            own,
            modules=module,
            base_model=given.settings.model,
        )


def _put(given: Problem, batch: dict[str, np.ndarray], share: float) -> dict[str, jax.Array]:
    shapes = given.batch()
    arrays = {name: batch[name] for name in ARRAYS} | _scored(batch, given.scored)
    arrays["share"] = np.float32(share)
    return {
        name: layout.put(shapes[name].sharding, np.asarray(array, shapes[name].dtype))
        for name, array in arrays.items()
    }


def _scored(batch: dict[str, np.ndarray], most: int) -> dict[str, np.ndarray]:
    """Returns places, targets and weights `(B, most)` of the tokens that count, those that do first."""
    places = np.argsort(batch["weights"] == 0, axis=1, kind="stable")[:, :most]
    picked = {name: np.take_along_axis(batch[name], places, 1) for name in ("targets", "weights")}
    return {**picked, "places": places}


def _evaluation(given: Problem, data: Data) -> Callable[[Any], float | None]:
    """Returns a function from params to the mean validation loss, nats a token that counts; None without such data."""
    settings = given.settings
    most = max(1, settings.validation_rows // settings.batch)
    batches = []
    for batch in data.validation_batches(settings.batch):
        if len(batches) == most:
            break
        batches.append((_put(given, batch, 1.0), float(np.sum(batch["weights"]))))
    value = jax.jit(partial(_mean, given.model))

    def evaluate(params: Any) -> float | None:
        if not batches:
            return None
        losses = [(value(params, batch), count) for batch, count in batches]
        total = sum(count for _, count in losses)
        return sum(float(one) * count for one, count in losses) / max(total, 1.0)

    return evaluate


def _answers(given: Problem, data: Data, tokenizer: Tokenizer, params: Any) -> list[dict[str, str]]:
    """Returns prompts of the validation side, what the data has after them, and what the model writes."""
    settings = given.settings
    if jax.process_count() > 1 or not settings.samples:
        return []
    shape = given.model.shape
    limit = shape.positions if isinstance(shape, gpt2.Shape) else settings.length
    room = max(1, limit - settings.sample_tokens)
    prompts = [(prompt[-room:], goal) for prompt, goal in data.prompts(settings.samples)]
    model = families.module(dataclasses.replace(shape, sharded=(), remat=False))
    longest = max((len(prompt) for prompt, _ in prompts), default=0)
    tokens = np.full((len(prompts), longest), tokenizer.pad, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, (prompt, _) in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = True
    ends = tuple(tokenizer.eos) or None
    options: dict[str, Any] = {"count": settings.sample_tokens, "end": ends, "pad": tokenizer.pad}
    if not prompts:
        return []
    if settings.heat:
        options |= {"key": jax.random.key(settings.seed), "heat": settings.heat}
        written = generate.sample(model, params, jnp.asarray(tokens), jnp.asarray(mask), **options)
    else:
        written = generate.greedy(model, params, jnp.asarray(tokens), jnp.asarray(mask), **options)
    return [
        {
            "prompt": tokenizer.decode(prompt),
            "goal": tokenizer.decode(goal[: settings.sample_tokens]),
            "text": tokenizer.decode(_until(row, ends)),
        }
        for (prompt, goal), row in zip(prompts, np.asarray(written).tolist(), strict=True)
    ]


def _until(tokens: list[int], ends: tuple[int, ...] | None) -> list[int]:
    for i, token in enumerate(tokens):
        if token in (ends or ()):
            return tokens[:i]
    return tokens


def _loop(
    given: Problem,
    frozen: Any,
    state: Any,
    first: int,
    batches: Any,
    history: dict[str, Any],
    evaluate: Callable[[Any], float | None],
    checkpoints: Checkpoints,
    show: "report.Log",
    planned: sizes.Sizes,
) -> Any:
    settings, method, total = given.settings, given.method, given.steps
    every = max(1, settings.validate_every or math.ceil(total / PARTS))
    save_every = max(1, settings.save_every or every)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} {task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=show.console, disable=jax.process_index() > 0)
    with (
        contextlib.closing(checkpoints),
        jax.set_mesh(given.mesh),
        bar as progress,
        told_to_stop() as stop,
    ):
        task = progress.add_task(settings.method, total=total, completed=first, figures="")
        start, before = time.perf_counter(), history["seconds"]
        seen = history["train"][-1][0] if history["train"] else 0
        begun = seen
        for done in range(first + 1, total + 1):
            group = [next(batches) for _ in range(settings.accumulated)]
            counts = [float(np.sum(batch["weights"])) for batch in group]
            step = max(sum(counts), 1.0) / len(group)
            losses = []
            for batch, count in zip(group, counts, strict=True):
                state, value = method.step(frozen, state, _put(given, batch, count / step))
                losses.append(value)
            seen += sum(int((batch["segments"] > 0).sum()) for batch in group)
            mean = float(np.mean([float(value) for value in losses]))
            if not math.isfinite(mean):
                raise ValueError(
                    f"the loss of step {done} is {mean}; the last checkpoint is kept in {settings.run}: give a "
                    "smaller --rate and another --out"
                )
            history["seconds"] = seconds = before + time.perf_counter() - start
            history["train"].append((seen, mean))
            speed = (seen - begun) / max(time.perf_counter() - start, 1e-9)
            show.step(done, mean, speed)
            figures = f"loss {mean:.3f}  {speed:,.0f} tokens/s  {_held()}"
            progress.update(task, completed=done, figures=figures)
            checkpoints.seal()
            told = stop(done)
            if done % every == 0 or done == total:
                value = evaluate(method.params(frozen, state))
                if value is not None:
                    history["validation"].append((seen, value))
                    show.validation(done, value)
                start, before, begun = time.perf_counter(), seconds, seen
            if done % save_every == 0 or done == total or told:
                history["data"] = batches.get_state()
                checkpoints.save(done, state, history)
            if told and done < total:
                raise Stopped(f"Stopped at step {done}, saved; the same command goes on.")
    return state


def _held() -> str:
    """Says what the device, or on a CPU the process, holds at most so far."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return f"peak {stats['peak_bytes_in_use'] / sizes.GIB:.2f} GiB"
    return f"process {psutil.Process().memory_info().rss / sizes.GIB:.2f} GiB"


def digest_of(settings: Settings) -> str:
    """Returns a digest of the settings that a run keeps."""
    return hashlib.sha256(json.dumps(settings.kept(), default=str).encode()).hexdigest()[:16]
