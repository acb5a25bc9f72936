"""Scores are computed by the libraries that papers report: rouge-score and sacrebleu."""

from collections.abc import Sequence

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

ROUGE = ("rouge1", "rouge2", "rougeL")


def rouge(found: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """Gives the mean F1 of ROUGE-1, -2 and -L with stemming, in percent."""
    scorer = RougeScorer(ROUGE, use_stemmer=True)
    pairs = zip(expected, found, strict=True)
    scores = [scorer.score(target, prediction) for target, prediction in pairs]
    return {name: 100 * float(np.mean([s[name].fmeasure for s in scores])) for name in ROUGE}


def bleu(found: Sequence[str], expected: Sequence[str]) -> tuple[dict[str, float], str]:
    """Gives corpus BLEU, and sacrebleu's signature of how it was computed."""
    metric = BLEU()
    score = metric.corpus_score(list(found), [list(expected)]).score
    return {"bleu": score}, str(metric.get_signature())


def perplexity(losses: Sequence[float]) -> dict[str, float]:
    """Gives the `exp` of the mean of losses in nats."""
    return {"perplexity": float(np.exp(np.mean(losses)))}


def accuracy(found: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Gives the percentage of classes that are right."""
    return {"accuracy": 100 * float(np.mean(np.asarray(found) == np.asarray(expected)))}
