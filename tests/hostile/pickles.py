"""Pickles written by hand, opcode by opcode: what a stranger's checkpoint may hold, bare or inside another format.

Opcodes are those of `pickletools`; `\x80\x02` opens protocol 2, and `.` ends the pickle.
"""

import io
import os
import pickle
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from cases import TOUCH, Case, cut, flipped
from checkpoint_files import flat_tensors, forget_byol, write_haiku

OPEN, END = b"\x80\x02", b"."
INSPECT = ("inspect", "x.pth")


class Payload:
    """Runs a command when a careless reader builds it."""

    def __reduce__(self) -> Any:
        return os.system, (TOUCH,)


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


def bombs() -> Iterator[tuple[str, bytes]]:
    """Pickles without protocol and end that cost their reader far more than they weigh, or that end a careless one."""
    yield "key of 200,000 tuples", b"})" + b"\x85" * 200_000 + b"Ns"
    yield "key of 2,000 tuples", b"})" + b"\x85" * 2_000 + b"Ns"
    yield "frozen set of 200,000 tuples", b"(" + b")" + b"\x85" * 200_000 + b"\x91"
    for power in (27, 30, 31):
        yield f"memo of 2^{power}", b"}r" + struct.pack("<I", 2**power)
    yield "memo in text of 10^15", b"}p1000000000000000\n"
    yield "memo of 2^27, read", b"}r" + struct.pack("<I", 2**27) + b"j" + struct.pack("<I", 2**27) + b"0"
    for levels in (2_000, 200_000):
        yield f"{levels:,} tuples", b")" + b"\x85" * levels
        yield f"{levels:,} lists", b"]" * levels + b"a" * (levels - 1)
        yield f"{levels:,} tables", (b"}" + text("a")) * levels + b"N" + b"s" * levels
    yield "list in itself", b"]q\x00h\x00a"
    yield "table in itself", b"}q\x00" + text("a") + b"h\x00s"
    # Each list holds the one before twice: 2^60 leaves in 300 bytes.
    doubled = b"".join(b"](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1]) for i in range(60))
    yield "2^60 leaves", b"]q\x00" + doubled
    yield "3 million numbers", b"](" + b"K\x01" * 3_000_000 + b"e"
    yield "3 million marks", b"}" + b"(" * 3_000_000
    yield "a number of 2 million digits", b"I" + b"9" * 2_000_000 + b"\n"
    yield "a long of 2 million digits", b"L" + b"9" * 2_000_000 + b"L\n"
    yield "a long of 2^31 bytes", b"\x8b" + struct.pack("<i", 2**31 - 1) + b"\x01"
    yield "a long of -1 bytes", b"\x8b" + struct.pack("<i", -1)
    yield "a text of 2^32 bytes", b"X" + struct.pack("<I", 2**32 - 1) + b"a"
    yield "a text of 2^62 bytes", b"\x8d" + struct.pack("<Q", 2**62) + b"a"
    yield "bytes of 2^62", b"\x8e" + struct.pack("<Q", 2**62) + b"a"
    yield "an array of 2^32 bytes", b"\x96" + struct.pack("<Q", 2**32) + b"a"
    yield "an array of 2^40 bytes", b"\x96" + struct.pack("<Q", 2**40) + b"a"
    yield "a frame of 2^60", b"\x95" + struct.pack("<Q", 2**60) + b"}"
    yield "a frame of 2^33", b"\x95" + struct.pack("<Q", 2**33) + b"}"
    yield "empty stack", b""
    yield "append to nothing", b"a"
    yield "items without a mark", b"}u"
    yield "set item of a number", b"K\x01K\x02K\x03s"
    yield "build of a list", b"]Nb"
    yield "reduce of a number", b"K\x01)R"
    yield "memo that is not there", b"h\x07"
    yield "no end", b"}" + b"0"
    yield from calls()


def calls() -> Iterator[tuple[str, bytes]]:
    """Calls of what readers let through, and of what they must not."""
    yield "bytearray of 2^35", named("builtins", "bytearray") + tuple_of(integer(2**35)) + b"R"
    yield "bytearray of 2^31", named("builtins", "bytearray") + tuple_of(integer(2**31)) + b"R"
    yield "encode 3 levels", named("_codecs", "encode") + tuple_of(text("a" * 1000), text("evil")) + b"R"
    yield "ordered table of a number", named("collections", "OrderedDict") + tuple_of(b"K\x01") + b"R"
    yield "an array of no tuple", named("numpy.core.multiarray", "_reconstruct") + b"NR"
    huge = tuple_of(integer(2**40), integer(2**40))
    array = named("numpy.core.multiarray", "_reconstruct") + tuple_of(
        named("numpy", "ndarray"), b"K\x00\x85", b"U\x01b"
    )
    state = tuple_of(b"K\x01", huge, named("numpy", "dtype") + tuple_of(text("f4")) + b"R", b"\x89", b"U\x01b")
    yield "an array of 2^80", table(a=array + b"R" + state + b"b")
    yield "size of 2^62", named("torch", "Size") + tuple_of(tuple_of(integer(2**62))) + b"R"
    tensor = named("torch._utils", "_rebuild_meta_tensor_no_storage")
    yield (
        "a tensor without storage",
        table(a=tensor + tuple_of(named("torch", "float32"), huge, tuple_of(integer(1), integer(1)), b"\x89") + b"R"),
    )
    yield "os.system", named("os", "system") + tuple_of(text(TOUCH)) + b"R"
    yield "posix.system", named("posix", "system") + tuple_of(text(TOUCH)) + b"R"
    yield "eval", named("builtins", "eval") + tuple_of(text(f"__import__('os').system('{TOUCH}')")) + b"R"
    yield "an instance of Popen", b"(" + text(TOUCH) + b"isubprocess\nPopen\n"
    yield "an object of Popen", b"(" + named("subprocess", "Popen") + text(TOUCH) + b"o"
    yield "a new Path", named("pathlib", "PosixPath") + tuple_of(text("a")) + b"\x81"
    yield "a name from the stack", text("os") + text("system") + b"\x93" + tuple_of(text(TOUCH)) + b"R"
    yield "an extension", b"\x82\x01"
    yield "a persistent id", b"Pid\n"
    yield "a global with escapes", named("\x1b[2J\x1b[31mos", "system\x07")


def strange_names() -> Iterator[tuple[str, dict[Any, Any]]]:
    """State dicts of sound tensors whose names nobody prints, sorts or splits safely."""
    one = np.ones((2, 2), np.float32)
    yield "lone surrogates", {"\ud800.weight": one, "layer1.\udfff": one}
    yield "escape sequences", {"\x1b[2J\x1b]0;owned\x07.weight": one}
    yield "NUL and line feeds", {"a\0b\nc\rd.weight": one}
    yield "a megabyte of name", {"a." * 500_000: one}
    yield "no text", {1: one, None: one, 2.5: one, (1, 2): one, b"b": one}
    yield "text and numbers", {"conv1.weight": one, 7: one}
    yield "not a number", {float("nan"): one, "a": one}
    yield "20,000 names", {f"layer{i}.weight": one for i in range(20_000)}
    yield "a deep name", {"module." * 20_000 + "conv1.weight": one}
    yield "empty name", {"": one}


def raw(pickled: bytes) -> bytes:
    return OPEN + pickled + END


def bare_pickles() -> Iterator[Case]:
    """Detectron2's and Caffe2's format, and whatever else begins like a pickle."""
    for name, pickled in bombs():
        yield Case(name, "x.pth", raw(pickled), INSPECT)
    for name, names in strange_names():
        yield Case(f"names: {name}", "x.pth", pickle.dumps({"model": names}, protocol=4), INSPECT)
        as_json = (*INSPECT, "--json")
        yield Case(f"names, as JSON: {name}", "x.pth", pickle.dumps({"model": names}, protocol=4), as_json)
    yield Case("payload", "x.pth", pickle.dumps({"model": Payload()}, protocol=2), INSPECT)
    yield Case("a thousand names of one array", "x.pth", shared_array(), INSPECT)
    values = {"epoch": 10**1000, "method": "x" * 2**20, "model": {"conv1.weight": np.ones(3, np.float32)}}
    yield Case("an epoch of 1,000 digits", "x.pth", pickle.dumps(values, protocol=2), INSPECT)
    for protocol in (0, 1, 6, 200):
        yield Case(f"protocol {protocol}", "x.pth", b"\x80" + bytes([protocol]) + b"}.", INSPECT)
    good = pickle.dumps({"model": {"conv1.weight": np.ones((64, 3, 7, 7), np.float32)}}, protocol=2)
    for name, data in (*cut(good, 0.01, 0.5, 0.999), *flipped(good, 12, within=slice(0, 400))):
        yield Case(name, "x.pth", data, INSPECT)


def shared_array(count: int = 1000) -> bytes:
    array = np.ones(2_000_000, np.float32)  # 8 MB
    return pickle.dumps({"model": {f"layer{i}.weight": array for i in range(count)}}, protocol=2)


def haiku_pickles() -> Iterator[Case]:
    """DeepMind's BYOL: nested mappings by reference to modules that no reader has."""
    mapping = named("haiku._src.data_structures", "FlatMapping")
    state = named("byol.byol_experiment", "_ByolExperimentState")
    from_jax = named("jax._src.array", "_reconstruct_array")

    def experiment(*values: bytes) -> bytes:
        return raw(table(experiment_state=state + tuple_of(*values) + b"R", step=integer(1)))

    tables = [mapping + tuple_of(table(a=table(w=b"N"))) + b"R"] * 4
    for name, data in {
        "mapping of a number": experiment(*[mapping + tuple_of(b"K\x01") + b"R"] * 5),
        "mapping of mappings in itself": experiment(b"}q\x00" + text("a") + b"h\x00s", *tables),
        "networks that are lists": experiment(*[b"]"] * 5),
        "networks that are text": experiment(*[text("a")] * 5),
        "modules that are numbers": experiment(*[b"}(K\x01K\x02u"] * 5),
        "leaves that are no table": experiment(*[table(a=b"K\x01")] * 5),
        "leaves that are texts": experiment(*[table(a=text("b"))] * 5),
        "no networks": experiment(),
        "two thousand networks": experiment(*[b"}"] * 2000),
        "names of numbers": raw(b"}(" + text("experiment_state") + b"}(K\x01N" + b"K\x02Nu" + b"u"),
        "a jax array of nothing": raw(table(experiment_state=from_jax + b")R")),
        "a jax array of another function": raw(
            table(a=from_jax + tuple_of(named("builtins", "eval"), b")", b"N", b"N") + b"R")
        ),
        "key of 200,000 tuples": experiment(b"})" + b"\x85" * 200_000 + b"Ns"),
        "a deep module": experiment(*[table(**{"a/" * 100_000: table(w=b"N")})] * 5),
    }.items():
        yield Case(name, "x.pkl", data, ("inspect", "x.pkl"))
    good = _haiku_file()
    for name, data in (*cut(good, 0.1, 0.6), *flipped(good, 10, within=slice(0, 3000))):
        yield Case(name, "x.pkl", data, ("inspect", "x.pkl"))


def _haiku_file() -> bytes:
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "byol.pkl"
        try:
            write_haiku(path, flat_tensors(), flat_tensors(seed=9), online=True)
        finally:
            forget_byol()
        return path.read_bytes()


def torch_stream(*parts: bytes) -> bytes:
    """torch's format before 1.6: pickles in a row (magic, protocol, system, value, storages' names), then raw bytes."""
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
    version, system = pickle.dumps(1001, protocol=2), pickle.dumps({"little_endian": True}, protocol=2)
    return magic + version + system + b"".join(parts)


def torch_streams() -> Iterator[Case]:
    for name, pickled in bombs():
        yield Case(name, "x.pth", torch_stream(raw(pickled), raw(b"]")), INSPECT)
    storage = named("torch", "FloatStorage")
    for name, count in {"2^60 numbers": 2**60, "2^31 numbers": 2**31, "-1 numbers": -1}.items():
        identity = tuple_of(text("storage"), storage, text("0"), text("cpu"), integer(count), b"N")
        rebuilt = named("torch._utils", "_rebuild_tensor_v2") + tuple_of(
            identity + b"Q", b"K\x00", tuple_of(integer(count)), tuple_of(b"K\x01"), b"\x89", b"}"
        )
        data = torch_stream(raw(table(a=rebuilt + b"R")), raw(b"](" + text("0") + b"e"), struct.pack("<q", count))
        yield Case(name, "x.pth", data, INSPECT)
    for part, where in enumerate(("names", "a number for the names", "text for the names")):
        yield Case(where, "x.pth", torch_stream(raw(b"}"), raw((b"})", b"K\x01", text("abc"))[part])), INSPECT)
    buffer = io.BytesIO()
    value = {"state_dict": flat_tensors(), "x": Payload()}
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    yield Case("payload", "x.pth", buffer.getvalue(), INSPECT)
    buffer = io.BytesIO()
    torch.save({"state_dict": flat_tensors()}, buffer, _use_new_zipfile_serialization=False)
    good = buffer.getvalue()
    for name, data in (*cut(good, 0.05, 0.5, 0.99), *flipped(good, 12, within=slice(0, 2000))):
        yield Case(name, "x.pth", data, INSPECT)
