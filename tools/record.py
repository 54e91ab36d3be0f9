"""Make a competition record folder from logs, and check somebody's. report.py --record and --check call it.

Every value comes from a record of a run or from a report of the audit. What neither states is null, and `reasons` has
why.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import report
import train_gpt
from train_gpt import CAP_BYTES, InputError

ROOT = Path(train_gpt.__file__).resolve().parent
STATIC = ("author", "github_id", "name", "track", "technique_summary", "attribution")  # of the project: submission.json
# The whole sequences of the validation text at 1,024, 4,096 (two tokenizers) and 8,192 pieces, and at 8,192 of CaseOps.
FULL_TOKENS = (62_021_632, 45_508_608, 45_514_752, 40_540_160, 47_851_520)
TARGET_HARDWARE = "8 x NVIDIA H100"
NGRAM_FREE = {"neural", "flat"}  # experts that count no tokens


# ==================== Making ==========================================================================================


def make_folder(folder: Path, paths: list[Path], audits: list[Path]) -> None:
    """Write submission.json, README.md, logs, script and requirements of runs. Raise InputError where they clash."""
    if other := [path for path in paths if path.suffix != ".json"]:
        raise InputError(f"{other[0]}: allowed are the .json records of runs, each with its log beside it")
    reports, records = [report.read(path) for path in paths], [json.loads(path.read_text()) for path in paths]
    for found, record in zip(reports, records, strict=True):
        compare_with_log(found, record)
    groups = report.by_configuration(reports)
    if len(groups) > 1:
        raise InputError(f"the runs differ in {'; '.join(report.differences(groups))}; allowed is one configuration")
    if wrong := [problem for group in groups for problem in report.repeated(group)]:
        raise InputError(f"{wrong[0]}; allowed is one run a seed")
    for name, values in dict(
        hardware={record["hardware"] for record in records},
        torch={record["versions"]["torch"] for record in records},
    ).items():
        if len(values) > 1:
            raise InputError(f"the runs differ in {name}: {' | '.join(sorted(values))}; allowed is one")
    if len({record["artifact"]["sha256"] for record in records}) < len(records):
        raise InputError("two runs have one artifact; allowed is a training a seed")
    made = submission(reports, records, [json.loads(path.read_text()) for path in audits])
    text = readme(made, groups[0] if groups else [], records)
    folder.mkdir(parents=True, exist_ok=False)
    for name in ("train_gpt.py", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    for path, found in zip(paths, reports, strict=True):
        shutil.copy(path.with_suffix(".txt"), folder / f"train_seed{found.seed}.log")
    train_gpt.write_atomically(folder / "submission.json", (json.dumps(made, indent=2) + "\n").encode())
    train_gpt.write_atomically(folder / "README.md", text.encode())


def compare_with_log(found: report.Report, record: dict) -> None:
    """Raise InputError unless a run scored, by the script at hand, and its log states what its record does."""
    if not found.final:
        raise InputError(f"{found.name}: a record of training alone; allowed are runs that scored")
    path, script = found.path.with_suffix(".txt"), (ROOT / "train_gpt.py").read_bytes()
    log = report.read(path)
    if f"script_sha256:{hashlib.sha256(script).hexdigest()}" not in path.read_text(errors="replace").splitlines():
        raise InputError(f"{path}: no log of the train_gpt.py at hand; allowed are runs of that script")
    for name in ("seed", "steps", "total_bytes", "world_size", "val_tokens"):
        here, there = getattr(found, name), getattr(log, name)
        if here != there:
            raise InputError(f"{found.name}: {name} is {here}, in its log {there}; allowed is one value")
    scores = [[(f"{x.val_loss:.8f}", f"{x.val_bpb:.8f}") for x in run.evaluation] for run in (found, log)]
    if scores[0] != scores[1]:
        raise InputError(f"{found.name}: its scores are {scores[0]}, in its log {scores[1]}; allowed is one value")


def submission(reports: list[report.Report], records: list[dict], audits: list[dict]) -> dict:
    """Return the fields of submission.json for some runs; for none, all results are null."""
    made, reasons = json.loads((ROOT / "submission.json").read_text()), {}
    made = {name: made[name] for name in STATIC} | dict(date=time.strftime("%Y-%m-%d"))
    found = dict.fromkeys(("val_loss", "val_loss_std", "val_bpb", "val_bpb_std", "hardware", "pytorch_version"))
    found |= dict.fromkeys(("bytes_total", "bytes_code", "artifact_bytes_mean", "artifact_bytes_max"))
    rows = [record["stages"][record["final_stage"]] for record in records]
    whole = all(row["whole_stream"] and row["has_manifest"] for row in rows)
    if len(reports) >= 3 and whole and all(record["hardware"].startswith(TARGET_HARDWARE) for record in records):
        for name in ("val_loss", "val_bpb"):
            values = [round(getattr(x.final, name), 8) for x in reports]  # as the logs have it
            found[name], found[f"{name}_std"] = (round(of(values), 8) for of in (statistics.fmean, statistics.stdev))
        blurb = f"{len(reports)} seeds: {found['val_bpb']:.5f} +- {found['val_bpb_std']:.5f} bits per byte."
    else:
        reasons["val_bpb"] = "no three seeds on 8 H100s over the whole validation stream are on record"
        blurb = f"No val_bpb is given: {reasons['val_bpb']}."
    if reports:
        artifacts = [x.total_bytes - x.code_bytes for x in reports]
        found |= dict(bytes_total=max(x.total_bytes for x in reports), bytes_code=reports[0].code_bytes)
        found |= dict(artifact_bytes_mean=round(statistics.fmean(artifacts)), artifact_bytes_max=max(artifacts))
        found |= dict(hardware=records[0]["hardware"], pytorch_version=records[0]["versions"]["torch"])
    seeds = {str(x.seed): seed_result(x, record) for x, record in zip(reports, records, strict=True)}
    made |= found | dict(blurb=blurb, seeds=[x.seed for x in reports], seed_results=seeds)
    made["compliance"], missing = compliance(reports, records, audits)
    made["audited_tokens"] = {x["run_id"]: x["tokens"] for x in audits}
    reasons |= {name: reasons.get("val_bpb", "no run is on record") for name, x in found.items() if x is None}
    return made | dict(reasons=reasons | missing)


def seed_result(found: report.Report, record: dict) -> dict:
    """Return what one run gave, by the names that accepted records use."""
    stages, final = found.stages, found.final
    ttt = stages["sliding"].val_bpb - stages["ttt"].val_bpb if {"sliding", "ttt"} <= set(stages) else None
    return dict(
        val_bpb=round(final.val_bpb, 8),
        val_loss=round(final.val_loss, 8),
        steps=found.steps,
        step_avg_ms=found.step_ms,
        train_time_s=found.train_seconds,
        eval_time_s=found.eval_seconds,
        artifact_bytes=found.total_bytes - found.code_bytes,
        val_tokens=found.val_tokens,
        quantized_val_bpb=round(stages["roundtrip"].val_bpb, 8) if "roundtrip" in stages else None,
        ttt_gain_bpb=ttt,
        **{f"{name}_val_bpb": round(x.val_bpb, 8) for name, x in stages.items() if name != "roundtrip"},
    )


def compliance(reports: list[report.Report], records: list[dict], audits: list[dict]) -> tuple[dict, dict[str, str]]:
    """Return each condition as true, false or null, and for a null one the reason."""
    script = hashlib.sha256((ROOT / "train_gpt.py").read_bytes()).hexdigest()

    def of(record: dict) -> list[dict]:
        """Return the checks of all audits of a record's artifact, script and stage."""
        wanted = record["artifact"]["sha256"], script, record["final_stage"]
        return [x["checks"] for x in audits if (x["artifact_sha256"], x["script_sha256"], x["stage"]) == wanted]

    checks = [of(record) for record in records]

    def audited(*names: str) -> bool | None:
        passed = all(x[name]["passed"] for found in checks for x in found for name in names)
        return passed if checks and all(checks) else None

    def timed(name: str) -> bool | None:
        seconds = [getattr(x, name) for x in reports]
        on_target = records and all(record["hardware"].startswith(TARGET_HARDWARE) for record in records)
        return max(seconds) <= report.LIMIT_SECONDS if on_target and None not in seconds else None

    rows = [record["stages"][record["final_stage"]] for record in records]
    experts = [
        set(x["config"]["hedge_experts"] if x["config"]["mixer"] == "hedge" else [x["config"]["mixer"]])
        for x in records
    ]
    found = dict(
        train_under_600s=timed("train_seconds"),
        eval_under_600s=timed("eval_seconds"),
        artifact_under_16mb=max(x.total_bytes for x in reports) <= CAP_BYTES if reports else None,
        three_seeds=len(reports) >= 3,
        score_first_ttt=audited("score before update", "single pass"),
        no_slot=audited("causal", "distribution"),
        no_pre_quant_ttt=audited("training text only"),
        no_ngram_cache=all(x <= NGRAM_FREE for x in experts) if records else None,
        full_validation_targets=all(row["whole_stream"] and row["has_manifest"] for row in rows) if rows else None,
        no_validation_training_leak=audited("training text only", "separation"),
    )
    why = "no run is on record" if not reports else "no audit of each artifact, by this script and stage, was given"
    late = (
        "no run is on record" if not reports else "the limit is that of 8 H100s, and not all of these runs state such"
    )
    return found, {name: late if name.endswith("600s") else why for name, value in found.items() if value is None}


