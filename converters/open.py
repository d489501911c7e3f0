"""Opening a checkpoint without running anything from it: bytes → nested plain values with numpy's arrays.

The first bytes decide what a file is, never its ending. A pickle names classes and functions and says how to call them:
each allowed name stands for one of the inert objects below, which store what they are given (after a look at the
opcodes, contracts/pickles.py). Neither torch nor another library is imported; the arrays are mapped onto the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import mmap
import os
import pickle
import re
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from twist.contracts import files
from twist.contracts.errors import UserError
from twist.contracts.pickles import ENDS_EARLY, STREAM_MAGIC, check_file

if TYPE_CHECKING:
    import torch

Container = Literal["torch", "torch-stream", "pickle", "safetensors", "npz"]
# More than any published checkpoint; a file that claims more is damaged or meant to exhaust the machine.
MOST_BYTES = 32 * 2**30
# Weights hardly compress (ratios near 1.1): a file that unpacks to more than this is a bomb, small files apart.
MOST_RATIO = 20
SMALL_BYTES = 256 * 2**20
MOST_MEMBERS = 200_000
MOST_NODES, MOST_DEPTH = 2_000_000, 64


@dataclass(frozen=True)
class Contents:
    """What a file holds: nested dictionaries and lists of arrays, numbers and strings."""

    path: Path
    container: Container
    sha256: str
    value: Any
    metadata: dict[str, str] = field(default_factory=dict)  # safetensors' own
    # Settings beside the file, by name: solo-learn's args.json, a model hub's config.json.
    beside: dict[str, Any] = field(default_factory=dict)

    @property
    def hub(self) -> dict[str, Any]:
        """The config.json that timm writes next to a weights file; {} when there is none."""
        config = self.beside.get("config.json", {})
        sound = isinstance(config.get("architecture"), str) and isinstance(config.get("pretrained_cfg", {}), dict)
        return config if sound else {}


def as_torch(arrays: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Arrays as torch's tensors, which share their memory; bfloat16 becomes float32."""
    import torch

    return {name: torch.from_numpy(np.require(widened(array), requirements="A")) for name, array in arrays.items()}


def widened(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """bfloat16, which numpy has not (a field of that name), as float32; others as they are."""
    if array.dtype.names != ("bfloat16",):
        return array
    return (array["bfloat16"].astype(np.uint32) << 16).view(np.float32)


def read_contents(path: Path) -> Contents:
    """Read `path` safely.

    Raises:
        UserError: not a checkpoint, damaged, too large when unpacked, or it asks for code to be run. One sentence.
    """
    path = _file_in(Path(path))
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    container = _container(path)
    with ThreadPoolExecutor(1) as pool:  # hashing takes as long as the rest
        digest = pool.submit(files.sha256_file, path)
        try:
            value, metadata = _READERS[container](path)
            value = _plain(value, path)
        except UserError:
            raise
        except Exception as error:  # a damaged file makes a reader raise anything: it becomes one sentence
            raise _refusal(path, container, error) from None
    return Contents(path, container, digest.result(), value, metadata, _settings_beside(path))


def _file_in(path: Path) -> Path:
    """`path`, or the weights file of a model hub's folder; `UserError` for a folder of another kind."""
    if not path.is_dir():
        return path
    for name in ("model.safetensors", "pytorch_model.bin"):
        for file in (path / name, path / f"{name}.index.json"):
            if file.is_file():
                return file
    if (path / ".metadata").is_file():
        command = f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} {path.name}.pth"
        raise UserError(f"{path} is a folder of torch's distributed checkpoints: make one file of it with `{command}`.")
    raise UserError(
        f"{path} is a folder without a backbone.safetensors, model.safetensors or pytorch_model.bin: name the "
        "checkpoint file in it."
    )


