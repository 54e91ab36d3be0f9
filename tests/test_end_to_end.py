"""The script as a whole: what a run writes, that a seed decides it, how it scores an artifact, and what it refuses."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import sentencepiece
import torch

import train_gpt
from conftest import TINY, on_ranks
from train_gpt import STAGES, Config, Dist, Stream, Tokenizer, TrainLoader, read_artifact, read_shard

SCRIPT = Path(train_gpt.__file__).resolve()
SCRIPT_BYTES = SCRIPT.stat().st_size
# Larger batches than the other tests': the choice of an average reads 65,536 tokens whatever the batch.
SMALL = dict(train_batch_tokens=1024, micro_batch_tokens=512, swa_every=1, swa_start_scale=0.6)
SMALL |= dict(ngram_orders=(1, 2, 4), mixer_hidden=4)
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
# What says where files are and which device runs; nothing here changes a score.
PLACES = ("DEVICE", "DATA_PATH", "LOG_DIR", "RUN_ID")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def settings(folder, tiny_env):
    """settings(run_id, extra={}, bare=False, **settings) -> the environment of a run; a bare one has only these few."""

    def settings(run_id, extra=None, bare=False, **overrides):
        env = tiny_env(**{**SMALL, "run_id": run_id, "log_dir": str(folder), **overrides})
        env.pop("TRITON_INTERPRET", None)
        if bare:
            known = {f.name.upper() for f in dataclasses.fields(Config)} - {*PLACES, *map(str.upper, overrides)}
            env = {name: value for name, value in env.items() if name not in known}
        return env | (extra or {})

    return settings


def result(folder, run_id, env, status, stdout, stderr):
    """What a run left: its exit status, its output, its log's lines, its record, its artifact's path."""
    log, record = folder / f"{run_id}.txt", folder / f"{run_id}.json"
    return SimpleNamespace(
        env=env,
        status=status,
        stdout=stdout,
        stderr=stderr,
        lines=log.read_text(encoding="utf-8").splitlines() if log.is_file() else [],
        record=json.loads(record.read_text()) if record.is_file() else None,
        artifact=folder / f"{run_id}.artifact",
    )


@pytest.fixture(scope="module")
def run(folder, settings):
    """run(run_id, **settings) -> what the script's main() left; the run takes place in this process."""

    def run(run_id, **overrides):
        env, stdout, stderr = settings(run_id, **overrides), io.StringIO(), io.StringIO()
        before = list(train_gpt.log.handlers)
        try:
            with (
                mock.patch.dict(os.environ, env, clear=True),
                mock.patch.object(train_gpt, "CALIBRATION_STEPS", 32),
                contextlib.redirect_stdout(stdout),
                contextlib.redirect_stderr(stderr),
            ):
                status = train_gpt.main()
        finally:
            for handler in set(train_gpt.log.handlers) - set(before):
                train_gpt.log.removeHandler(handler)
                handler.close()
        return result(folder, run_id, env, status, stdout.getvalue(), stderr.getvalue())

    return run


@pytest.fixture(scope="module")
def start(folder, settings):
    """start(run_id, processes=1, **settings) -> what the script left, started as a user starts it."""

    def start(run_id, processes=1, **overrides):
        env = settings(run_id, **overrides)
        command = [sys.executable, *(TORCHRUN if processes == 2 else []), str(SCRIPT)]
        done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=600)
        return result(folder, run_id, env, done.returncode, done.stdout, done.stderr)

    return start


def finished(run):
    assert run.status == 0, run.stderr
    return run


@pytest.fixture(scope="module")
def whole_run(run, folder):
    """Train, pack and score; the tests that only read a run's files share it."""
    return finished(run("whole", scores_path=str(folder / "whole.npz")))


@pytest.fixture(scope="module")
def trained(run):
    return finished(run("trained", phase="train"))


@pytest.fixture(scope="module")
def scored(run, trained):
    """An artifact scored with an environment that has no setting but the places."""
    return finished(run("scored", bare=True, phase="eval", artifact_path=str(trained.artifact)))


@pytest.fixture(scope="module")
def capped(run, tmp_path_factory):
    """A run of a preset, with a cap on scoring that passes as soon as adaptation may stop."""
    presets = tmp_path_factory.mktemp("presets")
    values = {**TINY, **SMALL, "max_eval_seconds": 1e-9, "iterations": 2, "stages": ("mixed",)}
    lines = [f"{name.upper()}={train_gpt.show(value)}" for name, value in values.items()]
    (presets / "tiny.env").write_text("\n".join(lines), encoding="utf-8")
    with mock.patch.object(train_gpt, "CONFIGS", presets):
        return finished(run("capped", bare=True, preset="tiny", val_tokens=1300))


@pytest.fixture(scope="module")
def by_hessian(run):
    """The strongest quantizer and codec, on a few positions."""
    changes = dict(quant="hessian", codec="rans", late_qat_threshold=0.0, crown_q_lambda=0.0, swa_start_scale=0.0)
    return finished(run("by_hessian", val_tokens=500, **changes))


@pytest.fixture(scope="module")
def scored_by_two(start, whole_run):
    """The same for two processes: no setting but the places."""
    few = dict(bare=True, phase="eval", artifact_path=str(whole_run.artifact))
    return finished(start("scored_by_two", processes=2, **few))


