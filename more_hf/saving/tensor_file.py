"""Where each tensor is in a safetensors or GGUF file, and a copy of the file with other values in some."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..core.erasure import Erasure
from ..core.errors import IncompatibleBaseError
from ..core.files import replacing
from ..core.site import EDITABLE, fingerprint
from .files import PICKLES, reading, writing


LENGTH = 8  # a safetensors file starts with the length of its header, in this many bytes
NOTE = "more_hf"  # the line of metadata that tells what was erased
STRING = 8  # the type of a text in the metadata of a GGUF file
BLOCK = 1 << 24  # how much is copied at once
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = (".scale_weight", ".weight_scale")  # of an fp8 weight, beside it
# what safetensors and GGUF call a type -> torch's; others, all quantized, keep their name
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}


class Stored(NamedTuple):
    """A tensor in a file; its bytes are from `start` to `stop`."""

    dtype: torch.dtype | str  # the file's name of a type that torch does not have
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class TensorFile:
    """A file's tensors by name, none of which is read yet."""

    path: Path
    tensors: dict[str, Stored]
    begin: int  # where the tensors' bytes begin
    note: str | None  # the line of metadata, if an erasure wrote one
    # `note ->` what stands in front of the tensors' bytes, with this line added
    head: Callable[[str], bytes] = field(repr=False)

    @property
    def precision(self) -> torch.dtype:
        """That of the largest tensor, or one to compute in where that is quantized."""
        dtypes = {stored.stop - stored.start: stored.dtype for stored in self.tensors.values()}
        return dtypes[max(dtypes)] if dtypes[max(dtypes)] in EDITABLE else torch.bfloat16

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        dtype, shape, start, stop = self.tensors[name]
        with self.path.open("rb") as file:
            file.seek(start)
            return torch.frombuffer(bytearray(file.read(stop - start)), dtype=dtype).reshape(shape)

    def read_dense(self, name: str) -> Tensor:
        """Read one tensor, in float32 if it is quantized."""
        dtype, shape, start, stop = self.tensors[name]
        if isinstance(dtype, str):
            from gguf import GGMLQuantizationType, dequantize

            with self.path.open("rb") as file:
                file.seek(start)
                rows = np.frombuffer(file.read(stop - start), np.uint8).reshape(*shape[:-1], -1)
            return torch.from_numpy(dequantize(rows, GGMLQuantizationType[dtype]))
        tensor = self.read(name)
        if dtype not in FP8:
            return tensor
        layer = name.removesuffix(".weight")
        scales = [self.read(layer + end) for end in SCALES if layer + end in self.tensors]
        return math.prod([tensor.float(), *scales])

    def copy(self, target: Path, edited: Mapping[str, Tensor], note: str) -> None:
        """
        Write a copy with other values in some tensors, which keep their shape and dtype, and with a line of
        metadata. All other tensors' bytes are copied as they are.

        Raises:
            `ExportError`: it could not be written; nothing of it is left then.
        """
        head = self.head(note)
        with writing(target), replacing(target) as draft, draft.open("wb") as copy:
            with self.path.open("rb") as source:
                copy.write(head)
                source.seek(self.begin)
                shutil.copyfileobj(source, copy, BLOCK)
            for name, tensor in edited.items():
                copy.seek(len(head) + self.tensors[name].start - self.begin)
                copy.write(bytes_of(tensor))


def bytes_of(tensor: Tensor) -> bytes:
    """A tensor's values as a file holds them."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def note_of(erasure: Erasure, edited: Mapping[str, Tensor]) -> str:
    """The line of metadata about an erasure; `edited` has each site's edited part as it is stored."""
    note = {"more_hf": __version__, "request": erasure.request.to_dict(), "facts": asdict(erasure.facts)}
    measured = {"guarantees": erasure.guarantees, "proof": erasure.proof}
    return json.dumps({**note, **measured, "edited": fingerprint(edited)})


def read_tensor_file(path: str | os.PathLike) -> TensorFile:
    """
    Read where a file's tensors are.

    Raises:
        `IncompatibleBaseError`: the file is a pickle, cut off, or neither safetensors nor GGUF.
    """
    path = Path(path)
    with reading(path):
        with path.open("rb") as file:
            magic = file.read(4)
        if path.suffix in PICKLES or magic[:2] == b"PK":
            raise IncompatibleBaseError(
                f"{path} is a pickle, which can run any code when it is opened, so it is not. Convert it to "
                "safetensors where that is safe, or take the .safetensors file that most models also have."
            )
        return (_read_gguf if magic == b"GGUF" else _read_safetensors)(path)


def _read_safetensors(path: Path) -> TensorFile:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH), "little")
        begin = LENGTH + length
        header = json.loads(file.read(length)) if begin <= size else {}
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, about in header.items():
        start, stop = about["data_offsets"]
        dtype = DTYPES.get(about["dtype"], about["dtype"])
        tensors[name] = Stored(dtype, tuple(about["shape"]), begin + start, begin + stop)
    expected = max((stored.stop for stored in tensors.values()), default=begin)
    if size < expected:
        raise IncompatibleBaseError(
            f"{path} has {size} bytes and should have {expected}: it was cut off, or is no safetensors file. "
            "Save or download it again."
        )

    def head(note: str) -> bytes:
        named = {"__metadata__": {**metadata, NOTE: note}, **header}
        text = json.dumps(named, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % LENGTH)  # the tensors' bytes stay aligned
        return len(text).to_bytes(LENGTH, "little") + text

    return TensorFile(path, tensors, begin, metadata.get(NOTE), head)


def _read_gguf(path: Path) -> TensorFile:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise IncompatibleBaseError(
            f"{path} needs the package gguf. Install it: `pip install gguf`."
        ) from error
    reader = GGUFReader(path)
    tensors = {}
    for found in reader.tensors:
        kind, start = found.tensor_type.name, int(found.data_offset)
        shape = tuple(map(int, reversed(found.shape)))  # which GGUF counts from the last dimension on
        tensors[found.name] = Stored(DTYPES.get(kind, kind), shape, start, start + int(found.n_bytes))
    begin, note = int(reader.data_offset), reader.fields.get(NOTE)
    # The metadata end where the first tensor's description begins, and these end with the last one's.
    first, last = reader.tensors[0].field, reader.tensors[-1].field
    metadata_end, end = first.offset, last.offset + sum(int(part.nbytes) for part in last.parts)

    def head(note: str) -> bytes:
        with path.open("rb") as file:
            old = file.read(end)
        # 4 bytes of magic, 4 of the version, 8 of the number of tensors, 8 of the number of lines of metadata
        lines = int.from_bytes(old[16:24], "little") + 1
        line = _gguf_text(NOTE) + STRING.to_bytes(4, "little") + _gguf_text(note)
        new = old[:16] + lines.to_bytes(8, "little") + old[24:metadata_end] + line + old[metadata_end:]
        return new + bytes(-len(new) % int(reader.alignment))

    return TensorFile(path, tensors, begin, None if note is None else note.contents(), head)


def _gguf_text(text: str) -> bytes:
    data = text.encode()
    return len(data).to_bytes(8, "little") + data
