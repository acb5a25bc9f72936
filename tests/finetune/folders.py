"""Small tokenizers, trained on the spot and saved as the folders of checkpoints."""

import functools
import io
import json

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat,",
    "and",
    "THE",
    "dog",
    "didn't;",
    "12",
    "+",
    "34",
    "=",
    "46.",
    "naïve",
    "café",
    "über",
    "日本",
    "x_y",
    "=",
    "f(z)",
]
CORPUS = [
    " ".join(WORDS[i % len(WORDS)] for i in range(j, 3 * j + 5, 1 + j % 3)) for j in range(80)
]
TEXTS = [
    *CORPUS[:20],
    "",
    "  two  spaces\n\n\ttab ",
    "é€ 日本語 🙂\u200d",
    "<|im_start|>user\nhi<|im_end|>\n",
    "a<bos>b <eos> c</s><s>",
    "\x00\x7f",
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@functools.cache
def byte_level():
    """A BPE of bytes whose post-processor adds bos, with added special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=310,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    return tokenizer.to_str()


@functools.cache
def metaspace():
    """A BPE whose spaces are ▁ and whose unknown characters fall back to bytes, as Gemma's."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    specials = ["<pad>", "<eos>", "<bos>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=560,
        special_tokens=specials + [f"<0x{i:02X}>" for i in range(256)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] in specials]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    tokenizer.add_special_tokens([AddedToken("<start_of_turn>"), AddedToken("<end_of_turn>")])
    return tokenizer.to_str()


@functools.cache
def pieces(kind):
    """A model of sentencepiece, trained as Llama 2's."""
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=out,
        vocab_size=340,
        model_type=kind,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    return out.getvalue()


def write(folder, tokenizer_config=None, fast=None, model=None, **files):
    """Writes a folder; `files` are JSON files by name, without their endings."""
    folder.mkdir(exist_ok=True, parents=True)
    if fast is not None:
        (folder / "tokenizer.json").write_text(fast)
    if model is not None:
        (folder / "tokenizer.model").write_bytes(model)
    files = {"tokenizer_config": tokenizer_config, **files}
    for name, content in files.items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def chatml(folder, **config):
    """A folder with the tokenizer of bytes and a ChatML template."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "chat_template": CHATML,
        **config,
    }
    return write(folder, config, fast=byte_level())