@pytest.fixture(scope="module")
def trained_by_two(start):
    changes = dict(stages=("roundtrip",), val_tokens=500, val_loss_every=6)
    return finished(start("trained_by_two", processes=2, **changes))


def matching(run, pattern):
    return [line for line in run.lines if re.fullmatch(pattern, line)]


def only(run, pattern):
    """The groups of the one line that has the pattern."""
    (line,) = matching(run, pattern)
    return re.fullmatch(pattern, line).groups()


# The log


def test_the_log_is_the_output_and_begins_with_every_value_in_force(whole_run):
    c = dataclasses.replace(Config.from_env(whole_run.env), artifact_path=str(whole_run.artifact))
    assert whole_run.lines == whole_run.stdout.splitlines() and whole_run.stderr == ""
    assert whole_run.lines[: len(c.lines())] == c.lines()


def test_the_log_names_machine_and_script(whole_run):
    for pattern in (r"hardware: .*CPU.*", r"versions: \{.*torch.*\}", r"script_sha256:[0-9a-f]{64}"):
        assert len(matching(whole_run, pattern)) == 1, pattern


def test_the_fields_scripts_find_their_lines(whole_run, tiny_data):
    """The forms that readers of the family's logs look for, with the values that they must have."""
    n = len(read_shard(tiny_data / "x_val_000000.bin")) - 1
    assert only(whole_run, r"seed:(\d+)") == ("1337",)
    assert only(whole_run, r"world_size:(\d+) grad_accum_steps:(\d+)") == ("1", "2")
    shards = only(whole_run, r"val_loader:shards pattern=(\S+) tokens:(\d+) documents:(\d+) no manifest: .*")
    assert shards == (f"{tiny_data}/*_val_*.bin", str(n), "16")
    assert only(whole_run, r"train_loader:dataset:(\S+) train_shards:(\d+) .*")[1] == "2"
    total, cap, margin = only(whole_run, r"Total submission size int6\+lzma: (\d+) bytes cap:(\d+) margin:(\d+)")
    assert int(total) == SCRIPT_BYTES + whole_run.artifact.stat().st_size
    assert (int(cap), int(margin)) == (16_000_000, 16_000_000 - int(total))


def test_each_step_that_is_due_has_one_line_in_the_familys_form(whole_run):
    pattern = r"step:(\d+)/12 train_loss:(\d+\.\d{4}) train_time:\d+ms step_avg:\d+\.\d\dms"
    found = [re.fullmatch(pattern, line).groups() for line in matching(whole_run, pattern)]
    assert [int(step) for step, _ in found] == [1, 2, 3, 4, 5, 8, 12]
    assert float(found[0][1]) == pytest.approx(math.log(320), abs=0.1)
    assert float(found[-1][1]) < float(found[0][1]) - 2


def test_the_log_shows_each_part_of_training_begin(whole_run):
    """The last 6 of 12 steps are the warmdown; it falls by a sixth a step."""
    assert only(whole_run, r"crown_q:start step:(\d+)") == ("7",)
    assert only(whole_run, r"swa:start step:(\d+)") == ("9",)
    step, scale, log2_step = only(whole_run, r"late_qat:enabled step:(\d+) scale:(\S+) log2_step:(\S+)")
    assert (step, scale) == ("11", f"{1 / 6:.4f}") and 31 * 2 ** float(log2_step) >= 4 - 1e-3


def test_the_best_of_all_averages_is_chosen(whole_run):
    *losses, chosen = only(whole_run, r"averages: last:(\S+) ema:(\S+) swa:(\S+) ema\+swa:(\S+) chosen:(\S+)")
    losses = dict(zip(("last", "ema", "swa", "ema+swa"), map(float, losses), strict=True))
    assert losses[chosen] == min(losses.values()) and len(set(losses.values())) > 1


def test_parts_of_training_that_are_off_are_not_in_the_log(by_hessian):
    assert not matching(by_hessian, "(crown_q|late_qat|swa):.*")
    assert only(by_hessian, r"averages: last:(\S+) ema:(\S+) chosen:(\S+)")


@pytest.mark.parametrize(
    ("stage", "label"),
    [
        ("roundtrip", "final_int6_roundtrip"),
        ("sliding", "final_int6_sliding_window"),
        ("ttt", "legal_ttt"),
        ("mixed", "mixed"),
    ],
)
@pytest.mark.parametrize("quant", ["int6", "hessian"])
def test_each_stage_has_its_lines_and_they_agree_with_the_record(quant, stage, label, whole_run, by_hessian):
    run, partial = (whole_run, "") if quant == "int6" else (by_hessian, " partial:500_tokens")
    row, label = run.record["stages"][stage], label.replace("int6", quant)
    exact = rf"{label}_exact val_loss:{row['val_loss']:.8f} val_bpb:{row['val_bpb']:.8f} max_sum_error:\S+{partial}"
    assert len(matching(run, exact)) == 1
    line = rf"{label} val_loss:\d+\.\d{{4}} val_bpb:\d+\.\d{{4}} eval_time:\d+ms{partial}"
    assert len(matching(run, line)) == 1


