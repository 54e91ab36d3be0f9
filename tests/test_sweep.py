"""Sweep: every combination once, whatever kills it; what crashed, was late or fell behind says so."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest

import sweep
from train_gpt import InputError

# In place of train_gpt.py: the score follows the settings, TTT_EPOCHS=9 crashes, TTT_EPOCHS=8 takes a minute.
SCRIPT = r"""
import json, os, sys, time
e = os.environ
lr, epochs, seed = float(e.get("MATRIX_LR", 0.02)), int(e.get("TTT_EPOCHS", 1)), int(e.get("SEED", 1))
time.sleep(float(e.get("PAUSE", 0)))
sys.stdout.buffer.write(b"\xff no UTF-8\n")
if epochs == 9:
    sys.exit("no memory for nine epochs")
for step in (10, 20):
    print(f"step:{step}/20 val_loss:2.0 val_bpb:{1 + lr + epochs}", flush=True)
time.sleep(60 * (epochs == 8))
with open(f"{e['LOG_DIR']}/{e['RUN_ID']}.json", "w") as file:
    json.dump(dict(val_bpb=1 + lr + epochs + seed / 1000), file)
with open(f"{e['LOG_DIR']}/runs", "a") as file:
    print(lr, epochs, seed, file=file)
"""


@pytest.fixture
def make_spec(tmp_path, monkeypatch):
    """Return a function that writes a sweep's file; its folder is a temporary one."""
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "fake.py").write_text(SCRIPT)

    def make(search: str, **given) -> Path:
        given = dict(name="s", command=f"{sys.executable} {tmp_path / 'fake.py'}") | given
        path = tmp_path / "spec.toml"
        path.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in given.items()) + f"[search]\n{search}\n")
        return path

    return make


def run(path: Path) -> list[str]:
    """Run a sweep. Return what its trials did, a line of settings each that ended well."""
    spec = sweep.read_spec(path)
    sweep.Sweep(spec).run()
    runs = spec.folder / "runs"
    return sorted(runs.read_text().splitlines()) if runs.is_file() else []


def study(path: Path) -> optuna.Study:
    spec = sweep.read_spec(path)
    return optuna.load_study(study_name=spec.name, storage=f"sqlite:///{spec.folder / 'study.db'}")


def test_a_grid_runs_every_combination_once_and_then_nothing(make_spec, capsys):
    path = make_spec("MATRIX_LR = [0.01, 0.02]\nSEED = [1, 2, 3]", slots=["", "nice"])
    expected = sorted(f"{lr} 1 {seed}" for lr in (0.01, 0.02) for seed in (1, 2, 3))
    assert run(path) == expected
    assert run(path) == expected
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[-1].startswith("6/6 s_0") and lines[-1].endswith("best:2.01100000")


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_samples_are_drawn_until_there_are_enough(make_spec, sampler):
    search = "MATRIX_LR = {low = 0.001, high = 0.1, log = true}\nTTT_EPOCHS = {low = 1, high = 3}"
    assert len(run(make_spec(search, sampler=sampler, trials=3))) == 3
    found = run(make_spec(search, sampler=sampler, trials=5))
    assert len(set(found)) == 5
    assert all(0.001 <= float(lr) <= 0.1 and epochs in "123" for lr, epochs, _ in map(str.split, found))


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_sweep_that_is_killed_goes_on(make_spec, tmp_path, how):
    path = make_spec("SEED = [1, 2, 3, 4]", slots=["", ""])
    code = f"import sweep; sweep.ROOT = sweep.Path({str(tmp_path)!r}); raise SystemExit(sweep.main())"
    env = os.environ | dict(PAUSE="1.5", PYTHONPATH=os.pathsep.join(sys.path))
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], env=env, stderr=subprocess.PIPE, text=True)
    runs = tmp_path / "logs" / "sweeps" / "s" / "runs"
    while not runs.is_file():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    time.sleep(0.3)  # in the middle of the next two
    process.send_signal(how)
    assert process.wait(20) == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[how]
    assert len(list(runs.parent.glob("*.json"))) < 4
    run(path)
    complete = study(path).get_trials(states=[optuna.trial.TrialState.COMPLETE])
    assert sorted(trial.params["SEED"] for trial in complete) == [1, 2, 3, 4]
    assert len(list(runs.parent.glob("*.json"))) == 4  # none of the orphans went on


def test_a_trial_that_was_killed_before_its_settings_were_stored_is_repeated_with_them(make_spec):
    path = make_spec("SEED = [1, 2, 3]")
    sweep.Sweep(sweep.read_spec(path)).study.ask()
    run(path)
    complete = study(path).get_trials(states=[optuna.trial.TrialState.COMPLETE])
    assert sorted(trial.params["SEED"] for trial in complete) == [1, 2, 3]


def test_a_crash_is_recorded_with_its_last_line_and_not_repeated(make_spec, capsys):
    path = make_spec("TTT_EPOCHS = [9, 1]")
    assert run(path) == run(path) == ["0.02 1 1"]
    failed = study(path).get_trials(states=[optuna.trial.TrialState.FAIL])
    assert [trial.user_attrs["said"] for trial in failed] == ["no memory for nine epochs"]
    assert "no memory for nine epochs" in capsys.readouterr().out


