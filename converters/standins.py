"""Inert stand-ins for the globals that real checkpoints name: what a restricted unpickler may build, and nothing else.

A pickle names classes and functions and says how to call them. Here every name that is allowed leads to one of the
few objects below, which store what they are given; no code of a library or of the file ever runs, and none of those
libraries needs to be installed. numpy too: an array is rebuilt from its shape, its kind and its bytes, because
numpy's own `__setstate__` believes a hostile file's flags.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

_NUMBER = re.compile(r"[<>|=]?(b1|[iuf][1248])")
_MOST_BYTES = 16 * 2**30


class Opaque:
    """An object of a class that carries no weights: settings, histories, paths. It keeps its state, as plain data."""

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


class NumberKind:
    """numpy.dtype of plain numbers; anything else is remembered as having none."""

    def __init__(self, code: Any = "", *_: Any) -> None:
        self.code = code if isinstance(code, str) else ""
        self.order = "<"

    def __setstate__(self, state: Any) -> None:
        # numpy: (version, byte order, subtype, names, fields, item size, alignment[, flags])
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|", "="):
            self.order = state[1]

    def numpy(self) -> np.dtype[Any] | None:
        if not _NUMBER.fullmatch(self.code):
            return None
        kind = np.dtype(self.code)
        return kind if self.order in "|=" else kind.newbyteorder(">" if self.order == ">" else "<")


class Array:
    """numpy.ndarray: shape, kind and bytes; `numpy()` gives the real array, or None when it does not hold numbers."""

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self.kind: Any = None
        self.fortran = False
        self.data: Any = b""

    def __setstate__(self, state: Any) -> None:
        # numpy: (version, shape, dtype, is_fortran, bytes); before numpy 1.0 without the version.
        fields = state[-4:] if isinstance(state, tuple) else ()
        if len(fields) == 4:
            self.shape, self.kind, self.fortran, self.data = fields

    def numpy(self) -> np.ndarray[Any, Any] | None:
        kind = self.kind.numpy() if isinstance(self.kind, NumberKind) else None
        # Python 2 wrote the bytes as a string, which reads back as Latin-1.
        data = self.data.encode("latin1") if isinstance(self.data, str) else self.data
        if kind is None or not isinstance(data, (bytes, bytearray)):
            return None
        if not all(isinstance(side, int) and side >= 0 for side in self.shape):
            raise ValueError(f"an array has the impossible shape {self.shape}")
        count = int(np.prod(self.shape, dtype=object)) if self.shape else 1
        if count * kind.itemsize != len(data) or len(data) > _MOST_BYTES:
            raise ValueError(f"an array of shape {self.shape} comes with {len(data)} bytes")
        array = np.frombuffer(data, dtype=kind).reshape(self.shape, order="F" if self.fortran else "C")
        return array.astype(kind.newbyteorder("="), copy=False)


class ByolState:
    """DeepMind's `_ByolExperimentState`, a named tuple of five fields."""

    FIELDS = ("online_params", "target_params", "online_state", "target_state", "opt_state")

    def __new__(cls, *values: Any) -> dict[str, Any]:  # type: ignore[misc]
        return dict(zip(cls.FIELDS, values))


def _mapping(*arguments: Any, **_: Any) -> dict[Any, Any]:
    """A dictionary-like class: `defaultdict(factory)`, haiku's FlatMapping(dict), OrderedDict(pairs)."""
    given = next((argument for argument in arguments if isinstance(argument, (dict, list))), {})
    return OrderedDict(given)


class Mapping:
    """The same for classes that are made by `__new__` and filled afterwards (addict.Dict, ConfigDict, CfgNode)."""

    def __new__(cls, *arguments: Any) -> dict[Any, Any]:  # type: ignore[misc]
        return _mapping(*arguments)


def _sequence(items: Any = (), *_: Any) -> list[Any]:
    return list(items) if isinstance(items, (list, tuple)) else []


def _reconstruct(*_: Any) -> Array:
    return Array()


def _from_buffer(data: Any, kind: Any, shape: Any, order: Any) -> Array:
    array = Array()
    array.__setstate__((1, shape, kind, order == "F", data))
    return array