def readme(made: dict, group: list[report.Report], records: list[dict]) -> str:
    """Return the README of a record folder, under the usual headings."""
    places, defaults = report.PER_RUN | {"preset", "tokenizer_path"}, dataclasses.asdict(train_gpt.Config())
    config = {name: x for name, x in (records[0]["config"] if records else {}).items() if name not in places}
    changed = {name: x for name, x in config.items() if json.dumps(x) != json.dumps(defaults.get(name))}
    settings = " ".join(f"{name.upper()}={train_gpt.show(x)}" for name, x in changed.items())
    ranks = group[0].world_size if group else 8
    rows = report.as_markdown(report.table(group)) if group else "No run is on record."
    conditions = "\n".join(f"* {name}: {json.dumps(value)}" for name, value in made["compliance"].items())
    reasons = "\n".join(f"* {name}: {reason}" for name, reason in made["reasons"].items())
    credits = "\n".join(f"* {name}: {source}" for name, source in made["attribution"].items())
    return (
        f"# {made['name']}\n\n## Results\n\n{rows}\n\n## Key techniques\n\n"
        f"The defaults are: {made['technique_summary']}\n\nChanged: {settings or 'nothing'}\n\n"
        f"## Compliance\n\n{conditions}\n\nNull, because:\n\n{reasons or '* nothing is null'}\n\n"
        "## Reproduction\n\n```sh\n"
        f"for seed in {' '.join(map(str, made['seeds']))}; do\n"
        f"SEED=$seed {settings} torchrun --standalone --nproc_per_node={ranks} train_gpt.py\ndone\n```\n\n"
        f"## Credits\n\n{credits}\n"
    )


