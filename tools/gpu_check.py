"""Run the first session on GPUs as one command that goes on where it stopped.

    python tools/gpu_check.py --out DIR --data D                # on all GPUs of this machine
    python tools/gpu_check.py --out DIR --data D --dry-run      # the same parts at PRESET=smoke on a CPU
    python tools/gpu_check.py --machine                         # only what is installed

The parts follow each other by worth, and each ends within --limit. A part that fails does not end the rest; one that
passed is not run again. DIR/NAME.log holds the output of a part, DIR/summary.txt a line of each.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import box
import train_gpt
from train_gpt import InputError

ROOT = Path(train_gpt.__file__).resolve().parent


@dataclass(frozen=True)
class Part:
    """A command, the settings that it needs, and where its figure stands in the output.

    A part that measures one form of a kernel has no figure where another form stood in.
    """

    name: str
    command: list[str]
    figure: str  # a regular expression; the last line that it fits is the part's figure
    env: dict[str, str] = field(default_factory=dict)

    def identity(self, dry_run: bool) -> str:
        """Return a digest of what a result rests on: a part of another script, size or command runs again."""
        script = (ROOT / "train_gpt.py").read_bytes()
        return hashlib.sha256(script + repr((self.command, self.env, dry_run)).encode()).hexdigest()[:16]


def parts(args) -> list[Part]:
    """Return all parts in order of worth."""
    data, python, out = ["--data", args.data], [sys.executable], Path(args.out)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.nproc}"]
    ranks = [*python, *(torchrun if args.nproc > 1 else [])]
    bench, step = str(ROOT / "tools" / "bench.py"), ["train", *data, "--steps", str(args.steps), "--warmup", "10"]
    forms = {f"step_kernels_{names or 'none'}": dict(KERNELS=names) for names in ("", "loss", "mlp")}
    forms |= {f"step_{name}": dict(ATTENTION=name) for name in ("flash3", "cudnn", "flash", "efficient")}
    artifact, record = f"{out}/run.artifact", [f"{out}/run.json", f"{out}/score.json"]
    some = ["--artifact", artifact, *data, "--val-tokens", str(args.val_tokens // 8)]
    train = dict(PHASE="train", MAX_WALLCLOCK_SECONDS=str(args.train_seconds), RUN_ID="run")
    score = dict(PHASE="eval", VAL_TOKENS=str(args.val_tokens), ARTIFACT_PATH=artifact, RUN_ID="score")
    score |= dict(SCORES_PATH=f"{out}/score.npz")
    audit = [f"{ROOT}/tools/audit.py", "--artifact", artifact, *data, "--record", *record, "--tokens", str(args.tokens)]
    median, script = r"step: median .*", str(ROOT / "train_gpt.py")
    found = [
        Part("machine", [*python, __file__, "--machine"], r"(lacks: .*|nothing is lacking)"),
        Part("tests", [*python, "-m", "pytest", "-v", "-rs", str(ROOT / "tests" / "gpu")], r".* in .*s.*"),
        Part("step", [*ranks, bench, *step, "--profile", f"{out}/profile.txt"], median),
        Part("run", [*ranks, script], r"train_seconds: .*", train),
        Part("score", [*ranks, script], r"final val_bpb:.*", score),
        *(Part(name, [*ranks, bench, *step], median, env) for name, env in forms.items()),
        Part("audit", [*python, *audit], r".* checks passed.*"),
        Part("strides", [*ranks, bench, "score", *some], r" *\d.*"),
        Part("epochs", [*ranks, bench, "ttt", *some, "--epochs", "0,1,3"], r" *\d.*"),
        Part("mixer", [*python, bench, "mixer", *data, "--millions", args.millions], r" *\d.*"),
    ]
    if args.peer:
        peer = ["train", *data, "--peer", args.peer, "--nproc", str(args.nproc), "--pairs", "1"]
        found.append(Part("peer", [*python, bench, *peer], r"tokens/s, ours over peer.*"))
    return found


def run_part(part: Part, env: dict[str, str], out: Path, limit: float) -> tuple[str, float, str]:
    """Run a part, its output in its log. Return (PASS, SKIP, FAIL or LATE; seconds; its figure or last words)."""
    began, log = time.monotonic(), out / f"{part.name}.log"
    with (
        open(log, "wb") as file,
        subprocess.Popen(
            part.command, env=env | part.env, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
        ) as process,
    ):
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # all ranks
    said = [line.rstrip() for line in log.read_text(errors="replace").splitlines() if line.strip()] or ["nothing"]
    figures = [line for line in said if re.fullmatch(part.figure, line)]
    passed = "LATE" if status is None else "PASS" if status == 0 and figures else "FAIL"
    other = [x for x in said for name, form in part.env.items() if x.startswith(f"kernel_fallback:{name}={form} ")]
    if other and status is not None:
        return "SKIP", time.monotonic() - began, other[-1]
    return passed, time.monotonic() - began, (figures or said)[-1].strip()


def forget(part: Part, results: dict, out: Path) -> None:
    """Remove what an earlier attempt at a part left, and the results that rest on it: a run overwrites nothing."""
    for ending in ("txt", "json", "npz", "artifact"):
        (out / f"{part.env.get('RUN_ID', part.name)}.{ending}").unlink(missing_ok=True)
    if part.name == "step":
        (out / "profile.txt").unlink(missing_ok=True)
    for name in ("score", "audit", "strides", "epochs") if part.name == "run" else ("audit",) * (part.name == "score"):
        results.pop(name, None)


def check(args) -> int:
    """Run every part that has not passed. Return the number of those that fail."""
    out = Path(args.out).resolve()
    args.out, args.data = str(out), str(Path(args.data).resolve())
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "results.json"
    results = json.loads(kept.read_text()) if kept.is_file() else {}
    env = os.environ | dict(DATA_PATH=args.data, LOG_DIR=args.out)
    if args.dry_run:
        small = dict(PRESET="smoke", DEVICE="cpu", ITERATIONS="2", OMP_NUM_THREADS="1")
        env = small | env  # the environment may name a smaller size still
    lines, n_failed = [], 0
    for part in parts(args):
        identity = part.identity(args.dry_run)
        was, *_, made_by = results.get(part.name, ["none", ""])
        if was not in ("PASS", "SKIP") or made_by != identity:
            if part.name in results:
                forget(part, results, out)
            results[part.name] = ["BEGUN", 0.0, "", identity]  # what is killed here leaves files behind
            train_gpt.write_atomically(kept, json.dumps(results).encode())
            results[part.name] = [*run_part(part, env, out, args.limit), identity]
            train_gpt.write_atomically(kept, json.dumps(results).encode())
        passed, seconds, figure, _ = results[part.name]
        lines.append(f"{passed:<4} {part.name:<18} {seconds:7.1f} s  {figure}")
        print(lines[-1], flush=True)
        n_failed += passed in ("FAIL", "LATE")
    train_gpt.write_atomically(out / "summary.txt", ("\n".join(lines) + "\n").encode())
    return n_failed


def machine() -> int:
    """Print what the script and its compilers need here. Return 1 where something is lacking."""
    needed = {"a CUDA build of torch": torch.version.cuda, "a GPU that torch can use": torch.cuda.is_available()}
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        print(f"gpu {i}: {found.name}, sm_{found.major}{found.minor}, {found.total_memory >> 30} GiB")
    if smi := shutil.which("nvidia-smi"):
        query = [smi, "--query-gpu=driver_version,memory.used,clocks.sm,power.limit", "--format=csv"]
        print(subprocess.run(query, capture_output=True, text=True).stdout.strip())
    compiler = shutil.which(os.environ.get("CC", "gcc")) or shutil.which("clang")
    needed["nvidia-smi, the driver's"] = smi
    needed["gcc or clang, with which Triton builds its launcher"] = compiler
    needed["Python.h, which that includes"] = Path(sysconfig.get_path("include"), "Python.h").is_file()
    versions = {}
    for name in ("torch", "triton", "numpy", "sentencepiece", "flash-attn", "flash-attn-3"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "none"
    needed["triton"] = versions["triton"] != "none"
    print(f"torch's CUDA {torch.version.cuda}, {versions}, compiler {compiler}, {os.cpu_count()} CPUs")
    reason = box.why_open()
    needed[f"namespaces of Linux, for the audit's box ({reason})"] = not reason
    lacking = [name for name, there in needed.items() if not there]
    print(f"lacks: {'; '.join(lacking)}" if lacking else "nothing is lacking")
    return 1 if lacking and (smi or torch.version.cuda) else 0  # a CPU build on a machine without a GPU: a dry run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", metavar="DIR", help="where logs, artifact and summary go")
    add("--data", metavar="DIR", help="shards with their tokenizer")
    add("--nproc", type=int, default=max(1, torch.cuda.device_count()), help="ranks [all GPUs]")
    add("--limit", type=float, default=540.0, help="seconds of a part [540]")
    add(
        "--train-seconds",
        type=float,
        default=300.0,
        help="MAX_WALLCLOCK_SECONDS of the run; compiling adds to it [300]",
    )
    add("--steps", type=int, default=20, help="timed steps of a benchmark [20]")
    add("--val-tokens", type=int, default=4_194_304, help="of the stream, scored by the run [4,194,304]")
    add("--tokens", type=int, default=8192, help="of the stream, audited and decoded [8192]")
    add("--millions", default="1,4", help="lengths at which the mixer is timed [1,4]")
    add("--peer", metavar="PATH", help="another train_gpt.py of the same model, timed beside this one")
    add("--dry-run", action="store_true", help="every part at PRESET=smoke on a CPU")
    add("--machine", action="store_true", help="print what is installed, and end")
    args = parser.parse_args()
    if args.machine:
        return machine()
    try:
        if not args.out or not args.data:
            raise InputError("--out and --data: allowed is a folder each")
        if not args.dry_run and not torch.cuda.is_available():
            raise InputError("no GPU can be used here; allowed is --dry-run")
        return 1 if check(args) else 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
