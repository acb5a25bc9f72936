"""A run: plan, train, validate, save, export."""

import contextlib
import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil
from filelock import FileLock, Timeout
from jax.experimental import multihost_utils
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from flora_jax.finetune import layout, report, sizes
from flora_jax.finetune.answers import answers
from flora_jax.finetune.batches import Data, prepare
from flora_jax.finetune.checkpoints import Checkpoints
from flora_jax.finetune.problem import Problem, problem, put, shape_for
from flora_jax.finetune.settings import Settings
from flora_jax.finetune.stopping import Stopped, told_to_stop
from flora_jax.finetune.tokenizer import Tokenizer
from flora_jax.memory.estimate import GIB
from flora_jax.models import decoder, families, gguf_tokenizer
from flora_jax.models.load import load, opened
from flora_jax.models.save import save

PARTS = 10
"""Validations, and checkpoints, of a run by default."""


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
    with _alone(settings.run):
        return _finetune(settings, config, console)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder; several processes of one run have one lock, that of the first."""
    if jax.process_index():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=0):
            yield
    except Timeout as error:
        raise ValueError(
            f"out: another run is at work in {folder}; wait for it, or give another --out"
        ) from error


def _finetune(settings: Settings, config: dict[str, Any], console: Console) -> dict[str, Any]:
    source = Path(settings.model)
    mesh = layout.make_mesh(settings.mesh)
    settings = dataclasses.replace(settings, batch=settings.batch or layout.parts(mesh))
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
    found = gguf_tokenizer.read_tokenizer(source)
    return Tokenizer(
        found.tokenizer,
        bos=found.ids.get("bos_token_id"),
        eos=found.ids.get("eos_token_id") or (),
        pad=found.ids.get("pad_token_id"),
        template=found.template,
    )


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
    rows = settings.rows * settings.accumulated
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
    if size is not None:
        console.print(report.plan(settings, given.model.shape.model_type, size, room, given.steps))
        if room is None or size.total <= room:
            return size

    def other(settings: Settings) -> sizes.Sizes | None:
        try:
            return problem(settings, config, given.mesh, given.steps, given.scored).measured()
        except ValueError:
            return None

    with console.status("It does not fit. Looking for what does"):
        found = sizes.fitting(settings, room, other)
    needed = "more than there is" if size is None else f"{size.total / GIB:.2f} GiB"
    there = "" if room is None else f", which has {room / GIB:.2f}"
    said = ", or ".join(f"{flags} ({x.total / GIB:.2f} GiB)" for flags, x in found)
    raise ValueError(
        f"this does not fit: {needed} on each device{there}; "
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
    settings, method = given.settings, given.method
    source = Path(settings.model)
    kept = {**settings.kept(), "model": _source_digest(source), "data": data.digest}
    checkpoints = Checkpoints(settings.run, {**kept, "steps": given.steps}, keep=2)
    first = checkpoints.newest()
    for sentence in checkpoints.passed_over:
        console.print(f"Passed over {sentence}.", markup=False)
    frozen, state = _start(given, data, console, trained=first > 0)
    batches = data.batches(settings.rows, settings.seed)
    history: dict[str, Any] = {"train": [], "validation": [], "seconds": 0.0, "answers": []}
    history["data"] = batches.get_state()
    evaluate = _evaluation(given, data)
    show = report.Log(settings.run, console)
    first, state, history = checkpoints.restore(state, history)
    if first:
        batches.set_state(history["data"])
        console.print(f"Going on from step {first} of {given.steps}.")
    else:
        with jax.set_mesh(given.mesh):
            before = evaluate(frozen, state)
            base = state["params"] if frozen is None else frozen
            history["answers"] = answers(given, data, tokenizer, base)
            del base
        if before is not None:
            history["validation"].append((0, before))
    show.begin(history, first)
    state = _loop(given, frozen, state, first, batches, history, evaluate, checkpoints, show)
    _save_adapter(given, state)
    with jax.set_mesh(given.mesh):
        params = method.params(frozen, state)
        after = answers(given, data, tokenizer, params)
    with console.status(f"Writing {settings.out}"):
        plain = families.module(dataclasses.replace(given.model.shape, sharded=()))
        save(settings.out, plain, params, like=source)
    losses = [value for _, value in history["validation"]]
    figures = {
        "method": settings.method,
        "before": losses[0] if losses else None,
        "after": losses[-1] if losses else None,
        "seconds": history["seconds"],
        "steps": given.steps,
        "tokens": history["train"][-1][0],
        "planned": planned._asdict(),
        "device": jax.devices()[0].device_kind,
        "answers": [
            {**start, "after": end["text"]}
            for start, end in zip(history["answers"], after, strict=True)
        ],
        "history": {name: history[name] for name in ("train", "validation")},
    }
    if jax.process_index() == 0:
        show.end(settings, figures)
    return figures


def _start(given: Problem, data: Data, console: Console, trained: bool) -> tuple[Any, Any]:
    """Returns the frozen params and the state; of a state that is in a checkpoint the shapes alone.

    Args:
      given: The problem.
      data: The data, of which a method may take a batch to begin with.
      console: Where it says what it does.
      trained: Whether there is a checkpoint.
    """
    settings, method = given.settings, given.method
    shapes, state = given.started()
    params = None
    if not trained or shapes is not None:
        shardings = jax.tree.map(lambda x: x.sharding, given.outline)
        dtype = jax.tree.leaves(given.outline)[0].dtype
        with console.status("Reading the weights"):
            _, params = load(settings.model, dtype, shardings)
    if trained:
        return params if shapes is not None else None, state
    places = {
        name: jax.tree.map(lambda x: x.sharding, part)
        for name, part in state.items()
        if name != "params"
    }

    def rest(params: Any, batch: Any) -> dict[str, Any]:
        made = method.init(params, batch)[1]
        return {name: part for name, part in made.items() if name != "params"}

    batch = put(given, next(iter(data.batches(settings.rows, settings.seed))), 1.0)
    with jax.set_mesh(given.mesh):
        made = jax.jit(rest, out_shardings=places)(params, batch)
    if "params" in state:
        return None, {**made, "params": params}
    return params, made


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


def _evaluation(given: Problem, data: Data) -> Callable[[Any, Any], float | None]:
    """Returns a function from frozen params and state to the mean validation loss, nats a token that counts.

    It gives None without such data.
    """
    settings = given.settings
    most = max(1, settings.validation_rows // settings.rows)
    batches = []
    for batch in data.validation_batches(settings.rows):
        if len(batches) == most:
            break
        batches.append((put(given, batch, 1.0), float(np.sum(batch["weights"]))))
    value = jax.jit(given.method.loss)

    def evaluate(frozen: Any, state: Any) -> float | None:
        if not batches:
            return None
        losses = [(value(frozen, state, batch), count) for batch, count in batches]
        total = sum(count for _, count in losses)
        return sum(float(one) * count for one, count in losses) / max(total, 1.0)

    return evaluate


def _loop(
    given: Problem,
    frozen: Any,
    state: Any,
    first: int,
    batches: Any,
    history: dict[str, Any],
    evaluate: Callable[[Any, Any], float | None],
    checkpoints: Checkpoints,
    show: report.Log,
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
                state, value = method.step(frozen, state, put(given, batch, count / step))
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
                value = evaluate(frozen, state)
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
        return f"peak {stats['peak_bytes_in_use'] / GIB:.2f} GiB"
    return f"process {psutil.Process().memory_info().rss / GIB:.2f} GiB"