def test_a_trial_ends_at_its_limit(make_spec, capsys):
    assert run(make_spec("TTT_EPOCHS = [8, 1]", seconds=3)) == ["0.02 1 1"]
    assert "stopped after 3 s" in capsys.readouterr().out


def test_a_trial_behind_the_median_is_pruned(make_spec, capsys):
    path = make_spec("TTT_EPOCHS = [1, 2, 3, 4, 5, 8]", prune=True)
    assert len(run(path)) == 5  # a median is that of five
    assert "TTT_EPOCHS=8 pruned at step 10" in capsys.readouterr().out


def test_the_best_settings_become_a_preset(make_spec, tmp_path):
    path = make_spec("MATRIX_LR = [0.02, 0.01]\nSEED = [1, 2]")
    path.write_text(path.read_text() + '[env]\nPRESET = "smoke"\nITERATIONS = 5\n')
    run(path)
    assert sweep.write_best(sweep.read_spec(path)).splitlines()[-1].startswith("PRESET=smoke,s ")
    lines = (tmp_path / "configs" / "s.env").read_text().splitlines()
    assert "2.01150000, 2 run(s)" in lines[0] and lines[1:] == ["ITERATIONS=5", "MATRIX_LR=0.01"]
    with pytest.raises(InputError, match="exists and would be overwritten"):
        sweep.write_best(sweep.read_spec(path))


@pytest.mark.parametrize(
    "search, given, message",
    [
        ("MATRIX_LR = [-1.0]", {}, "MATRIX_LR=-1.0 is out of range"),
        ("MATRIX_RATE = [1.0]", {}, "MATRIX_RATE.*allowed is settings of train_gpt.py"),
        ("MATRIX_LR = {low = 0.1}", dict(sampler="tpe", trials=1), "allowed is a list of choices, or low and high"),
        ("MATRIX_LR = {low = 0.1, high = 0.2}", {}, "lists of choices with sampler=grid"),
        ("SEED = [1]", dict(sampler="best"), "sampler=best: allowed is one of grid, random, tpe"),
        ("SEED = [1]", dict(sampler="tpe"), "trials=0: allowed is 1 or more"),
        ("SEED = [1]", dict(colour="red"), "colour: allowed are name, search"),
        ("SEED = [1]", dict(name="a/b"), "name=a/b: allowed is letters"),
        ("SEED = [1]", dict(storage="nowhere://"), "storage=nowhere:: allowed is a database"),
        ("SEED = [1, 1]", {}, "choices, each once"),
        ("SEED = []", {}, "choices, each once"),
        ("NUM_HEADS = [7]", {}, "NUM_HEADS=7: allowed is a divisor"),
        ("SEED = [1]", dict(slots="nice"), "slots='nice': allowed is a list"),
        ("SEED = [1]", dict(command="no_such_program x"), "allowed is programs that are there"),
        ("SEED = [1]", dict(seconds=0), "seconds=0: allowed is a number above 0"),
        ("PHASE = ['train']", {}, "env=.*allowed is all but"),
        ("SEED = [", {}, "a TOML file with name"),
    ],
)
def test_a_bad_file_is_refused_before_anything_runs(make_spec, tmp_path, search, given, message):
    path = make_spec(search, **given)
    with pytest.raises(InputError, match=message):
        run(path)
    assert not list(tmp_path.glob("logs/sweeps/*/*.json"))


def test_seeds_that_are_close_are_still_apart(make_spec):
    assert len(run(make_spec("SEED = [20250101, 20250102, 20250103]"))) == 3


@pytest.mark.slow
def test_two_sweeps_share_a_study(make_spec, tmp_path):
    """As two machines with one database would, the second one started a little later."""
    path = make_spec("SEED = [1, 2, 3, 4, 5, 6]")
    sweep.prepare(sweep.load_study(spec := sweep.read_spec(path)), spec)
    code = f"import sweep; sweep.ROOT = sweep.Path({str(tmp_path)!r}); raise SystemExit(sweep.main())"
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path))
    both = [subprocess.Popen([sys.executable, "-c", code, str(path)], env=env) for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    assert run(path) == [f"0.02 1 {seed}" for seed in range(1, 7)]


def test_only_settings_with_all_seeds_are_compared(make_spec):
    path = make_spec("TTT_EPOCHS = [1, 9]\nSEED = [1, 2]")
    run(path)
    assert "The best of 1 settings" in sweep.write_best(sweep.read_spec(path))


def test_records_of_another_study_are_not_taken_for_its_own(make_spec, tmp_path):
    folder = tmp_path / "logs" / "sweeps" / "s"
    folder.mkdir(parents=True)
    (folder / "s_0000.json").write_text('{"val_bpb": 0.5}')
    with pytest.raises(InputError, match="has records of another study"):
        run(make_spec("SEED = [1]"))


def test_another_search_under_the_same_name_is_refused(make_spec):
    run(make_spec("SEED = [1]"))
    with pytest.raises(InputError, match="other .env., .search. or command"):
        run(make_spec("SEED = [2]"))
