"""flora-jax: what it prints, what it writes, what it gives back."""

import builtins
import json

import pytest

from flora_jax import cli
from flora_jax.memory import compiled, estimate
from flora_jax.models import config


@pytest.fixture(autouse=True)
def without_a_compiler(monkeypatch):
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: None)


def test_the_answer(capsys, tmp_path):
    page = tmp_path / "plan.html"
    assert cli.main(["plan", "--model", "LLaMA-7B", "--chip", "v5e", "--html", str(page)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Flora, fused at rank 128 fits" in shown
    assert "does not fit" not in shown
    assert "…" not in shown  # nothing is cut at 80 columns
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_what_does_not_fit_gives_1_and_a_rank_that_does(capsys):
    assert cli.main(["plan", "--rank", "512"]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "does not fit" in shown and "rank 320 does." in shown
    assert cli.main(["plan", "--optimizer", "adam"]) == 1
    assert "take more chips" in " ".join(capsys.readouterr().out.split())


def test_json_of_a_config(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config.config_of(config.NAMED["GPT-2"])))
    arguments = ["plan", "--config", str(tmp_path), "--hbm", "8", "--length", "256", "--json"]
    assert cli.main(arguments) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["parameters"] == 124439808  # of the published checkpoint
    assert data["capacity"] == 8 * 2**30
    assert all(row["fits"] for row in data["methods"])


def test_what_the_compiler_says_decides(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: True)
    asked = []

    def measure(setting, method, chip):
        asked.append((setting.model.name, method, chip))
        return 16 * estimate.GIB

    monkeypatch.setattr(compiled, "measure", measure)
    page = tmp_path / "plan.html"
    assert cli.main(["plan", "--html", str(page)]) == 1  # estimated, it fits
    assert asked == [("LLaMA-7B", "Flora, fused", "v5e")]
    shown = " ".join(capsys.readouterr().out.split())
    assert "Flora, fused at rank 128 does not fit: 16.00 GiB, a chip has 15.75" in shown
    assert "<td>16.00</td>" in page.read_text(encoding="utf-8")
    assert cli.main(["plan", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)["methods"]
    assert [row["measured"] for row in rows] == [16 * estimate.GIB] + [None] * 5
    assert not rows[0]["fits"]
    asked.clear()
    assert cli.main(["plan", "--measure", "all"]) == 1
    assert [method for _, method, _ in asked] == list(compiled.MEASURED)
    assert capsys.readouterr().out.count("16.00") == 1 + len(compiled.MEASURED)
    asked.clear()
    assert cli.main(["plan", "--measure", "no"]) == 0
    assert cli.main(["plan", "--chip", "H100-80GB"]) == 0
    assert asked == []
    assert cli.main(["plan", "--method", "galore", "--measure", "yes"]) == 2
    assert "measure must be auto or no here, found yes: GaLore takes" in capsys.readouterr().err


def test_shapes_lists_names(capsys):
    assert cli.main(["shapes"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*config.NAMED, "v5e", "multisteps"))


def test_wrong_words_give_2_and_a_sentence(capsys):
    assert cli.main(["plan", "--chip", "v9"]) == 2
    assert "chip must be one of v5e, " in capsys.readouterr().err
    assert cli.main(["plan", "--chips", "0"]) == 2
    assert "chips must be at least 1, found 0" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["flax", "rich", "tyro"])
def test_without_its_extra_it_says_what_to_install(capsys, monkeypatch, missing):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == missing:
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert cli.main(["shapes"]) == 2
    shown = capsys.readouterr().err
    assert f"found no {missing}: pip install 'flora-jax[cli]'" in shown


def test_help_ends_well():
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "--help"])
    assert ended.value.code == 0
