"""Opening a checkpoint file without running anything from it: bytes → nested plain values with tensors.

torch files (zip and the older stream) are read by torch's `weights_only` unpickler, Detectron2's and haiku's pickles by
a restricted one, both after a look at their opcodes (contracts/pickles.py); safetensors and npz hold no code. The first
bytes decide, never the file's ending.

A pickle names classes and functions and says how to call them. Here each allowed name stands for one of the inert
objects below, which store what they are given: no code of a library or of the file runs, and none of those libraries
has to be installed. numpy's arrays are rebuilt from shape, dtype and bytes, too, because numpy's own `__setstate__`
trusts a hostile file's flags.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import pickle
import re
import tarfile
import zipfile
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from twist.contracts import files
from twist.contracts.errors import UserError
from twist.contracts.files import sha256_file
from twist.contracts.pickles import ENDS_EARLY, STREAM_MAGIC, check_file, load_torch

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
    """What a file holds: nested dictionaries and lists of tensors, numbers and strings."""

    path: Path
    container: Container
    sha256: str
    value: Any
    metadata: dict[str, str] = field(default_factory=dict)  # safetensors' own
    hub: dict[str, Any] = field(default_factory=dict)  # timm's config.json in the same folder
    # Settings beside the file, by name: solo-learn's args.json, a model hub's config.json.
    beside: dict[str, Any] = field(default_factory=dict)


def read_contents(path: Path) -> Contents:
    """Read `path` safely.

    Raises:
        UserError: not a checkpoint, damaged, too large when unpacked, or it asks for code to be run. One sentence.
    """
    path = _file_in(Path(path))
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    container = _container(path)
    metadata: dict[str, str] = {}
    try:
        if container == "safetensors":
            from safetensors import safe_open
            from safetensors.torch import load_file

            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
            value = load_file(path)
        elif container == "npz":
            _check_arrays(path)
            with np.load(path, allow_pickle=False) as arrays:
                value = {name: arrays[name] for name in arrays.files}
        elif container == "pickle":
            check_file(path)
            with path.open("rb") as file:
                # Latin-1, as numpy arrays of Python 2 need it (Caffe2's and Detectron's files).
                value = _Unpickler(file, encoding="latin1").load()
        else:
            # Mapped, not read: of a checkpoint with two encoders and an optimiser only what is used is read.
            allowed = [(stand_in, name) for name, stand_in in TORCH_GLOBALS.items()]
            value = load_torch(path, allowed=allowed, mapped=container == "torch")
        value = _plain(value, path)
    except UserError:
        raise
    except Exception as error:  # a damaged file makes a reader raise anything: it becomes one sentence
        raise _refusal(path, container, error) from None
    return Contents(path, container, sha256_file(path), value, metadata, _hub_settings(path), _settings_beside(path))


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
    missing = [name for name in shards if name not in value]
    if missing:
        raise UserError(
            f"{index.parent} lacks {len(missing)} tensors of its index (first: {missing[0]}): download it again."
        )
    digest = hashlib.sha256("".join(part.sha256 for part in parts).encode()).hexdigest()
    return Contents(index, parts[0].container, digest, value, {}, {}, _settings_beside(index))


# First bytes (lower case, after white space) of files that are mistaken for checkpoints, and what to do about them.
_NOT_CHECKPOINTS = (
    (b"version https://git-lfs", "is a git-lfs pointer, not the file itself: run `git lfs pull` where it came from"),
    (b"<!doctype", "is an HTML page, not a checkpoint: the download went to a web page, fetch the file itself"),
    (b"<html", "is an HTML page, not a checkpoint: the download went to a web page, fetch the file itself"),
    (b"<?xml", "is an XML document (often a server's error message), not a checkpoint: download it again"),
    (b"\x1f\x8b", "is compressed with gzip: unpack it first"),
    (b"\xfd7zxz", "is compressed with xz: unpack it first"),
    (b"\x89hdf", "is an HDF5 file (Keras): save its arrays as .npz or a PyTorch state dict first"),
)


def _container(path: Path) -> Container:
    """The container by its first bytes; `UserError` for anything that is no checkpoint."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no regular file: copy its contents into one first.")
    try:
        with path.open("rb") as file:
            head = file.read(512)
        size = path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"There is no checkpoint at {path}: check the path.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be opened ({error.strerror}): check its permissions.") from None
    if not head:
        raise UserError(f"{path} is empty: download it again.")
    if size > MOST_BYTES:
        raise UserError(f"{path} is larger than {MOST_BYTES // 2**30} GiB, more than any checkpoint: check the file.")
    for magic, sentence in _NOT_CHECKPOINTS:
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


