"""The script as it is started: what it writes, that a seed decides a run, and what bad input costs."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece

import train_gpt
from train_gpt import STAGES, Config, Run, TrainLoader, read_shard

SCRIPT = Path(train_gpt.__file__).resolve()
# Larger batches than the other tests': the choice of an average reads 65,536 tokens whatever the batch.
FEW_CALLS = dict(train_batch_tokens=1024, micro_batch_tokens=1024)
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def start(folder, tiny_env):
    """start(run_id, processes=1, extra={}, without=(), **settings) -> the finished process, its log and its record."""

    def start(run_id, processes=1, extra=None, without=(), **overrides):
        env = tiny_env(**{**FEW_CALLS, "run_id": run_id, "log_dir": str(folder), **overrides})
        env = {name: value for name, value in env.items() if name not in without} | (extra or {})
        command = [sys.executable, *(TORCHRUN if processes == 2 else []), str(SCRIPT)]
        done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=300)
        log, record = folder / f"{run_id}.txt", folder / f"{run_id}.json"
        return SimpleNamespace(
            env=env,
            status=done.returncode,
            stdout=done.stdout,
            stderr=done.stderr,
            lines=log.read_text(encoding="utf-8").splitlines() if log.is_file() else [],
            record=json.loads(record.read_text()) if record.is_file() else None,
            artifact=folder / f"{run_id}.artifact",
        )

    return start


def finished(run):
    assert run.status == 0, run.stderr
    return run


@pytest.fixture(scope="module")
def whole_run(start, folder):
    """Train, pack and score; the tests that only read a run's files share it."""
    return finished(start("whole", scores_path=str(folder / "whole.npz")))


@pytest.fixture(scope="module")
def trained(start):
    return finished(start("trained", phase="train"))


@pytest.fixture(scope="module")
def scored(start, trained):
    return finished(start("scored", phase="eval", artifact_path=str(trained.artifact)))


@pytest.fixture(scope="module")
def scored_by_two(start, whole_run):
    return finished(start("scored_by_two", processes=2, phase="eval", artifact_path=str(whole_run.artifact)))


@pytest.fixture(scope="module")
def trained_by_two(start):
    changes = dict(stages=("roundtrip",), val_tokens=500, val_loss_every=6)
    return finished(start("trained_by_two", processes=2, **changes))


def matching(run, pattern):
    return [line for line in run.lines if re.fullmatch(pattern, line)]


# The log


def test_the_log_is_what_was_printed_and_begins_with_every_value_in_force(whole_run):
    c = Config.from_env(whole_run.env)
    assert whole_run.lines == whole_run.stdout.splitlines()
    assert whole_run.lines[: len(c.lines())] == c.lines()


def test_the_log_says_what_it_ran_on(whole_run):
    for pattern in (
        r"hardware: .*CPU.*",
        r"versions: \{.*torch.*\}",
        r"script_sha256:[0-9a-f]{64}",
        r"world_size:1 .*",
    ):
        assert len(matching(whole_run, pattern)) == 1, pattern
    assert matching(whole_run, r"val_loader:\S+ tokens:\d+ documents:16")


def test_each_step_that_is_due_has_one_line_in_the_communitys_form(whole_run):
    pattern = r"step:(\d+)/12 train_loss:(\d+\.\d{4}) train_time:\d+ms step_avg:\d+\.\d\dms"
    found = [re.fullmatch(pattern, line).groups() for line in matching(whole_run, pattern)]
    assert [int(step) for step, _ in found] == [1, 2, 3, 4, 5, 8, 12]
    assert float(found[0][1]) == pytest.approx(math.log(320), abs=0.1)
    assert float(found[-1][1]) < float(found[0][1])


