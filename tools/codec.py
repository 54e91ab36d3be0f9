"""Encode text to bits and decode it, with the rows that a score is made of. The bits are as many as the score states.

python tools/codec.py encode --artifact A --data D --tokens N --out F            # the head of the validation stream
python tools/codec.py encode --artifact A --tokenizer T --file any.txt --out F   # a file of UTF-8; T normalizes nothing
python tools/codec.py decode --artifact A --tokenizer T --file F --out text.txt  # elsewhere, from A, T and F alone

The artifact holds the settings of scoring; a setting in the environment (TTT_CHUNK_TOKENS=512) overrides it. Both
sides need the same settings, and the same STAGES, DEVICE, DTYPE and MICRO_BATCH_TOKENS, which it does not hold.

Both sides must make each row to the last bit. Both ask `predict` for as many rows as its stride at a time and give it
the chunk up to there: dense tensors have the same shapes. The encoder has all of these inputs, and the decoder has
zeros in place of the tokens that it does not know yet. A row's arithmetic does not touch what comes after it.
Attention adds exact zeros for later positions. A matrix product sums over channels and not over rows. The hash chains
compare integers. The mixer's network runs on blocks of one size, and an entry's place in them depends on earlier rows
only. Hedge adds up its weights row by row. `exp` and `log` give a number the same bits wherever it stands in a
tensor. `predict` makes what one stride leaves to the next again when a token of the stride changes. `update` receives
equal tensors on both sides. On CUDA, torch.use_deterministic_algorithms picks kernels that add in a fixed order, and
nothing is compiled. A checksum in the file shows whether the tokens came back.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import caseops
import train_gpt
from runs import be_deterministic, load_run
from train_gpt import InputError, Tokenizer

MAGIC = b"\xb7"  # one byte: a file is measured by its length
CHECKSUM_BYTES, MOST_TOKENS = 4, 2**27  # the latter: twice the competition's validation text
SLACK_BITS = 128  # by which the coder's interval may be narrower: a file's last zeros are left out
UNKNOWN = 0  # stands where the decoder knows no token yet


# ======================================================================================================================
# Coder: a range coder with a row as its model, and what surrounds its words in a file.
# ======================================================================================================================


def categorical(logp: Tensor):
    """Return the coder's model of a row [V]: 24 bits, of which every token gets at least one step."""
    return constriction.stream.model.Categorical(logp.exp().cpu().numpy(), lazy=True)


def as_bytes(encoder) -> bytes:
    """Return the shortest bytes that name a number in the coder's interval; the decoder reads zeros behind them."""
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
    """Return seven bits a byte, low ones first, the top bit set on all but the last."""
    found = []
    while n >= 128:
        n, low = divmod(n, 128)
        found.append(low + 128)
    return bytes([*found, n])


def from_varint(data: bytes) -> tuple[int, bytes]:
    """Return the number and what follows it. Raise InputError if it does not end."""
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

    The rows of a stride are predicted together, and again after a token that the later rows did not know. The predictor
    learns from each chunk but the last, as in train_gpt.score.
    """
    n, stage = len(tokens) - 1, predictor.stages[-1]
    for start in range(0, n, chunk_tokens):
        chunk = tokens[start : min(start + chunk_tokens, n) + 1]
        for low in range(0, len(chunk) - 1, predictor.stride):
            rows, logp = slice(low, min(low + predictor.stride, len(chunk) - 1)), None
            for t in range(rows.start, rows.stop):
                logp = predictor.predict(chunk[: rows.stop], rows)[stage] if logp is None else logp
                expected = int(chunk[t + 1])
                token = code(logp[t - low], expected)
                if token != expected:
                    chunk[t + 1], logp = token, None
        if start + chunk_tokens < n:
            predictor.update(chunk)


def encode(predictor, tokens: Tensor, chunk_tokens: int) -> bytes:
    """Return a file's content for tokens [n + 1], the first of them given: magic, n, a checksum, the coder's words."""
    encoder = constriction.stream.queue.RangeEncoder()

    def code(logp: Tensor, token: int) -> int:
        encoder.encode(token, categorical(logp))
        return token

    walk(predictor, tokens, chunk_tokens, code)
    return MAGIC + to_varint(len(tokens) - 1) + checksum(tokens) + as_bytes(encoder)


def decode(predictor, data: bytes, bos_id: int, chunk_tokens: int) -> Tensor:
    """Return the tokens [n + 1] of a file's content. Raise InputError where they are not the encoded ones."""
    if data[:1] != MAGIC:
        raise InputError(f"encoded file: it begins with {data[:1].hex() or 'nothing'}; allowed is {MAGIC.hex()}")
    n, data = from_varint(data[1:])
    digest, words = data[:CHECKSUM_BYTES], data[CHECKSUM_BYTES:]
    decoder, encoder = as_decoder(words), constriction.stream.queue.RangeEncoder()
    tokens = torch.full((n + 1,), UNKNOWN, device=predictor.dist.device)
    tokens[0] = bos_id

    def code(logp: Tensor, _: int) -> int:
        model = categorical(logp)
        token = int(decoder.decode(model))
        encoder.encode(token, model)
        position, (_, size) = encoder.pos()
        if 32 * position + 64 - size.bit_length() > 8 * len(words) + SLACK_BITS:  # zeros are read behind the end
            raise InputError(f"encoded file: {len(words)} bytes of words end before the {n} tokens that it names")
        return token

    try:
        walk(predictor, tokens, chunk_tokens, code)
    except AssertionError as error:  # what constriction raises where no symbol fits
        raise InputError(f"encoded file: not decodable with this artifact ({error})") from None
    if checksum(tokens) != digest:
        raise InputError("encoded file: with this artifact, tokens with another checksum come out of it")
    if as_bytes(encoder) != words:
        raise InputError("encoded file: other bytes than these encode its tokens; allowed is nothing behind the words")
    return tokens


