"""The planner's estimate against the TPU compiler's figures, and against sums by hand."""

import dataclasses
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import jax.numpy as jnp
import pytest

import flora_jax
from experiments.bench import accelerator
from flora_jax.memory import estimate, outline, report
from flora_jax.memory.estimate import GIB, METHODS, PARTS, Setting
from flora_jax.models import config
from tests.models.test_config import QWEN3

FUSED, ORDINARY, BACKWARD, LORA, GALORE, EXACT, MUON, ADAM, MULTISTEPS = METHODS

# GiB a chip by the compiler, docs/memory.md: `python -m experiments.bench.memory`, `experiments.bench.pods`, and from
# LLaMA-60M on `flora-jax plan --measure yes`; moments in the dtype of the params
COMPILED = [
    ("LLaMA-7B", FUSED, 128, 2048, 1, 1, 14.44),
    ("LLaMA-7B", FUSED, 256, 2048, 1, 1, 15.36),
    ("LLaMA-7B", FUSED, 128, 4096, 1, 1, 15.34),
    ("LLaMA-7B", LORA, 128, 2048, 1, 1, 16.31),
    ("LLaMA-7B", ORDINARY, 128, 2048, 1, 1, 31.18),
    ("LLaMA-7B", MULTISTEPS, 128, 2048, 1, 1, 51.52),
    ("LLaMA-7B", EXACT, 128, 2048, 1, 1, 13.44),
    ("LLaMA-7B", EXACT, 128, 4096, 1, 1, 14.37),
    ("LLaMA-7B", MUON, 128, 2048, 1, 1, 13.66),
    ("LLaMA-7B", EXACT, 128, 2048, 4, 4, 4.27),
    ("LLaMA-7B", MUON, 128, 2048, 4, 4, 4.69),
    ("LLaMA-7B", EXACT, 128, 2048, 16, 16, 1.86),
    ("LLaMA-13B", EXACT, 128, 2048, 1, 2, 13.33),
    ("T5-3B", EXACT, 128, 512, 1, 1, 5.61),
    ("T5-3B", MUON, 128, 512, 1, 1, 5.61),
    ("GPT-2-XL", EXACT, 128, 1024, 1, 1, 3.54),
    ("GPT-2-XL", MUON, 128, 1024, 1, 1, 3.54),
    ("LLaMA-13B", FUSED, 128, 2048, 1, 2, 13.52),
    ("T5-3B", FUSED, 128, 512, 1, 1, 5.92),
    ("T5-3B", LORA, 128, 512, 1, 1, 8.22),
    ("T5-3B", MULTISTEPS, 128, 512, 1, 1, 19.38),
    ("GPT-2-XL", FUSED, 128, 1024, 1, 1, 3.47),
    ("GPT-2-XL", LORA, 128, 1024, 1, 1, 4.29),
    ("GPT-2-XL", MULTISTEPS, 128, 1024, 1, 1, 12.46),
    ("LLaMA-350M", FUSED, 128, 1024, 1, 1, 0.99),
    ("LLaMA-350M", LORA, 128, 1024, 1, 1, 1.26),
    ("LLaMA-350M", MULTISTEPS, 128, 1024, 1, 1, 2.73),
    ("LLaMA-7B", FUSED, 128, 2048, 16, 16, 1.95),
    ("LLaMA-7B", MULTISTEPS, 128, 2048, 16, 16, 4.39),
    ("LLaMA-70B", FUSED, 128, 2048, 256, 256, 5.09),
    ("LLaMA-70B", MULTISTEPS, 128, 2048, 256, 256, 7.92),
    ("LLaMA-60M", FUSED, 128, 1024, 1, 1, 0.201),
    ("LLaMA-60M", MULTISTEPS, 128, 1024, 1, 1, 0.469),
    ("LLaMA-60M", FUSED, 128, 1024, 8, 1, 0.925),
    ("LLaMA-60M", MULTISTEPS, 128, 1024, 8, 1, 1.220),
    ("LLaMA-350M", FUSED, 128, 1024, 8, 1, 1.978),
    ("LLaMA-350M", FUSED, 128, 4096, 2, 1, 1.871),
    ("LLaMA-350M", LORA, 128, 1024, 8, 1, 2.264),
    ("LLaMA-350M", ADAM, 128, 1024, 1, 1, 2.771),
    ("LLaMA-350M", MULTISTEPS, 128, 1024, 8, 1, 3.734),
    ("LLaMA-7B", FUSED, 128, 2048, 4, 1, 16.91),
    ("GPT-2", FUSED, 128, 1024, 1, 1, 0.399),
    ("GPT-2", MULTISTEPS, 128, 1024, 1, 1, 0.968),
    ("GPT-2-XL", MULTISTEPS, 128, 1024, 8, 1, 14.238),
    ("T5-small", FUSED, 128, 512, 4, 1, 0.571),
    ("T5-3B", FUSED, 128, 512, 8, 1, 7.280),
    ("ViT-B", MULTISTEPS, 128, 1, 32, 1, 0.933),
]


