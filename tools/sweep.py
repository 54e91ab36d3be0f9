"""Run train_gpt.py under many settings. Stop it at any time: the same command goes on.

    python tools/sweep.py SPEC.toml                      # all trials that are still missing
    python tools/sweep.py SPEC.toml --best               # the best settings to configs/NAME.env
    python tools/report.py logs/sweeps/NAME/*.json       # a row a trial, a mean a configuration

A sweep is a TOML file:

    name = "penalty"               # of the study, of its folder under logs/sweeps/ and of its runs
    sampler = "grid"               # all combinations; "random" and "tpe" take trials = N
    seconds = 3600                 # of a trial [no limit]
    prune = true                   # end a trial that is worse than the median at a VAL_LOSS_EVERY [false]
    slots = ["taskset -c 0", "env CUDA_VISIBLE_DEVICES=1"]  # prefixes of what runs side by side [one, without]
    storage = "postgresql://..."   # any of Optuna's; machines that name one share the trials [SQLite in the folder]
    command = "torchrun --standalone --nproc_per_node=8 train_gpt.py"  # [this Python, train_gpt.py]

    [env]                          # the same in every trial
    PRESET = "smoke"

    [search]
    SEED = [1337, 42]              # choices, or a range; in a grid choices only
    MATRIX_LR = {low = 0.01, high = 0.05, log = true}
    TTT_EPOCHS = {low = 1, high = 4}
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import math
import os
import re
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import threading
import tomllib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, fields
from pathlib import Path

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train_gpt import Config, InputError, refusing, show, write_atomically

ROOT = Path(__file__).resolve().parents[1]
SAMPLERS = {"grid": optuna.samplers.RandomSampler, "random": optuna.samplers.RandomSampler}
SAMPLERS |= {"tpe": optuna.samplers.TPESampler}
VALIDATION = re.compile(r"step:(\d+)/\d+ val_loss:\S+ val_bpb:(\S+)")


@dataclass(frozen=True)
class Spec:
    """A sweep, as its file states it."""

    name: str
    search: dict
    env: dict = field(default_factory=dict)
    sampler: str = "grid"
    trials: int = 0
    seconds: float | None = None
    prune: bool = False
    slots: list = field(default_factory=lambda: [""])
    storage: str = ""
    command: str = shlex.join([sys.executable, "train_gpt.py"])

    def __post_init__(self):
        lists = all(isinstance(values, list) for values in self.search.values())
        for name, kept, allowed in (
            ("name", re.fullmatch(r"[\w-]+", self.name), "letters, digits, - and _"),
            ("sampler", self.sampler in SAMPLERS, "one of " + ", ".join(SAMPLERS)),
            ("search", self.search, "one setting or more"),
            ("search", lists or self.sampler != "grid", "lists of choices with sampler=grid"),
            ("trials", self.trials > 0 or self.sampler == "grid", "1 or more"),
            ("slots", self.slots, "one or more"),
        ):
            if not kept:
                raise InputError(f"{name}={getattr(self, name)}: allowed is {allowed}")

    @property
    def folder(self) -> Path:
        return ROOT / "logs" / "sweeps" / self.name

    @property
    def total(self) -> int:
        """The number of trials."""
        return math.prod(map(len, self.search.values())) if self.sampler == "grid" else self.trials

    def run_id(self, number: int) -> str:
        return f"{self.name}_{number:04d}"

    def score(self, number: int) -> float | None:
        """Return the val_bpb of a trial's record; None where it has none."""
        record = self.folder / f"{self.run_id(number)}.json"
        try:
            return json.loads(record.read_text())["val_bpb"]
        except (OSError, ValueError, KeyError):
            return None

    def distributions(self) -> dict:
        """Return Optuna's distribution of each setting."""
        found = {}
        for name, values in self.search.items():
            with refusing(f"{name}={values}: allowed is a list of choices, or low and high, log and step"):
                if isinstance(values, list):
                    found[name] = CategoricalDistribution(values)
                else:
                    whole = all(isinstance(x, int) for x in (values["low"], values["high"], values.get("step", 1)))
                    found[name] = (IntDistribution if whole else FloatDistribution)(**values)
        return found

    def settings(self, params: dict) -> dict[str, str]:
        """Return the environment of a trial, as text."""
        return {name: show(value) for name, value in (self.env | params).items()}


