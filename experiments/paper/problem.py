"""A problem has a model, the arrays of a task, its loss and its score."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import text
from experiments.tasks import batches, catalogues, data, digits, docstrings, hub, scores, tokens
from flora_jax.models import decoder, generate, gpt2, t5, vit
from flora_jax.models.config import NAMED
from flora_jax.models.families import MODULES
from flora_jax.models.load import load as load_checkpoint

Task = Literal["summarisation", "translation", "language", "images"]
Data = Literal["offline", "paper"]
SMALL = {
    "T5-test": t5.Shape(1024, 128, 512, 2, 4, 32),
    "GPT-2-test": gpt2.Shape(1024, 256, 128, 2, 4),
    "LLaMA-test": decoder.Shape(1024, 128, 384, 2, 4, 2, jnp.float32),
    "ViT-test": vit.Shape(8, 2, 1, 128, 2, 4, 256, 10),
}
"""Shapes for two CPU cores."""
MODELS: dict[str, tuple[Any, Any]] = {
    name: (MODULES[type(shape)], shape) for name, shape in {**SMALL, **NAMED}.items()
}
METRIC = {
    "summarisation": "rougeL",
    "translation": "bleu",
    "language": "perplexity",
    "images": "accuracy",
}
"""The metric that a table is about; a perplexity is better where it is less."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model and a run.

    Attributes:
      model: A name in `MODELS`.
      lengths: Numbers of tokens of source and target; in language modelling the second is the window.
      batch: Number of examples in a micro-step.
      accumulation: Number of micro-steps in an optimizer step.
      optimizer_steps: Number of optimizer steps in a run.
      held_out: The largest number of examples for validation, and for test.
      beams: Number of beams of the search; 1 is greedy.
      remat: Whether activations are checkpointed.
      checkpoint_every: Number of optimizer steps between saved states of a run; 0 for none.
      warm: Number of optimizer steps of uncompressed training on another task of the same text, from which all
        methods begin where no checkpoint is given; 0 to begin from random params.
    """

    model: str
    lengths: tuple[int, int]
    batch: int
    accumulation: int
    optimizer_steps: int
    held_out: int = 256
    beams: int = 1
    remat: bool = False
    checkpoint_every: int = 0
    warm: int = 0


class Problem(NamedTuple):
    """A problem that methods are tried on.

    Attributes:
      model: The Flax model.
      params: Params to begin with, or None for random ones.
      loss: `(model, params, batch) -> scalar`.
      train: Training arrays, with the examples along their first axis.
      validation: Validation arrays, likewise.
      score: `(model, params) -> figures` on the test side.
      about: The card of the data and the sizes, as Markdown.
      digest: A digest of the examples.
      words: The tokeniser, where there is one.
    """

    model: Any
    params: Any
    loss: Callable[[Any, Any, Any], jax.Array]
    train: dict[str, np.ndarray]
    validation: dict[str, np.ndarray]
    score: Callable[[Any, Any], dict[str, float]]
    about: str
    digest: str
    words: tokens.Words | None = None

    def init(self, model: Any, seed: int) -> Any:
        """Gives random params."""
        batch = {name: x[:1] for name, x in self.train.items()}
        names = {t5.T5: ("source", "target"), vit.Vit: ("images",)}.get(type(model), ("tokens",))
        given = [jnp.asarray(batch[name]) for name in names]
        return jax.jit(model.init)(jax.random.key(seed), *given)["params"]


def make(
    task: Task,
    sizes: Sizes,
    source: Data = "offline",
    checkpoint: Path | None = None,
    changes: dict[str, Any] | None = None,
    other: bool = False,
) -> Problem:
    """Gives the problem of a task at these sizes.

    Args:
      task: The task.
      sizes: Sizes of the model and the run.
      source: The data that come with packages, or the paper's.
      checkpoint: A folder with weights and a tokeniser to begin with.
      changes: Changes to fields of the model's shape.
      other: Whether the task is replaced by continuing its sources, see `continuations`.
    """
    family, shape = MODELS[sizes.model]
    params, words = None, None
    if checkpoint is not None:
        model, params = load_checkpoint(checkpoint)
        if not isinstance(model, family):
            raise ValueError(
                f"{checkpoint} must be a {family.__name__} for {task}, found {type(model).__name__}"
            )
        shape, words = model.shape, None if task == "images" else tokens.of_checkpoint(checkpoint)
    shape = dataclasses.replace(shape, remat=sizes.remat, **(changes or {}))
    if task == "images":
        return _images(vit.Vit(_fit(shape, source)), params, source)
    sides = load(task, source)
    if other:
        sides = continuations(sides)
    if words is None:
        texts = (x if isinstance(x, str) else " ".join(x) for x in sides.train)
        words = tokens.train(texts, shape.vocabulary)
    model = family(shape)
    if task == "language":
        return _language(model, params, sides, words, sizes)
    return _pairs(task, model, params, sides, words, sizes)


def outline(task: Task, sizes: Sizes, changes: dict[str, Any] | None = None) -> Problem:
    """Gives the problem without its data, for shapes and programs alone."""
    family, shape = MODELS[sizes.model]
    shape = dataclasses.replace(shape, remat=sizes.remat, **(changes or {}))
    source, length = sizes.lengths
    rows = sizes.batch

    def of(*lengths: int, dtype: Any = np.int32) -> np.ndarray:
        return np.zeros((rows, *lengths), dtype)

    if task == "images":
        images = of(shape.image, shape.image, shape.channels, dtype=np.float32)
        arrays = {"images": images, "classes": of()}
    elif family is t5.T5:
        arrays = {name: of(length) for name in ("target", "labels")}
        arrays |= {"source": of(source), "mask": of(source, dtype=bool)}
        arrays["weights"] = of(length, dtype=np.float32)
    else:
        length = length if task == "language" else source + length - 1
        arrays = {"tokens": of(length), "targets": of(length)}
        if task != "language":
            arrays["weights"] = of(length, dtype=np.float32)
    loss = {t5.T5: _t5_loss, vit.Vit: _vit_loss}.get(family, _decoder_loss)
    return Problem(family(shape), None, loss, arrays, arrays, lambda *_: {}, "", "")


def load(task: Task, source: Data) -> data.Sides:
    """Loads the examples of a task."""
    offline = {
        "summarisation": docstrings.load,
        "translation": catalogues.load,
        "language": _source_code,
        "images": digits.load,
    }
    return offline[task]() if source == "offline" else getattr(hub, task)()


def continuations(sides: data.Sides) -> data.Sides:
    """Gives another task on the same sides: from the first half of a source its second half, which is real text too."""

    def halved(pairs: Sequence[Any]) -> list[tuple[str, str]]:
        halves = []
        for source, _ in pairs:
            words = source.split()
            halves.append((" ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])))
        return halves

    card = dataclasses.replace(sides.card, name=f"{sides.card.name}, continued")
    return data.Sides(card, *(halved(side) for side in sides[1:]))


def _source_code() -> data.Sides:
    """Gives the standard library's source by the split of `text`, whose validation side is divided in two."""
    corpus = text.load()
    card = data.Card(
        "Standard library",
        "The source of Python's standard library.",
        "PSF-2.0",
        "by file, one in ten held out; of these the first half for validation, the rest for test.",
    )
    sides = []
    for side in (corpus.train, corpus.validation):
        files = side.tobytes().split(bytes([text.SEPARATOR]))
        sides.append([file.decode(errors="replace") for file in files if file])
    half = len(sides[1]) // 2
    return data.Sides(card, sides[0], sides[1][:half], sides[1][half:])


