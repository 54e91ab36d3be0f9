"""Read the logs of finished runs: a row a seed, then mean, spread and significance.

    python tools/report.py logs/a_1337.txt logs/a_42.txt logs/a_2025.txt             # or their .json records
    python tools/report.py logs/a_*.json --baseline logs/b_*.json                    # Welch's test against other runs
    python tools/report.py logs/a_*.json --baseline-loss 1.8919 0.0010 3             # mean, deviation and number
    python tools/report.py train_seed*.log --markdown                                # or --csv; any log of the family
    python tools/report.py logs/a_*.json --plots DIR                                 # training, stages, stream, bytes
    python tools/report.py --record FOLDER logs/a_*.json --audit logs/audit_*.json   # makes a competition record
    python tools/report.py --check FOLDER                                            # is somebody's record sound?

It reads this project's records and logs and both formats of the published ones. Runs that state different settings are
not averaged: each configuration has its own rows, and what differs is printed. A limit that is exceeded, a partial
stream, a log that ends too early and a seed that stands there twice are named under the table.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import math
import re
import statistics
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train_gpt import CAP_BYTES, InputError, refusing, show

ROOT = Path(__file__).resolve().parents[1]
LIMIT_SECONDS = 600.0
# A record had to be better by so much nll at such a p; in the end, organisers took p against the row before.
RECORD_NATS, RECORD_P, FINAL_P = 0.005, 0.01, 0.25
# Settings that name files, machines or the run, or of which each seed has its own.
PER_RUN = {"seed", "run_id", "artifact_path", "scores_path", "log_dir", "logfile", "model_path", "quantized_model_path"}
PER_RUN |= {"resume", "checkpoint_every", "artifact_dir", "rank", "local_rank", "is_main_process", "phase"}
PER_RUN |= {"datasets_dir", "data_dir", "data_path"}


@dataclass
class Stage:
    """What one evaluation gave."""

    val_loss: float  # nll per token
    val_bpb: float
    seconds: float | None = None


@dataclass
class Report:
    """One run, as its log or record states it; None = not stated."""

    path: Path
    settings: dict[str, str] = field(default_factory=dict)
    seed: int | None = None
    world_size: int | None = None
    n_params: int | None = None
    steps: int | None = None
    step_ms: float | None = None
    train_seconds: float | None = None
    eval_seconds: float | None = None
    stages: dict[str, Stage] = field(default_factory=dict)  # in order; the last one is the run's score
    code_bytes: int | None = None
    model_bytes: int | None = None
    total_bytes: int | None = None
    part_bytes: dict[str, int] = field(default_factory=dict)  # of the model
    val_tokens: int | None = None
    data: str | None = None  # the folder of the shards
    on_cpu: bool = False  # where no limit of time holds
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def final(self) -> Stage | None:
        return self.evaluation[-1] if self.evaluation else None

    @property
    def configuration(self) -> tuple[tuple[str, str], ...]:
        """Return all that has to be alike in runs that are averaged."""
        # Of a path, the last folder and the file: seeds may run on several machines.
        shown = {name.lower(): "/".join(value.split("/")[-2:]) for name, value in self.settings.items()}
        known = {name: value for name, value in shown.items() if name not in PER_RUN}
        known |= {"world_size": str(self.world_size), "scores": ",".join(self.stages)}
        known |= {"text": f"{self.val_tokens} tokens of {self.data}", "code_bytes": str(self.code_bytes)}
        if not self.is_ours:  # whose settings give the number
            known["model_params"] = str(self.n_params)
        return tuple(sorted(known.items()))

    @property
    def is_ours(self) -> bool:
        return "LATE_QAT_THRESHOLD" in self.settings

    @property
    def evaluation(self) -> list[Stage]:
        """Return the passes over the text that follow training; `ttt` and `mixed` share one."""
        before = ("diagnostic p", "pre-quantization")  # of the weights before they are stored
        shared = {"ttt"} if "mixed" in self.stages else set()
        return [x for name, x in self.stages.items() if not name.lower().startswith(before) and name not in shared]


# ==================== Reading =========================================================================================

NUMBER = r"([-+]?[\d.]+(?:e[-+]?\d+)?|nan|inf)"
WORDS = r"(?: [a-z_]+:[^ ]+)*?"  # such as `stride:64`
STAGE = re.compile(rf"([^:=]*?)(_exact)?{WORDS} val_loss:{NUMBER} val_bpb:{NUMBER}(?: .*?eval_time:(\d+)ms)?(?:$| .*)")
# A line of the first format and one of the second, with what its groups are. The last line of a log that fits counts.
FACTS = (
    (r"seed:(\d+)| +seed: (\d+)", "seed", int),
    (r"world_size:(\d+) .*| +world_size: (\d+)", "world_size", int),
    (r"model_params:(\d+)", "n_params", int),
    (r"train_loader:dataset:(?:\S*/)?(\S+) train_shards.*", "data", str),
    (r"val_loader:.* tokens:(\d+).*|val_tokens: (\d+)", "val_tokens", int),
    (r"Code size(?: \(compressed\))?: (\d+) bytes", "code_bytes", int),
    (r"Serialized model [^ :]+: (\d+) bytes.*", "model_bytes", int),
    (r"Total submission size(?: \S+)?: (\d+) bytes.*", "total_bytes", int),
    (r"(?:total_eval_time:|eval_seconds: )([\d.]+).*", "eval_seconds", float),
)
FACTS = tuple((re.compile(pattern), name, kind) for pattern, name, kind in FACTS)
STEP = re.compile(r"(?:step:)?(\d+)/\d+ (?:train_loss|val_loss): ?[^ ]+.* train_time:(\d+)ms step_avg:[\d.]+ms")
MINUTES = re.compile(r"(\d+)/\d+ train_loss: \S+ train_time: ([\d.]+)m .*")
STOPPED = re.compile(r"stopping_early: wallclock_cap train_time: ?(\d+)ms step: ?(\d+)/\d+")
TRAIN_SECONDS = re.compile(r"train_seconds: .*\btotal:([\d.]+).*")
SETTING = re.compile(r"([A-Z][A-Z0-9_]*)=(.*)|  ([a-z][a-z0-9_]*): (.*)")
OWN_FINAL = re.compile(rf"final val_bpb:{NUMBER} stage:(\S+) (.*)")
PAIRS = re.compile(r"(?!step:)[a-z_]+:[^\s:]+(?: [a-z_]+:[^\s:]+)+")  # settings in the first format
STAMP = re.compile(r"\[?\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d\S* ")
OUR_STAGES = re.compile(r"final_\w+?_(roundtrip|sliding)(?:_window)?|legal_(ttt)")
# A last line that nothing cut: scores have eight digits behind the point.
COMPLETE = re.compile(r".* val_bpb:\d+\.\d{8}( eval_time:\d+ms)?|total_eval_time:\d+\.\ds|")
# The first scripts' name of their only score; later ones state their last one under it once more.
REPEATED = "final_int8_zlib_roundtrip"


def split_source(lines: list[str]) -> tuple[list[str], list[str]]:
    """Return the script that a log may hold between lines of 100 equal signs, and all else."""
    parts: list[list[str]] = [[]]
    for line in lines:
        if re.fullmatch("={100}", line):
            parts.append([])
        else:
            parts[-1].append(line)
    source, rest = [], []
    for part in parts:
        (source if any(re.match(r"import |from \w+ import ", line) for line in part) else rest).extend(part)
    return source, rest


def read_log(path: Path) -> Report:
    """Return what a text log states. Raise InputError where it is none."""
    text = path.read_text(encoding="utf-8", errors="replace")
    found = Report(path)
    if not text.endswith("\n") and not COMPLETE.fullmatch(text[text.rfind("\n") + 1 :]):
        found.problems.append("the log ends in the middle of a line")
        text = text[: text.rfind("\n") + 1]
    source, lines = split_source(text.splitlines())
    if source:
        found.settings["source"] = hashlib.sha256("\n".join(source).encode()).hexdigest()[:12]
    for line in lines:
        if len(line) < 2000:
            read_line(found, STAMP.sub("", line))
    if not (found.stages or found.steps):
        raise ValueError("no step and no score; allowed are logs of this family of scripts, and our records")
    if found.steps and found.train_seconds and not found.step_ms:
        found.step_ms = 1000 * found.train_seconds / found.steps
    others = [x.val_bpb for name, x in found.stages.items() if name != REPEATED]
    if REPEATED in found.stages and found.stages[REPEATED].val_bpb in others:
        del found.stages[REPEATED]
    if found.is_ours:
        renamed = ((OUR_STAGES.fullmatch(name), name, x) for name, x in found.stages.items())
        found.stages = {(fits and (fits[1] or fits[2])) or name: x for fits, name, x in renamed}
        if found.stages and not any(OWN_FINAL.fullmatch(line) for line in lines):
            found.problems.append("no final line: the run did not end")
    timed = [x.seconds for x in found.evaluation if x.seconds is not None]
    if found.eval_seconds is None and timed:
        found.eval_seconds = sum(timed)
    return found


def read_line(found: Report, line: str) -> None:
    """Take in a line of a log."""
    for pattern, name, kind in FACTS:
        if fits := pattern.fullmatch(line):
            setattr(found, name, kind(next(filter(None, fits.groups()))))
    again = STEP.fullmatch(line) or MINUTES.fullmatch(line)
    if again and found.steps is not None and int(again[1]) < found.steps:
        found.problems.append(f"step {again[1]} follows step {found.steps}: two runs in one log")
    if fits := SETTING.fullmatch(line):
        name, value, other, other_value = fits.groups()
        found.settings[name or other] = value if name else other_value
    elif fits := STEP.fullmatch(line):
        found.steps, found.train_seconds = int(fits[1]), int(fits[2]) / 1000
        found.step_ms = 1000 * found.train_seconds / max(1, found.steps)
    elif fits := STOPPED.fullmatch(line):
        found.steps, found.train_seconds = int(fits[2]), int(fits[1]) / 1000
        found.step_ms = 1000 * found.train_seconds / max(1, found.steps)
    elif fits := MINUTES.fullmatch(line):
        found.steps, found.train_seconds = int(fits[1]), 60 * float(fits[2])
    elif fits := TRAIN_SECONDS.fullmatch(line):
        found.train_seconds = float(fits[1])  # with all that follows the steps
    elif fits := OWN_FINAL.fullmatch(line):
        if not found.final or f"{found.final.val_bpb:.8f}" != fits[1]:
            found.problems.append(f"the final line states {fits[1]}, the last stage another value")
        found.problems += [fits[3]] if re.search("PARTIAL|CUT|OVER", fits[3]) else []
    elif line.startswith("hardware: "):
        found.on_cpu = " on CPU" in line
    elif line.startswith("artifact parts: "):
        parts = (pair.split(":") for pair in line.removeprefix("artifact parts: ").split())
        found.part_bytes = {part: int(n_bytes) for part, n_bytes in parts}
    elif (fits := STAGE.fullmatch(line)) and not re.match(r"(step:)?\d+/\d+", line):
        before = found.stages.pop(fits[1], None)  # the exact line comes second, without the time
        seconds = int(fits[5]) / 1000 if fits[5] else before.seconds if before else None
        if before and abs(before.val_bpb - float(fits[4])) > 1e-4:
            found.problems.append(f"{fits[1]} is {before.val_bpb} in one line and {fits[4]} in another")
        found.stages[fits[1]] = Stage(float(fits[3]), float(fits[4]), seconds)
    elif PAIRS.fullmatch(line) and found.steps is None and not found.is_ours:
        found.settings |= dict(pair.split(":") for pair in line.split())


def read_record(path: Path) -> Report:
    """Return what one of this project's JSON records states."""
    record = json.loads(path.read_text())
    config, artifact, train = record["config"], record["artifact"], record["train"] or {}
    settings = {name.upper(): show(value) for name, value in config.items()}
    found = Report(path, settings, record["seed"])
    for name in ("code_bytes", "model_bytes", "total_bytes", "part_bytes"):
        setattr(found, name, artifact.get(name))
    found.steps, found.step_ms = train.get("steps"), train.get("step_avg_ms")
    seconds = train.get("seconds")
    found.train_seconds = seconds["total"] if isinstance(seconds, dict) else seconds
    found.data = Path(config.get("data_path", "")).name or None
    for name, row in record["stages"].items():
        found.stages[name] = Stage(row["val_loss"], row["val_bpb"], row["seconds"])
        found.val_tokens = row["tokens"]
        if not row["whole_stream"]:
            found.problems.append(f"{name}: PARTIAL stream of {row['documents']} documents")
        if row.get("ttt_stop") is not None:
            found.problems.append(f"{name}: adaptation CUT after {row['ttt_stop']} of {row['chunks']} chunks")
    if found.final and found.final.val_bpb != record["val_bpb"]:
        found.problems.append(f"val_bpb is {record['val_bpb']}, its last stage's {found.final.val_bpb}")
    found.eval_seconds = sum(x.seconds for x in found.evaluation) if found.stages else None
    found.world_size, found.on_cpu = int(record["hardware"].split()[0]), " on CPU" in record["hardware"]
    return found