@pytest.mark.parametrize(("model", "method", "rank", "length", "batch", "chips", "gib"), COMPILED)
@pytest.mark.newest  # MultiSteps of older optax accumulates in the params' dtype
def test_within_a_tenth_of_the_compiler(model, method, rank, length, batch, chips, gib):
    setting = Setting(rank, length, batch, chips, model=outline.named(model), moments="params")
    assert estimate.estimate(setting, method).total / GIB == pytest.approx(gib, rel=0.1)


# GiB by the compiler at batch 1, 2048 tokens, rank 128 on one chip, of shapes as their config.json has them
CONFIGS = {
    "gemma-3-1b": {
        "model_type": "gemma3_text",
        "vocab_size": 262144,
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "sliding_window": 512,
    },
    "Qwen3-0.6B": QWEN3,
}


@pytest.mark.parametrize(("name", "gib"), [("gemma-3-1b", 3.084), ("Qwen3-0.6B", 1.923)])
def test_other_families_within_a_tenth(name, gib):
    model = outline.outline(config.shape_of(CONFIGS[name], jnp.bfloat16))
    assert estimate.estimate(Setting(model=model), FUSED).total / GIB == pytest.approx(gib, rel=0.1)


# settings of LLaMA-350M, 1024 tokens, one chip: method, settings, GiB by the compiler
SETTINGS = [
    (ADAM, {}, 4.138),
    (FUSED, {"preset": "advised"}, 1.063),
    (LORA, {"batch": 8}, 2.487),
]


@pytest.mark.parametrize(("method", "given", "gib"), SETTINGS)
def test_other_settings_within_a_tenth(method, given, gib):
    setting = Setting(model=outline.named("LLaMA-350M"), length=1024, **given)
    assert estimate.estimate(setting, method).total / GIB == pytest.approx(gib, rel=0.1)