def _read_shards(index: Path) -> Contents:
    """The state dict that an index (`weight_map`: tensor → file) spreads over several files of its own folder."""
    shards = files.read_json(index, remedy="download the folder again").get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{index} is no index of a sharded checkpoint: download the folder again.")
    if any(not isinstance(file, str) or Path(file).name != file for file in shards.values()):
        raise UserError(f"{index} names files outside its own folder: they are not read.")
    parts = [read_contents(index.parent / file) for file in sorted(set(shards.values()))]
    value = {name: tensor for part in parts for name, tensor in part.value.items()}
    digest = hashlib.sha256("".join(part.sha256 for part in parts).encode()).hexdigest()
    return Contents(index, parts[0].container, digest, value, {}, _settings_beside(index))


# Names of weights files whose folder holds nothing but one model, as the hubs have it.
_HUB_FILES = re.compile(r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")


def _settings_beside(path: Path) -> dict[str, Any]:
    """What programs write beside their checkpoints, by file name; a config.json only where the file is a hub's."""
    found = {}
    names = ("args.json", "config.json", "preprocessor_config.json")
    for name in names if _HUB_FILES.fullmatch(path.name) else names[:1]:
        with contextlib.suppress(UserError):  # of another program, or none
            found[name] = files.read_json(path.parent / name)
    return found


# ---- Which kind of file it is ----------------------------------------------------------------------------------------

# First bytes (lower case, after white space) of files that are mistaken for checkpoints, and what to do about them.
_NOT_CHECKPOINTS = {
    b"version https://git-lfs": "is a git-lfs pointer, not the file itself: run `git lfs pull` where it came from",
    b"<!doctype": "is an HTML page, not a checkpoint: the download went to a web page, fetch the file itself",
    b"<html": "is an HTML page, not a checkpoint: the download went to a web page, fetch the file itself",
    b"\x1f\x8b": "is compressed with gzip: unpack it first",
    b"\xfd7zxz": "is compressed with xz: unpack it first",
    b"\x89hdf": "is an HDF5 file (Keras): save its arrays as .npz or a PyTorch state dict first",
}


def _container(path: Path) -> Container:
    """The container by its first bytes; `UserError` for anything that is no checkpoint."""
    files.require_regular(path)
    with path.open("rb") as file:
        head, size = file.read(512), os.fstat(file.fileno()).st_size
    if not head:
        raise UserError(f"{path} is empty: download it again.")
    if size > MOST_BYTES:
        raise UserError(f"{path} is larger than {MOST_BYTES // 2**30} GiB, more than any checkpoint: check the file.")
    for magic, sentence in _NOT_CHECKPOINTS.items():
        if head.lstrip()[: len(magic)].lower() == magic:
            raise UserError(f"{path} {sentence}.")
    if head.startswith(b"PK\x03\x04"):
        return _zip_container(path, size)
    # Before the pickles: a header of 640 bytes begins as they do.
    if head[8:9] == b"{" and 0 < int.from_bytes(head[:8], "little") <= min(size, 100 * 2**20):
        return "safetensors"
    if head[:1] == b"\x80" and head[2:].startswith(STREAM_MAGIC):
        return "torch-stream"
    if head[:1] == b"\x80" and 2 <= head[1] <= 5:
        return "pickle"
    if tarfile.is_tarfile(path):
        raise UserError(
            f"{path} is a tar archive: unpack it and name the checkpoint inside (a PyTorch file of before 2017 cannot "
            "be read without running code from it; save it again with a newer PyTorch)."
        )
    raise UserError(f"{path} is no checkpoint, its first bytes are of no format that is known: check the path.")


def _zip_container(path: Path, size: int) -> Container:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        raise UserError(f"{path} is truncated or damaged (it has no table of contents): download it again.") from None
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


def _refusal(path: Path, container: Container, error: Exception) -> UserError:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0][:160].rstrip(".")
    if isinstance(error, AskedError):
        return UserError(
            f"{path} asks for {text} to be loaded when it is read, which is not a harmless part of a checkpoint: "
            "nothing was run; if you trust its origin, save its state dict alone with torch.save."
        )
    if isinstance(error, MemoryError):
        return UserError(f"{path} does not fit into memory, or is damaged and claims sizes it does not have.")
    if isinstance(error, pickle.UnpicklingError) and container != "pickle" and ENDS_EARLY not in text:
        return UserError(
            f"{path} holds a pickle that may not be read safely ({text}): nothing of it was run; save its state dict "
            "alone with torch.save."
        )
    if "allow_pickle" in text:
        return UserError(f"{path} holds pickled objects besides arrays, which are not read: save plain arrays.")
    return UserError(f"{path} is truncated or damaged ({text}): download it again.")


