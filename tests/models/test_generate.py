"""Searches with a cache are compared with naive ones, which run the model again for each token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.models import decoder, generate, gpt2, t5
from tests.helpers import normal

END, COUNT = 3, 6
TOKENS = np.random.default_rng(0).integers(4, 12, (3, 5)).astype(np.int32)
MASK = np.ones((3, 5), bool)
MASK[1, :2] = MASK[2, :4] = False  # padded on the left
MODELS = {
    "t5": t5.T5(t5.Shape(12, 16, 24, 2, 2, 8, gated=True, tied=False)),
    "gpt2": gpt2.Gpt2(gpt2.Shape(12, 16, 16, 2, 2)),
    "llama": decoder.Decoder(decoder.Shape(12, 16, 24, 2, 4, 2, jnp.float32)),
}


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    """A model, params that make its choices clear, and the log-probabilities of one sequence."""
    model = MODELS[request.param]
    tokens = jnp.zeros((1, 4), jnp.int32)
    given = (tokens,) * (2 if request.param == "t5" else 1)
    params = model.init(jax.random.key(0), *given)["params"]
    params = jax.tree.map(lambda x: x + 0.4 * normal(x.size, x.shape), params)
    apply = jax.jit(lambda *args: model.apply({"params": params}, *args))

    @functools.cache
    def log_probabilities(row, *new):
        """Gives log-probabilities of all next tokens, after the tokens `new`, without a cache, and without padding before or among them."""
        source = TOKENS[row][MASK[row]]
        target = [generate.START, *new] if request.param == "t5" else [*source, *new]
        padded = np.zeros((1, TOKENS.shape[1] + COUNT), np.int32)  # after them, so that one program
        padded[0, : len(target)] = target
        logits = apply(source[None], padded) if request.param == "t5" else apply(padded)
        logits = np.asarray(logits[0, len(target) - 1], np.float64)
        return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()

    return model, params, log_probabilities


def naive_greedy(log_probabilities, row, end):
    new: list[int] = []
    while len(new) < COUNT and end not in new:
        new.append(int(log_probabilities(row, *new).argmax()))
    return new + [0] * (COUNT - len(new))


def naive_beam(log_probabilities, row, beams, penalty, early):
    """Searches on lists, with the rules that the docstring of `beam` states."""
    running, ended = [(0.0, [])], []
    for length in range(1, COUNT + 1):
        found = [
            (score + gain, [*new, token])
            for score, new in running
            for token, gain in enumerate(log_probabilities(row, *new))
        ]
        found = sorted(found, key=lambda pair: -pair[0])[: 2 * beams]
        over = [new[-1] == END or length == COUNT for _, new in found]
        ended += [
            (score / length**penalty, new)
            for (score, new), is_over in list(zip(found, over, strict=True))[:beams]
            if is_over
        ]
        ended = sorted(ended, key=lambda pair: -pair[0])[:beams]
        running = [pair for pair, is_over in zip(found, over, strict=True) if not is_over][:beams]
        if len(ended) == beams and (
            early or not running or running[0][0] / length**penalty <= ended[-1][0]
        ):
            break
    score, new = ended[0]
    return score, new + [0] * (COUNT - len(new))


@pytest.mark.parametrize("end", [None, END])
def test_greedy(case, end):
    model, params, log_probabilities = case
    found = generate.greedy(model, params, TOKENS, MASK, count=COUNT, end=end)
    expected = [naive_greedy(log_probabilities, row, end) for row in range(3)]
    assert found.tolist() == expected


@pytest.mark.parametrize("penalty, early", [(1.0, False), (2.0, True)])
def test_beam(case, penalty, early):
    model, params, log_probabilities = case
    options = {"length_penalty": penalty, "early_stopping": early}
    found, scores = generate.beam(
        model, params, TOKENS, MASK, count=COUNT, beams=3, end=END, **options
    )
    for row in range(3):
        score, expected = naive_beam(log_probabilities, row, 3, penalty, early)
        assert found[row].tolist() == expected
        np.testing.assert_allclose(scores[row], score, atol=1e-4)


def test_one_beam_is_greedy(case):
    model, params, _ = case
    found, _ = generate.beam(
        model, params, TOKENS, MASK, count=COUNT, beams=1, end=END, early_stopping=True
    )
    expected = generate.greedy(model, params, TOKENS, MASK, count=COUNT, end=END)
    assert found.tolist() == expected.tolist()


def test_sequences_are_not_all_of_one_token(case):
    """Else the tests above would say little."""
    model, params, _ = case
    found = generate.greedy(model, params, TOKENS, MASK, count=COUNT)
    assert len(np.unique(found)) > 2
