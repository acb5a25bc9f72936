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

from flora_jax.memory import compiled, estimate, outline, report
from flora_jax.models import config

Dtype = Literal["bfloat16", "float16", "float32"]
Method = Literal["flora", "flora-ordinary", "lora", "galore", "adam", "multisteps"]
METHODS: dict[str, str] = dict(zip(get_args(Method), estimate.METHODS, strict=True))
HEADS = ("params", "state", "grads", "sketch", "activ.", "update", "gather", "copies")


@dataclass(frozen=True)
class Request:
    """Says what `plan` is asked about.

    Attributes:
      model: A name that `flora-jax shapes` lists.
      config: A Hugging Face config.json, or its folder, in place of a name.
      chip: A name that `flora-jax shapes` lists.
      hbm: GiB of a chip that a program may use, in place of a chip's name.
      chips: The chips over which the weights are sharded, and the batch where they divide it.
      length: Tokens of a sequence.
      batch: Sequences of a micro-step, over all chips.
      rank: The rank of Flora, GaLore and LoRA.
      dtype: The dtype of the parameters.
      preset: Flora's variant, as in `flora_jax.flora`.
    """

    model: str = "LLaMA-7B"
    config: Path | None = None
    chip: str = "v5e"
    hbm: float | None = None
    chips: int = 1
    length: int = 2048
    batch: int = 1
    rank: int = 128
    dtype: Dtype = "bfloat16"
    preset: Literal["paper", "advised"] = "paper"

    def setting(self) -> estimate.Setting:
        """Returns the same with the model's outline and the chip's bytes.

        Raises:
          ValueError: An unknown model or chip, a config that cannot be read or asks for what the models
            here have not, a number below 1.
        """
        if self.hbm is None and self.chip not in estimate.CHIPS:
            raise ValueError(
                f"chip must be one of {', '.join(estimate.CHIPS)}, or hbm be given, found {self.chip!r}"
            )
        dtype = jnp.dtype(self.dtype)
        found = (
            outline.read(self.config, dtype) if self.config else outline.named(self.model, dtype)
        )
        hbm = estimate.CHIPS[self.chip] if self.hbm is None else self.hbm
        capacity = round(hbm * estimate.GIB)
        return estimate.Setting(
            found, self.rank, self.length, self.batch, self.chips, capacity, self.preset
        )


def table(setting: estimate.Setting, found: list[estimate.Estimate]) -> Any:
    """Makes a rich table of the methods; the last column is the largest rank that fits."""
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
        totals, fits = [f"{e.total / estimate.GIB:.2f}"], "yes" if e.fits else "no"
        if was:
            totals.append("-" if e.measured is None else f"{e.measured / estimate.GIB:.2f}")
        style = "green" if e.fits else "red"
        result.add_row(
            e.method,
            str(e.rank or "-"),
            *sizes,
            *(f"[{style}]{total}[/]" for total in totals),
            f"[{style}]{fits}[/]",
            largest,
        )
    return result


def advice(setting: estimate.Setting, chosen: estimate.Estimate) -> str:
    """Says what to do about one method, in a sentence."""
    total, most = chosen.size / estimate.GIB, setting.capacity / estimate.GIB
    name = chosen.method + (f" at rank {chosen.rank}" if chosen.rank else "")
    if chosen.fits:
        text = f"{name} fits: {total:.2f} of {most:.2f} GiB"
        return text + (f"; rank {chosen.largest_rank} still does." if chosen.largest_rank else ".")
    text = f"{name} does not fit: {total:.2f} GiB, a chip has {most:.2f}"
    if chosen.largest_rank:
        return f"{text}; rank {chosen.largest_rank} does."
    return f"{text}; take more chips, a shorter sequence or a smaller batch."


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
      0; 1 where the method does not fit.
    """
    setting = request.setting()
    found = estimate.estimates(setting)
    asked = METHODS[method]
    obstacle = compiled.obstacle(setting, asked, request.chip)
    if measure in ("yes", "all") and obstacle:
        raise ValueError(f"measure must be auto or no here, found {measure}: {obstacle}")
    names = compiled.MEASURED if measure == "all" else (asked,)
    for name in () if measure == "no" or obstacle else names:
        print(f"Compiling {name} (--measure no leaves it out) ...", file=sys.stderr)
        size = compiled.measure(setting, name, request.chip)
        if size is None:
            print(f"{name} fits neither that chip nor a v5p one.", file=sys.stderr)
        place = estimate.METHODS.index(name)
        found[place] = dataclasses.replace(found[place], measured=size)
    if html:
        html.write_text(report.to_html(setting, found), encoding="utf-8")
    chosen = found[estimate.METHODS.index(asked)]
    if json:
        print(report.to_json(setting, found))
    else:
        console = Console()
        console.print(table(setting, found))
        console.print(advice(setting, chosen), highlight=False)
    return int(not chosen.fits)


def shapes() -> int:
    """Lists the models and chips that have a name."""
    print("models:     ", ", ".join(config.NAMED))
    print("model_types:", ", ".join(config.FAMILIES))
    print("methods:    ", "; ".join(f"{k} ({v})" for k, v in METHODS.items()))
    print("chips, GiB: ", ", ".join(f"{k} {v:g}" for k, v in estimate.CHIPS.items()))
    return 0
