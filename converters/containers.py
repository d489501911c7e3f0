"""Opening a checkpoint file without running anything from it: bytes → nested plain values with tensors.

torch files (zip and the older stream) go through torch's `weights_only` unpickler with the inert stand-ins of
`standins.py`; Detectron2's and haiku's pickles through a restricted unpickler that knows numpy arrays only;
safetensors and npz hold no code. Magic bytes decide, never the file's ending.
"""

from __future__ import annotations

import pickle
import tarfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from twist.contracts.errors import UserError
from twist.contracts.files import sha256_file
from twist.converters import standins

Container = Literal["torch", "torch-stream", "pickle", "safetensors", "npz"]
# More than any published checkpoint; a file that claims more is damaged or meant to exhaust the machine.
MOST_BYTES = 32 * 2**30
# Weights hardly compress (ratios near 1.1): what unpacks to more than this much is a bomb, small files apart.
MOST_RATIO = 20
SMALL_BYTES = 256 * 2**20
MOST_MEMBERS = 200_000
MOST_NODES, MOST_DEPTH = 2_000_000, 64
_STREAM_MAGIC = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."


@dataclass(frozen=True)
class Contents:
    """What a file holds: nested dictionaries and lists of tensors, numbers and strings."""

    path: Path
    container: Container
    sha256: str
    value: Any
    metadata: dict[str, str] = field(default_factory=dict)


def read_contents(path: Path) -> Contents:
    """Read `path` safely.

    Raises:
        UserError: not a checkpoint, damaged, too large when unpacked, or it asks for code to be run. One sentence.
    """
    path = Path(path)
    container = sniff(path)
    metadata: dict[str, str] = {}
    if container == "safetensors":
        value, metadata = _read_safetensors(path)
    elif container == "npz":
        value = _read_npz(path)
    elif container == "pickle":
        value = _read_pickle(path)
    else:
        value = _read_torch(path, container)
    return Contents(path, container, sha256_file(path), _plain(value, path), metadata)


