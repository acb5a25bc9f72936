"""No incomplete state is read, and no complete one is lost."""

import jax.numpy as jnp
import numpy as np
import pytest

from flora_jax.finetune.checkpoints import FORMAT, Checkpoints

SETTINGS = {"rank": 16, "seed": 0, "distribution": "srht", "side": "larger"}


def state(step):
    return {"params": jnp.arange(1000.0) + step, "count": jnp.asarray(step, jnp.int32)}


def save(folder, steps):
    checkpoints = Checkpoints(folder, SETTINGS)
    for step in steps:
        checkpoints.save(step, state(step), {"losses": [float(step)]})
    checkpoints.close()


def restore(folder):
    checkpoints = Checkpoints(folder, SETTINGS)
    step, restored, history = checkpoints.restore(state(0), {"losses": []})
    passed_over = checkpoints.passed_over
    checkpoints.close()
    return step, restored, history, passed_over


def check(folder, step, passed_over=()):
    found, restored, history, sentences = restore(folder)
    assert found == step and sentences == list(passed_over)
    np.testing.assert_array_equal(restored["params"], state(step)["params"])
    assert int(restored["count"]) == step and history == {"losses": [float(step)] if step else []}


def largest(folder):
    return max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )


def test_the_newest_of_the_kept_is_restored(tmp_path):
    save(tmp_path, range(1, 6))
    assert sorted(int(path.name) for path in (tmp_path / "states").iterdir()) == [3, 4, 5]
    check(tmp_path, 5)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-7])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage, wrong",
    [
        (truncate, "is not as it was written"),
        (flip, "is not as it was written"),
        (lambda file: file.unlink(), "is missing"),
    ],
)
def test_a_damaged_step_is_named_and_the_last_good_one_taken(tmp_path, damage, wrong):
    save(tmp_path, [1, 2])
    step = tmp_path / "states" / "2"
    file = largest(step)
    damage(file)
    check(tmp_path, 1, [f"step 2: {file.relative_to(step).as_posix()} {wrong}"])
    assert len(list((tmp_path / "damaged").iterdir())) == 1
    save(tmp_path, [2])
    check(tmp_path, 2)


def test_all_steps_damaged_begin_anew_and_keep_what_is_there(tmp_path):
    save(tmp_path, [1, 2])
    for step in (1, 2):
        flip(largest(tmp_path / "states" / str(step)))
    found, _, _, sentences = restore(tmp_path)
    assert found == 0 and len(sentences) == 2
    assert len(list((tmp_path / "damaged").iterdir())) == 2


def test_a_step_without_a_seal_is_not_picked_up(tmp_path):
    save(tmp_path, [1, 2])
    (tmp_path / "seals" / "2.json").unlink()
    check(tmp_path, 1, ["step 2: it was not finished"])
    save(tmp_path, [2])
    (tmp_path / "seals" / "1.json").unlink()
    check(tmp_path, 2, ["step 1: it was not finished"])


@pytest.mark.parametrize("content", ["", "{", "[]", "7", "{}"])
def test_a_step_with_a_damaged_seal_is_not_picked_up(tmp_path, content):
    save(tmp_path, [1, 2])
    (tmp_path / "seals" / "2.json").write_text(content)
    step, _, _, (sentence,) = restore(tmp_path)
    assert step == 1 and sentence.startswith("step 2: ")


@pytest.mark.parametrize("content", ["", "{", "7", None])
def test_states_without_readable_settings_are_refused(tmp_path, content):
    save(tmp_path, [1])
    file = tmp_path / "settings.json"
    kept = file.read_text()
    file.unlink() if content is None else file.write_text(content)
    wrong = "is missing beside its states" if content is None else "cannot be read"
    with pytest.raises(ValueError, match=rf"settings\.json {wrong}; put it back, or give another"):
        Checkpoints(tmp_path, SETTINGS)
    file.write_text(kept)
    check(tmp_path, 1)


def test_history_is_saved_as_it_was_when_save_was_called(tmp_path):
    checkpoints, history = Checkpoints(tmp_path, SETTINGS), {"losses": [1.0]}
    checkpoints.save(1, state(1), history)
    history["losses"].append("later")
    checkpoints.close()
    check(tmp_path, 1)


@pytest.mark.parametrize(
    "name, other",
    [("rank", 8), ("seed", 1), ("distribution", "gaussian"), ("side", "input"), ("format", 1)],
)
def test_a_run_of_other_settings_is_refused(tmp_path, name, other):
    save(tmp_path, [1])
    was = {"format": FORMAT, **SETTINGS}[name]
    message = f"{name}: the run in .* was started with {was!r}, this one has {other!r}; give the"
    with pytest.raises(ValueError, match=message):
        Checkpoints(tmp_path, {**SETTINGS, name: other})
    check(tmp_path, 1)
