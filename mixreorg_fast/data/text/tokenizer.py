"""Byte-level BPE on Hugging Face ``tokenizers``: CLIP's own file, or one trained on the captions of a run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from ...errors import UserError
from ...files import atomic_path

START, END = "<|startoftext|>", "<|endoftext|>"
FILES = ("tokenizer.json", "vocab.json")  # one or the other; the second, which is CLIP's, beside merges.txt
# How CLIP's tokenizer splits a text, to the letter.
_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """Captions to ids between a start token (second highest id) and an end token (highest id).

    The text encoder takes its features at the first occurrence of the highest id. So END has the highest id, and
    special tokens inside a caption are encoded as plain text.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, source: str = "tokenizer") -> None:
        self._backend = backend
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True
        size = backend.get_vocab_size(with_added_tokens=True)
        if (backend.token_to_id(START), backend.token_to_id(END)) != (size - 2, size - 1):
            raise UserError(
                f"{source}: expected {START} and {END} as the two highest ids {size - 2} and {size - 1}, got "
                f"{backend.token_to_id(START)} and {backend.token_to_id(END)}; "
                f"use CLIP's tokenizer.json or one that training wrote"
            )
        self.vocab_size, self.start_id, self.end_id = size, size - 2, size - 1

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> Tokenizer:
        """A tokenizer of at most `vocab_size` ids, lower-cased as CLIP's; the same captions give the same one.

        Raises:
            UserError: `vocab_size` has no room for the 256 bytes and the two special tokens; there are no captions.
        """
        if vocab_size < 258:
            raise UserError(f"vocab_size {vocab_size} is too small for 256 bytes and 2 special tokens (nearest: 258)")
        captions = [caption for caption in captions if caption.strip()]
        if not captions:
            raise UserError("no captions to train a tokenizer on; expected at least one .txt with text in the shards")
        backend = tokenizers.Tokenizer(models.BPE())
        backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 2,
            min_frequency=2,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(captions, trainer)
        backend.add_special_tokens([START, END])  # added last, so that they take the highest ids
        return cls(backend)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Tokenizer:
        """Read a ``tokenizer.json``, or a folder with one, or with CLIP's ``vocab.json`` and ``merges.txt``.

        Raises:
            UserError: the file is missing or not a tokenizer, or its special tokens are not the highest ids.
        """
        file = Path(path)
        if file.is_dir():
            file = next(filter(Path.is_file, (file / name for name in FILES)), file / FILES[0])
        if not file.is_file():
            raise UserError(f"no tokenizer {file}; expected a tokenizer.json, or a folder with one")
        try:
            backend = _clip(file) if file.name == FILES[1] else tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{file}: not a tokenizer.json of Hugging Face tokenizers, nor CLIP's: {error}") from None
        return cls(backend, source=str(file))

    def save(self, folder: str | os.PathLike) -> Path:
        """Write ``tokenizer.json`` into a folder, atomically; returns its path."""
        path = Path(folder) / "tokenizer.json"
        with atomic_path(path) as temporary:
            self._backend.save(str(temporary))
        return path

    def encode(self, texts: Sequence[str], context: int) -> tuple[Tensor, list[int]]:
        """Start token, tokens, end token; truncated to `context` with the end token kept.

        Returns:
            ids: int64 ``[B, context]``, padded with 0.
            lengths: tokens of each text with start and end.
        """
        if context < 3:
            raise UserError(f"context {context} has no room for a start token, a word and an end token (nearest: 3)")
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        rows = [[self.start_id, *encoding.ids[: context - 2], self.end_id] for encoding in encodings]
        padded = [row + [0] * (context - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int64).reshape(len(rows), context), [len(row) for row in rows]


def _clip(vocabulary: Path) -> tokenizers.Tokenizer:
    """CLIP's tokenizer from its two files: lower case, single spaces, words before bytes."""
    merges = str(vocabulary.with_name("merges.txt"))
    bpe = models.BPE.from_file(str(vocabulary), merges, unk_token=END, end_of_word_suffix="</w>")
    backend = tokenizers.Tokenizer(bpe)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(tokenizers.Regex(_CLIP_WORDS), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return backend