@pytest.mark.parametrize("quant", ["int6+lzma", "hessian+rans"])
def test_the_size_lines_agree_with_the_record_and_the_files(quant, whole_run, by_hessian):
    run = whole_run if quant == "int6+lzma" else by_hessian
    sizes, model_bytes = run.record["artifact"], run.artifact.stat().st_size
    total = SCRIPT_BYTES + model_bytes
    for line in (
        f"Code size: {SCRIPT_BYTES} bytes",
        f"Serialized model {quant}: {model_bytes} bytes",
        f"Total submission size {quant}: {total} bytes cap:16000000 margin:{16_000_000 - total}",
    ):
        assert run.lines.count(line) == 1
    assert Path(sizes["path"]) == run.artifact
    assert (sizes["code_bytes"], sizes["model_bytes"]) == (SCRIPT_BYTES, model_bytes)
    assert sizes["total_bytes"] == total <= sizes["cap_bytes"] == 16_000_000


@pytest.mark.parametrize("quant", ["int6+lzma", "hessian+rans"])
def test_the_parts_of_the_artifact_add_up_to_it(quant, whole_run, by_hessian):
    run = whole_run if quant == "int6+lzma" else by_hessian
    (listed,) = only(run, r"artifact parts: (.*)")
    parts = {name: int(size) for name, size in (part.split(":") for part in listed.split())}
    assert parts == run.record["artifact"]["part_bytes"]
    assert sum(parts.values()) == run.artifact.stat().st_size
    expected = {"header", "scales", "codes", "float16", "mixer"}
    assert expected | ({"rows", "columns", "frequencies"} if quant == "hessian+rans" else set()) <= set(parts)
    header, stored = read_artifact(run.artifact)
    assert {name: len(part) for name, part in stored.items()} == {n: size for n, size in parts.items() if n != "header"}


def test_the_log_ends_with_the_score(whole_run):
    bpb = whole_run.record["val_bpb"]
    assert whole_run.lines[-1] == f"final val_bpb:{bpb:.8f} stage:mixed documents:16 whole stream"


def test_the_log_has_the_loss_before_and_after_quantization(whole_run):
    before, after, gap = map(float, only(whole_run, r"quantization: float:(\S+) stored:(\S+) gap:(\S+)"))
    assert gap == pytest.approx(after - before, abs=2e-5) and abs(gap) < 1e-2  # there is room for the finest steps


def test_hedge_ends_with_a_weight_for_every_expert(whole_run):
    (weights,) = only(whole_run, r"hedge_weights: (.*)")
    weights = {name: float(w) for name, w in (part.split(":") for part in weights.split())}
    assert list(weights) == list(Config().hedge_experts)
    assert sum(weights.values()) == pytest.approx(1, abs=1e-2) and all(0 <= w <= 1 for w in weights.values())


def test_the_log_counts_the_chunks_that_were_adapted_to(whole_run):
    row = whole_run.record["stages"]["mixed"]
    chunks = -(-row["tokens"] // 256)
    assert only(whole_run, r"ttt_chunks:(\d+)/(\d+) .*") == (str(chunks - 1), str(chunks))  # nothing follows the last
    assert (row["adapted_chunks"], row["chunks"], row["ttt_stop"]) == (chunks - 1, chunks, None)


# The record


def test_the_record_has_every_key(whole_run):
    record = whole_run.record
    assert set(record) == {
        *("run_id", "seed", "config", "hardware", "versions", "kernels", "train", "artifact", "stages"),
        *("final_stage", "val_bpb"),
    }
    assert {"steps", "seconds", "tokens", "step_avg_ms", "skipped_steps"} <= set(record["train"])
    assert set(record["train"]["seconds"]) == {"steps", "averaging", "export", "total"}
    assert {"path", "sha256", "code_bytes", "model_bytes", "total_bytes", "cap_bytes"} <= set(record["artifact"])
    assert list(record["stages"]) == list(STAGES)
    common = {"val_loss", "val_bpb", "seconds", "tokens", "bytes", "documents", "whole_stream", "max_sum_error"}
    common |= {"has_manifest"}
    for stage, row in record["stages"].items():
        adapts = {"adapted_chunks", "chunks", "ttt_stop"} if stage in ("ttt", "mixed") else set()
        assert set(row) == common | adapts


def test_the_record_names_the_run(whole_run):
    record = whole_run.record
    c = dataclasses.replace(Config.from_env(whole_run.env), artifact_path=str(whole_run.artifact))
    assert record["run_id"] == "whole" and record["seed"] == c.seed
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in record["config"].items()} == dataclasses.asdict(c)
    assert record["train"]["steps"] == 12 and record["train"]["tokens"] == 12 * 1024
    assert set(record["versions"]) == {"python", "torch", "numpy", "sentencepiece"}


def test_every_stage_scored_the_same_whole_text_with_distributions(whole_run, tiny_data):
    n = len(read_shard(tiny_data / "x_val_000000.bin")) - 1
    rows = whole_run.record["stages"].values()
    assert {(row["tokens"], row["documents"], row["whole_stream"]) for row in rows} == {(n, 16, True)}
    assert len({row["bytes"] for row in rows}) == 1
    assert all(row["max_sum_error"] < 1e-6 for row in rows)
    assert whole_run.record["final_stage"] == "mixed"
    assert whole_run.record["val_bpb"] == whole_run.record["stages"]["mixed"]["val_bpb"]


