"""A checkpoint as transformers loads it: python -m fastlm.export --ckpt F --out DIR"""

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from fastlm.data.staging import staging_directory
from fastlm.errors import CheckpointError, OutputError, run_command
from fastlm.hardware import DTYPES
from fastlm.huggingface import CONFIG, INDEX, WEIGHTS, config_json, exported_state
from fastlm.huggingface_tokenizer import (
    GENERATION_CONFIG,
    TextEnds,
    write_json,
    write_tokenizer,
)
from fastlm.model import TransformerLM
from fastlm.pretrained import load_model

_FILE_BYTES = 5 << 30


def export(
    model: TransformerLM,
    out: Path,
    *,
    tokenizer: str | None = None,
    end_of_text: int | None = None,
    conversations: bool = False,
    dtype: torch.dtype = torch.float32,
    file_bytes: int = _FILE_BYTES,
) -> None:
    """Writes `model` to the directory `out`, for AutoModelForCausalLM.from_pretrained(out).

    Its logits there are `model`'s own but for rounding, in fp32. It appears when all of it is
    written. tokenizer: the content of a tokenizer.json. end_of_text: the id of the token between
    documents; by default `<|endoftext|>`'s or `<|end_of_text|>`'s, if the tokenizer has it.
    conversations: was it trained on chats (prepare --chat)? Then the end of a turn ends a text,
    too, and there is a chat template. file_bytes: weights of more are written to several files,
    with an index.

    Raises OutputError if `out` is not empty or cannot be written, CheckpointError for an
    architecture that no model of transformers has.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise OutputError(f"--out {out}: is there already; remove it, or choose another name")
    ends = TextEnds.of(tokenizer, end_of_text, conversations)
    config = model.config
    content = config_json(config, dtype=dtype, ends=ends.ids)
    state = exported_state(model.state_dict(), config)
    with staging_directory(out, re.compile("(?!)"), overwrite=False) as staging:
        _write_weights(staging, state, dtype, file_bytes)
        write_json(staging / CONFIG, content)
        if ends.end_of_text is not None:
            write_json(staging / GENERATION_CONFIG, ends.ids)
        if tokenizer is not None:
            write_tokenizer(staging, tokenizer, ends, config.max_seq_len)


def _write_weights(
    directory: Path, state: dict[str, Tensor], dtype: torch.dtype, file_bytes: int
) -> None:
    from safetensors.torch import save_file

    groups = list(_grouped(state.items(), dtype.itemsize, file_bytes))
    places = {}
    for number, group in enumerate(groups):
        name = WEIGHTS
        if len(groups) > 1:
            name = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        tensors = {key: t.detach().to("cpu", dtype).contiguous() for key, t in group.items()}
        save_file(tensors, directory / name, metadata={"format": "pt"})
        places |= dict.fromkeys(group, name)
    if len(groups) > 1:
        total = sum(t.numel() for t in state.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_json(directory / INDEX, index)


def _grouped(
    items: Iterable[tuple[str, Tensor]], itemsize: int, file_bytes: int
) -> Iterator[dict[str, Tensor]]:
    """The tensors in groups of at most `file_bytes`, or of one that alone is larger."""
    group: dict[str, Tensor] = {}
    held = 0
    for name, tensor in items:
        size = tensor.numel() * itemsize
        if group and held + size > file_bytes:
            yield group
            group, held = {}, 0
        group[name] = tensor
        held += size
    yield group


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fastlm.export",
        description="Write a checkpoint as a directory of Hugging Face's transformers: "
        "config.json, safetensors and the tokenizer, for AutoModelForCausalLM.from_pretrained.",
        epilog="The way back: fastlm.from_pretrained(DIR), or python -m fastlm.train --init-from "
        "DIR.",
    )
    parser.add_argument(
        "--ckpt", required=True, type=Path, help="a checkpoint, or a run (its newest checkpoint)"
    )
    parser.add_argument("--out", required=True, type=Path, help="the directory to write")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the weights; default: %(default)s"
    )
    arguments = parser.parse_args(argv)

    def command() -> None:
        model, payload = load_model(arguments.ckpt, "cpu")
        if "huggingface_config" in payload:
            raise CheckpointError(
                f"{arguments.ckpt}: is a directory of transformers already; --ckpt takes a run or "
                f"a checkpoint of fastlm.train"
            )
        tokenizer = payload.get("tokenizer")
        try:
            export(
                model, arguments.out, tokenizer=tokenizer, dtype=DTYPES[arguments.dtype],
                end_of_text=payload.get("end_of_text"),
                conversations=payload.get("conversations", False),
            )  # fmt: skip
        except CheckpointError as error:
            raise CheckpointError(f"{arguments.ckpt}: {error}") from error
        print(f"wrote {arguments.out}" + " (without a tokenizer)" * (tokenizer is None))

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