ADVISED = {"preset": "advised"}
NARROW = {**ADVISED, "state_dtype": "int8"}
WHOLE = {"embedding": "whole", "head": "whole"}
INT8 = {"weights": "int8"}
# GiB by the compiler: LLaMA-7B by `python -m experiments.bench.memory`, others by `flora-jax plan --measure yes`
NARROW_OR_INSIDE = [
    ("LLaMA-7B", BACKWARD, 512, 2048, NARROW | WHOLE, 15.24),
    ("LLaMA-7B", BACKWARD, 2048, 2048, {**NARROW, "state_dtype": "int4"} | WHOLE, 15.64),
    ("LLaMA-7B", BACKWARD, 1024, 2048, {**NARROW, "state_dtype": "int4"} | WHOLE, 14.94),
    ("LLaMA-7B", BACKWARD, 512, 2048, NARROW, 14.53),
    ("LLaMA-7B", BACKWARD, 256, 2048, NARROW, 14.18),
    ("LLaMA-7B", BACKWARD, 512, 2048, NARROW | INT8, 8.74),
    ("LLaMA-7B", BACKWARD, 512, 2048, NARROW | WHOLE | INT8, 9.83),
    ("LLaMA-7B", EXACT, 128, 2048, INT8, 7.72),
    ("LLaMA-7B", FUSED, 512, 2048, NARROW | WHOLE, 19.77),
    ("LLaMA-7B", FUSED, 256, 2048, NARROW | WHOLE, 17.14),
    ("LLaMA-7B", FUSED, 512, 2048, NARROW | WHOLE | INT8, 13.54),
    ("LLaMA-7B", FUSED, 256, 2048, NARROW | WHOLE | INT8, 11.36),
    ("LLaMA-7B", FUSED, 1024, 2048, {**NARROW, "state_dtype": "int4"} | WHOLE | INT8, 17.47),
    ("LLaMA-350M", FUSED, 128, 1024, NARROW, 1.073),
    ("LLaMA-350M", FUSED, 128, 1024, NARROW | INT8, 0.862),
    ("LLaMA-350M", FUSED, 256, 1024, {**NARROW, "state_dtype": "int4"} | WHOLE | INT8, 1.403),
    ("GPT-2-XL", FUSED, 200, 1024, NARROW | INT8, 3.993),
    ("T5-3B", FUSED, 256, 512, NARROW, 9.131),
    ("LLaMA-60M", BACKWARD, 128, 1024, {}, 0.259),
    ("LLaMA-350M", BACKWARD, 128, 1024, {}, 1.038),
    ("LLaMA-350M", BACKWARD, 128, 1024, ADVISED, 1.018),
    ("LLaMA-350M", BACKWARD, 128, 1024, ADVISED | {"batch": 8}, 1.993),
    ("LLaMA-350M", BACKWARD, 128, 1024, NARROW | WHOLE, 1.171),
    ("LLaMA-350M", EXACT, 128, 1024, INT8, 0.670),
    ("LLaMA-350M", MUON, 128, 1024, INT8, 0.664),
    ("GPT-2-XL", BACKWARD, 128, 1024, ADVISED, 3.891),
    ("GPT-2-XL", EXACT, 128, 1024, INT8, 3.102),
    ("T5-3B", BACKWARD, 128, 512, ADVISED, 6.583),
]


@pytest.mark.parametrize(("model", "method", "rank", "length", "given", "gib"), NARROW_OR_INSIDE)
def test_narrow_dtypes_and_updates_inside_the_backward_pass_within_a_tenth(
    model, method, rank, length, given, gib
):
    if given.get("weights") == "int8":
        pytest.importorskip("qwix")
    setting = Setting(rank, length, model=outline.named(model), moments="params", **given)
    assert estimate.estimate(setting, method).total / GIB == pytest.approx(gib, rel=0.1)


# model, method, rank, settings, GiB in use on an H200, 4 x 2048 tokens; `python -m experiments.bench.accelerator`
ON_A_GPU = [
    ("LLaMA-1B", FUSED, 256, {"state_dtype": "bfloat16"}, 4.85),
    ("LLaMA-1B", BACKWARD, 512, {"state_dtype": "int4"}, 4.37),
    ("LLaMA-1B", EXACT, 256, {}, 4.15),
    ("LLaMA-1B", MULTISTEPS, 256, {}, 11.41),
    ("LLaMA-7B", FUSED, 512, {"state_dtype": "bfloat16"}, 20.35),
    ("LLaMA-7B", BACKWARD, 1024, {"state_dtype": "int4"}, 17.32),
    ("LLaMA-7B", EXACT, 512, {}, 16.48),
    ("LLaMA-7B", MULTISTEPS, 512, {}, 53.60),
]


@pytest.mark.parametrize(("model", "method", "rank", "given", "gib"), ON_A_GPU)
def test_what_a_gpu_had_in_use_within_a_fortieth(model, method, rank, given, gib):
    shape = accelerator.SHAPES[model]
    setting = Setting(rank, 2048, 4, model=outline.outline(shape), **ADVISED, **given)
    assert estimate.estimate(setting, method).total / GIB == pytest.approx(gib, rel=0.025)