def test_loss_and_bpb_are_one_number_in_two_units(whole_run):
    for row in whole_run.record["stages"].values():
        assert row["val_bpb"] == pytest.approx(row["val_loss"] * row["tokens"] / row["bytes"] / math.log(2), rel=1e-12)


def test_adaptation_helps_and_counts_help_more(whole_run):
    """On a stream of regular text and a model of twelve steps, far beyond any chance."""
    bpb = {stage: row["val_bpb"] for stage, row in whole_run.record["stages"].items()}
    assert bpb["ttt"] < bpb["roundtrip"] - 0.01 and bpb["mixed"] < bpb["ttt"] - 0.5


# The size


@pytest.mark.parametrize("codec", ["lzma", "rans"])
@pytest.mark.parametrize("quant", ["int6", "hessian"])
@pytest.mark.slow
def test_script_and_artifact_take_the_size_that_was_asked_for(run, quant, codec):
    """Never more, and little less: the fit stops within 0.2 % or after its last attempt."""
    changes = dict(target_bytes=SCRIPT_BYTES + 18_000, quant=quant, codec=codec, late_qat_threshold=0.0)
    sized = finished(run(f"sized_{quant}_{codec}", phase="train", iterations=2, **changes))
    assert 0.98 * 18_000 <= sized.artifact.stat().st_size <= 18_000
    assert not matching(sized, "OVER.*")


def test_a_model_over_the_target_is_written_and_named_and_not_lost(run):
    """At the coarsest steps the codes fit, and what stands beside them does not."""
    target = SCRIPT_BYTES + 5_000
    changes = dict(target_bytes=target, quant_bits=5, stages=("roundtrip",), val_tokens=64)
    over = finished(run("over", iterations=2, **changes))
    excess = over.artifact.stat().st_size - 5_000
    assert excess > 0
    assert over.lines.count(f"OVER TARGET_BYTES={target} by {excess} bytes: {over.artifact}") == 1
    assert over.record["artifact"]["total_bytes"] == target + excess
    assert len(matching(over, r"final_int5_roundtrip_exact val_loss:\d.*")) == 1  # the label has the bits


# Per-token scores


def test_the_score_is_the_sum_of_the_tokens_scores(whole_run, folder):
    scores = np.load(folder / "whole.npz")
    bpb = scores["nll_nats"].sum() / math.log(2) / scores["bytes"].sum()
    assert bpb == pytest.approx(whole_run.record["val_bpb"], rel=1e-12)
    assert (scores["nll_nats"] > 0).all() and (scores["bytes"] >= 0).all()


def test_the_scored_tokens_and_bytes_are_the_texts(whole_run, folder, tiny_data):
    scores = np.load(folder / "whole.npz")
    stream = read_shard(tiny_data / "x_val_000000.bin").tolist()
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tiny_data / "tokenizer.model"))
    starts = [i for i, token in enumerate(stream) if token == 1] + [len(stream)]
    texts = [sp.decode(stream[a + 1 : b]) for a, b in zip(starts, starts[1:], strict=False)]
    assert scores["token"].tolist() == stream[1:]
    assert scores["bytes"].sum() == sum(len(text.encode("utf-8")) for text in texts)
    assert scores["bytes"].sum() == whole_run.record["stages"]["mixed"]["bytes"]


def test_scores_may_go_to_a_folder_that_does_not_exist_yet(run, whole_run, tmp_path):
    path = tmp_path / "new" / "scores.npz"
    few = dict(phase="eval", artifact_path=str(whole_run.artifact), stages=("roundtrip",), val_tokens=64)
    finished(run("new_folder", scores_path=str(path), **few))
    assert len(np.load(path)["token"]) == 64


# One seed, one result; one artifact, one score


@pytest.mark.slow
def test_two_runs_of_one_seed_write_the_same_artifact(whole_run, trained):
    assert whole_run.artifact.read_bytes() == trained.artifact.read_bytes()


def test_training_and_scoring_apart_give_the_score_of_both(whole_run, scored):
    """The scoring settings travel in the artifact: the environment of `scored` has none."""
    assert scored.record["val_bpb"] == whole_run.record["val_bpb"]
    for stage, row in whole_run.record["stages"].items():
        found = scored.record["stages"][stage]
        assert (found["val_loss"], found["val_bpb"]) == (row["val_loss"], row["val_bpb"])


def test_an_artifact_of_the_other_quantizer_and_codec_is_scored_without_settings_too(run, by_hessian):
    few = dict(bare=True, phase="eval", artifact_path=str(by_hessian.artifact), stages=("roundtrip",), val_tokens=500)
    again = finished(run("by_hessian_again", **few)).record
    assert again["stages"]["roundtrip"]["val_bpb"] == by_hessian.record["stages"]["roundtrip"]["val_bpb"]


def test_each_phase_records_its_own_part_only(trained, scored):
    assert trained.record["stages"] == {} and trained.record["val_bpb"] is None
    assert scored.record["train"] is None and not scored.artifact.exists()
    assert scored.record["artifact"]["path"] == str(trained.artifact)


def test_a_scoring_setting_of_the_environment_replaces_the_artifacts(run, whole_run):
    few = dict(bare=True, phase="eval", artifact_path=str(whole_run.artifact), val_tokens=600, stages=("ttt",))
    own, other = (
        finished(run(f"ttt_lr{i}", extra=extra, **few)).record for i, extra in enumerate(({}, {"TTT_LR": "0.5"}))
    )
    assert (own["config"]["ttt_lr"], other["config"]["ttt_lr"]) == (0.002, 0.5)
    assert own["val_bpb"] != other["val_bpb"]


