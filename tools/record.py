"""Make a competition record folder from logs, and check somebody's. report.py --record and --check call it.

Every value comes from a record of a run or from a report of the audit. What neither states is null, and `reasons` has
why.
"""

from __future__ import annotations

import hashlib
import json
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
# The whole sequences of the validation text at 1,024, 4,096 and 8,192 pieces, and at 8,192 of CaseOps.
FULL_TOKENS = (62_021_632, 45_514_752, 40_540_160, 47_851_520)
NGRAM_FREE = {"neural", "flat"}  # experts that count no tokens


# ==================== Making ==========================================================================================


def make_folder(folder: Path, paths: list[Path], audits: list[Path]) -> None:
    """Write submission.json, README.md, logs, script and requirements of runs. Raise InputError where they clash."""
    reports, records = [report.read(path) for path in paths], [json.loads(path.read_text()) for path in paths]
    groups = report.by_configuration(reports)
    if len(groups) > 1:
        raise InputError(f"the runs differ in {'; '.join(report.differences(groups))}; allowed is one configuration")
    if wrong := [problem for group in groups for problem in report.repeated(group)]:
        raise InputError(f"{wrong[0]}; allowed is one run a seed")
    script = hashlib.sha256((ROOT / "train_gpt.py").read_bytes()).hexdigest()
    for path in paths:
        if not (log := path.with_suffix(".txt")).is_file() or f"script_sha256:{script}" not in log.read_text():
            raise InputError(f"{log}: no log of the train_gpt.py at hand; allowed are runs of that script")
    folder.mkdir(parents=True, exist_ok=False)
    for name in ("train_gpt.py", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    for path, found in zip(paths, reports, strict=True):
        shutil.copy(path.with_suffix(".txt"), folder / f"train_seed{found.seed}.log")
    made = submission(reports, records, [json.loads(path.read_text()) for path in audits])
    train_gpt.write_atomically(folder / "submission.json", (json.dumps(made, indent=2) + "\n").encode())
    train_gpt.write_atomically(folder / "README.md", readme(made, groups[0] if groups else []).encode())


def submission(reports: list[report.Report], records: list[dict], audits: list[dict]) -> dict:
    """Return the fields of submission.json for some runs; for none, all results are null."""
    made, reasons = json.loads((ROOT / "submission.json").read_text()), {}
    made = {name: made[name] for name in STATIC} | dict(date=time.strftime("%Y-%m-%d"))
    found = dict.fromkeys(("val_loss", "val_loss_std", "val_bpb", "val_bpb_std", "hardware", "pytorch_version"))
    found |= dict.fromkeys(("bytes_total", "bytes_code", "artifact_bytes_mean", "artifact_bytes_max"))
    whole = all(record["stages"][record["final_stage"]]["whole_stream"] for record in records)
    if len(reports) >= 3 and whole and not any(x.on_cpu for x in reports):
        for name in ("val_loss", "val_bpb"):
            values = [getattr(x.final, name) for x in reports]
            found[name], found[f"{name}_std"] = (round(of(values), 8) for of in (statistics.fmean, statistics.stdev))
        blurb = f"{len(reports)} seeds: {found['val_bpb']:.5f} +- {found['val_bpb_std']:.5f} bits per byte."
    else:
        reasons["val_bpb"] = "no three seeds on 8 H100s over the whole validation stream are on record"
        blurb = f"No val_bpb is given: {reasons['val_bpb']}. logs/ has smaller runs, each with its machine."
    if reports:
        artifacts = [x.total_bytes - x.code_bytes for x in reports]
        found |= dict(bytes_total=max(x.total_bytes for x in reports), bytes_code=reports[0].code_bytes)
        found |= dict(artifact_bytes_mean=round(statistics.fmean(artifacts)), artifact_bytes_max=max(artifacts))
        found |= dict(hardware=records[0]["hardware"], pytorch_version=records[0]["versions"]["torch"])
    seeds = {str(x.seed): seed_result(x, record) for x, record in zip(reports, records, strict=True)}
    made |= found | dict(blurb=blurb, seeds=[x.seed for x in reports], seed_results=seeds)
    made["compliance"], missing = compliance(reports, records, audits)
    return made | dict(reasons=reasons | missing)


def seed_result(found: report.Report, record: dict) -> dict:
    """Return what one run gave, by the names that accepted records use."""
    stages, final = found.stages, found.final
    ttt = stages["sliding"].val_bpb - stages["ttt"].val_bpb if {"sliding", "ttt"} <= set(stages) else None
    return dict(
        val_bpb=final.val_bpb,
        val_loss=final.val_loss,
        steps=found.steps,
        step_avg_ms=found.step_ms,
        train_time_s=found.train_seconds,
        eval_time_s=found.eval_seconds,
        artifact_bytes=found.total_bytes - found.code_bytes,
        val_tokens=found.val_tokens,
        quantized_val_bpb=stages["roundtrip"].val_bpb if "roundtrip" in stages else None,
        ttt_gain_bpb=ttt,
        **{f"{name}_val_bpb": x.val_bpb for name, x in stages.items() if name != "roundtrip"},
    )


def compliance(reports: list[report.Report], records: list[dict], audits: list[dict]) -> tuple[dict, dict[str, str]]:
    """Return each condition as true, false or null, and for a null one the reason."""
    by_artifact = {audit["artifact_sha256"]: audit["checks"] for audit in audits}
    checks = [by_artifact.get(record["artifact"]["sha256"]) for record in records]

    def audited(*names: str) -> bool | None:
        return all(x[name]["passed"] for x in checks for name in names) if checks and all(checks) else None

    def timed(name: str) -> bool | None:
        seconds = [getattr(x, name) for x in reports]
        on_gpus = reports and not any(x.on_cpu for x in reports)
        return max(seconds) <= report.LIMIT_SECONDS if on_gpus and None not in seconds else None

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
    why = "no run is on record" if not reports else "no audit of each of these artifacts was given"
    late = "no run is on record" if not reports else "the limit is one of 8 H100s, and these ran on a CPU"
    return found, {name: late if name.endswith("600s") else why for name, value in found.items() if value is None}


def readme(made: dict, group: list[report.Report]) -> str:
    """Return the README of a record folder, under the usual headings."""
    rows = report.as_markdown(report.table(group)) if group else "No run is on record."
    conditions = "\n".join(f"* {name}: {json.dumps(value)}" for name, value in made["compliance"].items())
    reasons = "\n".join(f"* {name}: {reason}" for name, reason in made["reasons"].items())
    credits = "\n".join(f"* {name}: {source}" for name, source in made["attribution"].items())
    return (
        f"# {made['name']}\n\n## Results\n\n{rows}\n\n## Key techniques\n\n{made['technique_summary']}\n\n"
        f"## Compliance\n\n{conditions}\n\nNull, because:\n\n{reasons or '* nothing is null'}\n\n"
        "## Reproduction\n\n```sh\nSEED=1337 torchrun --standalone --nproc_per_node=8 train_gpt.py\n```\n\n"
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
        results = {int(re.sub(r"\D", "", seed)): x if isinstance(x, dict) else {"val_bpb": x} for seed, x in by_seed}
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{folder}/submission.json: {error}; allowed is a record's JSON") from None
    logs = sorted(x for x in folder.iterdir() if re.fullmatch(r".*(train|seed).*\.(log|txt)", x.name))
    reports, wrong = [], [] if logs else ["no log of a run"]
    for path in logs:
        try:
            reports.append(report.read(path))
        except InputError as error:
            wrong.append(str(error))
    groups = report.by_configuration(reports)
    wrong += [f"{x.name}: {problem}" for x in reports for problem in x.problems]
    wrong += [problem for group in groups for problem in report.repeated(group)]
    wrong += [f"the runs differ in {line}" for line in differences_shown(groups)]
    return wrong + against_results(results, reports) + against_headline(stated, results, reports, folder)


def differences_shown(groups: list[list[report.Report]]) -> list[str]:
    return report.differences(groups) if len(groups) > 1 else []


def against_results(results: dict[int, dict], reports: list[report.Report]) -> list[str]:
    """Return where the results of the seeds are not those of their logs."""
    by_seed, wrong = {x.seed: x for x in reports}, []
    for seed, row in results.items():
        found = by_seed.get(seed)
        if found is None:
            wrong.append(f"seed {seed}: it has a result and no log")
            continue
        pairs = (
            ("val_bpb", found.final and found.final.val_bpb),
            ("val_loss", found.final and found.final.val_loss),
            ("steps", found.steps),
            ("artifact_bytes", found.total_bytes),
        )
        for name, value in pairs:
            other = row.get(name)
            if None in (other, value):
                continue
            if abs(other - value) > (0.51 * 10 ** -decimals(other) if name.startswith("val") else 0):
                code = found.code_bytes or 0
                if name != "artifact_bytes" or other != value - code:
                    wrong.append(f"seed {seed}: {name} is {other}, its log states {value}")
    return wrong


def against_headline(stated: dict, results: dict, reports: list[report.Report], folder: Path) -> list[str]:
    """Return where the headline, the number of seeds, the sizes or the text are not those of the logs."""
    wrong, finals = [], [x for x in reports if x.final]
    for name in ("val_bpb", "val_loss"):
        values = [getattr(x.final, name) for x in finals if not results or x.seed in results]
        if isinstance(stated.get(name), (int, float)) and values:
            mean = statistics.fmean(values)
            if abs(stated[name] - mean) > 0.51 * 10 ** -decimals(stated[name]):
                wrong.append(f"{name} is {stated[name]}, the mean of {len(values)} logs {mean:.8f}")
    if len(finals) < 3:
        wrong.append(f"{len(finals)} logs with a score; three seeds are wanted")
    largest = max((x.total_bytes for x in reports if x.total_bytes), default=None)
    if (
        largest
        and isinstance(stated.get("bytes_total"), int)
        and stated["bytes_total"] not in {x.total_bytes for x in reports}
    ):
        wrong.append(f"bytes_total is {stated['bytes_total']}, that of no log; the largest is {largest}")
    script = folder / "train_gpt.py"
    shipped = os.path.getsize(script) if script.is_file() else None
    logged = {x.code_bytes for x in reports if x.code_bytes}
    if shipped is None:
        wrong.append("no train_gpt.py")
    elif logged and shipped not in logged:
        over = largest - max(logged) + shipped - CAP_BYTES
        with_it = f"; with it the largest total is {'OVER by ' if over > 0 else 'under by '}{abs(over)} bytes"
        wrong.append(f"train_gpt.py has {shipped} bytes, the logs state {sorted(logged)}{with_it}")
    texts = {x.val_tokens for x in reports if x.val_tokens}
    for n in sorted(n for n in texts if all(abs(n - full) > 4096 for full in FULL_TOKENS)):
        wrong.append(f"{n} validation tokens were scored; the whole stream has {' or '.join(map(str, FULL_TOKENS))}")
    return wrong
