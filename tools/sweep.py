"""Run train_gpt.py under many settings. Stop it at any time: the same command goes on.

    python tools/sweep.py SPEC.toml                      # all trials that are still missing
    python tools/sweep.py SPEC.toml --best               # the best settings to configs/NAME.env
    python tools/report.py logs/sweeps/NAME/*.json       # a row a trial, a mean a configuration

A sweep is a TOML file; a setting of the shell that it does not name has no effect. This is a grid, all combinations of
some choices:

    name = "penalty"               # of the study, of its folder under logs/sweeps/ and of its runs
    [env]                          # the same in every trial
    PRESET = "smoke"
    [search]
    SEED = [1337, 42]
    CROWN_Q_LAMBDA = [0.0, 0.1]

This one draws its trials, and may use all that there is:

    name = "rates"
    sampler = "tpe"                # or "random"
    trials = 40
    seconds = 3600                 # of a trial [no limit]
    prune = true                   # end a trial that is worse than the median at a VAL_LOSS_EVERY [false]
    slots = ["taskset -c 0", "env CUDA_VISIBLE_DEVICES=1"]  # prefixes of what runs side by side [one, without]
    command = "torchrun --standalone --nproc_per_node=8 train_gpt.py"  # [this Python, train_gpt.py]
    storage = "postgresql://..."   # a database [SQLite in the folder]; machines that share one need the same checkout
                                   # and data. Start one of them first. Each keeps the logs of its own trials.
    [env]
    VAL_LOSS_EVERY = 1000
    [search]
    MATRIX_LR = {low = 0.01, high = 0.05, log = true}
    TTT_EPOCHS = {low = 1, high = 4}
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import tomllib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from datetime import datetime, timedelta
from pathlib import Path

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train_gpt import Config, InputError, handle_signals, interrupt, refusing, show, write_atomically

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {f.name.upper() for f in fields(Config)}
# Of a trial: the sweep sets them or needs them as they are.
OURS = {"RUN_ID", "LOG_DIR", "ARTIFACT_PATH", "SCORES_PATH", "PHASE", "RESUME", "CHECKPOINT_EVERY"}
TYPES = dict(name=str, search=dict, env=dict, sampler=str, trials=int, prune=bool, slots=list, storage=str, command=str)
VALIDATION = re.compile(r"step:(\d+)/\d+ val_loss:\S+ val_bpb:(\S+)")
STOPS = {sign * number + base for number in (signal.SIGINT, signal.SIGTERM) for sign, base in ((-1, 0), (1, 128))}
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: not between fork and exec


@dataclass(frozen=True)
class Spec:
    """A sweep, as its file states it."""

    name: str
    search: dict
    env: dict = field(default_factory=dict)
    sampler: str = "grid"
    trials: int = 0
    seconds: float = math.inf
    prune: bool = False
    slots: list = field(default_factory=lambda: [""])
    storage: str = ""
    command: str = shlex.join([sys.executable, "train_gpt.py"])

    def __post_init__(self):
        for name, kind in TYPES.items():
            if not isinstance(value := getattr(self, name), kind):
                raise ValueError(f"{name}={value!r}: allowed is a {kind.__name__}")
        is_grid, choices = self.sampler == "grid", [x for x in self.search.values() if isinstance(x, list)]
        programs = [shlex.split(f"{slot} {self.command}")[0] for slot in self.slots if isinstance(slot, str)]
        given = self.search.keys() | self.env.keys()
        for name, kept, allowed in (
            ("name", re.fullmatch(r"[\w-]+", self.name), "letters, digits, - and _"),
            ("sampler", self.sampler in ("grid", "random", "tpe"), "one of grid, random, tpe"),
            ("seconds", isinstance(self.seconds, int | float) and self.seconds > 0, "a number above 0"),
            ("search", self.search, "one setting or more"),
            ("search", len(choices) == len(self.search) or not is_grid, "lists of choices with sampler=grid"),
            ("search", all(len(x) == len({show(y) for y in x}) > 0 for x in choices), "choices, each once"),
            ("search", self.search.keys() <= SETTINGS, "settings of train_gpt.py"),
            ("env", not given & OURS, "all but " + ", ".join(sorted(OURS))),
            ("trials", self.trials > 0 or is_grid, "1 or more"),
            ("slots", self.slots and len(programs) == len(self.slots), "one text or more"),
            ("command", all(map(shutil.which, programs)), "programs that are there, also in slots"),
        ):
            if not kept:
                raise ValueError(f"{name}={getattr(self, name)}: allowed is {allowed}")

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
        with suppress(OSError, ValueError, KeyError):
            return json.loads((self.folder / f"{self.run_id(number)}.json").read_text())["val_bpb"]

    def combinations(self) -> list[dict]:
        """Return the params of a grid's trials."""
        return [dict(zip(self.search, values, strict=True)) for values in itertools.product(*self.search.values())]

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
    """Return a sweep from its file; each trial of a grid is checked as train_gpt.py will check it. Raise InputError."""
    with refusing(f"{path}: no sweep, which is a TOML file with name and [search]"):
        given = tomllib.loads(path.read_text(encoding="utf-8"))
        if unknown := given.keys() - {f.name for f in fields(Spec)}:
            raise ValueError(f"{', '.join(sorted(unknown))}: allowed are {', '.join(f.name for f in fields(Spec))}")
        spec = Spec(**given)
    spec.distributions()
    for params in spec.combinations() if spec.sampler == "grid" else [{}]:
        Config.from_env(spec.settings(params))
    return spec