@pytest.mark.slow
def test_the_cap_on_scoring_stops_adaptation_and_the_log_names_the_chunk(capped):
    row = capped.record["stages"]["mixed"]
    assert (row["adapted_chunks"], row["chunks"], row["ttt_stop"]) == (3, 6, 3)
    assert len(matching(capped, r"ttt_stop: after 3 chunks, with 2 chunks left to score")) == 1
    assert capped.lines[-1].endswith("adaptation CUT by MAX_EVAL_SECONDS after 3 of 6 chunks")


def test_the_cap_on_scoring_travels_in_the_artifact(run, capped):
    """Scored without the preset, the artifact has the number of its own run. Without a cap it has another one."""
    few = dict(bare=True, phase="eval", artifact_path=str(capped.artifact), stages=("mixed",), val_tokens=1300)
    own = finished(run("capped_again", **few)).record
    assert own["config"]["max_eval_seconds"] == 1e-9 and own["config"]["preset"] == ""
    assert own["val_bpb"] == capped.record["val_bpb"]
    assert own["stages"]["mixed"]["ttt_stop"] == 3
    free = finished(run("capped_no_more", extra={"MAX_EVAL_SECONDS": "0"}, **few)).record
    assert free["stages"]["mixed"]["adapted_chunks"] == 5 and free["val_bpb"] != own["val_bpb"]


@pytest.mark.slow
def test_the_cap_on_scoring_is_the_same_for_two_processes(start, capped):
    few = dict(bare=True, phase="eval", artifact_path=str(capped.artifact), stages=("mixed",), val_tokens=1300)
    record = finished(start("capped_by_two", processes=2, **few)).record
    assert record["val_bpb"] == pytest.approx(capped.record["val_bpb"], abs=1e-6)
    assert record["stages"]["mixed"]["ttt_stop"] == 3


@pytest.mark.slow
def test_the_script_started_as_a_program_gives_the_same_numbers(start, whole_run):
    """It fits the mixer in more steps than `run` does; nothing before the mixer depends on that."""
    alone = finished(start("alone", stages=("roundtrip", "ttt")))
    assert alone.lines == alone.stdout.splitlines()
    for stage in ("roundtrip", "ttt"):
        assert alone.record["stages"][stage]["val_loss"] == whole_run.record["stages"][stage]["val_loss"]
    own, other = (read_artifact(run.artifact)[1] for run in (alone, whole_run))
    assert {part for part in own if own[part] != other[part]} == {"mixer"}


@pytest.mark.slow
def test_two_processes_score_as_one_does(whole_run, scored_by_two):
    assert only(scored_by_two, r"world_size:(\d+) .*") == ("2",)
    for stage, row in whole_run.record["stages"].items():
        found = scored_by_two.record["stages"][stage]
        assert found["val_bpb"] == pytest.approx(row["val_bpb"], abs=1e-6), stage
        assert (found["tokens"], found["bytes"]) == (row["tokens"], row["bytes"])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_ranks_score_as_one_does_in_bfloat16_too(optimizer, whole_run, tiny_config):
    """A gradient is rounded to bfloat16 once a backward pass: what a pass covers must not depend on the ranks.

    What is left is the order in which float32 gradients are added: it can tip a weight to the other bfloat16 neighbour.
    """
    header, parts = read_artifact(whole_run.artifact)
    c = train_gpt.with_artifact(tiny_config(val_tokens=600), header, {})
    rate, allowed = (0.02, 5e-5) if optimizer == "sgd" else (0.0005, 2e-4)  # AdamW moves a weight by its rate alone
    c = dataclasses.replace(c, dtype="bfloat16", ttt_optimizer=optimizer, ttt_lr=rate, ttt_micro_tokens=32)
    tokenizer = Tokenizer(c)

    def bpb(dist):
        model, net = train_gpt.unpack(parts, c, dist.device)
        predictor = train_gpt.make_predictor("ttt", model, net, c, dist, tokenizer)
        stream = Stream(c, dist.device, tokenizer)
        return train_gpt.score(predictor, stream, c.ttt_chunk_tokens, dist)["ttt"].val_bpb

    assert on_ranks(2, bpb) == pytest.approx([bpb(Dist())] * 2, abs=allowed)


@pytest.mark.slow
def test_a_process_without_a_sequence_takes_part(start):
    """One sequence a step on two processes, and one on which the Hessians are measured."""
    changes = dict(train_batch_tokens=32, gptq_tokens=32, phase="train", iterations=2)
    assert finished(start("idle", processes=2, **changes)).record["train"]["tokens"] == 64


@pytest.mark.slow
def test_two_processes_train_and_log_once(trained_by_two):
    steps = [line.split("/")[0] for line in trained_by_two.lines if re.match(r"step:\d+/12 train_loss", line)]
    assert steps == [f"step:{n}" for n in (1, 2, 3, 4, 5, 8, 12)]
    assert trained_by_two.lines.count("RUN_ID=trained_by_two") == 1
    assert trained_by_two.lines == trained_by_two.stdout.splitlines()
    assert trained_by_two.record["train"]["tokens"] == 12 * 1024
    assert only(trained_by_two, r"world_size:(\d+) grad_accum_steps:(\d+)") == ("2", "1")


