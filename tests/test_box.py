"""The decoder's box: no way that a program may try leads out of it, and what belongs inside is there."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

import box

SECRET = "the text that was to be decoded"
pytestmark = pytest.mark.skipif(bool(box.why_open()), reason=f"no namespaces here: {box.why_open()}")

WAYS_OUT = {
    "a path": "print(open({secret!r}).read())",
    "a path of bytes": "print(open({secret!r}.encode()).read())",
    "torch.from_file": "import torch; print(bytes(torch.from_file({secret!r}, size={n}, dtype=torch.uint8).tolist()))",
    "a memory map": "import numpy; print(numpy.memmap({secret!r}, dtype='u1', mode='r').tobytes())",
    "another program": "import subprocess; print(subprocess.run(['cat', {secret!r}], capture_output=True).stdout)",
    "a hard link": "os.link({secret!r}, 'here'); print(open('here').read())",
    "a symbolic link": "os.symlink({secret!r}, 'here'); print(open('here').read())",
    "a link that lies inside": "print(open('inside').read())",
    "a descriptor": "[print(os.read(fd, 99)) for fd in map(int, os.listdir('/proc/self/fd')) if fd > 2]",
    "a folder's descriptor": "fd = os.open('/', os.O_DIRECTORY); print(os.open('../' * 9 + {secret!r}, 0, dir_fd=fd))",
    "a root above": "os.chroot('.'); print(open('../' * 9 + {secret!r}).read())",
    "shared memory": "print(os.listdir('/dev/shm'), open({shm!r}).read())",
    "the environment": "print(dict(os.environ))",
    "another process's memory": "print(open('/proc/{pid}/environ').read(), os.kill({pid}, 0))",
    "another process's root": "print(open('/proc/{pid}/root' + {secret!r}).read())",
    "the first process's root": "print(open('/proc/1/root' + {secret!r}).read())",
    "the network": "import socket; print(socket.create_connection(('127.0.0.1', {port}), 5).recv(99))",
    "a mount": "import subprocess; print(subprocess.run('mount -t tmpfs t /box || exit 1', shell=True, check=True))",
    "a namespace": "import subprocess; print(subprocess.run(['unshare', '-Urm', 'cat', {secret!r}], check=True))",
    "the kernel's settings": "open('/proc/sys/kernel/core_pattern', 'r+')",
    "a library": "open(os.__file__, 'a').write('#')",
}


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """Where the secret lies on this machine, in all ways at once."""
    secret = tmp_path_factory.mktemp("outside") / "secret"
    secret.write_text(SECRET)
    shm = Path(f"/dev/shm/test_box_{os.getpid()}")
    shm.write_text(SECRET)
    server = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            try:
                server.accept()[0].sendall(SECRET.encode())
            except OSError:
                return

    threading.Thread(target=serve, daemon=True).start()
    os.environ["SECRET"] = SECRET
    descriptor = os.open(secret, os.O_RDONLY)
    os.set_inheritable(descriptor, True)
    yield dict(secret=str(secret), n=len(SECRET), shm=str(shm), pid=os.getpid(), port=server.getsockname()[1])
    os.close(descriptor)
    del os.environ["SECRET"]
    server.close()
    shm.unlink()


@pytest.mark.parametrize("way", WAYS_OUT)
def test_no_way_leads_out(way, outside, tmp_path):
    """Each would print the secret, or change what the auditor runs, were it open."""
    (tmp_path / "inside").symlink_to(outside["secret"])
    library = Path(os.__file__).read_bytes()
    done = box.run(tmp_path, ["-c", "import os; " + WAYS_OUT[way].format(**outside)])
    assert SECRET not in done.stdout + done.stderr
    assert done.returncode != 0 or way in ("another program", "a descriptor", "the environment"), done
    assert box.left(tmp_path, "here") == b"" and Path(os.__file__).read_bytes() == library


def test_the_folder_the_interpreter_and_its_libraries_are_inside(tmp_path):
    (tmp_path / "given").write_text("input")
    code = "import torch, numpy; open('made', 'w').write(open('given').read() + str(torch.ones(3).sum().item()))"
    done = box.run(tmp_path, ["-c", code], OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert box.left(tmp_path, "made") == b"input3.0"


def test_arguments_and_named_variables_arrive(tmp_path):
    done = box.run(tmp_path, ["-c", "import os, sys; print(sys.argv[1:], os.environ['A'])", "x y", "--z"], A="b c")
    assert done.stdout == "['x y', '--z'] b c\n" and done.returncode == 0
    assert box.run(tmp_path, ["-c", "raise SystemExit(7)"]).returncode == 7


def test_variables_of_the_program_are_not_those_of_the_tools_that_close_the_box(tmp_path):
    """A PATH with an `unshare` of its own would run outside."""
    planted = tmp_path / "unshare"
    planted.write_text(f"#!/bin/sh\ntouch {tmp_path}/escaped\n")
    planted.chmod(0o755)
    done = box.run(tmp_path, ["-c", "import os; print(os.environ['PATH'])"], PATH=str(tmp_path), LD_PRELOAD="x.so")
    assert done.stdout == f"{tmp_path}\n" and not (tmp_path / "escaped").exists()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers of system calls are those of x86_64")
def test_a_box_has_a_keyring_of_its_own(tmp_path):
    """A session's keyring would carry the text from the box that encodes to the one that decodes."""
    keys = "import ctypes; call = ctypes.CDLL(None, use_errno=True).syscall; session = ctypes.c_int(-3); "
    both = f"import sys; sys.path.insert(0, {str(Path(box.__file__).parent)!r}); import box\n"
    both += "first, second = (box.run(sys.argv[1], ['-c', code]).stdout for code in sys.argv[2:])\n"
    both += "assert int(second) < 0, (first, second)"
    put = keys + "print(call(248, b'user', b'text', b'secret', 6, session))"
    get = keys + "print(call(250, 10, session, b'user', b'text', 0))"
    subprocess.run([sys.executable, "-c", keys + "call(250, 1, None)\n" + both, str(tmp_path), put, get], check=True)


def test_a_program_that_no_longer_dies_with_its_parent_is_killed(tmp_path):
    forever = "import ctypes, time; ctypes.CDLL(None).prctl(1, 0); ticks = open('ticks', 'w', buffering=1)\n"
    forever += "while True: print('tick', file=ticks); print('up', flush=True); time.sleep(0.05)"
    with tempfile.TemporaryFile() as said, box.started(tmp_path, ["-c", forever], said) as process:
        assert process.stdout.readline() == b"up\n"
    before = (tmp_path / "ticks").read_text()
    time.sleep(0.5)
    assert (tmp_path / "ticks").read_text() == before


def test_a_program_that_does_not_answer_is_stopped(tmp_path):
    with (
        tempfile.TemporaryFile() as said,
        box.started(tmp_path, ["-c", "import time; time.sleep(10**6)"], said, seconds=1.0) as process,
    ):
        assert process.stdout.read() == b""
        said.seek(0)
        assert b"\nstopped after 1 s\n" in said.read()  # on a busy machine, the box that is not yet closed may say more


def test_what_a_program_writes_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(box, "LIMIT_BYTES", 10_000)
    done = box.run(tmp_path, ["-c", "with open('made', 'wb') as file: file.write(bytes(10_001))"])
    assert "File too large" in done.stderr and len(box.left(tmp_path, "made")) == 10_000
    done = box.run(tmp_path, ["-c", "print('x' * 20_000)"])
    assert done.returncode != 0 and len(done.stdout) == 10_000