def key(params: dict) -> tuple:
    """Return what tells a trial's settings from others'."""
    return tuple(sorted((name, show(value)) for name, value in params.items()))


def own_params(trial: FrozenTrial) -> dict:
    """Return a trial's settings, also of one that was killed before the study had taken them in."""
    return trial.params or trial.user_attrs.get("given", {})


def process_name(pid: int) -> str:
    """Return host, number and start of a process, by which it is known again; "" if there is none."""
    try:
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
    return f"{socket.gethostname()} {pid} {started}"


def is_dead(trial: FrozenTrial, spec: Spec) -> bool:
    """Return whether the sweep that had begun a trial is gone from this machine."""
    by = trial.user_attrs.get("by")
    if by is None:  # asked for and not signed: here that takes a turn, and another machine may be at it
        return not spec.storage or trial.datetime_start < datetime.now() - timedelta(minutes=1)
    host, pid, _ = by.split()
    return host == socket.gethostname() and process_name(int(pid)) != by


def load_study(spec: Spec) -> optuna.Study:
    """Return the study, new or as it was left. Raise InputError where it is of another sweep."""
    spec.folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler() if spec.sampler == "tpe" else optuna.samplers.RandomSampler()
    with refusing(f"storage={spec.storage.partition('//')[0]}: allowed is a database that can be opened"):
        url = spec.storage or f"sqlite:///{spec.folder / 'study.db'}"
        study = optuna.create_study(storage=url, study_name=spec.name, sampler=sampler, load_if_exists=True)
    stated = dict(env=spec.settings({}), search=spec.search, command=spec.command)
    if study.user_attrs.get("stated", stated) != stated:
        raise InputError(f"name={spec.name}: its study has other [env], [search] or command; allowed is another name")
    if not study.trials and any(spec.folder.glob("*.json")):
        raise InputError(f"name={spec.name}: {spec.folder} has records of another study; allowed is another name")
    study.set_user_attr("stated", stated)
    return study