@pytest.mark.slow
def test_two_processes_see_the_losses_that_one_sees(whole_run, trained_by_two):
    """But for rounding, which differs between a sum over one and over two ranks."""

    def losses(run):
        return [float(x) for x in re.findall(r"^step:.* train_loss:(\S+)", "\n".join(run.lines), re.MULTILINE)]

    assert losses(trained_by_two) == pytest.approx(losses(whole_run), abs=2e-3)


@pytest.mark.slow
def test_validation_during_training_is_logged(trained_by_two):
    pattern = r"step:(6|12)/12 val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms"
    assert len(matching(trained_by_two, pattern)) == 2


def test_a_score_of_part_of_the_stream_is_named_so_wherever_it_stands(by_hessian):
    row = by_hessian.record["stages"]["mixed"]
    assert row["tokens"] == 500 and row["whole_stream"] is False
    assert len(matching(by_hessian, r"val_loader:.* tokens:500 .* partial: the stream goes on no manifest.*")) == 1
    lines = matching(by_hessian, r"(final_hessian_\w+|legal_ttt|mixed)(_exact)? val_loss.*")
    assert len(lines) == 8 and all(line.endswith(" partial:500_tokens") for line in lines)
    assert by_hessian.lines[-1].endswith("PARTIAL stream")


# Bad input


def assert_refused(run, *named):
    """Exit status 2 and exactly one line on standard error."""
    assert run.status == 2, run.stderr
    lines = run.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), run.stderr
    assert all(part in lines[0] for part in named), lines[0]


def assert_wrote_nothing(run):
    assert run.stdout == "" and run.lines == [] and run.record is None and not run.artifact.exists()


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (dict(ITERATIONS="many"), ["ITERATIONS='many'", "a whole number"]),
        (dict(WARMDOWN_ITER="9"), ["WARMDOWN_ITER", "did you mean WARMDOWN_ITERS?"]),
        (dict(TTT_ENABLED="1"), ["TTT_ENABLED=1", "did you mean TTT_CHUNK_TOKENS, "]),
        (dict(PRESET="smoke,huge"), ["PRESET='huge'", "best, cpu"]),
        (dict(DATA_PATH="/no/such/folder"), ["DATA_PATH=/no/such/folder"]),
        (dict(PHASE="eval", ARTIFACT_PATH="/no/such/file"), ["ARTIFACT_PATH=/no/such/file"]),
    ],
    ids=["value", "near", "family", "preset", "data", "artifact"],
)
def test_bad_input_is_refused_in_one_line_before_anything_is_written(extra, named, run):
    refused = run("refused", extra=extra)
    assert_refused(refused, *named)
    assert_wrote_nothing(refused)


@pytest.mark.slow
def test_the_program_itself_ends_with_one_line_and_status_2(start):
    refused = start("refused_program", extra=dict(ITERATIONS="many"))
    assert_refused(refused, "ITERATIONS='many'", "a whole number")
    assert_wrote_nothing(refused)


def test_a_size_that_holds_no_model_is_refused_before_any_training(run):
    refused = run("no_room", target_bytes=1000)
    assert_refused(refused, "TARGET_BYTES=1000 is too small", "need at least")
    assert not matching(refused, "(warmup_step|step):.*") and refused.record is None and not refused.artifact.exists()


def test_missing_shards_are_refused(run, tmp_path, tiny_tokenizer):
    refused = run("nothing", data_path=str(tmp_path), tokenizer_path=str(tiny_tokenizer))
    assert_refused(refused, f"DATA_PATH={tmp_path}", "no shard")


def test_a_truncated_artifact_is_refused(run, whole_run, tmp_path):
    path = tmp_path / "half.artifact"
    path.write_bytes(whole_run.artifact.read_bytes()[:-100])
    refused = run("half", phase="eval", artifact_path=str(path))
    assert_refused(refused, f"ARTIFACT_PATH={path}", "truncated")
    assert_wrote_nothing(refused)


def test_a_run_that_exists_is_refused_and_left_as_it_is(run, whole_run, folder):
    paths = sorted(folder.glob("whole.*"))
    before = [path.read_bytes() for path in paths]
    assert_refused(run("whole"), "RUN_ID=whole", "would be overwritten")
    assert len(paths) == 4 and [path.read_bytes() for path in paths] == before


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_no_artifact(run):
    refused = run("diverged", matrix_lr=1e15)
    assert_refused(refused, "train_loss=nan", "MATRIX_LR=1000000000000000.0", "SCALAR_LR=")
    assert refused.record is None and not refused.artifact.exists()


def test_the_record_of_training_is_there_before_scoring_begins(run, monkeypatch):
    def ended(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_gpt, "evaluate", ended)
    refused = run("ended")
    assert_refused(refused, "interrupted")
    record = refused.record
    assert record["train"]["steps"] == TINY["iterations"] and record["val_bpb"] is None and record["stages"] == {}
    assert record["artifact"]["sha256"] == read_artifact(refused.artifact)[0]["sha256"]