# ==================== Checking ========================================================================================


def decimals(value) -> int:
    """Return the digits behind the point that a number was written with, at least 4."""
    return max(4, len(repr(float(value)).partition(".")[2]))


def check_folder(folder: Path) -> list[str]:
    """Return all that is wrong with a record folder: logs, headline, seeds, sizes and limits. Raise InputError."""
    try:
        stated = json.loads((folder / "submission.json").read_text())
        by_seed = (stated.get("seed_results") or {}).items()  # some name the seed `seed_42`, some give its score alone
        numbered = ((re.sub(r"\D", "", seed), x) for seed, x in by_seed)
        results = {int(seed): x if isinstance(x, dict) else {"val_bpb": x} for seed, x in numbered if seed}
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{folder}/submission.json: {error}; allowed is a record's JSON") from None
    named = (x for x in sorted(folder.rglob("*")) if re.fullmatch(r".*(train|seed|log).*\.(log|txt)", x.name))
    found = (x for x in named if x.is_file())
    logs = list({hashlib.sha256(x.read_bytes()).digest(): x for x in found}.values())  # `train.log` may be one of them
    reports, wrong = [], [] if logs else ["no log of a run"]
    for path in logs:
        try:
            reports.append(report.read(path))
        except InputError as error:
            wrong.append(str(error))
    groups = report.by_configuration(reports)
    wrong += [f"{x.name}: {problem}" for x in reports for problem in x.problems]
    wrong += [problem for group in groups for problem in report.repeated(group)]
    wrong += [f"the runs differ in {line}" for line in (report.differences(groups) if len(groups) > 1 else [])]
    wrong += [f"{x.name}: it ran on a CPU, where no limit of time holds" for x in reports if x.on_cpu]
    wrong += against_results(results, reports) + against_headline(stated, results, reports)
    wrong += against_compliance(stated, reports)
    return wrong + against_sizes(stated, reports, folder / "train_gpt.py")


def mapping(x) -> dict:
    """Return a part of somebody's JSON if it has names, and no names otherwise."""
    return x if isinstance(x, dict) else {}


def count_seeds(reports: list[report.Report]) -> int:
    """Return the number of seeds with a score; a log that states none counts as one of its own."""
    return len({x.path if x.seed is None else x.seed for x in reports if x.final})


def differs(stated, found, digits: bool = True) -> bool:
    """Return whether a stated number is not the one found, as far as it was written out. One that is none differs."""
    if isinstance(stated, bool) or not isinstance(stated, (int, float)) or abs(stated) > 1e15:
        return True
    return not abs(stated - found) <= (1.01 * 10 ** -decimals(stated) if digits else 0)