def _check_arrays(path: Path) -> None:
    """`ValueError` where an array of an npz claims more numbers than it has: numpy allocates them first."""
    read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as file:
                shape, _, dtype = read[min(np.lib.format.read_magic(file)[0], 2)](file)
                if math.prod(shape) * dtype.itemsize > member.file_size:
                    raise ValueError(f"an array of shape {shape} has {member.file_size} bytes")


def _refusal(path: Path, container: Container, error: Exception) -> UserError:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0][:160].rstrip(".")
    asked = re.search(r"unsupported global: GLOBAL (\S+)|unsupported GLOBAL (\S+)", str(error), re.IGNORECASE)
    if asked:
        name = (asked[1] or asked[2]).rstrip(".,")
        return UserError(
            f"{path} asks for {name} to be loaded when it is read, which is not a harmless part of a checkpoint: "
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


def _hub_settings(path: Path) -> dict[str, Any]:
    """The config.json that timm writes next to a weights file; {} when there is none."""
    config = _settings_beside(path).get("config.json", {})
    sound = isinstance(config.get("architecture"), str) and isinstance(config.get("pretrained_cfg", {}), dict)
    return config if sound else {}


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


def _plain(value: Any, path: Path) -> Any:
    """Stand-in arrays become tensors, bounded in depth and size; objects of settings keep their simple values."""
    import torch

    nodes = 0
    # One tensor for all names of an array: a copy for each of a thousand would fill the memory.
    copies: dict[int, torch.Tensor | None] = {}

    def walk(value: Any, depth: int) -> Any:
        nonlocal nodes
        nodes += 1
        if nodes > MOST_NODES or depth > MOST_DEPTH:
            raise UserError(f"{path} nests its contents too deeply or too widely to be a checkpoint: it is not read.")
        if isinstance(value, torch.Tensor):
            return value.detach()
        if isinstance(value, (Array, np.ndarray)):
            if id(value) not in copies:
                array = value.numpy() if isinstance(value, Array) else value
                # A copy: the array lies in the pickle's own read-only bytes.
                plain = array is not None and array.dtype.kind in "biuf"
                copies[id(value)] = torch.from_numpy(np.array(array)) if plain else None
            return copies[id(value)]
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


class _Unpickler(pickle.Unpickler):
    """Builds dictionaries, lists, numbers, strings and the stand-ins below; every other global is an error."""

    def find_class(self, module: str, name: str) -> Any:
        # The module of BYOL's state depends on how its authors started the program; the stand-in is inert anyway.
        if name == "_ByolExperimentState":
            return ByolState
        if f"{module}.{name}" not in PICKLE_GLOBALS:
            raise pickle.UnpicklingError(f"unsupported GLOBAL {module}.{name}")
        return PICKLE_GLOBALS[f"{module}.{name}"]


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
    """numpy.ndarray: shape, dtype and bytes; `numpy()` is the real array, or None when it does not hold numbers."""

    def __init__(self, state: Any = None) -> None:
        self.state: tuple[Any, ...] = ()
        self.__setstate__(state)

    def __setstate__(self, state: Any) -> None:
        # numpy: (version, shape, dtype, is_fortran, bytes); before numpy 1.0 without the version.
        self.state = state[-4:] if isinstance(state, tuple) else ()

    def numpy(self) -> np.ndarray[Any, Any] | None:
        if len(self.state) != 4:
            return None
        shape, dtype, fortran, data = self.state
        dtype = dtype.numpy() if isinstance(dtype, Dtype) else None
        # Python 2 wrote the bytes as a string, which reads back as Latin-1.
        data = data.encode("latin1") if isinstance(data, str) else data
        if dtype is None or not isinstance(data, (bytes, bytearray)):
            return None
        if not all(isinstance(side, int) and side >= 0 for side in shape):
            raise ValueError(f"an array has the impossible shape {shape}")
        count = int(np.prod(shape, dtype=object)) if shape else 1
        if count * dtype.itemsize != len(data):
            raise ValueError(f"an array of shape {shape} comes with {len(data)} bytes")
        array = np.frombuffer(data, dtype=dtype).reshape(shape, order="F" if fortran else "C")
        return array.astype(dtype.newbyteorder("="), copy=False)


class ByolState:
    """DeepMind's `_ByolExperimentState`, a named tuple of five fields."""

    FIELDS = ("online_params", "target_params", "online_state", "target_state", "opt_state")

    def __new__(cls, *values: Any) -> dict[str, Any]:  # type: ignore[misc]
        return dict(zip(cls.FIELDS, values))


class Mapping:
    """A dictionary class: `defaultdict(factory)`, haiku's FlatMapping(dict), or one that is filled later (addict)."""

    def __new__(cls, *arguments: Any) -> dict[Any, Any]:  # type: ignore[misc]
        given = next((argument for argument in arguments if isinstance(argument, (dict, list))), {})
        return OrderedDict(given)


def _sequence(items: Any = (), *_: Any) -> list[Any]:
    return list(items) if isinstance(items, (list, tuple)) else []


def _reconstruct(*_: Any) -> Array:
    return Array()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> Array:
    return Array((shape, dtype, order == "F", data))


def _scalar(dtype: Any, data: Any = b"", *_: Any) -> Any:
    value = Array(((), dtype, False, data)).numpy()
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


def _names(stand_in: Any, text: str) -> dict[str, Any]:
    return dict.fromkeys(text.split(), stand_in)


# Qualified name → stand-in. numpy 2 moved `numpy.core` to `numpy._core`.
_NUMPY: dict[str, Any] = {
    **_names(_reconstruct, "numpy.core.multiarray._reconstruct numpy._core.multiarray._reconstruct"),
    **_names(_scalar, "numpy.core.multiarray.scalar numpy._core.multiarray.scalar"),
    **_names(_from_buffer, "numpy.core.numeric._frombuffer numpy._core.numeric._frombuffer"),
    "numpy.ndarray": Array,
    "numpy.dtype": Dtype,
}

# Of torch files: harmless things that training programs save next to their tensors.
TORCH_GLOBALS: dict[str, Any] = {
    **_NUMPY,
    **_names(
        Opaque,
        "argparse.Namespace typing.Any builtins.dict builtins.list builtins.int builtins.str builtins.float "
        "builtins.bool builtins.complex builtins.set omegaconf.dictconfig.DictConfig omegaconf.listconfig.ListConfig "
        "builtins.getattr "  # mmengine's histories name their methods with it
        "omegaconf.base.ContainerMetadata omegaconf.base.Metadata omegaconf.nodes.AnyNode omegaconf.nodes.IntegerNode "
        "omegaconf.nodes.StringNode omegaconf.nodes.FloatNode omegaconf.nodes.BooleanNode "
        "mmengine.logging.history_buffer.HistoryBuffer mmengine.logging.message_hub.MessageHub "
        "pathlib.PosixPath pathlib.Path pathlib.PurePosixPath datetime.datetime datetime.timedelta "
        "numpy.random.mtrand.RandomState",
    ),
    **_names(_sequence, "collections.deque"),
    **_names(
        Mapping,
        "collections.defaultdict addict.addict.Dict mmengine.config.config.ConfigDict mmcv.utils.config.ConfigDict "
        "yacs.config.CfgNode fvcore.common.config.CfgNode detectron2.config.config.CfgNode "
        "vissl.config.attr_dict.AttrDict pytorch_lightning.utilities.parsing.AttributeDict "
        "lightning.pytorch.utilities.parsing.AttributeDict lightning.fabric.utilities.data.AttributeDict "
        "lightning_fabric.utilities.data.AttributeDict",
    ),
}

# Of plain pickles: numpy's data, and DeepMind's BYOL (haiku mappings, jax arrays, optimiser states).
PICKLE_GLOBALS: dict[str, Any] = {
    **_NUMPY,
    "_codecs.encode": _latin1_bytes,
    **_names(_no_bytes, "__builtin__.bytes builtins.bytes"),
    **_names(
        Mapping,
        "collections.OrderedDict haiku._src.data_structures.FlatMapping haiku._src.data_structures.FlatMap "
        "haiku._src.data_structures.frozendict",
    ),
    **_names(
        _from_jax,
        "jax._src.array._reconstruct_array jax._src.device_array.reconstruct_device_array "
        "jax.interpreters.xla._reconstruct_array",
    ),
    **_names(
        Opaque,
        "byol.utils.optimizers.ScaleByLarsState byol.utils.optimizers.AddWeightDecayState "
        "optax._src.base.EmptyState optax._src.transform.EmptyState optax._src.transform.ScaleState "
        "optax._src.base.IdentityState optax._src.transform.IdentityState optax.EmptyState",
    ),
}
