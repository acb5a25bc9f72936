"""The methods that run in torch, called as their own pages say; their packages are imported only where they are used.

LLaMA is the one of `transformers`, from the checkpoint that JAX's processes read. GaLore and APOLLO act on
the matrices inside the layers, as in their examples, and Adam on the rest; they keep uncompressed gradients
between micro-steps, since they have nothing else to accumulate in. flora-opt's accelerator compresses
each matrix, embeddings too, and steps inside the backward pass. Q-GaLore, and APOLLO on int8 weights, keep the matrices inside the
layers in int8.
"""

import importlib
import json
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import optimizers
from experiments.bench.baselines.methods import PROJECTION_GAP, Size

LONG = 10**4


def schedule(optimizer_steps: int) -> np.ndarray:
    """Gives optax's schedule with a peak of 1, at each optimizer step."""
    return np.asarray(jax.vmap(optimizers.cosine(1.0, optimizer_steps))(np.arange(optimizer_steps)))


def groups(model: Any, rank: int, **others: Any) -> list[dict[str, Any]]:
    """Gives two groups of parameters: all others, and the matrices inside the layers, which have a rank."""
    named = dict(model.named_parameters())
    inner = {name for name, p in named.items() if ".layers." in name and p.dim() == 2}
    low = {"rank": rank, "update_proj_gap": PROJECTION_GAP, "proj_type": "std", **others}
    return [
        {"params": [p for name, p in named.items() if name not in inner]},
        {"params": [named[name] for name in sorted(inner)], **low},
    ]


def as_of_2024(kind: type) -> type:
    """Gives an optimizer that was written for bitsandbytes of 2024 to a newer one, which has kernels for CPUs.

    Since then two arguments have gone from the constructor and two came into the updates, before others.
    """
    functional = importlib.import_module("bitsandbytes.functional")

    def of_32bit(name, g, p, state1, beta1, eps, step, lr, *others, **named):
        names = ("state2", "beta2", "weight_decay", "gnorm_scale", "unorm_vec")
        named |= dict(zip(names, others, strict=False))
        functional.optimizer_update_32bit(name, g, p, state1, beta1, eps, step, lr, **named)

    def of_8bit(name, g, p, state1, state2, beta1, beta2, *others, **named):
        first = (name, g, p, state1, state2, beta1, beta2, 0.0, 0.0)
        functional.optimizer_update_8bit_blockwise(*first, *others, **named)

    sys.modules[kind.__module__].F = types.SimpleNamespace(  # pyright: ignore[reportAttributeAccessIssue]
        optimizer_update_32bit=of_32bit, optimizer_update_8bit_blockwise=of_8bit
    )

    class Now(kind):
        def get_config(self, *place: Any) -> dict[str, Any]:
            now = {"percentile_clipping": 100, "block_wise": True}
            return super().get_config(*place) | now | {"max_unorm": 0.0, "skip_zeros": False}

    return Now


