"""The planner's commands: `flora-jax plan` and `flora-jax shapes`."""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import jax.numpy as jnp
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from flora_jax.memory import chips, compiled, estimate, outline, report
from flora_jax.models import config

Dtype = Literal["bfloat16", "float16", "float32"]
Method = Literal["flora", "flora-ordinary", "lora", "galore", "adam", "multisteps"]
METHODS: dict[str, str] = dict(zip(get_args(Method), estimate.METHODS, strict=True))
HEADS = ("params", "state", "grads", "sketch", "activ.", "update", "gather", "copies")


STYLES = {"fits": "green", "close": "yellow", "no": "red"}


@dataclass(frozen=True)
class Request:
    """Says what `plan` is asked about.

    Attributes:
      model: A name that `flora-jax shapes` lists, in any case.
      config: A Hugging Face config.json, or its folder, in place of a name.
      chip: A name that `flora-jax shapes` lists, in any case; by default v5e.
      hbm: GiB that a program may use, in place of a chip; nothing is compiled then.
      chips: The chips over which the weights are sharded, and the batch where they divide it.
      length: Tokens of a sequence.
      batch: Sequences of a micro-step, over all chips.
      rank: The rank of Flora, GaLore and LoRA.
      dtype: The dtype of the parameters.
      preset: Flora's variant, as in `flora_jax.flora`.
    """

    model: str = "LLaMA-7B"
    config: Path | None = None
    chip: str | None = None
    hbm: float | None = None
    chips: int = 1
    length: int = 2048
    batch: int = 1
    rank: int = 128
    dtype: Dtype = "bfloat16"
    preset: Literal["paper", "advised"] = "paper"

    @property
    def device(self) -> str | None:
        """Returns the name of the chip; None where only its memory is known.

        Raises:
          ValueError: The chip is unknown, or given beside `hbm`.
        """
        if self.hbm is None:
            return chips.find("chip", self.chip or "v5e", chips.CHIPS)
        if self.chip is not None:
            raise ValueError(f"hbm stands in the place of a chip, found both: {self.chip!r}")
        return None

    def setting(self) -> estimate.Setting:
        """Returns the same with the model's outline and the chip's bytes.

        Raises:
          ValueError: An unknown model or chip, a config that cannot be read or asks for what the models
            here have not, a number below 1.
        """
        device = self.device
        dtype = jnp.dtype(self.dtype)
        found = (
            outline.read(self.config, dtype) if self.config else outline.named(self.model, dtype)
        )
        hbm = self.hbm if device is None else chips.CHIPS[device]
        capacity = round((hbm or 0) * estimate.GIB)
        return estimate.Setting(
            found, self.rank, self.length, self.batch, self.chips, capacity, self.preset
        )


def table(setting: estimate.Setting, found: list[estimate.Estimate]) -> Any:
    """Makes a rich table of the methods; the last column is the largest rank that surely fits."""
    used = [name for name in estimate.PARTS if any(e.parts[name] for e in found)]
    caption = "GiB on each chip, estimated from figures of the TPU compiler"
    heads = [head for head, name in zip(HEADS, estimate.PARTS, strict=True) if name in used]
    was = any(e.measured is not None for e in found)
    if was:
        caption += "; compiled: the compiler's own"
    heads += ["total", *["compiled"] * was]
    result = Table(title=report.title(setting), caption=caption, box=box.SIMPLE_HEAD, padding=0)
    for head in ("method", "rank", *heads, "fits", "most"):
        result.add_column(
            head, justify="left" if head == "method" else "right", no_wrap=head != "method"
        )
    for e in found:
        sizes = (f"{e.parts[name] / estimate.GIB:.2f}" for name in used)
        largest = str(e.largest_rank or ("none" if e.rank else "-"))
        totals = [_gib(e.total)]
        if was:
            over = ">" if e.beyond else ""
            totals.append("-" if e.measured is None else over + _gib(e.measured))
        style = STYLES[e.answer]
        result.add_row(
            e.method,
            str(e.rank or "-"),
            *sizes,
            *(f"[{style}]{total}[/]" for total in totals),
            f"[{style}]{report.ANSWERS[e.answer]}[/]",
            largest,
        )
    return result