def read(path: Path) -> Report:
    """Return what a log or a record states, with what there is to say against it. Raise InputError where it is none."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with refusing(f"{path}: no log and no record of a run"):
        found = read_record(path) if path.suffix == ".json" else read_log(path)
        judge(found)
    return found


def judge(found: Report) -> None:
    """Name what there is to say against a run."""
    if not found.final:
        found.problems.append("no score")
    named = re.search(r"seed[_-]?(\d+)", found.name)
    if named and (found.seed is None or found.settings.get("PHASE") == "eval"):  # scoring has no seed of its own
        found.seed = int(named[1])
    elif named and found.seed != int(named[1]):
        found.problems.append(f"its name says seed {named[1]}, its lines {found.seed}")
    for what, seconds in (("training", found.train_seconds), ("evaluation", found.eval_seconds)):
        if seconds and seconds > LIMIT_SECONDS and not found.on_cpu:
            last = what == "training" and seconds - LIMIT_SECONDS < (found.step_ms or 0.0) / 1000
            within = ", less than a step over" if last else ""
            found.problems.append(f"{what} took {seconds:.3f} s of {LIMIT_SECONDS:g}{within}")
    counted = found.model_bytes, found.code_bytes, found.total_bytes
    if None not in counted and counted[0] + counted[1] != counted[2]:
        found.problems.append(f"{counted[0]:,} bytes of model and {counted[1]:,} of code are not {counted[2]:,}")
    if found.total_bytes and found.total_bytes > CAP_BYTES:
        found.problems.append(f"{found.total_bytes:,} bytes, {found.total_bytes - CAP_BYTES:,} over the cap")
    if found.final and not 0 < found.final.val_bpb < math.inf:
        found.problems.append(f"val_bpb is {found.final.val_bpb}")


# ==================== Comparing =======================================================================================


def by_configuration(reports: list[Report]) -> list[list[Report]]:
    """Return the runs in groups of one configuration, each sorted by seed."""
    groups = defaultdict(list)
    for report in reports:
        groups[report.configuration].append(report)
    return [sorted(group, key=lambda report: (report.seed or 0, report.name)) for group in groups.values()]


def differences(groups: list[list[Report]]) -> list[str]:
    """Return the settings that groups do not share, in words."""
    known = [dict(group[0].configuration) for group in groups]
    names = sorted(set().union(*known))
    shown = ((name, [settings.get(name, "none") for settings in known]) for name in names)
    return [f"{name}: {' | '.join(values)}" for name, values in shown if len(set(values)) > 1]


def repeated(reports: list[Report]) -> list[str]:
    """Return what is wrong with a group as a whole: a seed or a run twice."""
    seeds = Counter(report.seed for report in reports if report.seed is not None)
    found = [f"seed {seed} stands in {n} logs: one of them counts" for seed, n in seeds.items() if n > 1]
    run_ids = Counter(report.settings.get("RUN_ID", report.settings.get("run_id", "")) for report in reports)
    return found + [f"RUN_ID={name} stands in {n} logs" for name, n in run_ids.items() if n > 1 and name]


@dataclass(frozen=True)
class Sample:
    """Mean, standard deviation and number of some values."""

    mean: float
    std: float
    n: int


def sample(values: list[float]) -> Sample:
    return Sample(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))


def welch(ours: Sample, baseline: Sample, margin: float = 0.0) -> float:
    """Return the p of one-sided Welch: that ours is not below the baseline by more than `margin`; NaN for one value."""
    if min(ours.n, baseline.n) < 2 or not ours.std + baseline.std:
        return math.nan
    shifted = ours.mean + margin, ours.std, ours.n
    result = stats.ttest_ind_from_stats(
        *shifted, baseline.mean, baseline.std, baseline.n, equal_var=False, alternative="less"
    )
    return float(result.pvalue)


def verdict(ours: Sample, baseline: Sample) -> list[str]:
    """Return both rules of the competition on nll per token, each with its p."""
    if min(ours.n, baseline.n) < 2:
        return [f"no test: it needs two runs each, here are {ours.n} and {baseline.n}"]
    record, final = welch(ours, baseline, RECORD_NATS), welch(ours, baseline)
    gain = baseline.mean - ours.mean
    return [
        f"baseline: nll {baseline.mean:.5f} +- {baseline.std:.5f} (n={baseline.n}); ours is lower by {gain:+.5f}",
        f"written rule, lower by {RECORD_NATS} at p < {RECORD_P}: p = {record:.4g}, {met(record < RECORD_P)}",
        f"rule applied at the end, lower at p < {FINAL_P}: p = {final:.4g}, {met(final < FINAL_P)}",
    ]


def met(yes: bool) -> str:
    return "met" if yes else "NOT met"


# ==================== Showing =========================================================================================


def cell(value, form: str) -> str:
    return "" if value is None else format(value, form)


def row(report: Report, stages: list[str]) -> list[str]:
    """Return a run's cells."""
    found = [report.name, cell(report.seed, "d"), cell(report.steps, "d"), cell(report.step_ms, ".2f")]
    found += [cell(report.stages[x].val_bpb if x in report.stages else None, ".5f") for x in stages]
    margin = None if report.total_bytes is None else CAP_BYTES - report.total_bytes
    found += [cell(report.final.val_loss if report.final else None, ".5f"), cell(report.train_seconds, ".1f")]
    return [*found, cell(report.eval_seconds, ".1f"), cell(report.total_bytes, "d"), cell(margin, "d")]