@pytest.mark.parametrize(
    ("stage", "label"),
    [
        ("roundtrip", "final_int6_roundtrip"),
        ("sliding", "final_int6_sliding_window"),
        ("ttt", "legal_ttt"),
        ("mixed", "mixed"),
    ],
)
def test_each_stage_has_its_lines_and_they_agree_with_the_record(whole_run, stage, label):
    row = whole_run.record["stages"][stage]
    exact = rf"{label}_exact val_loss:{row['val_loss']:.8f} val_bpb:{row['val_bpb']:.8f} max_sum_error:\S+"
    assert len(matching(whole_run, exact)) == 1
    assert len(matching(whole_run, rf"{label} val_loss:\d+\.\d{{4}} val_bpb:\d+\.\d{{4}} eval_time:\d+ms")) == 1


def test_the_size_lines_agree_with_the_record(whole_run):
    sizes = whole_run.record["artifact"]
    for line in (
        f"Code size: {sizes['code_bytes']} bytes ({train_gpt.minified_bytes()} if it were minified and compressed)",
        f"Serialized model range: {sizes['model_bytes']} bytes",
        f"Total submission size range: {sizes['total_bytes']} bytes cap:16000000 "
        f"margin:{16_000_000 - sizes['total_bytes']}",
    ):
        assert whole_run.lines.count(line) == 1


def test_the_last_line_is_the_score(whole_run):
    bpb = whole_run.record["val_bpb"]
    assert whole_run.lines[-1] == f"final val_bpb:{bpb:.8f} stage:mixed documents:16 whole stream"


def test_the_log_says_what_storing_costs_in_nats(whole_run):
    pattern = r"quantization: float:(\S+) stored:(\S+) gap:(\S+)"
    (line,) = matching(whole_run, pattern)
    before, after, gap = map(float, re.fullmatch(pattern, line).groups())
    assert gap == pytest.approx(after - before, abs=2e-5) and abs(gap) < 1e-3  # there is room for every class's last


# The record


def test_the_record_has_every_key(whole_run):
    record = whole_run.record
    assert set(record) == {
        *("run_id", "seed", "config", "hardware", "versions", "kernels", "train", "artifact", "stages"),
        *("final_stage", "val_bpb"),
    }
    assert {"steps", "seconds", "tokens", "step_avg_ms"} <= set(record["train"])
    assert {"path", "code_bytes", "model_bytes", "total_bytes", "cap_bytes"} <= set(record["artifact"])
    assert list(record["stages"]) == list(STAGES)
    for row in record["stages"].values():
        assert set(row) == {
            *("val_loss", "val_bpb", "seconds", "tokens", "bytes", "documents", "whole_stream", "max_sum_error"),
            "ttt_epochs",
        }


def test_the_record_says_what_was_run(whole_run):
    record, c = whole_run.record, Config.from_env(whole_run.env)
    assert record["run_id"] == "whole" and record["seed"] == c.seed
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in record["config"].items()} == dataclasses.asdict(c)
    assert record["train"]["steps"] == 12 and record["train"]["tokens"] == 12 * 1024
    assert set(record["versions"]) == {"python", "torch", "numpy", "sentencepiece"}


def test_the_record_counts_the_files_that_lie_there(whole_run):
    sizes = whole_run.record["artifact"]
    assert Path(sizes["path"]) == whole_run.artifact
    assert sizes["model_bytes"] == whole_run.artifact.stat().st_size
    assert sizes["code_bytes"] == SCRIPT.stat().st_size
    assert sizes["total_bytes"] == sizes["code_bytes"] + sizes["model_bytes"] <= sizes["cap_bytes"] == 16_000_000


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


@pytest.mark.parametrize("codec", ["range", "lzma"])
def test_script_and_artifact_take_the_size_that_was_asked_for(start, codec):
    """Never more, and less by what `fill` may leave and what it keeps for the mixer's numbers."""
    target = SCRIPT.stat().st_size + 24_000
    run = finished(start(f"sized_{codec}", phase="train", iterations=2, target_bytes=target, codec=codec))
    assert 0.98 * 24_000 <= run.artifact.stat().st_size <= 24_000


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


def test_scores_may_go_to_a_folder_that_does_not_exist_yet(start, whole_run, tmp_path):
    path = tmp_path / "new" / "scores.npz"
    few = dict(phase="eval", artifact_path=str(whole_run.artifact), stages=("roundtrip",), val_tokens=64)
    finished(start("new_folder", scores_path=str(path), **few))
    assert len(np.load(path)["token"]) == 64


