"""This command times training steps on the GPU or TPU that is there: tokens a second, peak bytes, share of the peak FLOPs.

    python -m experiments.bench.accelerator                        # some ten minutes; it prints as it goes
    python -m experiments.bench.accelerator --shapes LLaMA-1B --methods flora exact
    python -m experiments.bench.accelerator --shapes LLaMA-test --length 64 --rounds 1     # on a CPU, a trial
    python -m experiments.bench.accelerator --in-turn --shapes LLaMA-60M --batch 2 --length 128 --micro-batches 4

LLaMA in bfloat16, layers under `scan` with remat, from the smallest shape to the largest that a method holds. Each method runs in a
process of its own, so that its peak is its own, and one that runs out of memory takes nothing else with it. With `--ahead 8` all steps are compiled
before anything is timed, eight at once: on a machine that is paid by the minute that is most of the time. Methods that accumulate do so over
`micro_batches` micro-batches, and a time is that of them all with their optimizer step; the others take as many optimizer steps on the same tokens.
FLOPs are those of uncompressed training, six for each weight that is not an embedding and each token, and twelve
for each layer, each token and each pair of a channel and a token that attention looks at: sketches and LoRA take fewer, so that
their share says how fast they train, not how busy the chip is. With `--in-turn` all methods run in one process, one micro-step of each after
the other, so that what else the machine does meets them all alike: then times are ratios, in float32. Peak FLOPs are the data sheets', dense, in bfloat16.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import matplotlib

matplotlib.use("Agg")
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
import tyro
from rich.console import Console

import flora_jax
from experiments import report
from experiments.bench import chips, interleaved, records
from flora_jax.adapters import lora
from flora_jax.finetune.muon import muon
from flora_jax.memory.compiled import compiled_bytes
from flora_jax.models import decoder, families
from flora_jax.update.ordinary_step import ordinary_step

SHAPES = {
    "LLaMA-test": decoder.Shape(
        vocabulary=256, width=128, hidden=344, layers=2, heads=4, key_heads=4
    ),
    "LLaMA-60M": decoder.SHAPES["LLaMA-60M"],
    "LLaMA-350M": decoder.SHAPES["LLaMA-350M"],
    "LLaMA-1B": decoder.Shape(width=2048, hidden=5504, layers=24, heads=16, key_heads=16),
    "LLaMA-3B": decoder.Shape(width=3200, hidden=8640, layers=26, heads=32, key_heads=32),
    "LLaMA-7B": decoder.SHAPES["LLaMA-7B"],
    "LLaMA-13B": decoder.SHAPES["LLaMA-13B"],
}
Method = Literal[
    "flora", "int8", "accumulated", "paper", "exact", "stateless", "multisteps", "muon", "lora"
]
TITLES: dict[str, str] = {
    "flora": "Flora, orthogonalized (advised), fused",
    "int8": "Flora, orthogonalized (advised), fused, weights in int8",
    "accumulated": "Flora, orthogonalized, twice the rank in int4, in the backward mode",
    "paper": "Flora, the paper's, fused",
    "exact": "exact gradients, Adafactor",
    "stateless": "exact gradients, orthogonalized, no state",
    "multisteps": "MultiSteps + Adafactor",
    "muon": "MultiSteps + Muon",
    "lora": "LoRA, rank 16, Adam",
}
RATE = 1e-4


@dataclass(frozen=True)
class Config:
    """What is timed."""

    shapes: tuple[Literal[tuple(SHAPES)], ...] = tuple(SHAPES)[1:]  # type: ignore[valid-type]
    """Names of shapes, from small to large."""
    methods: tuple[Method, ...] = tuple(TITLES)  # pyright: ignore[reportAssignmentType]
    """Names of methods."""
    part: int = 8
    """The width of the model divided by the rank of the sketches."""
    batch: int = 4
    """Number of windows in a micro-batch."""
    length: int = 2048
    """Number of tokens in a window."""
    micro_batches: int = 8
    """Number of micro-batches in an optimizer step."""
    rounds: int = 2
    """Number of timed optimizer steps, after one that compiles."""
    minutes: float = 10
    """Time after which no further row is begun, without that of compiling ahead."""
    ahead: int = 0
    """Number of steps that are compiled at once before anything is timed; 0 to compile each when its turn comes."""
    in_turn: bool = False
    """Time all methods in turn in one process, as ratios to `multisteps`; no peaks."""
    out: Path = Path("runs/accelerator")
    """Folder of the table, its JSON and the plot."""
    row: Literal["no", "compile", "time"] = "no"
    """Compile or time the one method here, and print its figures as JSON, one line for each shape; the command calls itself so."""


@dataclass(frozen=True)
class Step:
    """A step of training.

    Attributes:
      init: The function `params -> carry`.
      run: The function `(carry, windows) -> carry`, which may overwrite its carry.
      lower: The function that lowers it, of the same arguments or their shapes.
    """

    init: Callable[[Any], Any]
    run: Callable[[Any, Any], Any]
    lower: Callable[[Any, Any], Any]


def build(config: Config, method: str, model: Any, windows: Any) -> Step:
    """Builds the step of a method."""
    loss, rank = families.loss(model), max(1, model.shape.width // config.part)
    count = config.micro_batches
    tx: Any
    if method in ("flora", "int8", "accumulated", "paper"):
        advised = method != "paper"
        rank = 2 * rank if method == "accumulated" else rank
        projection = flora_jax.Projection(
            rank,
            distribution="srtt" if advised else "srht",
            side="input" if advised else "larger",
            resample_every=64 * count if advised else count,
        )
        tx = flora_jax.flora(
            RATE,
            projection=projection,
            accumulation_steps=count,
            preset="advised" if advised else "paper",
            state_dtype="int4" if method == "accumulated" else "bfloat16",
        )
        step: Any
        if method == "accumulated":
            step = flora_jax.make_train_step(loss, tx, update="backward")
        else:
            rounding = "stochastic" if method == "int8" else "nearest"
            step = flora_jax.make_train_step(loss, tx, projection, rounding=rounding)
        prepared = flora_jax.to_int8 if method == "int8" else None
        return _of_params(lambda params: step.init(params, windows), step, prepared)
    elif method in ("exact", "stateless"):
        if method == "exact":
            tx = optax.adafactor(optax.constant_schedule(RATE))
        else:
            tx = flora_jax.sketched_muon(RATE)
        step = flora_jax.make_train_step(loss, tx, update="backward")
        return _of_params(lambda params: step.init(params, windows), step)
    elif method == "lora":
        return _adapted(lora(16), loss)
    else:
        others = optax.adafactor(RATE)
        inner = others if method == "multisteps" else muon(RATE, others)
        tx = optax.MultiSteps(inner, count).gradient_transformation()
        step = ordinary_step(loss, tx)
    return _of_params(tx.init, step)


def _of_params(init: Callable, step: Any, prepared: Callable | None = None) -> Step:
    def run(carry: Any, windows: Any) -> Any:
        return step(*carry, windows)[:2]

    def start(params: Any) -> Any:
        params = prepared(params) if prepared else params
        return params, jax.jit(init)(params)

    return Step(start, run, lambda carry, windows: step.lower(*carry, windows))


def _adapted(adapter: Any, loss: Callable) -> Step:
    """Builds the step that trains an adapter; the carry has the frozen weights too, which no step touches."""
    tx, of_frozen = optax.adam(RATE), adapter.apply(loss)
    step = ordinary_step(lambda own, frozen, windows: of_frozen(frozen, own, windows), tx)

    def init(params: Any) -> Any:
        own = jax.jit(adapter.init)(jax.random.key(0), params)
        return own, jax.jit(tx.init)(own), params

    def run(carry: Any, windows: Any) -> Any:
        own, state, frozen = carry
        return *step(own, state, frozen, windows)[:2], frozen

    return Step(init, run, lambda carry, windows: step.lower(carry[0], carry[1], carry[2], windows))


def weights(model: Any) -> Any:
    """Makes random weights on the device, leaf by leaf."""
    leaves, structure = jax.tree.flatten(families.outline(model))

    @partial(jax.jit, static_argnums=(1, 2))
    def make(key: Any, shape: tuple[int, ...], dtype: Any) -> Any:
        return 0.02 * jax.random.normal(key, shape, dtype)

    keys = jax.random.split(jax.random.key(0), len(leaves))
    return jax.tree.unflatten(
        structure,
        [make(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)],
    )


def flops(shape: decoder.Shape, tokens: int, length: int) -> float:
    """Gives the FLOPs of uncompressed training on so many tokens."""
    outline = jax.tree_util.tree_leaves_with_path(families.outline(families.module(shape)))
    names = ((jax.tree_util.keystr(path), leaf) for path, leaf in outline)
    matrices = sum(leaf.size for name, leaf in names if "embed" not in name.lower())
    return tokens * (6.0 * matrices + 12.0 * shape.layers * shape.width * length)


def one(config: Config, method: str, name: str) -> dict[str, Any]:
    """Gives the figures of a method at a shape, on the device of this process."""
    shape = SHAPES[name]
    model = families.module(shape)
    random = jax.random.randint(
        jax.random.key(1), (config.batch, config.length + 1), 0, shape.vocabulary
    )
    windows = jax.block_until_ready(random)
    step = build(config, method, model, windows)
    start = time.perf_counter()
    carry = jax.block_until_ready(step.init(weights(model)))
    compiled, times = _compiled(step, carry, windows)
    ready, seconds = 0.0, []
    for _ in range(config.rounds + 1):
        begun = time.perf_counter()
        for _ in range(config.micro_batches):
            carry = step.run(carry, windows)
        jax.block_until_ready(carry)
        seconds.append(time.perf_counter() - begun)
        ready = ready or time.perf_counter() - start
    device = jax.devices()[0]
    tokens = config.batch * config.length * config.micro_batches
    took = median(seconds[1:])
    most = chips.peak(device.device_kind)
    used = (device.memory_stats() or {}).get("peak_bytes_in_use")
    share = flops(shape, tokens, config.length) / took / most if most else None
    return {
        "method": method,
        "shape": name,
        "device": device.device_kind,
        "tokens_per_second": tokens / took,
        "peak_bytes": used,
        "compiled_bytes": compiled_bytes(compiled),
        "share_of_peak": share,
        "seconds_until_timed": ready,
    } | times


def _compiled(step: Step, carry: Any, windows: Any) -> tuple[Any, dict[str, float]]:
    """Gives the compiled step, and the seconds that tracing and compiling it took."""
    begun = time.perf_counter()
    lowered = step.lower(carry, windows)
    traced = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - traced
    return compiled, {"trace_seconds": traced - begun, "compile_seconds": seconds}


def compile_one(config: Config, method: str, name: str) -> dict[str, Any]:
    """Compiles the step of a method at a shape from descriptions of its arguments, for the cache, and gives the seconds."""
    model = families.module(SHAPES[name])
    windows = jax.ShapeDtypeStruct((config.batch, config.length + 1), jnp.int32)
    step = build(config, method, model, windows)
    carry = jax.eval_shape(step.init, families.outline(model))
    return {"method": method, "shape": name} | _compiled(step, carry, windows)[1]


def in_turn(config: Config, name: str) -> dict[str, float]:
    """Gives the seconds of each method for the tokens of an optimizer step, all methods in turn."""
    shape = dataclasses.replace(SHAPES[name], dtype=jnp.float32)
    model = families.module(shape)
    windows = jax.random.randint(
        jax.random.key(1), (config.batch, config.length + 1), 0, shape.vocabulary
    )
    steps = {}
    for method in config.methods:
        step = build(config, method, model, windows)
        steps[method] = (partial(_in_turn, step), None, step.init(weights(model)))
    found = interleaved.seconds(steps, (windows,), config.rounds, config.micro_batches)
    return {method: sum(each) for method, each in found.items()}


def _in_turn(step: Step, _: None, carry: Any, windows: Any) -> tuple[None, Any, None]:
    """Runs a step as `interleaved.seconds` calls it; the carry is the state, which is not copied."""
    return None, step.run(carry, windows), None


def rows(config: Config) -> Iterator[dict[str, Any]]:
    """Gives the figures of each method at each shape as they come, each method from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        variables = {
            "JAX_COMPILATION_CACHE_DIR": folder,  # the step is compiled once more to be looked at
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
            **os.environ,
        }
        before = _ahead(config, variables)
        end = time.monotonic() + 60 * config.minutes
        for method in config.methods:
            left = end - time.monotonic()
            if left <= 0:
                yield {"method": method, "error": "not begun: the time was over"}
                continue
            for row in _child(config, "time", method, config.shapes, variables, left):
                yield row | before.get((method, row.get("shape")), {})