class Run:
    """A method that trains, from the weights of the checkpoint in `folder`."""

    def __init__(self, key: str, size: Size, folder: Path, optimizer_steps: int = LONG):
        self.torch = importlib.import_module("torch")
        self.key, self.size = key, size
        self.schedule = schedule(optimizer_steps)
        self.reset(1e-3, folder)

    def reset(self, rate: float, folder: Path) -> None:
        """Begins anew from the weights in `folder`, with this peak learning rate."""
        transformers = importlib.import_module("transformers")
        transformers.logging.disable_progress_bar()
        model = transformers.LlamaForCausalLM.from_pretrained(
            folder, dtype=self.torch.float32
        ).train()
        self.model, self.rate, self.count, self.accelerator = model, rate, 0, None
        self.optimizer = getattr(self, "_" + self.key.replace("-", "_"))(transformers)

    def _torch(self, transformers: Any) -> Any:
        adafactor = importlib.import_module("transformers.optimization").Adafactor
        # as optax.adafactor has it
        return adafactor(
            self.model.parameters(), lr=self.rate, relative_step=False, scale_parameter=True
        )

    def _torch_flora(self, transformers: Any) -> Any:
        flora = importlib.import_module("flora_opt")
        if flora.FloraAccelerator is None:
            raise ModuleNotFoundError("flora_opt finds no torch, accelerate or bitsandbytes")
        state = importlib.import_module("accelerate.state")
        state.GradientState._reset_state()
        self.accelerator = flora.FloraAccelerator(
            accumulation_compression_rank=self.size.rank,
            gradient_accumulation_steps=self.size.accumulation,
            cpu=True,
        )
        optimizer = flora.Flora(self.model.parameters(), lr=self.rate)
        self.model, optimizer = self.accelerator.prepare(self.model, optimizer)
        return optimizer

    def _torch_galore(self, transformers: Any) -> Any:
        galore = importlib.import_module("galore_torch")
        return galore.GaLoreAdamW(
            groups(self.model, self.size.rank, scale=1.0), lr=self.rate, no_deprecation_warning=True
        )

    def _torch_apollo(self, transformers: Any) -> Any:
        apollo = importlib.import_module("apollo_torch")
        low = groups(self.model, self.size.rank, scale=1.0, proj="random", scale_type="channel")
        return apollo.APOLLOAdamW(low, lr=self.rate)

    def _torch_q_galore(self, transformers: Any) -> Any:
        galore = importlib.import_module("q_galore_torch")
        # the projection in int4, and the rule for its renewal, as in its scripts
        low = groups(
            self._int8(),
            self.size.rank,
            **{"scale": 1.0, "quant": True, "quant_group_size": 256, "quant_n_bit": 4},
            **{"cos_threshold": 0.4, "gamma_proj": 2, "queue_size": 5},
        )
        return as_of_2024(galore.QGaLoreAdamW8bit)(low, lr=self.rate, weight_decay=0.0)

    def _torch_q_apollo(self, transformers: Any) -> Any:
        apollo = importlib.import_module("apollo_torch")
        own = {"scale": 1.0, "proj": "random", "scale_type": "channel"}
        low = groups(self._int8(), self.size.rank, **own)
        return as_of_2024(apollo.QAPOLLOAdamW)(low, lr=self.rate, weight_decay=0.0)

    def _int8(self) -> Any:
        """Gives the model with the weights of its layers in int8."""
        from experiments.bench.baselines import int8_linear

        int8_linear.quantize(self.model)
        self.torch.manual_seed(0)  # of the rounding
        self.torch.cuda.synchronize = lambda *_: None  # both wait for a GPU, which is not here
        return self.model

    def _loss(self, windows: np.ndarray) -> Any:
        tokens = self.torch.from_numpy(np.asarray(windows, np.int64))
        logits = self.model(input_ids=tokens[:, :-1], use_cache=False).logits
        return self.torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def step(self, windows: np.ndarray) -> float:
        update, place = divmod(self.count, self.size.accumulation)
        self.count += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * float(self.schedule[update])
        if self.accelerator is not None:
            with self.accelerator.accumulate(self.model):
                loss = self._loss(windows)
                self.accelerator.backward(loss)  # divides by the number of micro-steps
                self.optimizer.step()
                self.optimizer.zero_grad()
            return loss.item()
        loss = self._loss(windows)
        (loss / self.size.accumulation).backward()
        if place == self.size.accumulation - 1:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.item()

    def evaluate(self, windows: np.ndarray) -> float:
        with self.torch.no_grad():
            return self._loss(windows).item()

    def state_bytes(self) -> int:
        """Counts the bytes of what is kept beside the params: optimizer state, gradients, flora-opt's sketches."""
        kept: list[Any] = [self.optimizer.state]
        for p in self.model.parameters():
            kept += [p.grad, getattr(p, "float_grad", None)]
        if self.accelerator is not None:
            kept.append(self.accelerator.packs)
        return self._bytes(kept)

    def peak_bytes(self, windows: np.ndarray) -> int:
        """Gives the bytes that torch's allocator held at the worst moment of a cycle, by its profiler.

        This is the sum of params and state at the start of the cycle, and of the largest excess of what was allocated
        over what was freed.
        """
        params: list[Any] = list(self.model.parameters())
        params += [getattr(p, name, None) for p in params for name in ("scales", "zeros")]
        held = self.state_bytes() + self._bytes(params)
        profiler = self.torch.profiler
        with profiler.profile(
            activities=[profiler.ProfilerActivity.CPU], profile_memory=True
        ) as trace:
            for _ in range(self.size.accumulation):
                self.step(windows)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            trace.export_chrome_trace(str(file))
            events = json.loads(file.read_text())["traceEvents"]
        return held + largest_sum(events)

    def sample(self) -> bool:
        """Samples every `A` of flora-opt once; gives False for the other methods."""
        if self.accelerator is None:
            return False
        randn = importlib.import_module("flora_opt.optimizers.torch.flora").stable_randn
        for p, seed in self.accelerator.seeds.items():
            rows, columns = p.shape
            rank = self.size.rank
            randn((rank, rows) if rows < columns else (columns, rank), seed=seed, dtype=p.dtype)
        return True

    def _bytes(self, kept: Any) -> int:
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in _tensors(kept, self.torch.Tensor)
        }
        return sum(storages.values())


def largest_sum(events: list[dict[str, Any]]) -> int:
    """Gives the most bytes at a time, from a trace's allocations (positive) and releases (negative) in order."""
    changes = sorted(
        (event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"
    )
    return int(max(np.cumsum([0, *(size for _, size in changes)])))


def _tensors(kept: Any, kind: type) -> Iterator[Any]:
    if isinstance(kept, kind):
        yield kept
    elif isinstance(kept, dict):
        for value in kept.values():
            yield from _tensors(value, kind)
    elif isinstance(kept, list | tuple):
        for value in kept:
            yield from _tensors(value, kind)
    elif hasattr(kept, "__dict__"):  # a projector
        yield from _tensors(vars(kept), kind)