def _fit(shape: vit.Shape, source: Data) -> vit.Shape:
    """Gives the shape of ViT for the data: CIFAR-100 has 32 pixels, in patches of 4, and 100 classes."""
    if source == "offline":
        return shape
    return dataclasses.replace(shape, image=32, patch=4, channels=3, classes=100)


def _images(model: vit.Vit, params: Any, source: Data) -> Problem:
    sides = load("images", source)

    def arrays(pairs: Sequence[Any]) -> dict[str, np.ndarray]:
        images, classes = zip(*pairs, strict=True)
        return {"images": np.stack(images), "classes": np.array(classes, np.int32)}

    test = arrays(sides.test)
    apply = jax.jit(lambda model, p, x: model.apply({"params": p}, x).argmax(-1), static_argnums=0)

    def score(model, params):
        found = [apply(model, params, b["images"]) for b in batches.in_order(test, 256)]
        return scores.accuracy(np.concatenate(found), test["classes"])

    train, validation = arrays(sides.train), arrays(sides.validation)
    return Problem(
        model, params, _vit_loss, train, validation, score, sides.describe(), sides.digest()
    )


def _vit_loss(model, params, batch):
    return vit.loss(model, params, batch["images"], batch["classes"])


def _t5_loss(model, params, batch):
    args = (batch[name] for name in ("source", "target", "labels", "weights", "mask"))
    return model.apply({"params": params}, *args)


