"""Greedy and beam search against those of transformers, on padded batches."""

import jax
import numpy as np
import pytest
import torch

from flora_jax.models import generate
from flora_jax.models.load import load
from tests.parity.test_pretrained import MASK, TOKENS, make

END, PAD, COUNT = 1, 2, 9


@pytest.fixture(scope="module", params=["t5", "gpt2", "llama"])
def case(request, tmp_path_factory):
    model = make(request.param)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)  # clearer choices
    folder = tmp_path_factory.mktemp("checkpoint") / request.param
    model.save_pretrained(folder)
    ours, params = load(folder)
    return model, ours, jax.tree.map(np.asarray, params)


def theirs(model, **options):
    found = model.generate(
        torch.tensor(TOKENS),
        attention_mask=torch.tensor(MASK).long(),
        max_new_tokens=COUNT,
        do_sample=False,
        eos_token_id=END,
        pad_token_id=PAD,
        decoder_start_token_id=generate.START,
        **options,
    )
    start = 1 if model.config.is_encoder_decoder else TOKENS.shape[1]
    found = found[:, start:].numpy()
    return np.pad(found, ((0, 0), (0, COUNT - found.shape[1])), constant_values=PAD)


def test_greedy(case):
    torch_model, model, params = case
    found = generate.greedy(model, params, TOKENS, MASK, count=COUNT, end=END, pad=PAD)
    np.testing.assert_array_equal(found, theirs(torch_model))


@pytest.mark.parametrize("penalty, early", [(1.0, False), (0.6, True)])
def test_beam(case, penalty, early):
    torch_model, model, params = case
    options = {"length_penalty": penalty, "early_stopping": early}
    found, _ = generate.beam(
        model, params, TOKENS, MASK, count=COUNT, beams=4, end=END, pad=PAD, **options
    )
    np.testing.assert_array_equal(found, theirs(torch_model, num_beams=4, **options))
