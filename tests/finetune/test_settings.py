import pytest

from flora_jax.finetune.settings import METHODS, Settings


def test_defaults_of_each_method():
    found = {name: Settings("m", ("d",), method=name) for name in METHODS}
    assert [found[name].ranked for name in ("flora", "lora", "xgb-lora", "exact", "muon")] == [
        64,
        16,
        1,
        None,
        None,
    ]
    assert [found[name].accumulated for name in ("flora", "exact", "exact-muon", "xgb-lora")] == [
        8,
        1,
        1,
        1,
    ]
    assert all(0 < one.peak < 0.1 for one in found.values())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"length": 0}, "length must be at least 1, found 0"),
        ({"rank": 0}, "rank must be at least 1, found 0"),
        ({"rate": -1.0}, "rate must be above 0, found -1.0"),
        ({"held_out": 1.0}, "held_out must be at least 0 and below 1, found 1.0"),
        (
            {"method": "lora", "state_dtype": "int4"},
            "state_dtype must not be given with method lora, which has no sketches",
        ),
        (
            {"method": "exact", "rank": 4},
            "rank must not be given with method exact, which has none",
        ),
        (
            {"method": "exact", "micro_batches": 4},
            "micro_batches must be 1 with method exact, .* give a larger batch",
        ),
        ({"data": ()}, "data must be at least one file, found none"),
    ],
)
def test_what_does_not_go_together(changes, said):
    with pytest.raises(ValueError, match=said):
        Settings(**{"model": "m", "data": ("d",), **changes})


def test_settings_that_may_differ_are_not_kept():
    one, two = (
        Settings("m", ("d",), out=out, samples=samples) for out, samples in (("a", 1), ("b", 2))
    )
    assert one.kept() == two.kept()
    assert one.kept() != Settings("m", ("d",), rate=0.5).kept()