def summary(reports: list[Report], stages: list[str], name: str, of) -> list[str]:
    """Return a row of a figure over runs: mean or standard deviation."""
    columns = [[report.stages[x].val_bpb for report in reports if x in report.stages] for x in stages]
    columns.append([report.final.val_loss for report in reports if report.final])
    shown = [f"{of(sample(values)):.5f}" if values else "" for values in columns]
    return [name, "", "", "", *shown, "", "", "", ""]


def table(reports: list[Report]) -> list[list[str]]:
    """Return names and rows for one configuration: a row a run, then mean and standard deviation."""
    stages = list(dict.fromkeys(x for report in reports for x in report.stages))
    names = ["log", "seed", "steps", "ms/step", *stages, "nll", "train s", "eval s", "bytes", "margin"]
    rows = [row(report, stages) for report in reports]
    if len(reports) > 1 and not repeated(reports):
        rows.append(summary(reports, stages, "mean", lambda x: x.mean))
        rows.append(summary(reports, stages, f"std (n={len(reports)})", lambda x: x.std))
    return [names, *rows]


def as_text(rows: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in rows) for i in range(len(rows[0]))]
    aligned = (
        [x.ljust(w) if i == 0 else x.rjust(w) for i, (x, w) in enumerate(zip(line, widths, strict=True))]
        for line in rows
    )
    return "\n".join("  ".join(line).rstrip() for line in aligned)