# ---- The readers -----------------------------------------------------------------------------------------------------

# torch's types of storages, and safetensors' types, by the name of the numbers in them.
_STORAGES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64",
    "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool", "ComplexFloat": "complex64",
    "ComplexDouble": "complex128", "QInt8": "qint8", "QUInt8": "quint8", "QInt32": "qint32", "Untyped": "uint8",
}  # fmt: skip
_SAFE = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
# Numbers that numpy has not, and their bytes: an array of them has one field of that name.
_OTHERS = {"bfloat16": 2, "qint32": 4} | dict.fromkeys(
    (
        "sparse",
        "qint8",
        "quint8",
        "float8_e4m3fn",
        "float8_e4m3fnuz",
        "float8_e5m2",
        "float8_e5m2fnuz",
        "float8_e8m0fnu",
    ),
    1,
)


def _dtype(name: str) -> np.dtype[Any]:
    return np.dtype([(name, f"<u{_OTHERS[name]}")]) if name in _OTHERS else np.dtype(name)


def _mapped(path: Path) -> np.ndarray[Any, Any]:
    """The bytes of a file; what is written there stays in memory."""
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:  # which checks every place and shape
        metadata = file.metadata() or {}
    whole = _mapped(path)
    begin = 8 + int.from_bytes(whole[:8].tobytes(), "little")
    header = json.loads(whole[8:begin].tobytes())
    header.pop("__metadata__", None)
    places = {name: [begin + at for at in entry["data_offsets"]] for name, entry in header.items()}
    return {
        name: whole[slice(*places[name])].view(_dtype(_SAFE[entry["dtype"]])).reshape(entry["shape"])
        for name, entry in header.items()
    }, metadata


def _read_npz(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as file:
                shape, _, dtype = read[min(np.lib.format.read_magic(file)[0], 2)](file)
                # An array may claim more numbers than it has, and numpy allocates them first.
                if math.prod(shape) * dtype.itemsize > member.file_size:
                    raise ValueError(f"an array of shape {shape} has {member.file_size} bytes")
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}, {}


def _read_pickle(path: Path) -> tuple[Any, dict[str, str]]:
    check_file(path)
    with path.open("rb") as file:
        # Latin-1, as numpy arrays of Python 2 need it (Caffe2's and Detectron's files).
        return _Unpickler(file, encoding="latin1").load(), {}


def _read_zip(path: Path) -> tuple[Any, dict[str, str]]:
    """torch's format since 1.6: a pickle, and a member for each storage."""
    check_file(path)
    whole = _mapped(path)
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: member for member in archive.infolist()}
        name = next(name for name in members if name.endswith("data.pkl"))
        folder = name.removesuffix("data.pkl")
        if f"{folder}byteorder" in members and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        unpickler = _Unpickler(io.BytesIO(archive.read(name)))
        value = unpickler.load()
        for key, storage in unpickler.storages.items():
            member = members[f"{folder}data/{key}"]
            if member.compress_type == zipfile.ZIP_STORED:
                # The lengths of name and extra field stand in the member's own header.
                lengths = whole[member.header_offset + 26 : member.header_offset + 30].view("<u2")
                begin = member.header_offset + 30 + int(lengths.sum())
                storage.bytes = whole[begin : begin + member.file_size]
            else:
                storage.bytes = np.frombuffer(bytearray(archive.read(member)), np.uint8)
    return value, {}


