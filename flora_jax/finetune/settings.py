"""The settings of a fine-tuning run."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from flora_jax.chain.storage import StateDtype

Method = Literal[
    "flora",
    "flora-adafactor",
    "exact",
    "exact-muon",
    "lora",
    "rslora",
    "lora-pro",
    "flat-lora",
    "sora",
    "deep-lora",
    "lorta",
    "run-lora",
    "xgb-lora",
    "adafactor",
    "muon",
    "adam",
]
METHODS: tuple[Method, ...] = get_args(Method)
ADAPTERS = METHODS[METHODS.index("lora") : METHODS.index("xgb-lora") + 1]
"""Methods that train an adapter beside frozen weights."""
EXACT = ("exact", "exact-muon")
"""Methods that update each weight inside the backward pass, and do not accumulate."""
UNRANKED = (*EXACT, "adafactor", "muon", "adam")
"""Methods that have no rank."""
RANKS: dict[str, int] = {"xgb-lora": 1, **dict.fromkeys(("flora", "flora-adafactor"), 64)}
"""The default rank of a method; 16 of all others."""
RATES: dict[str, float] = {
    "flora": 0.001,
    "flora-adafactor": 0.00025,
    "exact": 0.00025,
    "exact-muon": 0.0006,
    "adafactor": 0.00025,
    "muon": 0.001,
    "adam": 2e-5,
}
"""The default peak of the learning rate of a method; 0.001 of adapters."""
OTHERS = 0.00025
"""The default learning rate of Adafactor for leaves that `flora`, `exact-muon` and `muon` do not orthogonalize."""


@dataclass(frozen=True)
class Settings:
    """A checkpoint, data, a method, and how long to train."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A folder of Hugging Face's layout with safetensors, or a .gguf file."""
    data: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DATA...")]
    """Files or folders (.jsonl, .json, .parquet, texts), or hub:owner/name: records with `text`, with `prompt` and
    `completion`, or with `messages`."""
    out: Path = Path("finetuned")
    """The folder to make, which `transformers` loads. Checkpoints and logs are in OUT.run beside it."""
    method: Method = "flora"
    """flora: orthogonalized sketches of all gradients. flora-adafactor: Adafactor after decompressing. exact: Adafactor, each
    weight updated inside the backward pass. exact-muon: the same, orthogonalized, without state. lora and its variants.
    adafactor, muon, adam: with accumulated gradients."""
    rank: int | None = None
    """Rank of sketches or adapters: by default 64 for Flora, 16 for adapters."""
    state_dtype: StateDtype = "float32"
    """Dtype of the sketches of flora and flora-adafactor between micro-batches. int8 costs nothing that was seen; int4 takes half
    of its bytes, which are better spent on rank."""
    length: int = 1024
    """Tokens of a sequence; documents are packed into sequences and kept apart."""
    batch: int | None = None
    """Sequences of a micro-batch, over all devices: by default one for each that the batch is sharded over. More use a device
    better, fewer take less memory."""
    micro_batches: int | None = None
    """Micro-batches of an optimizer step: by default 8, and 1 for exact and xgb-lora, which do not accumulate."""
    epochs: float = 3.0
    """Passes over the data."""
    steps: int | None = None
    """Optimizer steps, in the place of epochs."""
    rate: float | None = None
    """Peak of the learning rate: by default one that was the best on Gemma 3 270M for the method."""
    other_rate: float | None = None
    """That of embeddings, heads and norms where matrices are orthogonalized (flora, exact-muon, muon)."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls after the warm-up: to zero, or not at all."""
    warmup: float = 0.05
    """Share of the steps in which the rate rises."""
    weight_decay: float = 0.0
    """Share of each matrix that is subtracted at each step, times the rate."""
    loss: Literal["completions", "all"] = "completions"
    """Whether completions and assistants' messages alone count, or prompts as well."""
    too_long: Literal["cut", "drop"] | None = None
    """What becomes of documents longer than a sequence; by default texts are cut into several, and all others left out and
    counted."""
    packed: bool = True
    """Whether documents share sequences."""
    held_out: float = 0.05
    """Share of the documents that is for validation."""
    validation: tuple[str, ...] = ()
    """Files for validation, in the place of a share."""
    validation_rows: int = 64
    """The most sequences of a validation."""
    validate_every: int | None = None
    """Optimizer steps between validations: by default ten validations in all."""
    save_every: int | None = None
    """Optimizer steps between checkpoints: by default as between validations."""
    samples: int = 3
    """Validation prompts that the model answers before and after."""
    sample_tokens: int = 64
    """The most tokens of an answer."""
    heat: float = 0.0
    """Temperature of the answers; 0 takes the likeliest token."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Dtype of weights and activations: by default that of the checkpoint, and float32 on CPUs."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """How new bfloat16 weights are rounded."""
    remat: bool = True
    """Whether the backward pass computes each layer again, which takes less memory and some time."""
    memory: float | None = None
    """GiB that each device has for this: by default what it says."""
    plan_only: bool = False
    """Stop after the plan."""
    seed: int = 0
    """Seed of projections, adapters, order of the data and samples."""
    mesh: str = ""
    """A mesh such as fsdp=4 or data=2,fsdp=2,model=2, over which batch and weights are sharded."""
    distributed: bool = False
    """Whether this is one of several processes; on TPU pods and under SLURM they find each other."""
    coordinator: str | None = None
    """HOST:PORT of the first process, where the processes cannot find each other."""
    processes: int | None = None
    """Number of processes, where they cannot find each other."""
    process: int | None = None
    """Index of this process, where they cannot find each other."""

    def __post_init__(self):
        for name in ("length", "validation_rows", "sample_tokens"):
            _at_least(name, getattr(self, name), 1)
        for name in ("rank", "batch", "micro_batches", "steps", "validate_every", "save_every"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        _at_least("samples", self.samples, 0)
        for name in ("rate", "other_rate", "memory", "epochs"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, found {value}")
        for name in ("warmup", "held_out", "weight_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 0 and below 1, found {getattr(self, name)}"
                )
        if self.rank is not None and self.method in UNRANKED:
            raise ValueError(f"rank must not be given with method {self.method}, which has none")
        if self.state_dtype != "float32" and not self.sketched:
            raise ValueError(
                f"state_dtype must not be given with method {self.method}, which has no sketches"
            )
        if not self.data:
            raise ValueError("data must be at least one file, found none")
        alone = (*EXACT, "xgb-lora")
        if self.method in alone and self.micro_batches not in (None, 1):
            raise ValueError(
                f"micro_batches must be 1 with method {self.method}, which updates weights in each "
                f"backward pass, found {self.micro_batches}; give a larger batch"
            )

    @property
    def sketched(self) -> bool:
        """Returns whether the method accumulates sketches."""
        return self.method.startswith("flora")

    @property
    def rows(self) -> int:
        """Returns the sequences of a micro-batch."""
        return self.batch or 1

    @property
    def accumulated(self) -> int:
        """Returns the micro-batches of an optimizer step."""
        if self.method in (*EXACT, "xgb-lora"):
            return 1
        return self.micro_batches or 8

    @property
    def ranked(self) -> int | None:
        """Returns the rank, or None where the method has none."""
        if self.method in UNRANKED:
            return None
        return self.rank or RANKS.get(self.method, 16)

    @property
    def peak(self) -> float:
        """Returns the peak of the learning rate."""
        return self.rate or RATES.get(self.method, 1e-3)

    @property
    def run(self) -> Path:
        """Returns the folder of checkpoints and logs."""
        return self.out.with_name(self.out.name + ".run")

    def kept(self) -> dict[str, Any]:
        """Returns the settings that must be the same when a run goes on."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in FREE}


FREE = (
    "model",
    "data",
    "validation",
    "out",
    "samples",
    "sample_tokens",
    "heat",
    "validation_rows",
    "memory",
    "plan_only",
    "validate_every",
    "save_every",
    "mesh",
    "distributed",
    "coordinator",
    "processes",
    "process",
)
"""Settings that may differ when a run goes on; model and data are compared by what they hold."""


def _at_least(name: str, value: Any, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, found {value}")
