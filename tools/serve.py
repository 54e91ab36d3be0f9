"""Hold a script's predictors, one a rank, and answer for them over a pipe. audit.py starts it in a closed box.

python tools/serve.py RANKS BLOCKS [TTT_STOP]      # of x.artifact and tokenizer.model here; train_gpt.py lies above

The first answer is a line with the number of rows that the ranks predict together. A request is a line of JSON and
the int64 tokens that it counts. An answer is float32 rows, a digest or one byte: the auditor knows its length. Both
sides read numbers and nothing that could run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import sys
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import runs
import train_gpt
from train_gpt import Config, InputError


def state_of(x, visited: dict | None = None):
    """Yield every tensor and number that an object's attributes and containers hold, however deep.

    No predictor chooses what is looked at. What one keeps in a module or a closure is not found here: the rows of a run
    that nobody probed, which the audit compares, are what shows it.

    Left out is what `predict` may leave behind: what is made again for other inputs (`made`, what hash chains
    hold past `seen`) and what the last collective added up.
    """
    visited = {} if visited is None else visited  # by id; holds the objects, whose ids would be used again otherwise
    if isinstance(x, (bool, int, float, str, bytes)):
        yield x
    elif isinstance(x, np.ndarray):
        yield x.tobytes()
    elif id(x) not in visited:
        visited[id(x)] = x
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (train_gpt.Clock, train_gpt.Deadline)):  # no token decides about time
            return
        elif isinstance(x, train_gpt.HashChains):
            yield from (x.seen, x.document, x.tail, x.head, x.tokens[: x.seen], x.prev[:, : x.seen])
        elif isinstance(x, (dict, list, tuple, set, deque)):
            for part in x.values() if isinstance(x, dict) else x:
                yield from state_of(part, visited)
        elif hasattr(x, "__dict__"):
            for name, part in vars(x).items():
                if name != {train_gpt.MixedTTT: "made", train_gpt.LoRA: "made", ThreadRank: "slots"}.get(type(x)):
                    yield from state_of(part, visited)


def fingerprint(*predictors) -> bytes:
    """Return the sha256 of all that predictors hold."""
    digest = hashlib.sha256()
    for x in state_of(predictors):
        digest.update(train_gpt.as_bytes([x]) if isinstance(x, Tensor) else repr(x).encode())
    return digest.digest()


class Turns:
    """Threads for ranks, of which one runs at a time. A rank that waits for the others gives its turn away.

    Which forms of attention are allowed belongs to the whole process. `train_gpt.attention` sets them and then restores
    what it found. Two ranks at once could compute with another form than they asked for, and leave it set.
    """

    def __init__(self, n: int):
        self.n, self.turn, self.barrier = n, threading.Lock(), threading.Barrier(n)
        # The first matrix product of a new thread would take all cores, whatever torch.set_num_threads said here, and
        # with five rows that moves bits.
        self.pool = ThreadPoolExecutor(n, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),))

    def wait(self) -> None:
        self.turn.release()
        try:
            self.barrier.wait()
        finally:
            self.turn.acquire()

    def each(self, function, items) -> list:
        """Return function(item) of each rank's item. Where one fails, raise its error, not those of ranks that wait."""

        def work(item):
            with self.turn:
                try:
                    return function(item)
                except BaseException:
                    self.barrier.abort()
                    raise

        done = [self.pool.submit(work, item) for item in items]
        failed = [error for error in (x.exception() for x in done) if error]
        if failed:
            raise min(failed, key=lambda error: isinstance(error, threading.BrokenBarrierError))
        return [x.result() for x in done]


class ThreadRank(train_gpt.Dist):
    """One of several ranks that are threads of this process, with the collectives that scoring needs."""

    def __init__(self, rank: int, device: torch.device, turns: Turns, slots: list):
        super().__init__(rank, turns.n, device)
        self.turns, self.slots = turns, slots

    def exchange(self, mine, reduce):
        self.slots[self.rank] = mine
        self.turns.wait()
        result = reduce(self.slots)
        self.turns.wait()
        return result

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(self.exchange(tensor, lambda parts: torch.stack(parts).sum(0)))

    def max(self, value: float) -> float:
        return self.exchange(value, max)


