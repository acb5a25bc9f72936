"""flora-jax: what it prints, what it writes, what it gives back."""

import builtins
import json
import sys

import jax.numpy as jnp
import pytest

import flora_jax
from flora_jax import cli
from flora_jax.memory import compiled, estimate
from flora_jax.models import config


@pytest.fixture(autouse=True)
def without_a_compiler(monkeypatch):
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: None)


def test_the_answer(capsys, tmp_path):
    page = tmp_path / "plan.html"
    given = ["plan", "--model", "llama-7b", "--chip", "V5E", "--rank", "64", "--html", str(page)]
    assert cli.main(given) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Flora, fused at rank 64 fits: 13.86 of 15.75 GiB, estimated within 10%." in shown
    assert "Up to rank 104 it surely does." in shown
    assert "does not fit" not in shown
    assert "…" not in shown  # nothing is cut at 80 columns
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_what_is_too_close_to_call_gives_3(capsys):
    assert cli.main(["plan"]) == 3
    shown = " ".join(capsys.readouterr().out.split())
    assert "is too close to call: 13.02 to 15.92 of 15.75 GiB. Rank 104 surely fits." in shown
    assert cli.main(["plan", "--hbm", "80", "--method", "adam"]) == 3
    shown = " ".join(capsys.readouterr().out.split())
    assert "of 80.00 GiB. The compiler was not asked: hbm names no chip to compile for." in shown


def test_what_does_not_fit_gives_1_and_a_rank_that_does(capsys):
    assert cli.main(["plan", "--rank", "1024"]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "does not fit" in shown and "Rank 104 does." in shown
    assert cli.main(["plan", "--optimizer", "adam"]) == 1
    assert "Take more chips" in " ".join(capsys.readouterr().out.split())


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
    said = "Flora, fused at rank 128 does not fit: 16.00, as compiled; a chip has 15.75 GiB. Rank "
    assert said in shown
    rank = int(shown.split(said)[1].split()[0])
    assert rank < 128
    assert f"no {rank}" in shown  # the table's column says the same
    assert "<td>16.00</td>" in page.read_text(encoding="utf-8")
    assert cli.main(["plan", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)["methods"]
    assert [row["measured"] for row in rows] == [16 * estimate.GIB] + [None] * 8
    assert not rows[0]["fits"]
    asked.clear()
    assert cli.main(["plan", "--measure", "all"]) == 1
    assert [method for _, method, _ in asked] == list(compiled.MEASURED)
    assert capsys.readouterr().out.count("16.00") == 1 + len(compiled.MEASURED)
    asked.clear()
    assert cli.main(["plan", "--measure", "no"]) == 3
    assert cli.main(["plan", "--chip", "H100-80GB"]) == 0
    assert cli.main(["plan", "--hbm", "40"]) == 0
    assert asked == []
    assert cli.main(["plan", "--method", "galore", "--measure", "yes"]) == 2
    assert "measure must be auto or no here, found yes: GaLore takes" in capsys.readouterr().err


def test_what_no_chip_holds(capsys, monkeypatch):
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(compiled, "measure", lambda setting, method, chip: None)
    assert cli.main(["plan", "--json"]) == 1
    row = json.loads(capsys.readouterr().out)["methods"][0]
    assert row["bounds"] == [row["measured"], None] and row["answer"] == "no"
    assert cli.main(["plan"]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert ">95.73" in shown and "does not fit: over 95.73, as compiled" in shown


def test_what_only_the_compiler_knows(capsys, monkeypatch):
    assert cli.main(["plan", "--no-remat"]) == 2
    shown = capsys.readouterr().err
    assert "remat must be on to be estimated by parts, found off; --measure yes compiles" in shown
    assert "the package libtpu is not installed" in shown
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: True)
    remats = []

    def measure(setting, method, chip):
        remats.append(setting.model.model.shape.remat)
        return 14 * estimate.GIB

    monkeypatch.setattr(compiled, "measure", measure)
    assert cli.main(["plan", "--no-remat"]) == 0
    assert remats == [False]
    shown = " ".join(capsys.readouterr().out.split())
    assert "flora 128 - 14.00 yes -" in shown and "without remat" in shown
    assert cli.main(["plan", "--no-remat", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["methods"]
    assert (row["bytes"], row["measured"]) == (None, 14 * estimate.GIB)


def test_settings_of_the_command_arrive(capsys):
    words = ["plan", "--model", "gpt-2", "--json", "--method", "adam", "--length", "256"]
    states = []
    for more in ([], ["--moments", "params"], ["--micro-batches", "4"]):
        assert cli.main([*words, *more]) == 0
        rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)["methods"]}
        states.append(rows["Adam"]["parts"]["state"])
    assert states[0] == 2 * states[1] - 4
    assert states[2] > states[0]


@pytest.mark.parametrize("measure", [False, True])
def test_eighty_columns(capsys, monkeypatch, measure):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: measure or None)
    monkeypatch.setattr(compiled, "measure", lambda setting, method, chip: 2**37)
    words = ["plan", "--model", "LLaMA-70B", "--chips", "4", "--batch", "4", "--dtype", "float32"]
    assert cli.main(words) == 1
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    rows = [line.split() for line in lines if line.split()[:1] == ["multisteps"]]
    assert rows and rows[0][-2:] == ["no", "-"]
    assert "Adam's moments in float32" in " ".join(" ".join(lines).split())


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"flora-jax {flora_jax.__version__}, jax ")


def test_shapes_lists_names(capsys):
    assert cli.main(["shapes"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*config.NAMED, "v5e", "multisteps"))


def test_wrong_words_give_2_and_a_sentence(capsys):
    assert cli.main(["plan", "--chip", "v9"]) == 2
    assert "chip must be one of v4, " in capsys.readouterr().err
    assert cli.main(["plan", "--chip", "v5e", "--hbm", "8"]) == 2
    assert "hbm stands in the place of a chip, found both" in capsys.readouterr().err
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


def test_a_package_that_int8_needs(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "qwix", None)  # as if it were not installed
    words = ["plan", "--method", "exact", "--weights", "int8", "--measure", "no"]
    assert cli.main(words) == 2
    found = capsys.readouterr().err
    assert found.startswith("flora-jax needs more packages for this, found no qwix: pip install ")
    with pytest.raises(ModuleNotFoundError, match=r"weights in int8 need qwix: pip install"):
        flora_jax.to_int8({"kernel": jnp.ones((256, 256))})


def test_weights_in_int8_are_of_some_methods(capsys):
    assert cli.main(["plan", "--method", "adam", "--weights", "int8", "--measure", "no"]) == 2
    said = "method must be one of flora, flora-backward, exact, exact-muon where weights are int8, found"
    assert said in capsys.readouterr().err
