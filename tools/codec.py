"""Text to bits and back, with the rows that a score charges for: what the score says a text takes, taken.

python tools/codec.py encode --artifact A --data D --tokens N --out F           # the head of the validation stream
python tools/codec.py decode --artifact A --tokenizer T --file F --out text.txt  # elsewhere, from A, T and F alone

How a text is predicted is part of the artifact; a setting in the environment (TTT_CHUNK_TOKENS=512) overrides it.
Both sides need the same, and the same STAGES, DEVICE, DTYPE and MICRO_BATCH_TOKENS, which belong to the machine.

Both sides must have each row to the last bit, the encoder with the whole chunk at hand and the decoder with zeros
where it knows no token yet. They have, because both ask `predict` for the same EVAL_STRIDE rows at a time, so that
dense tensors have the same shapes, and then a row's arithmetic does not touch what comes after it: attention adds
exact zeros for later positions, a matrix product's sums run over channels and not over rows, the context index
compares integers, and the mixer's network runs on blocks of one size, in which an entry's place depends on earlier
rows only. What is done number by number (exp, log) gives the same bits wherever in a tensor the number stands.
`update` is given equal tensors on both sides and is the same function of them on CPU; on CUDA,
torch.use_deterministic_algorithms picks kernels that add in a fixed order, and nothing is compiled or chosen by
its speed, which may turn out differently in each process. None of this is taken on trust: where it failed, the
checksum would tell.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from pathlib import Path

import constriction
import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt
from train_gpt import Config, InputError, Run, Stream, Tokenizer

MAGIC = b"\xb7"  # one byte: a file is measured by its length
CHECKSUM_BYTES, MOST_TOKENS = 4, 2**31 - 1
UNKNOWN = 0  # stands where the decoder knows no token yet


def in_force(artifact: str | Path, data: str | Path, **overrides) -> tuple[Config, dict, dict[str, bytes]]:
    """The settings that the artifact is scored with here, its header and its parts. Raises InputError."""
    given = dict(PHASE="eval", ARTIFACT_PATH=artifact, DATA_PATH=data, TORCH_COMPILE=0, KERNELS="", **overrides)
    env = {**os.environ, **{name: str(value) for name, value in given.items()}}
    if env.get("WORLD_SIZE", "1") != "1":
        raise InputError(f"WORLD_SIZE={env['WORLD_SIZE']}: allowed is 1; run this with python, not with torchrun")
    header, parts = train_gpt.read_artifact(artifact)
    return train_gpt.as_packed(Config.from_env(env), header, env), header, parts


def be_deterministic() -> None:
    """Kernels that give the same bits in every process, also on CUDA."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # every tensor here is written before it is read


# ======================================================================================================================
# Coder: a range coder whose model is a row, and what surrounds its words in a file.
# ======================================================================================================================


def categorical(logp: Tensor):
    """The coder's model of a row [V]: 24 bits, of which every token gets at least one step."""
    return constriction.stream.model.Categorical(logp.exp().cpu().numpy(), lazy=True)


def as_bytes(encoder) -> bytes:
    """The shortest bytes that name a number in the coder's interval; the decoder reads zeros behind them."""
    words = encoder.get_compressed()
    position, (lower, size) = encoder.pos()  # the interval's last 64 bits, behind `position` words
    n_bytes = 4 * (position + 2)
    point = int.from_bytes(words.astype(">u4").tobytes().ljust(n_bytes, b"\0"), "big")  # lies in the interval
    low = point - (point - lower) % 2**64
    for zeros in range(8, -1, -1):
        number = -(-low >> 8 * zeros) << 8 * zeros  # rounded up
        if number < low + size:
            return number.to_bytes(n_bytes, "big").rstrip(b"\0")
    raise AssertionError("a range coder's interval is never empty")


def as_decoder(data: bytes):
    words = np.frombuffer(data + bytes(8 + -len(data) % 4), dtype=">u4")
    return constriction.stream.queue.RangeDecoder(words.astype(np.uint32))