def _ahead(config: Config, variables: dict[str, str]) -> dict[Any, dict[str, float]]:
    """Compiles all steps into the cache, if the config says so, and gives the seconds of each; one that fails says why when it is timed."""
    if not config.ahead:
        return {}
    variables = variables | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # they share the device
    pairs = [(method, name) for name in reversed(config.shapes) for method in config.methods]

    def compiled(pair: tuple[str, str]) -> list[dict[str, Any]]:
        return list(_child(config, "compile", pair[0], pair[1:], variables, config.minutes * 60))

    with ThreadPoolExecutor(config.ahead) as pool:
        found = [row for some in pool.map(compiled, pairs) for row in some if "error" not in row]
    print(f"Compiled {len(found)} of {len(pairs)} steps.", flush=True)
    return {(row.pop("method"), row.pop("shape")): row for row in found}


def _child(
    config: Config,
    what: str,
    method: str,
    shapes: Sequence[str],
    variables: dict[str, str],
    seconds: float,
) -> Iterator[dict[str, Any]]:
    command = [sys.executable, "-m", "experiments.bench.accelerator", "--row", what]
    command += ["--methods", method, "--shapes", *shapes]
    for name in ("part", "batch", "length", "micro_batches", "rounds"):
        command += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    command += ["--minutes", str(seconds / 60)]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, env=variables, stdout=subprocess.PIPE, stderr=said, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
        if process.wait():
            said.seek(0)
            lines = [line for line in said.read().splitlines() if line.strip()]
            named = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
            last = (named or lines or [f"exit status {process.returncode}"])[-1]
            yield {"method": method, "error": last}