# model, method, length, batch, MiB, float32; rank 128, one chip; `flora-jax plan --measure yes --dtype float32`
FLOAT32 = [
    ("T5-small", FUSED, 512, 1, 539.1),
    ("T5-small", FUSED, 512, 4, 739.6),
    ("T5-small", MULTISTEPS, 512, 1, 910.6),
    ("GPT-2", FUSED, 1024, 4, 1282.8),
    ("GPT-2", MULTISTEPS, 1024, 4, 1990.6),
    ("ViT-B", FUSED, 1, 64, 1572.2),
    ("LLaMA-350M", FUSED, 1024, 1, 2411.4),
    ("LLaMA-350M", FUSED, 1024, 4, 2980.9),
    ("LLaMA-350M", LORA, 1024, 4, 3845.4),
    ("LLaMA-350M", MULTISTEPS, 1024, 1, 4735.7),
    ("LLaMA-350M", MULTISTEPS, 1024, 4, 5566.4),
    ("GPT-2-XL", FUSED, 1024, 1, 9753.1),
    ("T5-3B", FUSED, 512, 1, 17118.4),
    ("GPT-2-XL", MULTISTEPS, 1024, 1, 22343.5),
]


@pytest.mark.parametrize(("model", "method", "length", "batch", "mib"), FLOAT32)
def test_float32_within_eleven_hundredths(model, method, length, batch, mib):
    setting = Setting(128, length, batch, model=outline.named(model, jnp.float32))
    assert estimate.estimate(setting, method).total / 2**20 == pytest.approx(mib, rel=0.11)


@pytest.mark.newest  # MultiSteps of older optax accumulates in the params' dtype
def test_no_answer_contradicts_the_compiler():
    answers = []
    for model, method, rank, length, batch, chips, gib in COMPILED:
        found = estimate.estimate(
            Setting(rank, length, batch, chips, model=outline.named(model), moments="params"),
            method,
        )
        answers.append(found.answer)
        if found.answer != "close":
            assert (found.answer == "fits") == (gib <= 15.75), (model, method)
        if method == LORA and gib == 16.31:  # nearer to the border than the estimate's error
            assert found.answer == "close"
    assert set(answers) == {"fits", "close", "no"}
    assert answers.count("close") < 10


def test_what_was_measured_decides_the_largest_rank():
    """A step of 16.06 GiB at rank 128 is too large for 15.75, and so is every rank that an estimate of 14.3 would let pass."""
    setting = Setting(model=outline.named("LLaMA-7B"))
    plain = estimate.estimate(setting, FUSED)

    def known(gib, beyond=False):
        e = dataclasses.replace(plain, measured=round(gib * GIB), beyond=beyond)
        return estimate.with_rank(setting, e)

    over, under = known(16.06), known(14.37)
    assert over.answer == "no" and (over.largest_rank or 0) < 128
    assert under.answer == "fits"
    assert under.largest_rank is not None
    # 0.31 GiB must go, of what a rank takes by the estimate, and a tenth more of that
    smaller = estimate.estimate(setting, FUSED, over.largest_rank)
    assert (plain.total - smaller.total) / 1.1 >= 0.31 * GIB
    larger = estimate.estimate(setting, FUSED, under.largest_rank)
    assert 0 < (larger.total - plain.total) / 0.9 <= 1.38 * GIB
    assert under.largest_rank >= 256  # which takes 15.36 by the compiler
    assert known(15.75).largest_rank == 128
    none = known(95.73, beyond=True)
    assert none.answer == "no" and (none.largest_rank or 0) < 128


@pytest.mark.parametrize(
    ("total", "measured", "answer"),
    [
        (89, None, "fits"),
        (91, None, "close"),
        (109, None, "close"),
        (111, None, "no"),
        (111, 100, "fits"),
        (89, 101, "no"),
    ],
)
def test_three_answers(total, measured, answer):
    e = estimate.Estimate(FUSED, 8, {"state": total}, 100, measured=measured)
    assert e.answer == answer
    assert e.fits == (answer == "fits")


