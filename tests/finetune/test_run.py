"""Runs of small checkpoints: they learn, resume to the last bit, and leave a checkpoint behind."""

import contextlib
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filelock import FileLock
from rich.console import Console

from flora_jax.chain import storage
from flora_jax.finetune import run, sizes
from flora_jax.finetune.settings import Settings
from flora_jax.finetune.stopping import Stopped
from flora_jax.models.load import load
from tests.finetune.checkpoint import PAIRS, make_checkpoint, write
from tests.helpers import often

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "pairs.jsonl", PAIRS)


def settings(model, data, out, **changes):
    given = Settings(
        str(model),
        (str(data),),
        out=out,
        method="flora",
        rank=8,
        length=64,
        batch=4,
        micro_batches=2,
        steps=12,
        rate=0.02,
        other_rate=0.01,
        samples=2,
        sample_tokens=8,
    )
    return replace(given, **changes)


def weights(folder):
    return jax.tree.leaves(load(folder)[1])


def test_a_run_learns_and_leaves_a_checkpoint(model, data, tmp_path):
    given = settings(model, data, tmp_path / "mine")
    figures = run.finetune(given, QUIET)
    assert figures["after"] < 0.75 * figures["before"]
    assert figures["before"] == pytest.approx(np.log(300), rel=0.3)
    out, own = tmp_path / "mine", tmp_path / "mine.run"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md"):
        assert (out / name).read_bytes() == (model / name).read_bytes()
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (model / "config.json").read_text()
    )
    assert not any(np.array_equal(a, b) for a, b in zip(weights(out), weights(model), strict=True))
    assert (own / "loss.svg").exists() and list((own / "logs").glob("events*"))
    report = json.loads((own / "report.json").read_text())
    assert len(report["history"]["train"]) == 12
    assert [len(report["answers"]), report["answers"][0]["goal"][:2]] == [2, " a"]
    # the validation loss is that of the exported weights, on the counted tokens alone
    assert report["after"] == pytest.approx(naive_loss(given, out), rel=1e-4)


@pytest.mark.parametrize("rows", [1, 2])
def test_texts_at_the_length_by_default(rows, model, tmp_path):
    """Every token has a loss, and a sequence has more of them than logits exist at a time."""
    words = [pair["prompt"] + pair["completion"] for pair in PAIRS]
    texts = [{"text": " ".join(words[i:] + words[:i])} for i in range(4)]
    data = write(tmp_path / "texts.jsonl", texts)
    given = Settings(str(model), (str(data),), out=tmp_path / "mine", batch=rows, steps=1)
    given = replace(given, micro_batches=1, held_out=0.25, samples=0)
    assert run.finetune(given, QUIET)["after"] == pytest.approx(
        naive_loss(given, given.out), rel=1e-4
    )


def naive_loss(given, folder):
    """The mean loss of the validation side, one document at a time, from logits."""
    found, params = load(folder)
    apply = jax.jit(lambda tokens: found.apply({"params": params}, tokens))
    tokenizer = run.tokenizer_of(folder)
    held = run._data(given, tokenizer, QUIET).validation.store
    total, count = 0.0, 0
    for first, last in zip(held.offsets[:-1], held.offsets[1:], strict=True):
        tokens, counts = held.tokens[first:last], held.counts[first:last]
        padded = np.zeros((1, given.length), np.int32)
        padded[0, : len(tokens)] = tokens
        odds = jax.nn.log_softmax(apply(jnp.asarray(padded))[0])
        for i in np.flatnonzero(counts[1:]):
            total -= float(odds[i, tokens[i + 1]])
            count += 1
    return total / count


def stopping_at(step):
    @contextlib.contextmanager
    def told_to_stop():
        yield lambda done: done == step

    return told_to_stop