def test_an_artifact_that_cannot_be_written_is_kept_elsewhere(run, monkeypatch, tmp_path):
    replace = os.replace

    def full(source, target):
        if str(target).endswith(".artifact"):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    refused = run("full", phase="train")
    assert_refused(refused, "full.artifact cannot be written (No space left on device): a copy is kept in ")
    assert read_artifact(refused.stderr.split()[-1]) and not refused.artifact.exists() and refused.lines


def test_the_data_may_vanish_once_training_has_begun(run, tiny_data, tmp_path, monkeypatch):
    """The shards are open, and what scoring needs is in memory."""
    folder = shutil.copytree(tiny_data, tmp_path / "data")
    choose = train_gpt.choose_average

    def vanish(*arguments):
        shutil.rmtree(folder)
        choose(*arguments)

    monkeypatch.setattr(train_gpt, "choose_average", vanish)
    found = finished(run("vanished", data_path=str(folder), stages=("roundtrip",)))
    assert not folder.exists() and found.record["val_bpb"] > 0


def test_a_run_that_is_refused_leaves_no_file_of_its_own(run, folder, tmp_path, monkeypatch):
    """Its log and its record were free; the artifact's name was taken in between."""
    taken, exists = tmp_path / "x.artifact", Path.exists
    taken.write_bytes(b"another run's")
    monkeypatch.setattr(Path, "exists", lambda path: path != taken and exists(path))
    refused = run("second", artifact_path=str(taken))
    assert_refused(refused, f"{taken}: allowed is a folder that can be written", "File exists")
    assert taken.read_bytes() == b"another run's" and not list(folder.glob("second.*"))