def run_row(config: Config) -> None:
    """Prints the figures of the one method, shape by shape, until one does not fit or the time is over."""
    figures = {"compile": compile_one, "time": one}[config.row]
    end = time.monotonic() + 60 * config.minutes
    (method,) = config.methods
    for name in config.shapes:
        if time.monotonic() > end:
            print(json.dumps({"method": method, "shape": name, "error": "the time was over"}))
            return
        try:
            found = figures(config, method, name)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(json.dumps({"method": method, "shape": name, "error": "does not fit"}))
            return
        print(json.dumps(found), flush=True)
        jax.clear_caches()


def words(row: dict[str, Any]) -> tuple[str, ...]:
    """Gives a row of the table."""
    head = row.get("shape", "-"), TITLES[row["method"]]
    if "error" in row:
        return *head, row["error"], "", "", ""
    gib, share = 2**30, row["share_of_peak"]
    return (
        *head,
        f"{row['tokens_per_second']:,.0f}",
        f"{row['peak_bytes'] / gib:.2f}" if row["peak_bytes"] else "-",
        f"{row['compiled_bytes'] / gib:.2f}",
        f"{share:.3f}" if share else "-",
    )


def plot(found: list[dict[str, Any]], folder: Path) -> None:
    """Draws memory against speed, a panel for each shape, as PNG and SVG."""
    good = [row for row in found if "error" not in row]
    shapes = list(dict.fromkeys(row["shape"] for row in good))
    figure, panels = plt.subplots(
        1, len(shapes), figsize=(3.6 * len(shapes), 3.8), layout="constrained", squeeze=False
    )
    colours = dict(zip(TITLES, plt.get_cmap("tab10").colors, strict=False))  # pyright: ignore[reportAttributeAccessIssue]
    for axes, shape in zip(panels[0], shapes, strict=True):
        for row in good:
            if row["shape"] == shape:
                memory = (row["peak_bytes"] or row["compiled_bytes"]) / 2**30
                axes.scatter(
                    row["tokens_per_second"],
                    memory,
                    color=colours[row["method"]],
                    label=TITLES[row["method"]],
                )
        axes.set(title=shape, xlabel="tokens a second", ylabel="GiB at the worst moment")
        axes.grid(alpha=0.3)
    named = {
        label: handle
        for axes in panels[0]
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(named.values(), named.keys(), frameon=False, loc="outside lower center", ncols=2)
    figure.suptitle(good[0]["device"])
    records.save_figure(figure, folder / "accelerator")


def main(config: Config) -> list[dict[str, Any]]:
    if config.row != "no":
        run_row(config)
        return []
    if config.in_turn:
        return _ratios(config)
    console, found = Console(width=120), []
    config.out.mkdir(parents=True, exist_ok=True)
    for row in rows(config):
        found.append(row)
        console.print(*words(row), sep="  ")
        given = {
            name: value for name, value in asdict(config).items() if name not in ("out", "row")
        }
        records.keep({"config": given, "rows": found}, config.out / "accelerator.json")
    heads = ["shape", "method", "tokens a second", "GiB in use", "GiB compiled", "share of peak"]
    device = next((row["device"] for row in found if "device" in row), "no device")
    title = (
        f"{device}, {config.batch} x {config.length} tokens, {config.micro_batches} micro-batches"
    )
    order = {name: place for place, name in enumerate(SHAPES)}
    found.sort(key=lambda row: order.get(row.get("shape", ""), len(order)))
    console.print(report.table(title, heads, [words(row) for row in found]))
    if any("error" not in row for row in found):
        plot(found, config.out)
        console.print(f"Table and picture: {config.out}/accelerator.json, .png, .svg")
    return found


def _ratios(config: Config) -> list[dict[str, Any]]:
    """Prints and keeps the ratios of methods that were timed in turn."""
    found = []
    for name in config.shapes:
        seconds = in_turn(config, name)
        base = seconds.get("multisteps", next(iter(seconds.values())))
        found += [
            {"shape": name, "method": method, "seconds": taken, "ratio": taken / base}
            for method, taken in seconds.items()
        ]
    shown = [
        (row["shape"], TITLES[row["method"]], f"{row['seconds']:.2f}", f"{row['ratio']:.3f}")
        for row in found
    ]
    title = f"{config.batch} x {config.length} tokens, {config.micro_batches} micro-batches"
    Console(width=100).print(report.table(title, ["shape", "method", "seconds", "ratio"], shown))
    config.out.mkdir(parents=True, exist_ok=True)
    records.keep(found, config.out / "in_turn.json")
    return found


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
