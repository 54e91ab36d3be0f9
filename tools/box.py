"""Run a program that can read one folder, the interpreter and its libraries, and nothing else of this machine.

    done = box.run(folder, ["decode.py", "x.bits"], DEVICE="cpu")    # python decode.py x.bits, in the folder
    text = box.left(folder, "text")

Namespaces of Linux close the box, by util-linux's `unshare`, `pivot_root` and `setpriv`: a root of its own on a fresh
tmpfs, no network, no other process, no shared memory, a keyring of its own, an input and two outputs as its only
descriptors, no capability, kernel settings that cannot be written, an environment of a few names. tests/test_box.py
tries the ways out.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import glob
import os
import platform
import resource
import signal
import site
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import BinaryIO

KEPT_NAMES = ("LANG", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG")
SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/alternatives", "/sys/devices/system/cpu")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
LIMIT_SECONDS, LIMIT_BYTES = 6 * 3600.0, 2**30  # of a process; of each file that it writes, its output among them

# $1: the new root. $2: the folder, which becomes /box. Then what is to be seen, up to "--", and the command.
CLOSE = r"""
root=$1 folder=$2; shift 2
mount -t tmpfs -o size=1g tmpfs "$root"
mkdir -p "$root/old" "$root/proc" "$root/tmp" "$root/dev/shm" "$root/box"
see() {
  case $1 in /bin|/lib|/lib64) if [ -L "$1" ]; then ln -s "$(readlink "$1")" "$root$1"; return; fi;; esac
  mkdir -p "$root$(dirname "$1")"
  if [ -d "$1" ]; then mkdir -p "$root$1"; else touch "$root$1"; fi
  mount --rbind "$1" "$root$1"
  case $1 in /dev/*) return;; esac
  awk -v at="$root$1" '$5 == at || index($5, at "/") == 1 { print $5 }' /proc/self/mountinfo | while read -r mounted; do
    mount -o remount,bind,ro "$mounted" 2>/dev/null || mount -o remount,bind,ro,nosuid,nodev "$mounted"
  done
}
while [ "$1" != -- ]; do see "$1"; shift; done; shift
mount --bind "$folder" "$root/box"
mount -t proc -o ro,nosuid,nodev,noexec proc "$root/proc"
cd "$root"; pivot_root . old; umount -l old; rmdir old; cd /box
exec setpriv --no-new-privs --inh-caps=-all --bounding-set=-all -- env -i "$@"
"""


def run(folder: str | Path, arguments: list[str], **env: str) -> subprocess.CompletedProcess:
    """Run Python with the arguments in the folder, to its end. Its output is captured as text."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        with started(folder, arguments, err, stdout=out, **env) as process:
            process.communicate()
        for file in (out, err):
            file.seek(0)
        said = (file.read().decode(errors="replace") for file in (out, err))
        return subprocess.CompletedProcess(arguments, process.returncode, *said)


@contextlib.contextmanager
def started(
    folder: str | Path,
    arguments: list[str],
    stderr: BinaryIO,
    stdout: BinaryIO | int = subprocess.PIPE,
    closed: bool = True,
    seconds: float = LIMIT_SECONDS,
    **env: str,
):
    """Start Python with the arguments in the folder. Yield the process, and kill it in the end.

    closed: False leaves it open to this machine, in the same environment. seconds: after them it is killed before.
    """
    homes = [sys.prefix, sys.base_prefix, *site.getsitepackages(), site.getusersitepackages()]
    outermost = [x for x in homes if not any(x != y and Path(x).is_relative_to(y) for y in [*homes, "/usr"])]
    seen = [*SYSTEM, *DEVICES, *dict.fromkeys(outermost), *glob.glob("/dev/nvidia*")]
    places = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/tmp"}
    kept = {name: os.environ[name] for name in KEPT_NAMES if name in os.environ}
    variables, python = places | kept | env, [sys.executable, *arguments]
    with tempfile.TemporaryDirectory() as root:
        command = ["unshare", "--user", "--map-root-user", "--mount", "--net", "--pid", "--ipc", "--uts"]
        command += ["--kill-child", "--fork", "sh", "-ec", CLOSE, "box", root, str(folder)]
        command += [*filter(os.path.exists, seen), "--", *(f"{k}={v}" for k, v in variables.items()), *python]
        given = dict(args=command, env=places) if closed else dict(args=python, env=variables, cwd=folder)
        pipes = dict(stdin=subprocess.PIPE, stdout=stdout, stderr=stderr)
        with subprocess.Popen(**given, **pipes, preexec_fn=limit) as process:

            def overran() -> None:
                os.write(stderr.fileno(), b"\nstopped after %d s\n" % seconds)
                kill(process)

            timer = threading.Timer(seconds, overran)
            timer.start()
            try:
                yield process
            finally:
                timer.cancel()
                kill(process)
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()


def limit() -> None:
    """Limit what is written. Join a new keyring: what one box puts into the session's, the next could read."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, LIMIT_BYTES))
    keyctl, join_session_keyring = {"x86_64": 250, "aarch64": 219}.get(platform.machine()), 1
    if keyctl:
        ctypes.CDLL(None).syscall(keyctl, join_session_keyring, None)


def kill(unshare: subprocess.Popen) -> None:
    """Kill the first process in a box, and with it all others there. It may have undone `--kill-child`."""
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
    unshare.kill()


def left(folder: str | Path, name: str) -> bytes:
    """Return what the program left in the folder, nothing where it is no plain file: a link would lead out here."""
    path = Path(folder).resolve() / name
    return path.read_bytes() if path.is_file() and path.resolve() == path else b""


@functools.cache
def why_open() -> str:
    """Return why this machine has no box, "" where it has one."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = run(folder, ["-c", "print('closed')"])
        except OSError as error:
            return f"unshare: {error.strerror}"
    return "" if done.stdout == "closed\n" else " ".join(done.stderr.split()) or f"status {done.returncode}"