@pytest.mark.slow
def test_of_two_runs_of_one_name_one_is_refused(settings, folder):
    env = settings("twice", phase="train", iterations=2)
    both = [
        subprocess.Popen([sys.executable, str(SCRIPT)], env=env, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = [process.communicate(timeout=600)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], said
    assert "RUN_ID=twice" in "".join(said) or "File exists" in "".join(said)
    assert read_artifact(folder / "twice.artifact")


@pytest.mark.parametrize(
    "left",
    [dict(RANK="0", WORLD_SIZE="2"), dict(RANK="abc"), dict(WORLD_SIZE="0"), dict(RANK="3", WORLD_SIZE="2")],
    ids=str,
)
def test_what_torchrun_left_in_the_environment_is_named(run, left, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # other ranks than the first wait before they say it
    names = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    assert_refused(run("left", extra=names | left), "RANK, WORLD_SIZE, LOCAL_RANK: allowed are those of torchrun")


@pytest.mark.slow
def test_a_closed_screen_ends_no_run(settings, folder):
    env = settings("closed", phase="train", iterations=2)
    process = subprocess.Popen([sys.executable, str(SCRIPT)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    said = process.stderr.read().decode()
    assert process.wait(600) == 0 and said == ""
    assert read_artifact(folder / "closed.artifact") and "train_seconds" in (folder / "closed.txt").read_text()


@pytest.mark.slow
def test_no_rank_outlives_torchrun(settings, folder):
    """SIGKILL leaves torchrun no time to end its ranks."""
    env = settings("orphans", iterations=10**6)
    process = subprocess.Popen([sys.executable, *TORCHRUN, str(SCRIPT)], env=env, stdout=subprocess.DEVNULL)
    log, deadline = folder / "orphans.txt", time.monotonic() + 300
    while "step:2/" not in (log.read_text() if log.is_file() else "") and time.monotonic() < deadline:
        time.sleep(0.1)
    ranks = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.kill()
    process.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in ranks) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(ranks) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in ranks)


def test_another_model_than_the_artifacts_is_refused(run, whole_run):
    refused = run("other", phase="eval", artifact_path=str(whole_run.artifact), num_layers=3)
    assert_refused(refused, "NUM_LAYERS=3", "has 2")
    assert_wrote_nothing(refused)


def test_another_tokenizer_than_the_artifacts_is_refused(run, whole_run, tmp_path):
    """It has as many pieces and the same BOS; its pieces are others."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{a}{b}{c}{d} " * 9 for a in "abcd" for b in "efgh" for c in "ijkl" for d in "mnop"))
    options = dict(vocab_size=320, byte_fallback=True, model_type="bpe", pad_id=0, bos_id=1, eos_id=2, unk_id=3)
    prefix = str(tmp_path / "other")
    sentencepiece.SentencePieceTrainer.train(input=str(text), model_prefix=prefix, minloglevel=2, **options)
    few = dict(bare=True, phase="eval", artifact_path=str(whole_run.artifact))
    assert_refused(run("foreign", tokenizer_path=f"{prefix}.model", **few), "ARTIFACT_PATH=", "sha256")


@pytest.mark.slow
def test_bad_data_that_only_the_other_process_meets_is_named_as_well(
    start, tmp_path, tiny_data, tiny_config, write_shard
):
    """Of a step's two sequences each process reads one; the bad token is in the second process's."""
    shutil.copytree(tiny_data, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.glob("x_train_*.bin"):
        path.unlink()
    write_shard(tmp_path / "x_train_0.bin", range(65))
    c = tiny_config(tmp_path, train_batch_tokens=64)
    tokens = np.full(65, 5)
    tokens[int(TrainLoader(c, Dist()).batch(0)[1, 1])] = 999
    write_shard(tmp_path / "x_train_0.bin", tokens)
    refused = start("elsewhere", 2, data_path=str(tmp_path), train_batch_tokens=64, complement_alpha=0.0)
    assert refused.status != 0 and refused.record is None
    assert any(re.match(r"error: .*token id 999", line) for line in refused.stderr.splitlines()), refused.stderr[-300:]


@pytest.mark.slow
def test_no_graph_is_compiled_once_a_clock_runs(run, monkeypatch):
    """Each takes half a minute on a GPU."""
    torch._dynamo.reset()
    graphs, phases = Counter(), ["start"]

    def backend(module, inputs):
        graphs[phases[-1]] += 1
        return module

    def phase(name, function, *arguments):
        phases.append(name)
        try:
            return function(*arguments)
        finally:
            phases.pop()

    for name in ("choose_kernels", "warm_up", "compile_ahead", "train", "choose_average", "export", "evaluate"):
        monkeypatch.setattr(train_gpt, name, functools.partial(phase, name, getattr(train_gpt, name)))
    compiled = functools.partial(torch.compile, backend=backend, dynamic=False, fullgraph=True)
    monkeypatch.setattr(train_gpt, "compiles", lambda c, device: True)
    monkeypatch.setattr(train_gpt, "compiled", lambda function, c, device: compiled(function))
    finished(run("graphs", iterations=2, warmup_steps=1, late_qat_threshold=1.0))
    assert graphs.pop("choose_kernels") == 1
    # The step; held-out losses, whose last micro batch is shorter here; windows that score all or a stride; adaptation.
    assert graphs == dict(warm_up=1, compile_ahead=2 + 2 + 1)


# --- stop and go on ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(run):
    """An uninterrupted training that leaves a checkpoint after step 5 and, later, 10."""
    return finished(run("unbroken", phase="train", checkpoint_every=5))


@pytest.mark.parametrize("every", [5, 7, 11], ids=["before the warmdown's end", "in SWA", "in late QAT"])
def test_a_run_that_goes_on_ends_as_one_that_never_stopped(run, unbroken, folder, every):
    """With the same bytes, from a checkpoint after each kind of step."""
    finished(run(f"until{every}", phase="train", checkpoint_every=every))
    resumed = finished(run(f"from{every}", phase="train", resume=str(folder / f"until{every}")))
    assert resumed.artifact.read_bytes() == unbroken.artifact.read_bytes()
    assert not any(line.startswith("step:1/") for line in resumed.lines)
    assert resumed.record["train"]["steps"] == unbroken.record["train"]["steps"]


def test_a_checkpoint_can_be_packed_as_it_is(run, unbroken, folder):
    packed = finished(run("packed", phase="train", resume=str(folder / "unbroken"), iterations=1))
    assert packed.record["train"]["steps"] == 10 and packed.artifact.read_bytes() != unbroken.artifact.read_bytes()


@pytest.mark.slow
def test_two_ranks_go_on_together_and_not_as_one(start, run, folder):
    settings = dict(phase="train", checkpoint_every=7)
    whole = finished(start("pair", 2, **settings))
    resumed = finished(start("pair2", 2, phase="train", resume=str(folder / "pair")))
    assert resumed.artifact.read_bytes() == whole.artifact.read_bytes()
    assert_refused(run("one_of_pair", phase="train", resume=str(folder / "pair")), "step 7 of 2 ranks", "of 1 ranks")


def test_what_is_no_checkpoint_of_such_a_model_is_refused(run, unbroken, folder):
    assert_refused(run("r1", resume=str(folder / "nowhere")), "RESUME=", "nowhere.0.checkpoint", "is no checkpoint")
    assert_refused(run("r2", resume=str(folder / "unbroken"), model_dim=64), "is no checkpoint of such a model")
    (folder / "text.0.checkpoint").write_text("nothing")
    assert_refused(run("r3", resume=str(folder / "text")), "text.0.checkpoint is no checkpoint")
    scored = run("r4", phase="eval", artifact_path=str(unbroken.artifact), resume=str(folder / "unbroken"))
    assert_refused(scored, "RESUME=", "none with PHASE=eval")


@pytest.mark.slow
@pytest.mark.parametrize(
    "line, number, long",
    [
        ("warmup_step:1/", "SIGTERM", dict(warmup_steps=10**6)),
        ("step:2/", "SIGTERM", dict(iterations=10**6)),
        ("step:2/", "SIGINT", dict(iterations=10**6)),
        ("averages:", "SIGTERM", dict(gptq_tokens=10**6)),
        ("final_int6_sliding_window", "SIGTERM", dict(ttt_epochs=1000)),
    ],
    ids=["warm-up", "training", "training, by hand", "export", "scoring"],
)
def test_a_signal_ends_a_run_within_seconds(settings, folder, line, number, long, request):
    run_id = f"signal{request.node.callspec.id}".replace(" ", "_")
    command, env = [sys.executable, str(SCRIPT)], settings(run_id, **long)
    with subprocess.Popen(command, env=env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as p:
        assert any(text.startswith(line) for text in p.stdout)
        p.send_signal(signal.Signals[number])
        _, stderr = p.communicate(timeout=30)
    assert p.returncode == 128 + signal.Signals[number] and stderr == f"error: interrupted by {number}\n"
    assert (folder / f"{run_id}.txt").read_text().endswith(f"interrupted by {number}\n")
