"""Against counts by hand."""

import math

import numpy as np
import pytest

from experiments.tasks import scores


def test_rouge_by_hand():
    found = scores.rouge(["the cat sat"], ["the cat is on the mat"])
    # unigrams: 2 of 3 found, 2 of 6 expected; bigrams: 1 of 2, 1 of 5; longest common: 2
    assert found["rouge1"] == pytest.approx(100 * 2 * (2 / 3) * (2 / 6) / (2 / 3 + 2 / 6))
    assert found["rouge2"] == pytest.approx(100 * 2 * (1 / 2) * (1 / 5) / (1 / 2 + 1 / 5))
    assert found["rougeL"] == pytest.approx(found["rouge1"])


def test_bleu_by_hand():
    found, signature = scores.bleu(["the cat sat on mat"], ["the cat sat on the mat"])
    precisions = [5 / 5, 3 / 4, 2 / 3, 1 / 2]
    mean = math.exp(sum(map(math.log, precisions)) / 4)
    assert found["bleu"] == pytest.approx(100 * math.exp(1 - 6 / 5) * mean)
    assert signature.startswith("nrefs:1|case:mixed") and "tok:13a" in signature


def test_perplexity_and_accuracy():
    assert scores.perplexity([math.log(3), math.log(12)]) == {"perplexity": pytest.approx(6)}
    assert scores.accuracy(np.array([1, 2, 3, 4]), np.array([1, 2, 0, 4])) == {"accuracy": 75.0}