def checksum(tokens: Tensor) -> bytes:
    return hashlib.sha256(tokens.cpu().numpy().astype("<u4").tobytes()).digest()[:CHECKSUM_BYTES]


def to_varint(n: int) -> bytes:
    """Seven bits a byte, low ones first, the top bit set on all but the last."""
    found = []
    while n >= 128:
        n, low = divmod(n, 128)
        found.append(low + 128)
    return bytes([*found, n])


def from_varint(data: bytes) -> tuple[int, bytes]:
    """The number and what follows it. Raises InputError if it does not end."""
    last = next((i for i, byte in enumerate(data[:5]) if byte < 128), None)
    n = 0 if last is None else sum((byte & 127) << (7 * i) for i, byte in enumerate(data[: last + 1]))
    if last is None or n > MOST_TOKENS:
        raise InputError(f"encoded file: it names {n or 'no'} tokens; allowed are up to {MOST_TOKENS}")
    return n, data[last + 1 :]


# ======================================================================================================================
# The walk along the stream, the same on both sides.
# ======================================================================================================================


def walk(predictor, tokens: Tensor, chunk_tokens: int, code) -> None:
    """Call code(row, token) at every position of tokens [n + 1] but the first, in order, and put in what it returns.

    The rows of a stride are predicted at once, and again when a token came in that the later ones did not know. The
    predictor learns from each chunk but the last, as in train_gpt.score.
    """
    n = len(tokens) - 1
    for start in range(0, n, chunk_tokens):
        chunk = tokens[start : min(start + chunk_tokens, n) + 1]
        for low in range(0, len(chunk) - 1, predictor.stride):
            rows, logp = slice(low, min(low + predictor.stride, len(chunk) - 1)), None
            for t in range(rows.start, rows.stop):
                logp = predictor.predict(chunk[:-1], rows) if logp is None else logp
                expected = int(chunk[t + 1])
                token = code(logp[t - low], expected)
                if token != expected:
                    chunk[t + 1], logp = token, None
        if start + chunk_tokens < n:
            predictor.update(chunk)


def encode(predictor, tokens: Tensor, chunk_tokens: int) -> bytes:
    """A file's content for tokens [n + 1], of which the first is given: magic, n, a checksum, the coder's words."""
    encoder = constriction.stream.queue.RangeEncoder()

    def code(logp: Tensor, token: int) -> int:
        encoder.encode(token, categorical(logp))
        return token

    walk(predictor, tokens, chunk_tokens, code)
    return MAGIC + to_varint(len(tokens) - 1) + checksum(tokens) + as_bytes(encoder)


def decode(predictor, data: bytes, bos_id: int, chunk_tokens: int, device: torch.device) -> Tensor:
    """The tokens [n + 1] of a file's content. Raises InputError where they are not those that were encoded."""
    if data[:1] != MAGIC:
        raise InputError(f"encoded file: it begins with {data[:1].hex() or 'nothing'}; allowed is {MAGIC.hex()}")
    n, data = from_varint(data[1:])
    digest, decoder = data[:CHECKSUM_BYTES], as_decoder(data[CHECKSUM_BYTES:])
    tokens = torch.full((n + 1,), UNKNOWN, device=device)
    tokens[0] = bos_id
    try:
        walk(predictor, tokens, chunk_tokens, lambda logp, _: int(decoder.decode(categorical(logp))))
    except AssertionError as error:  # what constriction raises where no symbol fits
        raise InputError(f"encoded file: not decodable with this artifact ({error})") from None
    if checksum(tokens) != digest:
        raise InputError("encoded file: its checksum is not that of the tokens that come out of it with this artifact")
    return tokens


# ======================================================================================================================
# The two commands.
# ======================================================================================================================


