"""The first session on GPUs, rehearsed: every part at a tiny size, what a failure leaves, and how it goes on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import gpu_check
import train_gpt

TOOL = Path(train_gpt.__file__).resolve().parent / "tools" / "gpu_check.py"


@pytest.mark.slow
def test_every_part_passes_a_dry_run(tiny_env, tiny_data, tmp_path):
    small = tiny_env(iterations=2, reserve_seconds=1.0, eval_stride=16)
    options = [
        "--steps",
        "1",
        "--val-tokens",
        "1040",
        "--tokens",
        "256",
        "--millions",
        "0.001",
        "--nproc",
        "1",
        "--limit",
        "900",
    ]
    command = [sys.executable, str(TOOL), "--out", str(tmp_path), "--data", str(tiny_data), "--dry-run", *options]
    done = subprocess.run(command, env=small, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    names = [line.split()[1] for line in (tmp_path / "summary.txt").read_text().splitlines()]
    assert names[:5] == ["machine", "tests", "step", "run", "score"] and len(names) == len(set(names)) == 16
    results = {line.split()[1]: line for line in done.stdout.splitlines()}
    skipped = {
        name for name, line in results.items() if line.startswith("SKIP")
    }  # no Triton's kernel, no GPU's attention
    assert all(line.startswith("PASS") for name, line in results.items() if name not in skipped)
    assert {"step_flash3", "step_cudnn"} <= skipped < {name for name in results if name.startswith("step_")}
    assert "17 of 17 checks passed" in results["audit"]


@pytest.fixture
def checked(monkeypatch, tmp_path, capsys):
    """checked(code, limit=60) -> (number that fail, printed lines): a session of one part, this Python code."""

    def checked(code, limit=60.0, dry_run=False, **env):
        part = gpu_check.Part("step", [sys.executable, "-c", code], r"figure: .*", dict(RUN_ID="x", **env))
        monkeypatch.setattr(gpu_check, "parts", lambda args: [part])
        args = dict(out=str(tmp_path), data=str(tmp_path), dry_run=dry_run, limit=limit)
        failed = gpu_check.check(type("Args", (), args)())
        return failed, capsys.readouterr().out.splitlines()

    return checked


def test_a_part_that_failed_runs_again_and_one_that_passed_does_not(checked, tmp_path):
    count = f"n = open({str(tmp_path / 'count')!r}, 'a'); n.write('x')\n"
    failed, (line,) = checked(count + "print('figure: 7'); raise SystemExit('out of memory')")
    assert failed == 1 and line.startswith("FAIL step") and line.endswith("figure: 7")
    assert checked(count + "print('no such line')")[0] == 1  # ended well and gave no figure
    (tmp_path / "x.json").write_text("of the attempt before")
    assert checked(count + "print('figure: 8')", dry_run=True)[0] == 0  # of another kind: it counts for none but itself
    (tmp_path / "x.json").write_text("of the attempt before")
    failed, (line,) = checked(count + f"import os; print('figure:', os.path.exists({str(tmp_path / 'x.json')!r}))")
    assert failed == 0 and line.startswith("PASS step") and line.endswith("figure: False")
    code = count + f"import os; print('figure:', os.path.exists({str(tmp_path / 'x.json')!r}))"
    assert checked(code)[0] == 0 and (tmp_path / "count").read_text() == "xxxx"
    assert (tmp_path / "summary.txt").read_text().startswith("PASS step")
    assert list(json.loads((tmp_path / "results.json").read_text())) == ["step"]


def test_a_session_that_was_killed_goes_on(checked, tmp_path):
    """What the part had begun to write is in its way."""
    (tmp_path / "results.json").write_text(json.dumps({"step": ["BEGUN", 0.0, "", "before"]}))
    (tmp_path / "x.json").write_text("half")
    code = f"import json, os; print('figure:', os.path.exists({str(tmp_path / 'x.json')!r}), end=' ')\n"
    code += f"print(json.load(open({str(tmp_path / 'results.json')!r}))['step'][0])"
    assert checked(code)[1][0].endswith("figure: False BEGUN")


def test_a_form_that_fell_back_has_no_figure(checked):
    said = "print('kernel_fallback:ATTENTION=flash3 is not used (none)\\nfigure: 7')"
    assert checked(said)[1][0].startswith("PASS")  # another form's part
    failed, (line,) = checked(said, ATTENTION="flash3")
    assert failed == 0 and line.startswith("SKIP") and "flash3 is not used" in line


def test_a_part_that_takes_too_long_is_ended(checked):
    failed, (line,) = checked("import time; print('begun', flush=True); time.sleep(1000)", limit=3.0)
    assert failed == 1 and line.startswith("LATE step") and line.endswith("begun")


def test_without_a_gpu_only_a_dry_run_is_allowed(monkeypatch, capsys):
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    for options, words in (([], "--out and --data"), (["--out", "x", "--data", "y"], "--dry-run")):
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", *options])
        assert gpu_check.main() == 2 and words in capsys.readouterr().err


def test_what_is_lacking_is_named(monkeypatch, capsys):
    monkeypatch.setattr(gpu_check.torch.version, "cuda", "12.8")
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    assert gpu_check.machine() == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("lacks: ") and "gcc or clang" in last and "nvidia-smi" in last
