"""A small checkpoint with a tokenizer, and data for it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from flora_jax.models import decoder, families
from flora_jax.models.save import save

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIALS = ["<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"]
SHAPE = decoder.Shape(300, 64, 96, 2, 4, 4, jnp.dtype("float32"))
COLOURS = ("red", "blue", "green", "grey")
PAIRS = [
    {"prompt": f"{i} {colour}:", "completion": f" a {colour} one of {i % 7}"}
    for i in range(60)
    for colour in COLOURS
]


def make_checkpoint(folder, **changes):
    """Writes a random model of this shape, with a byte-level tokenizer of 300 tokens and a chat template."""
    model = families.module(dataclasses.replace(SHAPE, **changes))
    params = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    save(folder, model, params)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([p["prompt"] + p["completion"] for p in PAIRS], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1]}))
    (folder / "README.md").write_text("the model's own")
    return folder


def write(file, records):
    """Writes records as JSONL."""
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file