def epochs_by_chunk(text: str) -> tuple[int, ...]:
    """What a run gave its chunks, from "3*12,2*40": 12 chunks of 3 epochs, then 40 of 2. Raises InputError."""
    parts = [part.partition("*") for part in text.split(",") if part]
    if not all(epochs.isdecimal() and times.isdecimal() for epochs, _, times in parts):
        raise InputError(f"--epochs={text}: allowed are pairs of epochs and chunks such as 3*12,2*40")
    return tuple(int(epochs) for epochs, _, times in parts for _ in range(int(times)))


def prepare(artifact: str, data: str | Path, epochs: str = "", **overrides):
    """(settings, run, tokenizer, predictor of the last of STAGES, its chunks' length). Raises InputError."""
    c, header, parts = in_force(artifact, data, **overrides)
    run, tokenizer, stage = Run(c), Tokenizer(c), c.stages[-1]
    train_gpt.check_tokenizer(header, tokenizer, artifact)
    pace = train_gpt.Pace(c.ttt_epochs, run, told=epochs_by_chunk(epochs))
    predictor = train_gpt.make_predictor(stage, *train_gpt.unpack(parts, c, run), c, run, tokenizer, pace)
    return c, run, tokenizer, predictor, train_gpt.chunk_length(stage, c)


def write(path: str, data: bytes) -> None:
    try:
        train_gpt.write_atomically(Path(path), data)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; allowed is a file that can be written") from None


def run_encode(args) -> None:
    c, run, tokenizer, predictor, length = prepare(args.artifact, args.data, args.epochs, VAL_TOKENS=args.tokens)
    stream = Stream(c, run.device, tokenizer)
    data = encode(predictor, stream.tokens.to(run.device), length)
    write(args.out, data)
    if args.text:
        write(args.text, as_text(stream.tokens, tokenizer))
    n_bytes = int(stream.token_bytes.sum())
    rate = f"{8 * len(data) / n_bytes:.4f} bits a byte"
    print(f"{len(stream)} tokens, {n_bytes} bytes of text, in {len(data)} bytes: {rate}")


def run_decode(args) -> None:
    folder = os.path.dirname(os.path.abspath(args.tokenizer))
    c, run, tokenizer, predictor, length = prepare(args.artifact, folder, args.epochs, TOKENIZER_PATH=args.tokenizer)
    try:
        data = Path(args.file).read_bytes()
    except OSError as error:
        raise InputError(f"--file={args.file}: {error.strerror}") from None
    write(args.out, as_text(decode(predictor, data, c.bos_id, length, run.device), tokenizer))


def documents(tokens: list[int], tokenizer: Tokenizer) -> list[str]:
    """The text of each document, by the tokenizer's own decoder."""
    found: list[list[int]] = []
    for token in tokens:
        if token == tokenizer.bos_id:
            found.append([])
        else:
            found[-1].append(token)
    return [tokenizer.sp.decode(document) for document in found]


def as_text(tokens: Tensor, tokenizer: Tokenizer) -> bytes:
    """The documents one after the other, a blank line between them."""
    return "\n\n".join(documents(tokens.tolist(), tokenizer)).encode()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("encode", "the head of a validation stream to a file"), ("decode", "that file to its text")):
        command = commands.add_parser(name, help=text)
        command.add_argument("--artifact", required=True, metavar="FILE")
        command.add_argument("--out", required=True, metavar="FILE")
        command.add_argument("--epochs", default="", metavar="E*N,...", help="by chunk, if the run had to lower them")
        if name == "encode":
            command.add_argument("--data", required=True, metavar="DIR", help="shards and tokenizer")
            command.add_argument("--tokens", type=int, default=8192, help="how many [8192]")
            command.add_argument("--text", metavar="FILE", help="write the same text plainly, to compare")
        else:
            command.add_argument("--tokenizer", required=True, metavar="FILE", help="the tokenizer.model of the shards")
            command.add_argument("--file", required=True, metavar="FILE", help="what encode wrote")
    args = parser.parse_args()
    be_deterministic()
    try:
        {"encode": run_encode, "decode": run_decode}[args.command](args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