@contextmanager
def turn(spec: Spec):
    """Wait for this machine's other sweeps of the study: SQLite may give one trial to two of them."""
    with open(spec.folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def prepare(study: optuna.Study, spec: Spec) -> None:
    """Put in line what is missing: what a sweep that is gone had begun, and the combinations of a grid."""
    trials = study.get_trials(deepcopy=False)
    known = {key(own_params(t)) for t in trials if t.state != TrialState.FAIL or "said" in t.user_attrs}
    for trial in trials:
        if trial.state == TrialState.RUNNING and is_dead(trial, spec):
            value = spec.score(trial.number)
            if value is None:
                study.enqueue_trial(own_params(trial), dict(given=own_params(trial)))
                remove_empty(spec, trial.number)
            study.tell(trial.number, value, TrialState.FAIL if value is None else TrialState.COMPLETE)
        elif trial.state == TrialState.RUNNING:
            print(f"! {spec.run_id(trial.number)} runs elsewhere: {trial.user_attrs.get('by', 'just begun')}")
    for params in spec.combinations() if spec.sampler == "grid" else []:
        if key(params) not in known:
            study.enqueue_trial(params, dict(given=params))


def remove_empty(spec: Spec, number: int) -> None:
    """Remove the files that a run which was killed has only created."""
    for path in spec.folder.glob(f"{spec.run_id(number)}.*"):
        if not path.stat().st_size:
            path.unlink()


class Sweep:
    """The trials of a study, each a process, as many at a time as there are slots."""

    def __init__(self, spec: Spec):
        self.spec, self.study, self.lock = spec, load_study(spec), threading.Lock()
        self.processes: set[subprocess.Popen] = set()
        self.stopped = False
        with turn(spec):
            prepare(self.study, spec)

    def run(self) -> int:
        """Run what is missing. Return how many trials have a score. A signal ends all; the next call repeats them."""
        with ThreadPoolExecutor(len(self.spec.slots)) as pool:
            try:
                for work in as_completed([pool.submit(self.work, slot) for slot in self.spec.slots]):
                    work.result()
            except BaseException:
                self.stopped = True
                stop(*self.processes)
                raise
        return sum(t.state == TrialState.COMPLETE for t in self.study.get_trials(deepcopy=False))

    def work(self, slot: str) -> None:
        while trial := self.next_trial():
            self.run_trial(trial, slot)

    def next_trial(self) -> optuna.Trial | None:
        """Return a trial that waits or, where samples are drawn, a new one; None once there are enough."""
        with self.lock, turn(self.spec):
            trials, is_grid = self.study.get_trials(deepcopy=False), self.spec.sampler == "grid"
            waiting = any(t.state == TrialState.WAITING for t in trials)
            begun = sum(t.state == TrialState.RUNNING or has_result(t) for t in trials)
            if self.stopped or not waiting and (is_grid or begun >= self.spec.trials):
                return None
            trial = self.study.ask(self.spec.distributions())
            if is_grid and "given" not in trial.user_attrs:  # another machine was faster
                self.study.tell(trial, state=TrialState.FAIL)
                return None
            trial.set_user_attr("by", process_name(os.getpid()))
            return trial

    def run_trial(self, trial: optuna.Trial, slot: str) -> None:
        """Run a trial to its end and tell the study its val_bpb, or why there is none."""
        run_id, late = self.spec.run_id(trial.number), threading.Event()
        env = {name: value for name, value in os.environ.items() if name not in SETTINGS}
        env |= self.spec.settings(trial.params) | dict(RUN_ID=run_id, LOG_DIR=str(self.spec.folder))
        process = subprocess.Popen(
            shlex.split(f"{slot} {self.spec.command}"), env=env, cwd=ROOT, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=die_with_parent,
        )  # fmt: skip
        self.processes.add(process)
        limit = min(self.spec.seconds, threading.TIMEOUT_MAX)
        timer = threading.Timer(limit, lambda: (late.set(), stop(process)))
        timer.daemon = True
        timer.start()
        try:
            if self.stopped:
                stop(process)
            said, pruned = self.follow(trial, process)
            status = process.wait()
        finally:
            timer.cancel()
            stop(process)
            self.processes.discard(process)
            remove_empty(self.spec, trial.number)
        by_other = status in STOPS and not (pruned or late.is_set())  # whoever ends this machine's processes
        if not (self.stopped or by_other):
            reason = pruned or (f"stopped after {limit:g} s" if late.is_set() else said)
            self.conclude(trial, None if status or pruned else self.spec.score(trial.number), pruned, reason)

    def follow(self, trial: optuna.Trial, process: subprocess.Popen) -> tuple[str, str]:
        """Keep what a trial prints, and end it where it falls behind. Return (its last words, why it was pruned)."""
        said, pruned = "", ""
        with open(self.spec.folder / f"{self.spec.run_id(trial.number)}.out", "w", encoding="utf-8") as file:
            for line in process.stdout:
                file.write(line)
                said = line.strip() if re.search("[a-z]", line) else said
                if (found := VALIDATION.search(line)) and not pruned:
                    trial.report(float(found[2]), int(found[1]))
                    if self.spec.prune and trial.should_prune():
                        pruned = f"pruned at step {found[1]}"
                        stop(process)
        return said, pruned

    def conclude(self, trial: optuna.Trial, value: float | None, pruned: str, reason: str) -> None:
        """Tell the study how a trial ended, and print a line of it with the best score so far."""
        state = TrialState.COMPLETE if value is not None else TrialState.PRUNED if pruned else TrialState.FAIL
        with self.lock:
            if value is None:
                trial.set_user_attr("said", reason)
            self.study.tell(trial, value, state)
            trials = self.study.get_trials(deepcopy=False)
            values = [t.value for t in trials if t.state == TrialState.COMPLETE]
            settings = " ".join(f"{name}={text}" for name, text in key(trial.params))
            result = reason if value is None else f"val_bpb:{value:.8f}"
            best = f" best:{min(values):.8f}" if values else ""
            counted = f"{sum(map(has_result, trials))}/{self.spec.total}"
            print(f"{counted} {self.spec.run_id(trial.number)} {settings} {result}{best}", flush=True)


def has_result(trial: FrozenTrial) -> bool:
    """Return whether a trial has ended by itself, not with a sweep that was killed."""
    return trial.state == TrialState.COMPLETE or "said" in trial.user_attrs


def die_with_parent() -> None:
    """Have Linux end this process when the sweep dies, however it dies."""
    if LIBC:
        LIBC.prctl(1, signal.SIGTERM)


def stop(*processes: subprocess.Popen) -> None:
    """End trials and all their ranks."""
    running = [process for process in processes if process.poll() is None]
    for process in running:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
    for process in running:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def write_best(spec: Spec) -> str:
    """Write configs/NAME.env with the settings of the least mean val_bpb over all seeds. Return lines that say so."""
    scores = defaultdict(lambda: defaultdict(list))  # by settings, by seed
    for trial in load_study(spec).get_trials(states=[TrialState.COMPLETE]):
        rest = {name: value for name, value in trial.params.items() if name != "SEED"}
        scores[key(rest)][trial.params.get("SEED")].append(trial.value)
    seeds = {seed for by_seed in scores.values() for seed in by_seed}
    means = {k: statistics.fmean(map(statistics.fmean, v.values())) for k, v in scores.items() if v.keys() == seeds}
    if not means:
        raise InputError(f"name={spec.name}: no settings have a score for each seed; allowed are some that have")
    best = min(means, key=means.get)
    path, chosen = ROOT / "configs" / f"{spec.name}.env", spec.settings({}) | dict(best)
    if path.exists():
        raise InputError(f"configs/{path.name}: exists and would be overwritten; allowed is to move it away")
    kept = {name: value for name, value in chosen.items() if name in SETTINGS - {"PRESET", "SEED"}}
    Config.from_env(chosen)
    title = (
        f"# The best of {len(means)} settings of the sweep {spec.name}: val_bpb {means[best]:.8f}, {len(seeds)} run(s)."
    )
    write_atomically(path, "".join(f"{line}\n" for line in (title, *(f"{k}={v}" for k, v in kept.items()))).encode())
    presets = ",".join(filter(None, (chosen.get("PRESET"), spec.name)))
    left_out = f"{len(scores) - len(means)} settings left out: not all of the {len(seeds)} seeds"
    return "\n".join([title[2:], *[left_out] * (len(scores) > len(means)), f"PRESET={presets} {spec.command}"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path, metavar="SPEC.toml")
    parser.add_argument("--best", action="store_true", help="write configs/NAME.env instead of running anything")
    args = parser.parse_args()
    handle_signals(interrupt)  # also where a shell's background job was told to ignore them
    try:
        spec = read_spec(args.spec)
        if args.best:
            print(write_best(spec))
        elif not Sweep(spec).run():
            raise InputError(f"name={spec.name}: no trial has a score; {spec.folder} has what they printed")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print("error: interrupted; the same command goes on", file=sys.stderr)
        return 128 + error.args[0]
    return 0


if __name__ == "__main__":
    sys.exit(main())