def test_parts_by_hand():
    entries = {
        "model_type": "llama",
        "vocab_size": 1000,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    model = outline.outline(config.shape_of(entries, jnp.bfloat16))
    count = 2 * 1000 * 256 + 256 + 3 * (4 * 256 * 256 + 3 * 256 * 512 + 2 * 256)
    setting = Setting(model=model, rank=16, length=128, moments="params")
    parts = estimate.estimate(setting, ADAM).parts
    assert parts["parameters"] == 2 * count
    assert parts["state"] == 2 * 2 * count + 4
    assert parts["gradients"] == 2 * count
    # saved states, then one layer: scores in float32, 6 widths and 3 hidden in bfloat16
    layer = 128 * 4 * 128 * 4 + 128 * (6 * 256 + 3 * 512) * 2
    # or the gradient of the logits, in bfloat16, which themselves fit the vector memory; the embedding's comes after
    late = 2 * 1000 * 256
    assert parts["activations"] == 3 * 128 * 256 * 2 + max(layer, 2 * 128 * 1000) - late
    # of a batch that they do not fit with: in float32 too
    large = estimate.estimate(Setting(model=model, rank=16, length=512, batch=64), ADAM).parts
    tokens = 64 * 512
    layer = tokens * 4 * 512 * 4 + tokens * (6 * 256 + 3 * 512) * 2
    assert large["activations"] == tokens * 3 * 256 * 2 + max(layer, 6 * tokens * 1000) - late
    wide = estimate.estimate(dataclasses.replace(setting, moments="float32"), ADAM).parts
    assert wide["state"] == 2 * 4 * count + 4
    lora = estimate.estimate(setting, LORA).parts
    factors = 2 * 3 * 16 * (4 * (256 + 256) + 3 * (256 + 512))
    assert lora["parameters"] == 2 * count + factors
    assert lora["state"] == 2 * factors + 4
    # the larger side is projected, of the embedding and of the head the width of 256;
    # float32; vectors stay uncompressed
    sketches = 3 * 7 * 16 * 256 + 16 * 1000 + 16 * 1000
    vectors = 256 + 3 * 2 * 256
    assert estimate.estimate(setting, FUSED).parts["sketches"] == 4 * (sketches + vectors)


def test_state_is_the_plan_s():
    model = outline.named("T5-small")
    projection = flora_jax.Projection(64, resample_every=2)
    state = flora_jax.plan(model.params, projection, accumulation_steps=2).state_bytes
    setting = Setting(64, 512, model=model, moments="params")
    for method, name in ((FUSED, "Flora"), (ADAM, "Adam"), ("GaLore", "GaLore")):
        assert estimate.estimate(setting, method).parts["state"] == state[name]


def test_settings_of_the_state():
    """What the settings change is what the transformation keeps."""
    model = outline.named("GPT-2")

    def parts(method, **given):
        return estimate.estimate(Setting(64, 256, model=model, **given), method).parts

    plain = parts(FUSED)["state"]
    assert parts(FUSED, micro_batches=16)["state"] == plain
    assert parts(FUSED, micro_batches=1)["state"] < plain  # no accumulators
    assert parts(FUSED, state_dtype="int8")["state"] < 0.6 * plain
    assert (
        parts(FUSED, state_dtype="int4")["state"] < 0.6 * parts(FUSED, state_dtype="int8")["state"]
    )
    assert parts(FUSED, embedding="whole")["state"] > plain
    assert parts(FUSED, side="input")["state"] != parts(FUSED, side="output")["state"]
    weights = parts(ADAM)["parameters"]
    assert parts(ADAM)["state"] == 4 * weights + 4
    assert parts(ADAM, micro_batches=4)["state"] > 5 * weights
    assert parts(MULTISTEPS, micro_batches=1)["state"] < 0.1 * weights
    backward = parts(BACKWARD)
    assert parts(BACKWARD, state_dtype="int8")["state"] < 0.6 * backward["state"]
    assert backward["parameters"] == weights and not backward["sketches"]
    exact = parts(EXACT)
    assert exact == parts(EXACT, micro_batches=4)
    assert exact["state"] < 0.1 * weights
    assert exact["gradients"] < 0.5 * weights


def test_weights_in_int8():
    """Of each matrix of a layer a byte a number and a scale of two bytes for 128 of them; only of methods that have them."""
    pytest.importorskip("qwix")
    model = outline.named("LLaMA-7B")
    inner = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    setting = Setting(model=model, weights="int8")
    whole = estimate.estimate(setting, ADAM).parts["parameters"]
    for method in (FUSED, BACKWARD, EXACT, MUON):
        assert whole - estimate.estimate(setting, method).parts["parameters"] == inner - inner // 64
    for method in (ORDINARY, LORA, MULTISTEPS):
        plain = estimate.estimate(Setting(model=model), method).parts["parameters"]
        assert estimate.estimate(setting, method).parts["parameters"] == plain


def test_what_no_estimate_is_made_of():
    shape = dataclasses.replace(config.NAMED["LLaMA-60M"], remat=False)
    with pytest.raises(ValueError, match="remat must be on to be estimated by parts, found off"):
        estimate.estimate(Setting(model=outline.outline(shape)), FUSED)
    shape = dataclasses.replace(shape, remat=True, experts=4, model_type="mixtral")
    with pytest.raises(ValueError, match=r"model must have no experts .*, found a mixtral; --mea"):
        estimate.estimate(Setting(model=outline.outline(shape)), FUSED)


@pytest.mark.parametrize("method", [FUSED, LORA])
def test_the_largest_rank_fits_and_the_next_does_not(method):
    setting = Setting(model=outline.named("LLaMA-7B"))
    rank = estimate.largest_rank(setting, method)
    assert rank is not None
    assert estimate.estimate(setting, method, rank).fits
    assert not estimate.estimate(setting, method, rank + 8).fits


def test_no_rank_where_none_fits_or_there_is_none():
    setting = Setting(model=outline.named("LLaMA-7B"))
    assert estimate.largest_rank(setting, ORDINARY) is None
    assert estimate.largest_rank(setting, ADAM) is None


def test_a_rank_is_below_the_matrices_smaller_side():
    setting = Setting(64, 128, model=outline.named("GPT-2"))
    assert estimate.largest_rank(setting, FUSED) == 760


def test_chips_divide_weights_and_the_batch():
    model = outline.named("LLaMA-7B")
    one, four = (
        estimate.estimate(Setting(model=model, batch=4, chips=chips), ADAM).parts
        for chips in (1, 4)
    )
    for name in ("parameters", "state", "gradients", "activations"):
        assert four[name] == pytest.approx(one[name] / 4, abs=1)
    assert one["gathered"] == 0
    assert four["gathered"] == 2 * 2 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)


