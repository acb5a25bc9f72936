"""The completion command prints what it measured."""

from experiments import completion


def test_the_table(tmp_path):
    out = tmp_path / "table.txt"
    completion.main(completion.Config(size=16, true_rank=1, rank=4, steps=3, seen=0.5, out=out))
    text = out.read_text()
    assert "16 x 16 of rank 1" in text
    for name in ("three factors of full width", "Deep LoRA", "LoRA"):
        assert name in text
