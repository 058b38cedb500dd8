"""Text files to prepare, and prepared directories read back without fastlm's own readers."""

import hashlib
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fastlm.data.manifest import Manifest
from fastlm.data.text import END_OF_TEXT


def quiet(line: str) -> None:
    pass


def write_files(directory: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return directory


def decoded_documents(directory: Path, split: str) -> list[str]:
    """The documents of a split, from nothing but the prepared directory."""
    manifest = Manifest.load(directory)
    tokenizer = Tokenizer.from_file(str(directory / manifest.tokenizer))
    ids = shard_tokens(directory, split)
    ends = np.flatnonzero(ids == manifest.end_of_text)
    assert len(ids) == 0 or ends[-1] == len(ids) - 1, "every document ends with the marker"
    parts = np.split(ids, ends + 1)[:-1]
    return [tokenizer.decode(part[:-1].tolist(), skip_special_tokens=False) for part in parts]


def seal(directory: Path, manifest: Manifest) -> Manifest:
    """Gives `manifest` the hashes of the files in `directory`, and saves it there."""
    parts = [hashlib.sha256((directory / manifest.tokenizer).read_bytes()).digest()]
    for name in ("train", "val"):
        shards = manifest.splits[name].shards
        parts.append(f"{name} {manifest.dtype} {len(shards)}\n".encode())
        for shard in shards:
            digest = hashlib.sha256((directory / shard.file).read_bytes())
            shard.sha256 = digest.hexdigest()
            parts.append(digest.digest())
    manifest.fingerprint = hashlib.sha256(b"".join(parts)).hexdigest()
    manifest.save(directory)
    return manifest


def shard_tokens(directory: Path, split: str) -> np.ndarray:
    manifest = Manifest.load(directory)
    dtype = np.dtype(manifest.dtype).newbyteorder("<")
    shards = manifest.splits[split].shards
    return np.concatenate([np.fromfile(directory / shard.file, dtype) for shard in shards])


def bytes_tokenizer(path: Path, *, end_of_text: int | None = 256, **words: int) -> Path:
    """A tokenizer of the 256 bytes and `words`, without merges."""
    vocab = {
        character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    vocab.update(words)
    if end_of_text is not None:
        vocab[END_OF_TEXT] = end_of_text
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if end_of_text is not None:
        tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.save(str(path))
    return path