def test_json_and_page_say_the_same():
    setting = Setting(model=outline.named("LLaMA-7B"))
    found = estimate.estimates(setting)
    data = json.loads(report.to_json(setting, found))
    assert [row["method"] for row in data["methods"]] == list(METHODS)
    assert data["parameters"] == 6738415616
    for row, e in zip(data["methods"], found, strict=True):
        assert row["answer"] == e.answer and row["bounds"] == [round(size) for size in e.bounds]
        assert row["bytes"] == sum(row["parts"].values()) == e.total
    picture = ElementTree.fromstring(report.to_svg(setting, found))
    space = "{http://www.w3.org/2000/svg}"
    bars = [node for node in picture.iter(f"{space}rect") if node.find(f"{space}title") is not None]
    assert len(bars) == sum(bool(e.parts[name]) for e in found for name in PARTS)
    widths = sum(float(bar.get("width", 0)) for bar in bars[:4])
    last = sum(float(bar.get("width", 0)) for bar in bars[-5:])
    assert widths / last == pytest.approx(found[0].total / found[-1].total, rel=0.01)
    page = report.to_html(setting, found)
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert f"{found[0].total / GIB:.2f}" in page


def test_names_are_escaped():
    setting = Setting(model=outline.outline(config.NAMED["GPT-2"], name="<b>&"))
    page = report.to_html(setting, estimate.estimates(setting))
    assert "<b>" not in page and "&lt;b&gt;&amp;" in page


def test_wrong_arguments_get_a_sentence():
    model = outline.named("GPT-2")
    with pytest.raises(ValueError, match="chips must be at least 1, found 0"):
        Setting(model=model, chips=0)
    with pytest.raises(ValueError, match=r"method must be one of .*, found 'SGD'"):
        estimate.estimate(Setting(model=model), "SGD")


def test_an_estimate_starts_no_backend():
    """Devices are often set up after a plan, which must not find them used."""
    code = (
        "from jax._src import xla_bridge\n"
        "from flora_jax.memory import estimate, outline\n"
        "list(estimate.estimates(estimate.Setting(model=outline.named('LLaMA-7B'))))\n"
        "assert not xla_bridge._backends\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