def as_markdown(rows: list[list[str]]) -> str:
    head, *rest = (f"| {' | '.join(line)} |" for line in rows)
    return "\n".join([head, f"|{'---|' * len(rows[0])}", *rest])


def as_csv(rows: list[list[str]]) -> str:
    csv.writer(file := io.StringIO(), lineterminator="\n").writerows(rows)
    return file.getvalue().rstrip()


# ==================== The command line ================================================================================


def make_or_check(args) -> int:
    """Make a record folder, or print what is wrong with one. Return 1 for one that is not sound."""
    import record  # which reads logs by this module

    if args.record:
        record.make_folder(args.record, args.logs, args.audit)
        print(f"{args.record}: {len(args.logs)} runs")
        return 0
    wrong = record.check_folder(args.check)
    print("\n".join(f"! {line}" for line in wrong) or "nothing is wrong")
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("logs", nargs="*", type=Path, metavar="LOG_OR_JSON")
    add("--baseline", nargs="+", type=Path, default=[], metavar="LOG_OR_JSON", help="runs to be better than")
    add("--baseline-loss", nargs=3, type=float, metavar=("MEAN", "STD", "N"), help="nll per token of published ones")
    add("--record", type=Path, metavar="FOLDER", help="make a record folder of runs of this script, by their JSON")
    add("--audit", nargs="+", type=Path, default=[], metavar="JSON", help="what audit.py --report wrote, with --record")
    add("--check", type=Path, metavar="FOLDER", help="check a record folder: logs, headline, seeds, sizes, limits")
    add("--plots", type=Path, metavar="DIR", help="draw the runs: PNG and SVG")
    shown = parser.add_mutually_exclusive_group()
    for form in (as_markdown, as_csv):
        name = f"--{form.__name__.removeprefix('as_')}"
        shown.add_argument(name, dest="show", action="store_const", const=form, default=as_text)
    args = parser.parse_args()
    try:
        if args.record or args.check:
            return make_or_check(args)
        if not args.logs:
            raise InputError("no log; allowed are one or more, --record FOLDER or --check FOLDER")
        groups = by_configuration([read(path) for path in args.logs])
        baseline = by_configuration([read(path) for path in args.baseline])
        if len(baseline) > 1:
            raise InputError(
                f"--baseline: its runs differ in {'; '.join(differences(baseline))}; allowed is one system"
            )
        against = Sample(*args.baseline_loss[:2], int(args.baseline_loss[2])) if args.baseline_loss else None
        if baseline:
            against = sample([report.final.val_loss for report in baseline[0] if report.final] or [math.nan])
        for group in groups:
            print(args.show(table(group)))
            for x in (x for x in group if x.part_bytes and args.show is as_text):
                print(
                    f"{x.name}: "
                    + " ".join(f"{part}:{n}" for part, n in (x.part_bytes | {"code": x.code_bytes}).items())
                )
            for problem in [f"{x.name}: {problem}" for x in group for problem in x.problems] + repeated(group):
                print(f"! {problem}")
            texts = {report.val_tokens for report in (*group, *sum(baseline, [])) if report.val_tokens}
            if against and repeated(group):
                print("! no test of runs that stand there twice")
            elif against and len(texts) > 1:
                print(f"! no test: nll a token of texts of {' and '.join(map(str, sorted(texts)))} tokens")
            elif against and (losses := [report.final.val_loss for report in group if report.final]):
                print("\n".join(verdict(sample(losses), against)))
            print()
        if args.plots:
            import plots  # matplotlib takes a second to start

            print("\n".join(map(str, plots.write_plots(args.plots, groups))))
        if len(groups) > 1:
            print(f"! {len(groups)} configurations, which are not averaged. They differ in")
            print("\n".join(f"!   {line}" for line in differences(groups)))
    except (InputError, OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