def read_spec(path: Path) -> Spec:
    """Return a sweep from its file, every choice checked as train_gpt.py will check it. Raise InputError."""
    with refusing(f"{path}: allowed is a TOML file with name and [search]"):
        given = tomllib.loads(path.read_text(encoding="utf-8"))
        if unknown := given.keys() - {f.name for f in fields(Spec)}:
            raise InputError(
                f"{path}: {', '.join(sorted(unknown))}: allowed are {', '.join(f.name for f in fields(Spec))}"
            )
        spec = Spec(**given)
    for name, distribution in spec.distributions().items():
        ends = getattr(distribution, "choices", None) or (distribution.low, distribution.high)
        for value in ends:
            Config.from_env(spec.settings({name: value}))
    return spec


def open_study(spec: Spec) -> optuna.Study:
    """Return the study, new or as it was left; what a sweep that was killed had begun waits again. Raise InputError."""
    spec.folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = spec.storage or f"sqlite:///{spec.folder / 'study.db'}"
    with refusing(f"storage={url}: allowed is one that Optuna opens"):
        study = optuna.create_study(storage=url, study_name=spec.name, load_if_exists=True)
    stated = dict(env=spec.settings({}), search=spec.search)
    if study.user_attrs.get("stated", stated) != stated:
        raise InputError(f"name={spec.name}: its study has other [env] or [search]; allowed is another name")
    study.set_user_attr("stated", stated)
    study.sampler = SAMPLERS[spec.sampler](seed=len(study.trials))  # not what was drawn before
    for trial in study.get_trials(states=[TrialState.RUNNING]):
        host, pid = trial.user_attrs.get("by", [socket.gethostname(), 0])
        if host == socket.gethostname() and not (pid and Path(f"/proc/{pid}").exists()):
            value = spec.score(trial.number)
            study.tell(trial.number, value, TrialState.FAIL if value is None else TrialState.COMPLETE)
            if value is None:
                study.enqueue_trial(trial.params)
    if spec.sampler == "grid":
        for values in itertools.product(*spec.search.values()):
            study.enqueue_trial(dict(zip(spec.search, values, strict=True)), skip_if_exists=True)
    return study