# ======================================================================================================================
# The two commands.
# ======================================================================================================================


def read_file(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"--file={path}: {error.strerror}") from None


def file_tokens(data: bytes, tokenizer: Tokenizer, args) -> Tensor:
    """Return a file as one document, [n + 1] with its BOS. Raise InputError if the tokenizer gives other bytes back."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"--file={args.file}: byte {error.start} is no UTF-8; allowed is text") from None
    ids = caseops.encode(tokenizer.sp, text)
    if not 0 < len(ids) <= MOST_TOKENS:
        raise InputError(f"--file={args.file}: {len(ids)} tokens; allowed are 1 to {MOST_TOKENS}")
    if caseops.decode(tokenizer.sp, ids) != text:
        allowed = "a text that it gives back; one that normalizes loses line breaks, those of data/prepare.py do not"
        raise InputError(f"--tokenizer={args.tokenizer}: it does not give {args.file} back; allowed is {allowed}")
    return torch.tensor([tokenizer.bos_id, *ids])


def load_without_shards(args):
    folder = os.path.dirname(os.path.abspath(args.tokenizer))
    return load_run(args.artifact, folder, TOKENIZER_PATH=args.tokenizer)


def run_encode(args) -> None:
    if args.file is not None:
        if not args.tokenizer:
            raise InputError("--tokenizer: none; allowed with --file is the tokenizer.model of the artifact")
        run, text = load_without_shards(args), read_file(args.file)
        tokens, n_bytes = file_tokens(text, run.tokenizer, args), len(text)
    else:
        run = load_run(args.artifact, args.data, VAL_TOKENS=args.tokens)
        stream = run.stream()
        tokens, n_bytes, text = stream.tokens, int(stream.token_bytes.sum()), as_text(stream.tokens, run.tokenizer)
    data = encode(run.predictor(args.ttt_chunks), tokens.to(run.dist.device), run.chunk_tokens)
    train_gpt.write_atomically(Path(args.out), data)
    if args.text:
        train_gpt.write_atomically(Path(args.text), text)
    rate = f"{8 * len(data) / n_bytes:.4f} bits a byte"
    print(f"{len(tokens) - 1} tokens, {n_bytes} bytes of text, in {len(data)} bytes: {rate}")


def run_decode(args) -> None:
    run, data = load_without_shards(args), read_file(args.file)
    tokens = decode(run.predictor(args.ttt_chunks), data, run.c.bos_id, run.chunk_tokens)
    train_gpt.write_atomically(Path(args.out), as_text(tokens, run.tokenizer))


def documents(tokens: list[int], tokenizer: Tokenizer) -> list[str]:
    """Return the text of each document, by the tokenizer's own decoder."""
    found: list[list[int]] = []
    for token in tokens:
        if token == tokenizer.bos_id:
            found.append([])
        else:
            found[-1].append(token)
    return [caseops.decode(tokenizer.sp, document) for document in found]


def as_text(tokens: Tensor, tokenizer: Tokenizer) -> bytes:
    """Return the documents one after the other, a blank line between them."""
    return "\n\n".join(documents(tokens.tolist(), tokenizer)).encode()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("encode", "a text to a file of bits"), ("decode", "that file to its text")):
        command = commands.add_parser(name, help=text)
        command.add_argument("--artifact", required=True, metavar="FILE")
        command.add_argument("--out", required=True, metavar="FILE")
        command.add_argument("--ttt-chunks", type=int, metavar="N", help="adapt to N chunks only: a record's ttt_stop")
        command.add_argument("--tokenizer", required=name == "decode", metavar="FILE", help="a tokenizer.model")
        if name == "encode":
            source = command.add_mutually_exclusive_group(required=True)
            source.add_argument("--data", metavar="DIR", help="shards and tokenizer")
            source.add_argument(
                "--file", metavar="FILE", help="a text in UTF-8, with a --tokenizer that normalizes nothing"
            )
            command.add_argument("--tokens", type=int, default=8192, help="how many of --data [8192]")
            command.add_argument("--text", metavar="FILE", help="write the same text plainly, to compare")
        else:
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