def _scalar(kind: Any, data: Any = b"", *_: Any) -> Any:
    array = Array()
    array.__setstate__((1, (), kind, False, data))
    value = array.numpy()
    return None if value is None else value.item()


def _from_jax(function: Any, _arguments: Any, state: Any, *_: Any) -> Array:
    # jax pickles an array as numpy's own recipe plus its abstract value; the recipe must be our own stand-in.
    if function is not _reconstruct:
        raise ValueError("a jax array is not built from numpy's parts")
    array = Array()
    array.__setstate__(state)
    return array


def _no_bytes(*_: Any) -> bytes:
    return b""  # how protocol 2 writes empty bytes; others come through _codecs.encode


def _latin1_bytes(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise ValueError("bytes in an encoding other than Latin-1")
    return text.encode("latin1")


def _names(stand_in: Any, text: str) -> dict[str, Any]:
    return dict.fromkeys(text.split(), stand_in)


# Qualified name → stand-in. numpy 2 moved `numpy.core` to `numpy._core`.
NUMPY: dict[str, Any] = {
    **_names(_reconstruct, "numpy.core.multiarray._reconstruct numpy._core.multiarray._reconstruct"),
    **_names(_scalar, "numpy.core.multiarray.scalar numpy._core.multiarray.scalar"),
    **_names(_from_buffer, "numpy.core.numeric._frombuffer numpy._core.numeric._frombuffer"),
    "numpy.ndarray": Array,
    "numpy.dtype": NumberKind,
    "_codecs.encode": _latin1_bytes,
    **_names(_no_bytes, "__builtin__.bytes builtins.bytes"),
    "collections.OrderedDict": _mapping,
}

# Harmless things that torch files of the field hold beside their tensors.
TORCH_EXTRAS: dict[str, Any] = {
    **{name: value for name, value in NUMPY.items() if name.startswith("numpy.")},
    **_names(
        Opaque,
        "argparse.Namespace typing.Any builtins.dict builtins.list builtins.int builtins.str builtins.float "
        "builtins.bool builtins.complex builtins.set omegaconf.dictconfig.DictConfig omegaconf.listconfig.ListConfig "
        "omegaconf.base.ContainerMetadata omegaconf.base.Metadata omegaconf.nodes.AnyNode omegaconf.nodes.IntegerNode "
        "omegaconf.nodes.StringNode omegaconf.nodes.FloatNode omegaconf.nodes.BooleanNode "
        "mmengine.logging.history_buffer.HistoryBuffer mmengine.logging.message_hub.MessageHub "
        "pathlib.PosixPath pathlib.Path pathlib.PurePosixPath datetime.datetime datetime.timedelta "
        "numpy.random.mtrand.RandomState",
    ),
    **_names(_sequence, "collections.deque"),
    **_names(_mapping, "collections.defaultdict"),
    **_names(
        Mapping,
        "addict.addict.Dict mmengine.config.config.ConfigDict mmcv.utils.config.ConfigDict yacs.config.CfgNode "
        "fvcore.common.config.CfgNode detectron2.config.config.CfgNode vissl.config.attr_dict.AttrDict "
        "pytorch_lightning.utilities.parsing.AttributeDict lightning.pytorch.utilities.parsing.AttributeDict "
        "lightning.fabric.utilities.data.AttributeDict lightning_fabric.utilities.data.AttributeDict",
    ),
}

# BYOL's pickle: haiku mappings, jax arrays, optimiser states (dropped anyway).
HAIKU: dict[str, Any] = {
    **_names(
        _mapping,
        "haiku._src.data_structures.FlatMapping haiku._src.data_structures.FlatMap "
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


def find_numpy(module: str, name: str) -> Callable[..., Any] | type:
    """The stand-in for `module.name` in a pickle of numpy or haiku data; `LookupError` names what is refused."""
    qualified = f"{module}.{name}"
    # The module of BYOL's state depends on how its authors started the program; the class is our own either way.
    if name == "_ByolExperimentState":
        return ByolState
    found = NUMPY.get(qualified) or HAIKU.get(qualified)
    if found is None:
        raise LookupError(qualified)
    return found
