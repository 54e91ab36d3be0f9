"""Open a run for the tools: an artifact, its settings in force here, and the data.

    run = load_run("logs/x.artifact", "data/datasets/sample", VAL_TOKENS=4096, STAGES="mixed")
    predictor = run.predictor()                              # of the last of STAGES, from what the artifact holds
    score = train_gpt.score(predictor, run.stream(), run.chunk_tokens, run.dist)[run.stage]

codec.py, audit.py and bench.py all begin with it.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt
from train_gpt import BiasNet, Config, Deadline, Dist, InputError, Stream, Tokenizer


@dataclass(frozen=True)
class Run:
    """All that a predictor is made of."""

    c: Config  # in force here: the artifact's settings, and those that the environment and the caller override
    header: dict  # the artifact's, with the file's size and sha256
    dist: Dist
    tokenizer: Tokenizer
    parts: dict[str, bytes]  # of the artifact
    make_predictor: Callable = train_gpt.make_predictor

    @functools.cached_property
    def unpacked(self) -> tuple[train_gpt.GPT, BiasNet]:
        """The model and the mixer's network of the artifact. A predictor that learns copies them."""
        return train_gpt.unpack(self.parts, self.c, self.dist.device)

    @property
    def model(self) -> train_gpt.GPT:
        return self.unpacked[0]

    @property
    def net(self) -> BiasNet:
        return self.unpacked[1]

    @property
    def stage(self) -> str:
        """The last of STAGES."""
        return self.c.stages[-1]

    @property
    def chunk_tokens(self) -> int:
        """Positions between two updates of the stage's predictor."""
        return train_gpt.chunk_length(self.stage, self.c)

    def stream(self, n_tokens: int | None = None) -> Stream:
        """Return the first n_tokens of the validation text; None = VAL_TOKENS, 0 = all."""
        c = self.c if n_tokens is None else dataclasses.replace(self.c, val_tokens=n_tokens)
        return Stream(c, self.dist.device, self.tokenizer)

    def predictor(self, ttt_stop: int | None = None, dist: Dist | None = None):
        """Return a new predictor of the stage, for a rank; one that learns stops after `ttt_stop` chunks."""
        dist = dist or self.dist
        deadline = Deadline(dist, stop_after=ttt_stop)
        return self.make_predictor(self.stage, self.model, self.net, self.c, dist, self.tokenizer, deadline)


def load_run(artifact: str | Path, data: str | Path, *, dist: Dist | None = None, plain=True, **overrides) -> Run:
    """Open an artifact and the folder of its tokenizer and shards. Raise InputError.

    overrides: settings by their names in the environment, which they override: VAL_TOKENS=4096. dist: this process
    among the ranks that the caller has joined; None = the only one. plain: nothing is compiled and no kernel is
    Triton's, for equal bits in every process; False leaves TORCH_COMPILE and KERNELS as they are, for speed.
    """
    given = dict(TORCH_COMPILE=0, KERNELS="") if plain else {}
    given |= dict(PHASE="eval", ARTIFACT_PATH=artifact, DATA_PATH=data) | overrides
    env = {**os.environ, **{name: train_gpt.show(value) for name, value in given.items()}}
    if dist is None and env.get("WORLD_SIZE", "1") != "1":
        raise InputError(f"WORLD_SIZE={env['WORLD_SIZE']}: allowed is 1; run this with python, not with torchrun")
    c = Config.from_env(env)
    dist = dist or train_gpt.open_dist(c)
    header, parts = dist.broadcast(train_gpt.read_artifact, artifact)
    c = train_gpt.with_artifact(c, header, env)
    return Run(c, header, dist, Tokenizer(c, header["tokenizer"]), parts)


def be_deterministic() -> None:
    """Pick kernels that give the same bits in every process, also on CUDA. Call it before anything runs there."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # every tensor here is written before it is read
