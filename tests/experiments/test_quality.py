from experiments import quality


def test_table_takes_the_best_rate_of_each_row():
    def row(name, rate, loss):
        return {"name": name, "rate": rate, "seed": 0, "loss": loss}

    lines = quality.table(
        [
            row("uncompressed x1", 0.1, 2.0),
            row("uncompressed x1", 0.2, 3.0),
            row("gaussian", 0.2, 2.2),
        ]
    ).splitlines()
    assert lines[2] == "| uncompressed x1 | 0.1 | 1 | 2.000 | 1.000 |"
    assert lines[3] == "| gaussian | 0.2 | 1 | 2.200 | 1.100 |"


def test_every_row_has_a_name_of_its_own():
    names = [str(setting) for setting in quality.settings(256)]
    assert len(set(names)) == len(names)
