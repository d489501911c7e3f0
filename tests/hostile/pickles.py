"""Pickles written by hand, opcode by opcode: what a stranger's checkpoint may hold, bare or inside another format.

Opcodes are those of `pickletools`; `\x80\x02` opens protocol 2, and `.` ends the pickle.
"""

import io
import os
import pickle
import struct
from collections.abc import Iterator
from functools import cache, partial
from itertools import starmap
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from cases import ESCAPES, TOUCH, Case, damaged
from checkpoint_files import flat_tensors, forget_byol, write_haiku

inspected = partial(Case, file="x.pth", command=("inspect", "x.pth"))


class Payload:
    """Runs a command when a careless reader builds it."""

    def __reduce__(self) -> Any:
        return os.system, (TOUCH,)


def raw(pickled: bytes) -> bytes:
    return b"\x80\x02" + pickled + b"."


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def tuple_of(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def table(**entries: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in entries.items()) + b"u"


def call(module: str, name: str, *arguments: bytes) -> bytes:
    return named(module, name) + tuple_of(*arguments) + b"R"


def rebuilt(
    sides: tuple[int, ...], strides: tuple[int, ...], numbers: int, *, offset: int = 0, view: bytes = b""
) -> bytes:
    """A tensor of torch's own recipe on storage 0, that claims to hold `numbers` numbers."""
    identity = tuple_of(text("storage"), named("torch", "FloatStorage"), text("0"), text("cpu"), integer(numbers), view)
    shape = (tuple_of(*map(integer, each)) for each in (sides, strides))
    hooks = call("collections", "OrderedDict")
    return call("torch._utils", "_rebuild_tensor_v2", identity + b"Q", integer(offset), *shape, b"\x89", hooks)


@cache
def bombs() -> dict[str, bytes]:
    """Pickles without protocol and end that cost their reader far more than they weigh, or that end a careless one."""
    # Each list holds the one before twice: 2^60 leaves in 300 bytes.
    doubled = b"".join(b"](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(60))
    memo = partial(struct.pack, "<cI", b"r")
    return {
        "key of 200,000 tuples": b"})" + b"\x85" * 200_000 + b"Ns",
        "key of 2,000 tuples": b"})" + b"\x85" * 2_000 + b"Ns",
        "frozen set of 200,000 tuples": b"(" + b")" + b"\x85" * 200_000 + b"\x91",
        **{f"memo of 2^{power}": b"}" + memo(2**power) for power in (27, 31)},
        "memo in text of 10^15": b"}p1000000000000000\n",
        "memo of 2^27, read": b"}" + memo(2**27) + struct.pack("<cI", b"j", 2**27) + b"0",
        "2,000 tuples": b")" + b"\x85" * 2_000,
        "200,000 lists": b"]" * 200_000 + b"a" * 199_999,
        "200,000 tables": (b"}" + text("a")) * 200_000 + b"N" + b"s" * 200_000,
        "list in itself": b"]q\x00h\x00a",
        "table in itself": b"}q\x00" + text("a") + b"h\x00s",
        "2^60 leaves": b"]q\x00" + doubled,
        "3 million numbers": b"](" + b"K\x01" * 3_000_000 + b"e",
        "3 million marks": b"}" + b"(" * 3_000_000,
        "a number of 2 million digits": b"I" + b"9" * 2_000_000 + b"\n",
        "a long of 2 million digits": b"L" + b"9" * 2_000_000 + b"L\n",
        **{f"a long of {size} bytes": b"\x8b" + struct.pack("<i", size) + b"\x01" for size in (2**31 - 1, -1)},
        "a text of 2^32 bytes": b"X" + struct.pack("<I", 2**32 - 1) + b"a",
        **{f"{code!r} of 2^{power}": code + struct.pack("<Q", 2**power) + b"a"
           for code in (b"\x8d", b"\x8e", b"\x96", b"\x95") for power in (33, 62)},
        **{f"unsound {code!r}": code
           for code in (b"", b"a", b"}u", b"KaKbKcs", b"]Nb", b"Ka)R", b"h\x07", b"}0", b"\x82\x01", b"Pid\n")},
        **calls(),
    }  # fmt: skip


def in_torch() -> dict[str, bytes]:
    """Of the bombs, which are all looked at in the same way, every third; of the calls, which torch judges too, all."""
    return dict([*bombs().items()][::3]) | calls()


def calls() -> dict[str, bytes]:
    """Calls of what readers let through, and of what they must not."""
    huge, one = tuple_of(integer(2**40), integer(2**40)), tuple_of(integer(1), integer(1))
    array = call("numpy.core.multiarray", "_reconstruct", named("numpy", "ndarray"), b"K\x00\x85", b"U\x01b")
    state = tuple_of(b"K\x01", huge, call("numpy", "dtype", text("f4")), b"\x89", b"U\x01b")
    meta = call("torch._utils", "_rebuild_meta_tensor_no_storage", named("torch", "float32"), huge, one, b"\x89")
    return {
        **{f"bytearray of 2^{power}": call("builtins", "bytearray", integer(2**power)) for power in (31, 35)},
        "another encoding": call("_codecs", "encode", text("a" * 1000), text("evil")),
        "ordered table of a number": call("collections", "OrderedDict", b"K\x01"),
        "an array of no tuple": named("numpy.core.multiarray", "_reconstruct") + b"NR",
        "an array of 2^80": table(a=array + state + b"b"),
        "size of 2^62": call("torch", "Size", tuple_of(integer(2**62))),
        "a tensor without storage": table(a=meta),
        **{f"{module}.system": call(module, "system", text(TOUCH)) for module in ("os", "posix")},
        "eval": call("builtins", "eval", text(f"__import__('os').system('{TOUCH}')")),
        "an instance of Popen": b"(" + text(TOUCH) + b"isubprocess\nPopen\n",
        "an object of Popen": b"(" + named("subprocess", "Popen") + text(TOUCH) + b"o",
        "a new Path": named("pathlib", "PosixPath") + tuple_of(text("a")) + b"\x81",
        "a name from the stack": text("os") + text("system") + b"\x93" + tuple_of(text(TOUCH)) + b"R",
        "a global with escapes": named(f"{ESCAPES}os", "system\x07"),
    }


def strange_names() -> dict[str, dict[Any, Any]]:
    """State dicts of sound tensors whose names nobody prints, sorts or splits safely."""
    names: dict[str, list[Any]] = {
        "lone surrogates": ["\ud800.weight", "layer1.\udfff"],
        "escape sequences": [f"{ESCAPES}.weight"],
        "NUL and line feeds": ["a\0b\nc\rd.weight"],
        "a megabyte of name": ["a." * 500_000],
        "no text": [1, None, 2.5, (1, 2), b"b"],
        "text and numbers": ["conv1.weight", 7],
        "not a number": [float("nan"), "a"],
        "10,000 names": [f"layer{i}.weight" for i in range(10_000)],
        "a deep name": ["module." * 20_000 + "conv1.weight"],
        "empty name": [""],
    }
    return {name: dict.fromkeys(keys, np.ones((2, 2), np.float32)) for name, keys in names.items()}


def shared_array(count: int = 1000) -> bytes:
    array = np.ones(2_000_000, np.float32)  # 8 MB
    return pickle.dumps({"model": {f"layer{i}.weight": array for i in range(count)}}, protocol=2)


def bare_pickles() -> Iterator[Case]:
    """Detectron2's and Caffe2's format, and whatever else begins like a pickle."""
    yield from starmap(inspected, ((name, raw(pickled)) for name, pickled in bombs().items()))
    for name, names in strange_names().items():
        yield inspected(name, pickle.dumps({"model": names}, protocol=4))
        yield inspected(name, pickle.dumps({"model": names}, protocol=4), command=("inspect", "x.pth", "--json"))
    good = pickle.dumps({"model": {"conv1.weight": np.ones((64, 3, 7, 7), np.float32)}}, protocol=2)
    values = {"epoch": 10**1000, "method": "x" * 2**20, "model": {"conv1.weight": np.ones(3, np.float32)}}
    files = {
        "payload": pickle.dumps({"model": Payload()}, protocol=2),
        "a thousand names of one array": shared_array(),
        "an epoch of 1,000 digits": pickle.dumps(values, protocol=2),
        **{f"protocol {protocol}": b"\x80" + bytes([protocol]) + b"}." for protocol in (0, 1, 6, 200)},
        **damaged(good, 12, 0.01, 0.5, 0.999, within=400),
    }
    yield from starmap(inspected, files.items())


def haiku_pickles() -> Iterator[Case]:
    """DeepMind's BYOL: nested mappings by reference to modules that no reader has."""
    mapping = partial(call, "haiku._src.data_structures", "FlatMapping")
    from_jax = partial(call, "jax._src.array", "_reconstruct_array")

    def experiment(*values: bytes) -> bytes:
        state = call("byol.byol_experiment", "_ByolExperimentState", *values)
        return raw(table(experiment_state=state, step=integer(1)))

    itself = b"}q\x00" + text("a") + b"h\x00s"
    five = {
        "mapping of a number": mapping(b"K\x01"), "networks that are lists": b"]", "networks that are text": text("a"),
        "modules that are numbers": b"}(K\x01K\x02u", "leaves that are no table": table(a=b"K\x01"),
        "leaves that are texts": table(a=text("b")), "a deep module": table(**{"a/" * 100_000: table(w=b"N")}),
    }  # fmt: skip
    files = {
        **{name: experiment(*[value] * 5) for name, value in five.items()},
        "mapping in itself": experiment(itself, *[mapping(table(a=table(w=b"N")))] * 4),
        "no networks": experiment(),
        "two thousand networks": experiment(*[b"}"] * 2000),
        "names of numbers": raw(b"}(" + text("experiment_state") + b"}(K\x01NK\x02Nuu"),
        "a jax array of nothing": raw(table(experiment_state=from_jax())),
        "a jax array of another function": raw(table(a=from_jax(named("builtins", "eval"), b")", b"N", b"N"))),
        "key of 200,000 tuples": experiment(bombs()["key of 200,000 tuples"]),
    }
    with TemporaryDirectory() as folder:
        path = Path(folder) / "byol.pkl"
        try:
            write_haiku(path, flat_tensors(), flat_tensors(seed=9), online=True)
        finally:
            forget_byol()
        files |= damaged(path.read_bytes(), 10, 0.1, 0.6, within=3000)
    yield from starmap(partial(Case, file="x.pkl", command=("inspect", "x.pkl")), files.items())


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def torch_streams() -> Iterator[Case]:
    """torch's format before 1.6: pickles in a row (magic, protocol, system, value, storages' names), then raw bytes."""
    heads = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    head = b"".join(pickle.dumps(value, protocol=2) for value in heads)
    no_names = raw(b"]")
    old = {"_use_new_zipfile_serialization": False}
    files = {name: head + raw(pickled) + no_names for name, pickled in in_torch().items()}
    for count in (2**60, 2**31, -1):
        value, storages = table(a=rebuilt((count,), (1,), count, view=b"N")), b"](" + text("0") + b"e"
        files[f"{count} numbers"] = head + raw(value) + raw(storages) + struct.pack("<q", count)
    files |= {f"names {names!r}": head + raw(b"}") + raw(names) for names in (b"})", b"K\x01", text("abc"))}
    files["payload"] = saved({"state_dict": flat_tensors(), "x": Payload()}, **old)
    files |= damaged(saved({"state_dict": flat_tensors()}, **old), 12, 0.05, 0.5, 0.99, within=2000)
    yield from starmap(inspected, files.items())