class Sweep:
    """The trials of a study, each a process, as many at a time as there are slots."""

    def __init__(self, spec: Spec):
        self.spec, self.study, self.lock = spec, open_study(spec), threading.Lock()
        self.processes: set[subprocess.Popen] = set()
        self.stopped = False

    def run(self) -> None:
        """Run what is missing. A signal ends the trials that run; they wait for the next call."""
        with ThreadPoolExecutor(len(self.spec.slots)) as pool:
            try:
                for work in as_completed([pool.submit(self.work, slot) for slot in self.spec.slots]):
                    work.result()
            except BaseException:
                self.stopped = True
                for process in list(self.processes):
                    stop(process)
                raise

    def work(self, slot: str) -> None:
        while (trial := self.next_trial()) and not self.stopped:
            self.run_trial(trial, slot)

    def next_trial(self) -> optuna.Trial | None:
        """Return a trial that waits or, where samples are drawn, a new one; None once there are enough."""
        with self.lock:
            trials = self.study.get_trials(deepcopy=False)
            waiting = any(t.state == TrialState.WAITING for t in trials)
            begun = sum(t.state == TrialState.RUNNING or has_result(t) for t in trials)
            if self.stopped or not waiting and (self.spec.sampler == "grid" or begun >= self.spec.trials):
                return None
            trial = self.study.ask(self.spec.distributions())
            trial.set_user_attr("by", [socket.gethostname(), os.getpid()])
            return trial

    def run_trial(self, trial: optuna.Trial, slot: str) -> None:
        """Run a trial to its end and tell the study its val_bpb, or its last line."""
        run_id = self.spec.run_id(trial.number)
        env = os.environ | self.spec.settings(trial.params) | dict(RUN_ID=run_id, LOG_DIR=str(self.spec.folder))
        process = subprocess.Popen(
            shlex.split(slot) + shlex.split(self.spec.command), env=env, cwd=ROOT, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=die_with_parent,
        )  # fmt: skip
        self.processes.add(process)
        late = threading.Event()
        limit = self.spec.seconds or threading.TIMEOUT_MAX
        timer = threading.Timer(limit, lambda: (late.set(), stop(process)))
        timer.start()
        said, pruned = self.follow(trial, process)
        status = process.wait()
        timer.cancel()
        self.processes.discard(process)
        if self.stopped:
            return
        value = None if status or pruned else self.spec.score(trial.number)
        state = TrialState.COMPLETE if value is not None else TrialState.PRUNED if pruned else TrialState.FAIL
        reason = pruned or (f"stopped after {self.spec.seconds} s" if late.is_set() else said)
        if value is None:
            trial.set_user_attr("said", reason)
        with self.lock:
            self.study.tell(trial, value, state)
            self.report(run_id, trial.params, reason if value is None else f"val_bpb:{value:.8f}")

    def follow(self, trial: optuna.Trial, process: subprocess.Popen) -> tuple[str, str]:
        """Read what a trial prints, and end it where it falls behind. Return (its last line, why it was pruned)."""
        said, pruned = "", ""
        for line in process.stdout:
            said = line.strip() or said
            if (found := VALIDATION.search(line)) and not pruned:
                trial.report(float(found[2]), int(found[1]))
                if self.spec.prune and trial.should_prune():
                    pruned = f"pruned at step {found[1]}"
                    stop(process)
        return said, pruned

    def report(self, run_id: str, params: dict, result: str) -> None:
        """Print a line of a trial that has ended, and the best one so far."""
        trials = self.study.get_trials(deepcopy=False)
        values = [t.value for t in trials if t.state == TrialState.COMPLETE]
        settings = " ".join(f"{name}={show(value)}" for name, value in params.items())
        best = f" best:{min(values):.8f}" if values else ""
        print(f"{sum(map(has_result, trials))}/{self.spec.total} {run_id} {settings} {result}{best}", flush=True)


def has_result(trial: optuna.trial.FrozenTrial) -> bool:
    """Return whether a trial has ended by itself, not with a sweep that was killed."""
    return trial.state == TrialState.COMPLETE or "said" in trial.user_attrs


def die_with_parent() -> None:
    """Have Linux end this process when the sweep dies, however it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def stop(process: subprocess.Popen) -> None:
    """End a trial and all its ranks."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def write_best(spec: Spec) -> str:
    """Write configs/NAME.env with the settings of the least mean val_bpb over seeds. Return a line that says so."""
    groups = defaultdict(list)
    for trial in open_study(spec).get_trials(states=[TrialState.COMPLETE]):
        groups[tuple((k, show(v)) for k, v in sorted(trial.params.items()) if k != "SEED")].append(trial.value)
    if not groups:
        raise InputError(f"name={spec.name}: none of its trials has ended; allowed is one or more")
    most = max(map(len, groups.values()))
    mean, winner = min((statistics.fmean(values), key) for key, values in groups.items() if len(values) == most)
    path = ROOT / "configs" / f"{spec.name}.env"
    if path.exists():
        raise InputError(f"configs/{path.name}: exists and would be overwritten; allowed is to move it away")
    preset = spec.env.get("PRESET", "")
    kept = {name: show(value) for name, value in spec.env.items() if name not in ("PRESET", "SEED")} | dict(winner)
    text = (
        f"# The best of {len(groups)} configurations of the sweep {spec.name}: val_bpb {mean:.8f} over {most} run(s).\n"
    )
    write_atomically(path, (text + "".join(f"{name}={value}\n" for name, value in kept.items())).encode())
    return f"val_bpb:{mean:.8f} runs:{most}\nPRESET={','.join(filter(None, (preset, spec.name)))} {spec.command}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path, metavar="SPEC.toml")
    parser.add_argument("--best", action="store_true", help="write configs/NAME.env instead of running anything")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        spec = read_spec(args.spec)
        if args.best:
            print(write_best(spec))
        else:
            Sweep(spec).run()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
