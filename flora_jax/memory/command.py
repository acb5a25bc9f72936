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

from flora_jax.memory import chips, compiled, estimate, methods, outline, report
from flora_jax.memory.methods import GIB, INT8, Options, Setting
from flora_jax.models import config

Dtype = Literal["bfloat16", "float16", "float32"]
Method = Literal[
    "flora",
    "flora-ordinary",
    "flora-backward",
    "lora",
    "galore",
    "exact",
    "exact-muon",
    "adam",
    "multisteps",
]
METHODS: dict[str, str] = dict(zip(get_args(Method), methods.METHODS, strict=True))
COLUMNS = {
    "params": ("parameters",),
    "state": ("state",),
    "grads": ("gradients", "sketches"),
    "activ.": ("activations",),
    "other": ("update", "gathered", "copies"),
}
"""The columns of the table, and the parts whose sum each is."""
STYLES = {"fits": "green", "close": "yellow", "no": "red"}


@dataclass(frozen=True)
class Request(Options):
    """Says what `plan` is asked about.

    Attributes:
      model: A name that `flora-jax shapes` lists, in any case.
      config: A Hugging Face config.json, or its folder, in place of a name.
      chip: A name that `flora-jax shapes` lists, in any case; by default v5e.
      hbm: GiB that a program may use, in place of a chip; nothing is compiled then.
      dtype: The dtype of the parameters.
      remat: Whether the backward pass computes each layer again; without it no estimate is made, the step is compiled.
    """

    model: str = "LLaMA-7B"
    config: Path | None = None
    chip: str | None = None
    hbm: float | None = None
    dtype: Dtype = "bfloat16"
    remat: bool = True

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

    def setting(self) -> Setting:
        """Returns the same with the model's outline and the chip's bytes.

        Raises:
          ValueError: An unknown model or chip, a config that cannot be read or asks for what the models
            here have not, a number below 1.
        """
        device = self.device
        dtype = jnp.dtype(self.dtype)
        if self.config:
            found = outline.read(self.config, dtype, self.remat)
        else:
            found = outline.named(self.model, dtype, self.remat)
        hbm = self.hbm if device is None else chips.CHIPS[device]
        return Setting(
            model=found,
            capacity=round((hbm or 0) * GIB),
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(Options)},
        )


def table(setting: Setting, found: list[estimate.Estimate]) -> Any:
    """Makes a rich table of the methods, of 80 columns at most; the last one is the largest rank that surely fits."""
    used = {
        head: parts
        for head, parts in COLUMNS.items()
        if any(e.parts.get(part) for e in found for part in parts)
    }
    was = any(e.measured is not None for e in found)
    caption = (
        f"GiB on each chip, estimated within {estimate.ERROR:.0%} of the TPU compiler's figures; no GPU was "
        "measured."
    )
    if was:
        caption += " Compiled: the compiler's own, for a larger chip where this one cannot hold it."
    caption += (
        " Other: the update, layers gathered from chips, and copies for the matrix unit. Most:"
    )
    caption += f" the largest rank that surely fits. {report.assumed(setting)}"
    result = Table(
        title=report.title(setting),
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    for head in ("method", "rank", *used, "total", *["compiled"] * was, "fits", "most"):
        result.add_column(head, justify="left" if head == "method" else "right", no_wrap=True)
    names = {label: name for name, label in METHODS.items()}
    for e in found:
        sizes = [sum(e.parts.get(part, 0) for part in parts) for parts in used.values()]
        totals = [_gib(e.total) if e.parts else "-"]
        if was:
            over = ">" if e.beyond else ""
            totals.append("-" if e.measured is None else over + _gib(e.measured))
        style = STYLES[e.answer]
        result.add_row(
            names[e.method],
            str(e.rank or "-"),
            *(_gib(size) if size else "-" for size in sizes),
            *(f"[{style}]{total}[/]" for total in totals),
            f"[{style}]{report.ANSWERS[e.answer]}[/]",
            str(e.largest_rank or ("none" if e.rank and e.parts else "-")),
        )
    return result


def advice(setting: Setting, chosen: estimate.Estimate, obstacle: str = "") -> str:
    """Says whether one method fits and what to do about it, in two sentences at most.

    Args:
      setting: What is trained.
      chosen: The method's estimate.
      obstacle: Why the compiler cannot be asked; empty where it can.
    """
    capacity, size = f"{setting.capacity / GIB:.2f} GiB", _gib(chosen.size)
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
        tip = f"The compiler was not asked: {obstacle}." if obstacle else "--measure yes tells."
        return f"{text} " + (f"Rank {largest} surely fits." if largest else tip)
    text = f"{name} does not fit: {more}, {how}; a chip has {capacity}."
    if largest:
        return f"{text} Rank {largest} does."
    return f"{text} Take more chips, a shorter sequence or a smaller batch."


def _gib(size: float) -> str:
    gib = size / GIB
    return f"{gib:.2f}" if gib < 99.995 else f"{gib:.1f}"


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
    asked = METHODS[method]
    if request.weights == "int8" and asked not in INT8:
        able = ", ".join(name for name, label in METHODS.items() if label in INT8)
        raise ValueError(f"method must be one of {able} where weights are int8, found {method}")
    device = request.device
    obstacle = compiled.obstacle(setting, asked, device)
    if measure in ("yes", "all") and obstacle:
        raise ValueError(f"measure must be auto or no here, found {measure}: {obstacle}")
    names = compiled.MEASURED if measure == "all" else (asked,)
    if device is None or measure == "no" or obstacle:
        names = ()
    if reason := estimate.unknown(setting):
        if not names:
            raise ValueError(f"{reason}, but {obstacle or 'measure is no'}")
        rank = {name: setting.rank if name in methods.RANKED else None for name in names}
        found = [estimate.Estimate(name, rank[name], {}, setting.capacity) for name in names]
    else:
        found = estimate.estimates(setting)
    for name in names:
        print(f"Compiling {name} (--measure no leaves it out) ...", file=sys.stderr)
        size = compiled.measure(setting, name, device or "")
        place = [e.method for e in found].index(name)
        beyond = size is None
        least = max(setting.capacity, round(chips.CHIPS[compiled.LARGEST] * GIB)) + 1
        known = dataclasses.replace(found[place], measured=size or least, beyond=beyond)
        found[place] = estimate.with_rank(setting, known) if known.parts else known
    if html:
        html.write_text(report.to_html(setting, found), encoding="utf-8")
    chosen = next(e for e in found if e.method == asked)
    if json:
        print(report.to_json(setting, found))
    else:
        console = Console()
        console.print(table(setting, found))
        console.print(advice(setting, chosen, obstacle), highlight=False)
    return {"fits": 0, "no": 1, "close": 3}[chosen.answer]


def shapes() -> int:
    """Lists the models and chips that have a name."""
    print("models:     ", ", ".join(config.NAMED))
    print("model_types:", ", ".join(config.FAMILIES))
    print("methods:    ", "; ".join(f"{k} ({v})" for k, v in METHODS.items()))
    print("TPUs, GiB:  ", ", ".join(f"{k} {v:g}" for k, v in chips.TPUS.items()))
    print("GPUs, GiB:  ", ", ".join(f"{k} {v:g}" for k, v in chips.GPUS.items()))
    return 0