# One seed, one result


def test_two_runs_of_one_seed_write_the_same_artifact(whole_run, trained):
    assert whole_run.artifact.read_bytes() == trained.artifact.read_bytes()


def test_training_and_scoring_apart_give_the_score_of_both(whole_run, scored):
    assert scored.record["val_bpb"] == whole_run.record["val_bpb"]
    for stage, row in whole_run.record["stages"].items():
        got = scored.record["stages"][stage]
        assert (got["val_loss"], got["val_bpb"]) == (row["val_loss"], row["val_bpb"])


def test_each_phase_records_its_own_part_only(trained, scored):
    assert trained.record["stages"] == {} and trained.record["val_bpb"] is None
    assert scored.record["train"] is None and not scored.artifact.exists()
    assert scored.record["artifact"]["path"] == str(trained.artifact)


def test_two_processes_score_as_one_does(whole_run, scored_by_two):
    assert matching(scored_by_two, r"world_size:2 .*")
    for stage, row in whole_run.record["stages"].items():
        got = scored_by_two.record["stages"][stage]
        assert got["val_bpb"] == pytest.approx(row["val_bpb"], abs=1e-6), stage
        assert (got["tokens"], got["bytes"]) == (row["tokens"], row["bytes"])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_two_processes_score_as_one_does_in_bfloat16_too(start, whole_run, optimizer):
    """A gradient is rounded to bfloat16 once a backward pass, so what a pass covers must not depend on the ranks.

    What is left is the order in which float32 gradients are added: it can tip a weight to the other bfloat16 neighbour.
    """
    changes = dict(phase="eval", artifact_path=str(whole_run.artifact), dtype="bfloat16", stages=("ttt",))
    changes |= dict(ttt_micro_tokens=32, ttt_optimizer=optimizer, ttt_lr=0.02 if optimizer == "sgd" else 0.002)
    one, two = (finished(start(f"bf16_{optimizer}_{n}", processes=n, **changes)) for n in (1, 2))
    assert one.record["val_bpb"] == pytest.approx(two.record["val_bpb"], abs=5e-5)


def test_a_process_without_a_sequence_takes_part(start):
    """One sequence a step on two processes, and one to measure what errors in weights cost."""
    changes = dict(train_batch_tokens=32, gptq_tokens=32, phase="train", iterations=2)
    assert finished(start("idle", processes=2, **changes)).record["train"]["tokens"] == 64


def test_an_artifact_is_scored_as_it_was_packed_unless_told_otherwise(start, whole_run, tiny_env):
    """The scoring settings travel in the file: with an environment that names none of them the score is the same."""
    kept = [name.upper() for name in (*Config().marked("score"), "train_batch_tokens")]
    plain = start("as_packed", without=kept, phase="eval", artifact_path=str(whole_run.artifact), stages=("mixed",))
    assert finished(plain).record["val_bpb"] == whole_run.record["val_bpb"]
    other = start("other_lr", without=kept, extra={"TTT_LR": "0.5"}, phase="eval", val_tokens=600,
                  artifact_path=str(whole_run.artifact), stages=("ttt",))  # fmt: skip
    assert finished(other).record["config"]["ttt_lr"] == 0.5


def test_two_processes_train_and_log_once(trained_by_two):
    steps = [line.split("/")[0] for line in trained_by_two.lines if re.match(r"step:\d+/12 train_loss", line)]
    assert steps == [f"step:{n}" for n in (1, 2, 3, 4, 5, 8, 12)]
    assert trained_by_two.lines.count("RUN_ID=trained_by_two") == 1
    assert trained_by_two.lines == trained_by_two.stdout.splitlines()
    assert trained_by_two.record["train"]["tokens"] == 12 * 1024


def test_two_processes_see_the_losses_that_one_sees(whole_run, trained_by_two):
    """But for rounding, which differs between a sum over one and over two ranks."""

    def losses(run):
        return [float(x) for x in re.findall(r"^step:.* train_loss:(\S+)", "\n".join(run.lines), re.MULTILINE)]

    assert losses(trained_by_two) == pytest.approx(losses(whole_run), abs=2e-3)