@pytest.mark.parametrize(
    "method", often(["flora", "flora in int4", "exact", "lora"], "flora in int4", "exact")
)
def test_a_stopped_run_goes_on_to_the_same_bits(method, model, data, tmp_path, monkeypatch):
    own = {"rank": None, "micro_batches": None} if method == "exact" else {}
    if method == "flora in int4":
        monkeypatch.setattr(storage, "MIN_SIZE", 1)
        method, own = "flora", {"state_dtype": "int4"}
    given = settings(model, data, tmp_path / "mine", method=method, steps=5, samples=0, **own)
    run.finetune(replace(given, out=tmp_path / "whole"), QUIET)
    with monkeypatch.context() as patch:
        patch.setattr(run, "told_to_stop", stopping_at(2))
        with pytest.raises(Stopped, match="Stopped at step 2, saved; the same command goes on"):
            run.finetune(given, QUIET)
    assert not given.out.exists()
    figures = run.finetune(given, QUIET)
    assert len(figures["history"]["train"]) == 5
    for a, b in zip(weights(given.out), weights(tmp_path / "whole"), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("method", often(["flora", "exact", "lora"], "flora"))
def test_bfloat16_is_trained_and_kept(method, model, data, tmp_path):
    own = {"rank": None, "micro_batches": None} if method == "exact" else {}
    given = settings(model, data, tmp_path / "mine", method=method, dtype="bfloat16", **own)
    figures = run.finetune(replace(given, samples=0), QUIET)
    assert figures["after"] < 0.85 * figures["before"]
    assert {x.dtype for x in weights(given.out)} == {jnp.dtype("bfloat16")}
    assert json.loads((given.out / "config.json").read_text())["dtype"] == "bfloat16"
    if method == "lora":
        assert (tmp_path / "mine.run" / "adapter" / "adapter_model.safetensors").exists()


def test_another_run_in_its_place_is_refused(model, data, tmp_path, monkeypatch):
    given = settings(model, data, tmp_path / "mine", method="lora", steps=4, samples=0)
    monkeypatch.setattr(run, "told_to_stop", stopping_at(1))
    with pytest.raises(Stopped):
        run.finetune(given, QUIET)
    with pytest.raises(
        ValueError, match=r"rate: the run in .*mine.run was started with 0.02, this"
    ):
        run.finetune(replace(given, rate=0.5), QUIET)
    fewer = write(tmp_path / "fewer.jsonl", PAIRS[:100])
    with pytest.raises(ValueError, match=r"data: the run in .* was started with"):
        run.finetune(replace(given, data=(str(fewer),)), QUIET)


def test_a_mesh_gives_the_losses_of_one_device(model, data, tmp_path):
    given = settings(model, data, tmp_path / "one", steps=3, samples=0)
    alone = run.finetune(given, QUIET)
    for mesh in ("data=2,fsdp=2,model=2",):
        sharded = replace(given, out=tmp_path / mesh, mesh=mesh)
        found = run.finetune(sharded, QUIET)
        losses = [[value for _, value in x["history"]["train"]] for x in (found, alone)]
        np.testing.assert_allclose(*losses, rtol=2e-3)


def test_what_does_not_fit_is_refused_before_the_weights_are_read(
    model, data, tmp_path, monkeypatch
):
    given = settings(model, data, tmp_path / "mine", method="lora", memory=0.0002)
    monkeypatch.setattr(run, "load", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(
        ValueError, match=r"does not fit: 0.00 GiB on each device, which has 0.00; no smaller"
    ):
        run.finetune(given, QUIET)
    size = run.finetune(replace(given, memory=None, plan_only=True), QUIET)["planned"]
    room = (sum(size.values()) - 1000) / 2**30
    with pytest.raises(ValueError, match=r"what fits: --rank 4 \(0.00 GiB\), or --batch 1"):
        run.finetune(replace(given, memory=room), QUIET)


def test_a_compiler_without_room_is_a_plan_that_does_not_fit(model, data, tmp_path, monkeypatch):
    """As on a TPU, whose compiler refuses a program that is too large."""
    given = settings(model, data, tmp_path / "mine", method="adafactor", rank=None)
    measure = sizes.measure

    def refused(lowered, frozen, state, batch):
        if batch["tokens"].shape[0] > 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in hbm")
        return measure(lowered, frozen, state, batch)

    monkeypatch.setattr(sizes, "measure", refused)
    with pytest.raises(
        ValueError, match=r"more than there is on each .* fits: --batch 1 \(0.00 GiB\)"
    ):
        run.finetune(given, QUIET)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch": 3, "mesh": "fsdp=8"}, "batch must be a multiple of the mesh's data x fsdp, 8"),
        ({"mesh": "fsdp=3"}, "mesh 'fsdp=3' has 3 devices, found 8"),
        ({"data": ("nowhere.jsonl",)}, "nowhere.jsonl"),
        ({"model": "nowhere"}, "nowhere"),
    ],
)
def test_what_is_wrong_gets_a_sentence(changes, said, model, data, tmp_path):
    with pytest.raises(ValueError, match=said):
        run.finetune(replace(settings(model, data, tmp_path / "mine"), **changes), QUIET)
    assert not (tmp_path / "mine").exists()


def test_a_folder_that_is_there_is_not_touched(model, data, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match=r"out: .*mine is there already; give another folder"):
        run.finetune(settings(model, data, tmp_path / "mine"), QUIET)


def test_two_runs_in_one_folder_are_refused(model, data, tmp_path):
    (tmp_path / "mine.run").mkdir()
    refused = pytest.raises(ValueError, match=r"out: another run is at work in .*mine.run; wait")
    with FileLock(tmp_path / "mine.run" / "lock"), refused:
        run.finetune(settings(model, data, tmp_path / "mine"), QUIET)
    # a process that ended left the file, and no lock
    figures = run.finetune(settings(model, data, tmp_path / "mine", plan_only=True), QUIET)
    assert sum(figures["planned"].values()) > 0


def test_chats_learn_their_answers_alone(model, tmp_path):
    chats = [
        {
            "messages": [
                {"role": "user", "content": one["prompt"]},
                {"role": "assistant", "content": one["completion"]},
            ]
        }
        for one in PAIRS
    ]
    file = write(tmp_path / "chats.jsonl", chats)
    given = settings(model, file, tmp_path / "mine", method="lora")
    figures = run.finetune(given, QUIET)
    assert figures["after"] < 0.9 * figures["before"]
    assert figures["answers"][0]["goal"].strip().startswith("a")
