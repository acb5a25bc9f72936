import pytest

from experiments.bench import pods, scaling

CHIP = pods.Chip(flops=1e14, memory=1e12, link=1e11, network=1e9)


def test_a_step_takes_as_long_as_its_slowest_part():
    one = scaling.Method(compute=0.5, memory=0.2, inside=3e10, shared=4e8)
    assert one.seconds(1, CHIP) == 0.5
    assert one.network(4) == pytest.approx(6e8)  # a ring of four: 2 · 3/4
    assert one.seconds(4, CHIP) == pytest.approx(0.6)
    assert one.hiding(4, CHIP) == pytest.approx(1.2e9)
    by_links = scaling.Method(compute=0.5, memory=0.2, inside=9e10, shared=4e8)
    assert by_links.seconds(4, CHIP) == pytest.approx(0.9)


def test_bytes_that_slices_share_are_those_of_the_shapes():
    """LLaMA-60M: 8 layers of width 512, hidden 1376, vocabulary 32000; rank 64, four chips."""
    config = pods.Config(shape="LLaMA-60M", rank=64, fsdp=4)
    found = scaling.shared_bytes(config)
    matrices = 8 * (4 * 512 * 512 + 3 * 512 * 1376)
    norms = (2 * 8 + 1) * 512
    numbers = matrices + 2 * 32000 * 512 + norms
    assert found["MultiSteps + Adafactor"] == 2 * numbers / 4
    sketches = 64 * (8 * 7 * 512 + 2 * 32000)  # embedding and head keep the words
    assert found["Flora, fused"] == 4 * (sketches + norms) / 4


def test_weights_are_those_of_the_shapes():
    config = pods.Config(shape="LLaMA-70B")
    attention = 2 * 8192 * 8192 + 2 * 8192 * 1024  # eight key heads of 128
    assert pods.weights(config) == 80 * (attention + 3 * 8192 * 28672) + 8192 * 32000