def sniff(path: Path) -> Container:
    """The container by its first bytes; `UserError` for anything that is no checkpoint, with what it is instead."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: it holds no backbone.safetensors: name the checkpoint file in it.")
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no regular file: copy what it gives into one first.")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(512)
    except FileNotFoundError:
        raise UserError(f"There is no checkpoint at {path}: check the path.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be opened ({error.strerror}): check its permissions.") from None
    if size == 0:
        raise UserError(f"{path} is empty: download it again.")
    if size > MOST_BYTES:
        raise UserError(
            f"{path} is larger than {MOST_BYTES // 2**30} GiB: no checkpoint of this field is; check the file."
        )
    for magic, sentence in _NOT_CHECKPOINTS:
        if head.lstrip()[: len(magic)].lower() == magic:
            raise UserError(f"{path} {sentence}.")
    if head.startswith(b"PK\x03\x04"):
        return _sniff_zip(path, size)
    if head[:1] == b"\x80" and head[2:].startswith(_STREAM_MAGIC):
        return "torch-stream"
    if head[:1] == b"\x80" and 2 <= head[1] <= 5:
        return "pickle"
    if head[8:9] == b"{" and 0 < int.from_bytes(head[:8], "little") <= min(size, 100 * 2**20):
        return "safetensors"
    if tarfile.is_tarfile(path):
        raise UserError(
            f"{path} is a tar archive: unpack it and name the checkpoint inside (PyTorch's own tar format of before "
            "2017 cannot be read without running code from the file; save it again with a newer PyTorch)."
        )
    if head.lstrip()[:1] == b"{":  # only here: a safetensors file may begin like this, too
        raise UserError(f"{path} is JSON text, not a checkpoint: name the file with the weights beside it.")
    raise UserError(f"{path} is no checkpoint, its first bytes are of no format that is known: check the path.")


_NOT_CHECKPOINTS = (
    (b"version https://git-lfs", "is a git-lfs pointer, not the file itself: run `git lfs pull` where it came from"),
    (b"<!doctype", "is an HTML page, not a checkpoint: the download went to a web page, fetch the file itself"),
    (b"<html", "is an HTML page, not a checkpoint: the download went to a web page, fetch the file itself"),
    (b"<?xml", "is an XML document (often a server's error message), not a checkpoint: download it again"),
    (b"\xff\xd8\xff", "is a JPEG picture, not a checkpoint: check the path"),
    (b"\x89png", "is a PNG picture, not a checkpoint: check the path"),
    (b"\x1f\x8b", "is compressed with gzip: unpack it first"),
    (b"\xfd7zxz", "is compressed with xz: unpack it first"),
    (b"\x89hdf", "is an HDF5 file (Keras): save its arrays as .npz or a PyTorch state dict first"),
)


def _sniff_zip(path: Path, size: int) -> Container:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        raise UserError(
            f"{path} is truncated or damaged (its table of contents is missing): download it again."
        ) from None
    unpacked = sum(member.file_size for member in members)
    if len(members) > MOST_MEMBERS or unpacked > max(SMALL_BYTES, MOST_RATIO * size) or unpacked > MOST_BYTES:
        raise UserError(
            f"{path} holds {size / 2**20:.0f} MiB that unpack to {unpacked / 2**20:.0f} MiB in {len(members)} parts: "
            "weights do not compress like that, so it is not read."
        )
    names = [member.filename for member in members]
    if any("/code/" in name for name in names):
        raise UserError(
            f"{path} is a TorchScript program, which holds code: save its state_dict() with torch.save instead."
        )
    if any(name.endswith("/data.pkl") or name == "data.pkl" for name in names):
        return "torch"
    if names and all(name.endswith(".npy") for name in names):
        return "npz"
    raise UserError(
        f"{path} is a zip archive without PyTorch's or numpy's parts: unpack it and name the checkpoint inside."
    )


def _read_torch(path: Path, container: Container) -> Any:
    import torch

    allowed = [(stand_in, name) for name, stand_in in standins.TORCH_EXTRAS.items()]
    try:
        with torch.serialization.safe_globals(allowed):  # type: ignore[arg-type]
            # Mapped, not read: a checkpoint with two encoders and an optimiser costs only what is used of it.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=container == "torch")
    except pickle.UnpicklingError as error:
        raise _refused(path, str(error)) from None
    except MemoryError:
        raise UserError(f"{path} does not fit into memory, or is damaged and claims sizes it does not have.") from None
    except Exception as error:  # whatever a damaged file makes a reader stumble over: it becomes one sentence
        raise UserError(f"{path} is truncated or damaged ({_first_line(error)}): download it again.") from None


def _refused(path: Path, message: str) -> UserError:
    for mark in ("Unsupported global: GLOBAL ", "unsupported GLOBAL "):
        if mark in message:
            name = message.partition(mark)[2].split()[0].rstrip(".,")
            return _refused_name(path, name)
    return UserError(
        f"{path} holds a pickle that may not be read safely ({message.splitlines()[0][:160]}): nothing of it was run; "
        "save its state dict alone with torch.save."
    )


def _refused_name(path: Path, name: str) -> UserError:
    return UserError(
        f"{path} asks for {name} to be loaded when it is read, which is not a harmless part of a checkpoint: nothing "
        "was run; if you trust its origin, save its state dict alone with torch.save."
    )


class _NumpyUnpickler(pickle.Unpickler):
    """Builds dictionaries, lists, numbers, strings and stand-ins; every other global is an error."""

    def find_class(self, module: str, name: str) -> Any:
        return standins.find_numpy(module, name)


def _read_pickle(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            # Latin-1, as numpy arrays of Python 2 need it (Caffe2's and Detectron's files).
            return _NumpyUnpickler(file, encoding="latin1").load()
    except LookupError as error:
        raise _refused_name(path, str(error.args[0])) from None
    except MemoryError:
        raise UserError(f"{path} does not fit into memory, or is damaged and claims sizes it does not have.") from None
    except Exception as error:  # see _read_torch
        raise UserError(f"{path} is truncated or damaged ({_first_line(error)}): download it again.") from None


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return load_file(path), metadata
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is truncated or damaged ({_first_line(error)}): download it again.") from None


def _read_npz(path: Path) -> dict[str, Any]:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except MemoryError:
        raise UserError(f"{path} does not fit into memory, or is damaged and claims sizes it does not have.") from None
    except Exception as error:  # see _read_torch
        if "allow_pickle" in str(error):
            raise UserError(
                f"{path} holds pickled objects besides arrays, which are not read: save plain arrays."
            ) from None
        raise UserError(f"{path} is truncated or damaged ({_first_line(error)}): download it again.") from None


def _plain(value: Any, path: Path) -> Any:
    """Stand-in arrays become tensors; what only settings hold stays opaque. Bounded in depth and size."""
    import numpy as np
    import torch

    nodes = 0

    def walk(value: Any, depth: int) -> Any:
        nonlocal nodes
        nodes += 1
        if nodes > MOST_NODES or depth > MOST_DEPTH:
            raise UserError(f"{path} nests its contents too deeply or too widely to be a checkpoint: it is not read.")
        if isinstance(value, torch.Tensor):
            return value.detach()
        if isinstance(value, standins.Array):
            try:
                value = value.numpy()
            except ValueError as error:
                raise UserError(f"{path} is damaged ({error}): download it again.") from None
        if isinstance(value, np.ndarray):
            # A copy: the array lies in the pickle's own read-only bytes.
            return torch.from_numpy(np.array(value)) if value.dtype.kind in "biuf" else None
        if isinstance(value, dict):
            return {key: walk(item, depth + 1) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [walk(item, depth + 1) for item in value]
        if isinstance(value, standins.Opaque) and isinstance(value.state, dict):
            value.state = {key: item for key, item in value.state.items() if isinstance(item, (int, float, str, bool))}
        return value

    return walk(value, 0)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return (text.splitlines()[0] if text else type(error).__name__)[:160].rstrip(".")