def advice(setting: estimate.Setting, chosen: estimate.Estimate) -> str:
    """Says whether one method fits and what to do about it, in two sentences at most."""
    capacity, size = f"{setting.capacity / estimate.GIB:.2f} GiB", _gib(chosen.size)
    name = chosen.method + (f" at rank {chosen.rank}" if chosen.rank else "")
    more = f"over {size}" if chosen.beyond else size
    how = "as compiled" if chosen.measured is not None else f"estimated within {estimate.ERROR:.0%}"
    largest = chosen.largest_rank
    if chosen.answer == "fits":
        text = f"{name} fits: {size} of {capacity}, {how}."
        return text + (f" Up to rank {largest} it surely does." if largest else "")
    if chosen.answer == "close":
        least, most = map(_gib, chosen.bounds)
        text = f"{name} is too close to call: {least} to {most} of {capacity}."
        tip = "--measure yes tells, where libtpu is installed (pip install libtpu)."
        return f"{text} " + (f"Rank {largest} surely fits." if largest else tip)
    text = f"{name} does not fit: {more}, {how}; a chip has {capacity}."
    if largest:
        return f"{text} Rank {largest} does."
    return f"{text} Take more chips, a shorter sequence or a smaller batch."


def _gib(size: float) -> str:
    return f"{size / estimate.GIB:.2f}"


def plan(
    request: Annotated[Request, tyro.conf.OmitArgPrefixes] = Request(),
    method: Annotated[Method, tyro.conf.arg(aliases=["--optimizer"])] = "flora",
    measure: Literal["auto", "yes", "all", "no"] = "auto",
    json: bool = False,
    html: Path | None = None,
) -> int:
    """Says whether a training step fits, by method and by part.

    Args:
      request: The model, the chips and the batch.
      method: The method that the answer is about.
      measure: Compile the method's step for the TPU, which takes minutes for billions of
        parameters; `auto` where libtpu is installed (`pip install libtpu`; no TPU); `all`
        methods' in turn.
      json: Print JSON, bytes, in place of the table.
      html: Write one page with a picture to this file.

    Returns:
      0 where the method fits, 1 where it does not, 3 where that is too close to call.
    """
    setting = request.setting()
    found = estimate.estimates(setting)
    asked = METHODS[method]
    device = request.device
    obstacle = compiled.obstacle(setting, asked, device)
    if measure in ("yes", "all") and obstacle:
        raise ValueError(f"measure must be auto or no here, found {measure}: {obstacle}")
    names = compiled.MEASURED if measure == "all" else (asked,)
    for name in names:
        if device is None or measure == "no" or obstacle:
            break
        print(f"Compiling {name} (--measure no leaves it out) ...", file=sys.stderr)
        size = compiled.measure(setting, name, device)
        place = estimate.METHODS.index(name)
        beyond = size is None
        least = max(setting.capacity, round(chips.CHIPS[compiled.LARGEST] * estimate.GIB)) + 1
        known = dataclasses.replace(found[place], measured=size or least, beyond=beyond)
        found[place] = estimate.with_rank(setting, known)
    if html:
        html.write_text(report.to_html(setting, found), encoding="utf-8")
    chosen = found[estimate.METHODS.index(asked)]
    if json:
        print(report.to_json(setting, found))
    else:
        console = Console()
        console.print(table(setting, found))
        console.print(advice(setting, chosen), highlight=False)
    return {"fits": 0, "no": 1, "close": 3}[chosen.answer]


def shapes() -> int:
    """Lists the models and chips that have a name."""
    print("models:     ", ", ".join(config.NAMED))
    print("model_types:", ", ".join(config.FAMILIES))
    print("methods:    ", "; ".join(f"{k} ({v})" for k, v in METHODS.items()))
    print("TPUs, GiB:  ", ", ".join(f"{k} {v:g}" for k, v in chips.TPUS.items()))
    print("GPUs, GiB:  ", ", ".join(f"{k} {v:g}" for k, v in chips.GPUS.items()))
    return 0