class Ranks:
    """The predictors of one pass. Each of at least `n_blocks` parts of a chunk is predicted by all ranks together."""

    def __init__(self, run: runs.Run, n_ranks: int = 1, n_blocks: int = 1, ttt_stop: int | None = None):
        self.run, self.turns, slots = run, Turns(n_ranks), [None] * n_ranks
        dists = [ThreadRank(rank, run.dist.device, self.turns, slots) for rank in range(n_ranks)]
        self.predictors = self.turns.each(lambda dist: run.predictor(ttt_stop, dist), dists)
        strides = math.ceil(run.chunk_tokens / (n_blocks * n_ranks * self.predictors[0].stride))
        for predictor in self.predictors:
            predictor.block_rows = min(predictor.block_rows, strides * predictor.stride)
        self.rows = n_ranks * self.predictors[0].block_rows

    def each(self, function) -> list:
        """Return function(predictor) of each rank."""
        return self.turns.each(function, self.predictors)

    def predict(self, inputs: Tensor, rows: slice) -> Tensor:
        """Return the rows [m, V] of the final stage, of all ranks in order."""
        inputs = inputs.to(self.run.dist.device)
        return torch.cat(self.each(lambda predictor: predictor.predict(inputs, rows)[predictor.stages[-1]])).cpu()

    def update(self, tokens: Tensor) -> None:
        """Let every rank learn from a scored chunk [n + 1]."""
        tokens = tokens.to(self.run.dist.device)
        self.each(lambda predictor: predictor.update(tokens))

    def fingerprint(self) -> bytes:
        return fingerprint(*self.predictors)

    @torch.no_grad()
    def boundary(self) -> Tensor:
        """Return what enters the first block at a BOS behind each token of the vocabulary: [V, D]."""
        c, found = self.run.c, []
        handle = self.run.model.blocks[0].register_forward_pre_hook(lambda _, inputs: found.append(inputs[0][:, 1]))
        last = torch.arange(c.vocab_size, device=self.run.dist.device)
        self.run.model(torch.stack([last, torch.full_like(last, c.bos_id)], dim=1))
        handle.remove()
        return found[0].float().cpu()


def answer(ranks: Ranks, request: dict, tokens: Tensor) -> bytes:
    """Return the answer to a request, and see that rows have the shape that the auditor will read."""
    if request["call"] == "update":
        ranks.update(tokens)
        return b"."
    if request["call"] == "fingerprint":
        return ranks.fingerprint()
    if request["call"] == "boundary":
        return ranks.boundary().numpy().tobytes()
    rows = slice(*request["rows"])
    found, shape = ranks.predict(tokens, rows), (rows.stop - rows.start, ranks.run.c.vocab_size)
    if found.shape != shape or found.dtype != torch.float32:
        raise ValueError(f"predict gave {found.dtype} {tuple(found.shape)}; allowed is float32 {shape}")
    return found.numpy().tobytes()


class Remote:
    """The same predictors for the auditor, behind the pipe."""

    def __init__(self, process, c: Config, said):
        """Take a process that runs this file for a run with such a config, and the file of its error output."""
        self.process, self.c, self.said = process, c, said
        line = process.stdout.readline(32)
        self.rows = max(1, int(line)) if line.strip().isdigit() else self.stopped()

    def stopped(self):
        """Raise InputError with the last words of the script."""
        self.process.kill()
        self.said.seek(0)
        words = self.said.read().decode(errors="replace").strip().splitlines() or ["nothing"]
        shown = "".join(x if x.isprintable() else "?" for x in words[-1][:300])
        raise InputError(f"the script's predictor stopped; its last words are: {shown}")

    def call(self, name: str, n_bytes: int, tokens: Tensor | None = None, **named) -> bytes:
        """Send a request. Return its answer of so many bytes."""
        sent = b"" if tokens is None else tokens.cpu().numpy().astype("<i8").tobytes()
        with contextlib.suppress(BrokenPipeError):  # an answer that is too short tells
            self.process.stdin.write(json.dumps(dict(call=name, n=len(sent) // 8, **named)).encode() + b"\n" + sent)
            self.process.stdin.flush()
        data = self.process.stdout.read(n_bytes)
        return data if len(data) == n_bytes else self.stopped()

    def floats(self, n: int, width: int, *request, **named) -> Tensor:
        data = self.call(request[0], 4 * n * width, *request[1:], **named)
        return torch.from_numpy(np.frombuffer(data, dtype="<f4").reshape(n, width).copy())

    def predict(self, inputs: Tensor, rows: slice) -> Tensor:
        part = [rows.start, rows.stop]
        return self.floats(rows.stop - rows.start, self.c.vocab_size, "predict", inputs, rows=part)

    def update(self, tokens: Tensor) -> None:
        self.call("update", 1, tokens)

    def fingerprint(self) -> bytes:
        return self.call("fingerprint", 32)

    def boundary(self) -> Tensor:
        return self.floats(self.c.vocab_size, self.c.model_dim, "boundary")


def main() -> None:
    pipe = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the script prints
    runs.be_deterministic()
    run = runs.load_run("x.artifact", ".", TOKENIZER_PATH="tokenizer.model")
    ranks = Ranks(run, *map(int, sys.argv[1:]))
    pipe.write(b"%d\n" % ranks.rows)
    pipe.flush()
    while line := sys.stdin.buffer.readline():
        request = json.loads(line)
        tokens = np.frombuffer(sys.stdin.buffer.read(8 * request["n"]), dtype="<i8")
        pipe.write(answer(ranks, request, torch.from_numpy(tokens.astype(np.int64))))
        pipe.flush()


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