def _decoder_loss(model, params, batch):
    return model.apply({"params": params}, batch["tokens"], batch["targets"], batch.get("weights"))


def _language(
    model: Any, params: Any, sides: data.Sides, words: tokens.Words, sizes: Sizes
) -> Problem:
    length = sizes.lengths[1]
    train, validation, test = (
        tokens.windows(words, side, length) for side in (sides.train, sides.validation, sides.test)
    )
    validation, test = (_some(side, sizes.held_out) for side in (validation, test))
    of_batch = jax.jit(_decoder_loss, static_argnums=0)

    def score(model, params):
        parts = list(batches.in_order(test, 32))
        total = sum(float(of_batch(model, params, b)) * len(b["tokens"]) for b in parts)
        return scores.perplexity([total / len(test["tokens"])])

    about = f"{sides.describe()} {len(train['tokens']):,} windows of {length} tokens to train on."
    return Problem(
        model, params, _decoder_loss, train, validation, score, about, sides.digest(), words
    )


def _pairs(
    task: Task, model: Any, params: Any, sides: data.Sides, words: tokens.Words, sizes: Sizes
) -> Problem:
    encoder_decoder = isinstance(model, t5.T5)
    arrays = tokens.for_encoder_decoder if encoder_decoder else tokens.for_decoder
    held = {"validation": _spread(sides.validation, sizes.held_out)}
    held["test"] = _spread(sides.test, sizes.held_out)
    train, validation = (
        arrays(words, pairs, sizes.lengths) for pairs in (sides.train, held["validation"])
    )
    given = [source for source, _ in held["test"]]
    expected = [target for _, target in held["test"]]
    if encoder_decoder:
        test = arrays(words, held["test"], sizes.lengths)
        prompts = {"tokens": test["source"], "mask": test["mask"]}
    else:
        rows = tokens.prompts(words, given, sizes.lengths[0])
        found, mask = tokens.padded(rows, sizes.lengths[0], words.pad, left=True)
        prompts = {"tokens": found, "mask": mask}
    options = {"count": sizes.lengths[1], "end": words.end, "pad": words.pad}

    loss = _t5_loss if encoder_decoder else _decoder_loss

    def score(model, params):
        rows = []
        for batch in batches.in_order(prompts, 64):
            args = (model, params, batch["tokens"], batch["mask"])
            if sizes.beams > 1:
                rows.append(generate.beam(*args, beams=sizes.beams, **options)[0])
            else:
                rows.append(generate.greedy(*args, **options))
        found = words.decode(np.concatenate(rows))
        if task == "summarisation":
            return scores.rouge(found, expected)
        return scores.bleu(found, expected)[0]

    about = sides.describe()
    if task == "translation":
        about += f" BLEU by sacrebleu, `{scores.bleu(expected, expected)[1]}`."
    else:
        about += " ROUGE by rouge-score, F1, with stemming."
    about += f" Scored on {len(given)} of the test side, by a search with {sizes.beams} beam(s)."
    return Problem(model, params, loss, train, validation, score, about, sides.digest(), words)


def _spread(examples: Sequence[Any], count: int) -> list[Any]:
    """Gives at most so many examples, evenly spaced."""
    return list(examples)[:: max(1, -(-len(examples) // count))]


def _some(arrays: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    return {name: np.stack(_spread(list(x), count)) for name, x in arrays.items()}