def against_results(results: dict[int, dict], reports: list[report.Report]) -> list[str]:
    """Return where the results of the seeds are not those of their logs."""
    by_seed, wrong = {x.seed: x for x in reports}, []
    for seed in sorted(by_seed.keys() - results.keys(), key=str) if results else []:
        wrong.append(f"{by_seed[seed].name}: its seed {seed} has no result")
    for seed, row in results.items():
        if seed not in by_seed:
            wrong.append(f"seed {seed}: it has a result and no log")
            continue
        found = by_seed[seed]
        if found.final:
            for name in ("val_bpb", "val_loss"):
                if name in row and differs(row[name], value := getattr(found.final, name)):
                    wrong.append(f"seed {seed}: {name} is {row[name]}, its log states {value}")
        if found.steps and "steps" in row and differs(row["steps"], found.steps, digits=False):
            wrong.append(f"seed {seed}: steps is {row['steps']}, its log states {found.steps}")
        sizes = {found.total_bytes, (found.total_bytes or 0) - (found.code_bytes or 0)}  # some count the script in
        if found.total_bytes and row.get("artifact_bytes", found.total_bytes) not in list(sizes):
            wrong.append(f"seed {seed}: artifact_bytes is {row['artifact_bytes']}, its log states {sorted(sizes)}")
    return wrong


def against_headline(stated: dict, results: dict, reports: list[report.Report]) -> list[str]:
    """Return where the headline is not the mean of the logs, of three seeds and of the whole text."""
    wrong, finals = [], [x for x in reports if x.final]
    for name in ("val_bpb", "val_loss"):
        values = [getattr(x.final, name) for x in finals if not results or x.seed in results]
        if stated.get(name) is None and name in mapping(stated.get("reasons")):
            continue
        if name in stated and values and differs(stated[name], mean := statistics.fmean(values)):
            wrong.append(f"{name} is {stated[name]}, the mean of {len(values)} logs {mean:.8f}")
        if stated.get(f"{name}_std") is not None and len(values) > 1 and all(map(math.isfinite, values)):
            forms = values, [round(x, 4) for x in values]  # some take the rounded scores, some divide by n
            spreads = [of(x) for of in (statistics.stdev, statistics.pstdev) for x in forms]
            if all(differs(stated[f"{name}_std"], x) for x in spreads):
                wrong.append(f"{name}_std is {stated[f'{name}_std']}, that of the logs {spreads[0]:.8f}")
    if "val_bpb" not in stated:
        wrong.append("no val_bpb")
    if (n := count_seeds(reports)) < 3:
        wrong.append(f"{n} seeds with a score; three are wanted")
    texts = {x.val_tokens for x in reports if x.val_tokens}
    for n in sorted(n for n in texts if all(abs(n - full) > 4096 for full in FULL_TOKENS)):
        wrong.append(f"{n} validation tokens were scored; the whole stream has {' or '.join(map(str, FULL_TOKENS))}")
    return wrong


def against_compliance(stated: dict, reports: list[report.Report]) -> list[str]:
    """Return which conditions are called kept and are, by the logs, not."""
    claimed = mapping(stated.get("compliance"))
    largest = {
        name: max((value for x in reports if (value := getattr(x, name))), default=0)
        for name in ("train_seconds", "eval_seconds", "total_bytes")
    }
    kept = dict(
        train_under_600s=largest["train_seconds"] <= report.LIMIT_SECONDS,
        eval_under_600s=largest["eval_seconds"] <= report.LIMIT_SECONDS,
        artifact_under_16mb=largest["total_bytes"] <= CAP_BYTES,
        three_seeds=count_seeds(reports) >= 3,
    )
    return [
        f"compliance: {name} is called true; its logs do not"
        for name in kept
        if claimed.get(name) is True and not kept[name]
    ]


def against_sizes(stated: dict, reports: list[report.Report], script: Path) -> list[str]:
    """Return where the stated bytes are not those of the logs, or the script not the one that they count."""
    totals, wrong = [x.total_bytes for x in reports if x.total_bytes], []
    if totals and "bytes_total" in stated:
        largest, mean = max(totals), statistics.fmean(totals)
        if stated["bytes_total"] != largest and differs(stated["bytes_total"], round(mean), digits=False):
            wrong.append(f"bytes_total is {stated['bytes_total']}; the largest of the logs is {largest}")
    models = [x.total_bytes - (x.code_bytes or 0) for x in reports if x.total_bytes]
    for name, of in (("artifact_bytes_mean", statistics.fmean), ("artifact_bytes_max", max)):
        # Some count the script in; some cut or round the mean.
        sizes = sorted({f(of(x)) for x in (models, totals) if x for f in (int, round, float)})
        complete = len(models) == len(mapping(stated.get("seed_results")) or models)  # of each seed a log
        if sizes and complete and stated.get(name) is not None and all(differs(stated[name], x) for x in sizes):
            wrong.append(f"{name} is {stated[name]}; that of the logs is {' or '.join(map(str, sizes))}")
    logged = {x.code_bytes for x in reports if x.code_bytes}
    if not script.is_file():
        wrong.append("no train_gpt.py")
    elif logged and (shipped := os.path.getsize(script)) not in logged:
        wrong.append(f"train_gpt.py has {shipped} bytes; the logs count {' or '.join(map(str, sorted(logged)))} for it")
    return wrong