def test_validation_during_training_is_logged(trained_by_two):
    pattern = r"step:(6|12)/12 val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms"
    assert len(matching(trained_by_two, pattern)) == 2


def test_a_score_of_part_of_the_stream_says_so_wherever_it_stands(trained_by_two):
    row = trained_by_two.record["stages"]["roundtrip"]
    assert row["tokens"] == 500 and row["whole_stream"] is False
    assert all(line.endswith(" partial:500_tokens") for line in matching(trained_by_two, "final_int6_roundtrip.*"))
    assert trained_by_two.lines[-1].endswith("PARTIAL stream")


# Bad input


def assert_refused(run, *named):
    """Exit status 2 and exactly one line on standard error."""
    assert run.status == 2, run.stderr
    lines = run.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), run.stderr
    assert all(part in lines[0] for part in named), lines[0]


def test_a_value_that_does_not_parse_is_refused_before_anything_is_written(start):
    run = start("unparsable", extra=dict(ITERATIONS="many"))
    assert_refused(run, "ITERATIONS='many'", "a whole number")
    assert run.stdout == "" and run.lines == []


def test_a_near_miss_is_refused(start):
    assert_refused(start("near", extra=dict(WARMDOWN_ITER="9")), "WARMDOWN_ITER", "did you mean WARMDOWN_ITERS?")


def test_a_size_that_holds_no_model_is_refused_before_any_training(start):
    run = start("no_room", target_bytes=1000)
    assert_refused(run, "TARGET_BYTES=1000", "28032 weights of 1.2 bits", "more than are left")
    assert not matching(run, "(warmup_step|step):.*") and run.record is None and not run.artifact.exists()


def test_missing_shards_are_refused(start, tmp_path, tiny_tokenizer):
    run = start("nothing", data_path=str(tmp_path), tokenizer_path=str(tiny_tokenizer))
    assert_refused(run, f"DATA_PATH={tmp_path}", "no shard")


def test_a_truncated_artifact_is_refused(start, whole_run, tmp_path):
    path = tmp_path / "half.artifact"
    path.write_bytes(whole_run.artifact.read_bytes()[:-100])
    run = start("half", phase="eval", artifact_path=str(path))
    assert_refused(run, f"ARTIFACT_PATH={path}", "truncated")
    assert run.record is None


def test_a_run_that_exists_is_refused_and_left_as_it_is(start, whole_run, folder):
    paths = sorted(folder.glob("whole.*"))
    before = [path.read_bytes() for path in paths]
    assert_refused(start("whole"), "RUN_ID=whole", "would be overwritten")
    assert len(paths) == 4 and [path.read_bytes() for path in paths] == before


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_no_artifact(start):
    run = start("diverged", matrix_lr=1e30)
    assert_refused(run, "train_loss=nan", "MATRIX_LR=1e+30")
    assert run.record is None and not run.artifact.exists()


def test_what_only_the_other_process_meets_is_told_as_well(start, tmp_path, tiny_data, tiny_config, write_shard):
    """Of a step's two sequences each process reads one; the bad token is in the second process's."""
    shutil.copytree(tiny_data, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.glob("x_train_*.bin"):
        path.unlink()
    write_shard(tmp_path / "x_train_0.bin", range(65))
    c = tiny_config(tmp_path, train_batch_tokens=64)
    tokens = np.full(65, 5)
    tokens[TrainLoader(c, Run(c)).sequence(1)[1]] = 999
    write_shard(tmp_path / "x_train_0.bin", tokens)
    run = start("elsewhere", 2, data_path=str(tmp_path), train_batch_tokens=64, complement_alpha=0.0)
    assert run.status != 0 and run.record is None
    assert any(re.match(r"error: .*token id 999", line) for line in run.stderr.splitlines()), run.stderr[-300:]


def test_another_model_than_the_artifacts_is_refused(start, whole_run):
    run = start("other", phase="eval", artifact_path=str(whole_run.artifact), num_layers=3)
    assert_refused(run, "NUM_LAYERS=3", "has 2")