def _read_stream(path: Path) -> tuple[Any, dict[str, str]]:
    """torch's format of before: five pickles (magic, protocol, system, value, keys), then each storage's bytes."""
    check_file(path)
    whole = _mapped(path)
    with path.open("rb") as file:
        for _ in range(3):
            _Unpickler(file).load()
        unpickler = _Unpickler(file)
        value, keys, begin = unpickler.load(), _Unpickler(file).load(), file.tell()
    for storage in (unpickler.storages[key] for key in keys):
        end = begin + 8 + storage.count * _dtype(storage.dtype).itemsize
        storage.bytes = whole[begin + 8 : end]
        begin = end
    return value, {}


_READERS: dict[Container, Callable[[Path], tuple[Any, dict[str, str]]]] = {
    "safetensors": _read_safetensors,
    "npz": _read_npz,
    "pickle": _read_pickle,
    "torch": _read_zip,
    "torch-stream": _read_stream,
}


def _plain(value: Any, path: Path) -> Any:
    """Stand-ins become arrays, bounded in depth and size; objects of settings keep their simple values."""
    nodes = 0
    # One array for all its names: a copy for each of a thousand would fill the memory.
    arrays: dict[int, np.ndarray[Any, Any] | None] = {}

    def walk(value: Any, depth: int) -> Any:
        nonlocal nodes
        nodes += 1
        if nodes > MOST_NODES or depth > MOST_DEPTH:
            raise UserError(f"{path} nests its contents too deeply or too widely to be a checkpoint: it is not read.")
        if isinstance(value, (Array, Tensor)):
            if id(value) not in arrays:
                arrays[id(value)] = value.array()
            return arrays[id(value)]
        if isinstance(value, dict):
            return {key: walk(item, depth + 1) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [walk(item, depth + 1) for item in value]
        if isinstance(value, Opaque) and isinstance(value.state, dict):
            for key in ("_content", "_val"):  # omegaconf's containers and leaves
                if key in value.state:
                    return walk(value.state[key], depth + 1)
            value.state = {key: item for key, item in value.state.items() if isinstance(item, (int, float, str, bool))}
        return value

    return walk(value, 0)


# ---- What a pickle may build -----------------------------------------------------------------------------------------


class AskedError(pickle.UnpicklingError):
    """A pickle names something that is not harmless."""


class _Unpickler(pickle.Unpickler):
    """Builds dictionaries, lists, numbers, strings and the stand-ins below; every other global is an error."""

    def __init__(self, file: Any, **options: Any) -> None:
        super().__init__(file, **options)
        self.storages: dict[Any, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        whole = f"{module}.{name}".replace("__builtin__.", "builtins.")  # as protocol 2 has it
        if module == "torch" and (name in _OTHERS or name in _STORAGES.values()):
            return name
        if module in ("torch", "torch.storage") and name.removesuffix("Storage") in _STORAGES:
            return _STORAGES[name.removesuffix("Storage")]
        for pattern, stand_in in STAND_INS.items():
            if re.fullmatch(pattern, whole):
                return stand_in
        raise AskedError(whole)

    def persistent_load(self, saved: Any) -> Storage:
        kind, dtype, key, _location, count, *_view = saved
        if kind != "storage":
            raise ValueError(f"a {kind} in the place of a storage")
        return self.storages.setdefault(key, Storage(dtype, count))


@dataclass
class Storage:
    """The numbers of a tensor, or of several."""

    dtype: str
    count: int
    bytes: Any = None


class Tensor:
    """torch.Tensor: a storage, and where in it the values lie."""

    def __init__(self, storage: Any, offset: Any, size: Any, stride: Any, dtype: str | None = None) -> None:
        self.storage, self.offset, self.size, self.stride = storage, offset, tuple(size), tuple(stride)
        self.dtype = dtype or storage.dtype

    def array(self) -> np.ndarray[Any, Any]:
        dtype, data = _dtype(self.dtype), self.storage.bytes
        values = data[: len(data) // dtype.itemsize * dtype.itemsize].view(dtype)
        reach = self.offset + sum((side - 1) * step for side, step in zip(self.size, self.stride, strict=True)) + 1
        if min((self.offset, *self.size, *self.stride)) < 0 or (all(self.size) and reach > len(values)):
            raise ValueError(f"a tensor of shape {self.size} has {len(data)} bytes")
        steps = [step * dtype.itemsize for step in self.stride]
        return np.lib.stride_tricks.as_strided(values[self.offset :], self.size, steps)


class Opaque:
    """An object of a class without weights: settings, histories, paths. It keeps its state, as plain data."""

    def __new__(cls, *arguments: Any) -> Opaque:
        self = object.__new__(cls)
        self.state = arguments
        return self

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __hash__(self) -> int:
        return id(self)


class Dtype:
    """numpy.dtype of plain numbers; `numpy()` is None for any other."""

    def __init__(self, code: Any = "", *_: Any) -> None:
        self.code = code if isinstance(code, str) else ""
        self.order = "<"

    def __setstate__(self, state: Any) -> None:
        # numpy: (version, byte order, subtype, names, fields, item size, alignment[, flags])
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|", "="):
            self.order = state[1]

    def numpy(self) -> np.dtype[Any] | None:
        if not re.fullmatch(r"[<>|=]?(b1|[iuf][1248])", self.code):
            return None
        dtype = np.dtype(self.code)
        return dtype if self.order in "|=" else dtype.newbyteorder(">" if self.order == ">" else "<")


class Array:
    """numpy.ndarray by shape, dtype and bytes (numpy's own `__setstate__` trusts a hostile file's flags)."""

    def __init__(self, state: Any = None) -> None:
        self.state: tuple[Any, ...] = ()
        self.__setstate__(state)

    def __setstate__(self, state: Any) -> None:
        # numpy: (version, shape, dtype, is_fortran, bytes); before numpy 1.0 without the version.
        self.state = state[-4:] if isinstance(state, tuple) else ()

    def array(self) -> np.ndarray[Any, Any] | None:
        """The real array, or None when it does not hold numbers."""
        if len(self.state) != 4:
            return None
        shape, dtype, fortran, data = self.state
        dtype = dtype.numpy() if isinstance(dtype, Dtype) else None
        # Python 2 wrote the bytes as a string, which reads back as Latin-1.
        data = data.encode("latin1") if isinstance(data, str) else data
        if dtype is None or not isinstance(data, (bytes, bytearray)):
            return None
        if any(not isinstance(side, int) or side < 0 for side in shape) or math.prod(shape) * dtype.itemsize != len(
            data
        ):
            raise ValueError(f"an array of shape {shape} comes with {len(data)} bytes")
        array = np.frombuffer(data, dtype=dtype).reshape(shape, order="F" if fortran else "C")
        return array.astype(dtype.newbyteorder("="))  # a copy: the bytes are the pickle's own, and read-only


class Dictionary:
    """A dictionary class: `defaultdict(factory)`, haiku's FlatMapping(dict), or one that is filled later (addict)."""

    def __new__(cls, *arguments: Any) -> dict[Any, Any]:  # type: ignore[misc]
        given = next((argument for argument in arguments if isinstance(argument, (dict, list))), {})
        return OrderedDict(given)


class ByolState:
    """DeepMind's `_ByolExperimentState`, a named tuple of five fields."""

    def __new__(cls, *values: Any) -> dict[str, Any]:  # type: ignore[misc]
        return dict(zip(("online_params", "target_params", "online_state", "target_state", "opt_state"), values))


def _sequence(items: Any = (), *_: Any) -> list[Any]:
    return list(items) if isinstance(items, (list, tuple)) else []


def _rebuilt(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor:
    dtype = next((one for one in rest if isinstance(one, str)), None)  # of untyped storages
    return Tensor(storage, offset, size, stride, dtype)


def _rebuilt_from(function: Any, _type: Any, arguments: Any, *_: Any) -> Any:
    if function not in (_rebuilt, _first):
        raise ValueError("a tensor is not built from torch's parts")
    return function(*arguments)


def _first(value: Any, *_: Any) -> Any:
    return value  # a parameter is its tensor


def _no_values(*_: Any) -> Tensor:
    return Tensor(Storage("sparse", 0, np.zeros(0, np.uint8)), 0, (0,), (1,))  # or quantised, or on the meta device


def _reconstruct(*_: Any) -> Array:
    return Array()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> Array:
    return Array((shape, dtype, order == "F", data))


def _scalar(dtype: Any, data: Any = b"", *_: Any) -> Any:
    value = Array(((), dtype, False, data)).array()
    return None if value is None else value.item()


def _from_jax(function: Any, _arguments: Any, state: Any, *_: Any) -> Array:
    # jax pickles an array as numpy's own recipe plus its abstract value; the recipe must be our own stand-in.
    if function is not _reconstruct:
        raise ValueError("a jax array is not built from numpy's parts")
    return Array(state)


def _no_bytes(*_: Any) -> bytes:
    return b""  # how protocol 2 writes empty bytes; others come through _codecs.encode


def _latin1_bytes(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise ValueError("bytes in an encoding other than Latin-1")
    return text.encode("latin1")


# Qualified names (a regular expression) → what each stands for.
STAND_INS: dict[str, Any] = {
    r"torch\._utils\._rebuild_tensor(_v[23])?": _rebuilt,
    r"torch\._tensor\._rebuild_from_type_v2": _rebuilt_from,
    r"torch\._utils\._rebuild_parameter(_with_state)?|torch\.nn\.parameter\.Parameter": _first,
    r"torch\._utils\._rebuild_(sparse_tensor|sparse_csr_tensor|qtensor|meta_tensor_no_storage)": _no_values,
    r"numpy\._?core\.multiarray\._reconstruct": _reconstruct,
    r"numpy\._?core\.multiarray\.scalar": _scalar,
    r"numpy\._?core\.numeric\._frombuffer": _from_buffer,
    r"numpy\.ndarray": Array,
    r"numpy\.dtype": Dtype,
    r"_codecs\.encode": _latin1_bytes,
    r"builtins\.bytes": _no_bytes,
    r"collections\.deque|torch\.Size": _sequence,
    # The module of BYOL's state depends on how its authors started the program.
    r"([\w.]+\.)?_ByolExperimentState": ByolState,
    r"jax[\w.]*\.(_reconstruct_array|reconstruct_device_array)": _from_jax,
    # Settings and other dictionaries of mmengine, detectron2, fvcore, yacs, addict, vissl, Lightning and haiku.
    r"collections\.(OrderedDict|Counter|defaultdict)|addict\.addict\.Dict|haiku\._src\.data_structures\.\w+"
    r"|[a-z0-9_.]+\.(ConfigDict|CfgNode|AttrDict|AttributeDict)": Dictionary,
    # What programs keep beside their weights; mmengine's histories name their methods with `getattr`.
    r"argparse\.Namespace|typing\.Any|builtins\.(dict|list|int|long|str|float|bool|complex|set|getattr)|omegaconf\.[\w.]+"
    r"|mmengine\.logging\.[\w.]+|pathlib\.\w+|datetime\.\w+|numpy\.random\.mtrand\.RandomState|optax\.[\w.]+"
    r"|byol\.utils\.optimizers\.\w+|torch\.(device|Tensor|nn\.parameter\.Buffer|serialization\._get_layout)": Opaque,
}
