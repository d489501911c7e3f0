"""Looks at the pickles of a torch file, or at a bare one, before anything is built from them.

Unpicklers believe what a file says: a memo index makes a table of that length, nested tuples as a key overflow the C
stack, `bytearray(2**31)` or a storage of 2**31 numbers is allocated, and 8 MB can be copied a thousand times by their
name in the memo. `check_pickle` reads the opcodes alone and keeps three numbers for each object on the stack, so its
memory and time are those of the file's length. `pickletools` gives the table of opcodes but not the reader, which
decodes all that it passes. A child process with limits was the alternative: it costs seconds of imports for each file,
its tensors have to come back, and not every system has such limits.
"""

import mmap
import os
import pickle
import pickletools
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from twist.contracts import files
from twist.contracts.errors import UserError

# Far above those of real checkpoints: a ResNet-50 with its optimiser has 20,000 opcodes, 12 levels, no long number.
MOST_OPCODES, MOST_DEPTH, MOST_NUMBER_BYTES = 5_000_000, 500, 128
# Bytes that calls are given, for each byte of the file: an array's pass through two or three of them.
MOST_COPIES: Final = 8
ENDS_EARLY: Final = "it ends too early"
SMALL: Final = 64 * 2**20
_ZIP = b"PK\x03\x04"
# torch's format before 1.6 begins with a magic number: five pickles (that, protocol, system, value, names of storages),
# then raw bytes.
STREAM_MAGIC: Final = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
_PICKLES_OF_STREAM = 5
# What allocates as much as a number says.
_ALLOCATORS = re.compile(rb"(__builtin__|builtins)\nbytearray\n|torch\n\w*(Tensor|Storage)\n")
# Opcodes that add to the object below what they take, which they leave.
_ADDING = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}
_NUMBERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"}


class _Opcode(NamedTuple):
    """`width` bytes of argument, which for a `counted` one say its length, or `lines`; what it takes and leaves."""

    name: str
    width: int
    counted: bool
    lines: int
    marked: bool  # takes all above the last mark
    takes: int
    gives: int


def _opcode(info: pickletools.OpcodeInfo) -> _Opcode:
    length = info.arg.n if info.arg else 0
    counted = {pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT8U: 8}.get(length, 4)
    lines = 0 if length != pickletools.UP_TO_NEWLINE else 2 if info.name in ("GLOBAL", "INST") else 1
    before = [one for one in info.stack_before if one not in (pickletools.markobject, pickletools.stackslice)]
    marked = pickletools.markobject in info.stack_before
    takes = 0 if info.name == "OBJ" else len(before)  # its class lies above the mark, with the rest
    width = length if length >= 0 else 0 if lines else counted
    return _Opcode(info.name, width, length < 0 and not lines, lines, marked, takes, len(info.stack_after))


_OPCODES = {ord(info.code): _opcode(info) for info in pickletools.opcodes}
# Of an object: its depth, the largest number in it, the bytes in it.
_Seen = tuple[int, int, int]
_ALLOCATOR: _Seen = (-1, 0, 0)


def check_pickle(data: bytes | mmap.mmap, start: int = 0, *, room: int | None = None) -> int:
    """Where the pickle that begins at `start` of `data` ends. `room` is how many bytes storages can have in the file.

    Raises:
        pickle.UnpicklingError: it is damaged, or asks for more than a file of its length can mean.
    """
    size = len(data)
    room = size if room is None else room
    stack: list[_Seen] = []
    marks: list[int] = []
    memo: dict[int, _Seen] = {}
    at, given = start, 0

    def refuse(reason: str) -> pickle.UnpicklingError:
        return pickle.UnpicklingError(f"{reason}, at byte {at}")

    for _ in range(MOST_OPCODES):
        opcode = _OPCODES.get(data[at]) if at < size else None
        if opcode is None:
            raise refuse(ENDS_EARLY if at >= size else "it has a byte that is no opcode")
        name, begin = opcode.name, at + 1
        end = begin + opcode.width
        if opcode.counted:
            begin, end = end, end + int.from_bytes(data[begin:end], "little")
        for _ in range(opcode.lines):
            end = data.find(b"\n", end) + 1 or size + 1
        if end > size:
            raise refuse(ENDS_EARLY)
        if name == "STOP":
            if len(stack) != 1 or marks:
                raise refuse("it does not leave one object")
            return end
        if name in _NUMBERS:
            if end - begin > MOST_NUMBER_BYTES * (3 if opcode.lines else 1):
                raise refuse("it has an endless number")
            stack.append((0, _number(data[begin:end], as_text=bool(opcode.lines)), 0))
        elif name == "MARK":
            marks.append(len(stack))
        elif name.endswith("GET"):
            index = _number(data[begin:end], as_text=bool(opcode.lines))
            if index not in memo:
                raise refuse("it takes from its memo what is not there")
            stack.append(memo[index])
        elif name.endswith("PUT") or name == "MEMOIZE":
            index = len(memo) if name == "MEMOIZE" else _number(data[begin:end], as_text=bool(opcode.lines))
            if index > 2 * len(memo) + 1000 or not stack:
                raise refuse("its memo has places without objects")
            memo[index] = stack[-1]
        elif name == "FRAME":
            if int.from_bytes(data[begin:end], "little") > size - end:
                raise refuse(ENDS_EARLY)
        elif name == "GLOBAL":
            stack.append(_ALLOCATOR if _ALLOCATORS.fullmatch(data[begin:end]) else (0, 0, 0))
        elif name == "POP" and marks and marks[-1] == len(stack):
            marks.pop()
        else:
            if opcode.marked and not marks:
                raise refuse("it lacks a mark")
            floor = marks.pop() if opcode.marked else len(stack)
            floor -= opcode.takes
            if floor < (marks[-1] if marks else 0):
                raise refuse("it takes more than there is")
            taken = stack[floor:]
            del stack[floor:]
            if not opcode.gives:
                at = end
                continue
            first, others = (taken[:1], taken[1:]) if name in _ADDING else ([], taken)
            depth = max([one[0] for one in first] + [one[0] + 1 for one in others], default=0)
            largest = max([one[1] for one in taken], default=0)
            # Capped: an object that holds itself twice, sixty times over, would have endless ones.
            held = min(sum(one[2] for one in taken) + (end - begin), 2**62)
            if depth > MOST_DEPTH:
                raise refuse(f"it nests more than {MOST_DEPTH} objects")
            if name == "BINPERSID" and largest > room:
                raise refuse(f"it names a storage of {largest:,} numbers, which the file does not have")
            if name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ"):
                given += held
                if given > MOST_COPIES * size + SMALL:
                    raise refuse("it has the same bytes copied again and again")
                if taken and taken[0] == _ALLOCATOR and largest:
                    raise refuse("it asks for memory by a number")
            stack.extend([(depth, largest, held)] * opcode.gives)
        if len(marks) > MOST_DEPTH:
            raise refuse(f"it nests more than {MOST_DEPTH} objects")
        at = end
    raise refuse(f"it has more than {MOST_OPCODES:,} opcodes")


def _number(data: bytes, *, as_text: bool) -> int:
    if not as_text:
        return int.from_bytes(data, "little")  # a negative one is large, and so refused where size matters
    text = data.strip().removesuffix(b"L")
    return int(text) if text.isdigit() else 0


def check_file(path: Path) -> None:
    """Look at every pickle that torch or `pickle` would read from the file at `path`.

    Raises:
        pickle.UnpicklingError: see `check_pickle`. UserError: it is no regular file, or a part of it is too large.
    """
    files.require_regular(path)
    with path.open("rb") as file:
        head, size = file.read(4), os.fstat(file.fileno()).st_size
        if head == _ZIP:
            with zipfile.ZipFile(file) as archive:
                _check_archive(archive, path)
        elif size:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                end = 0
                for _ in range(_PICKLES_OF_STREAM if data[2 : 2 + len(STREAM_MAGIC)] == STREAM_MAGIC else 1):
                    end = check_pickle(data, end)


def _check_archive(archive: zipfile.ZipFile, path: Path) -> None:
    members = archive.infolist()
    room = sum(member.file_size for member in members)
    for member in members:
        # torch looks for the name without regard to case, and a name may be there twice.
        if member.filename.lower().endswith("data.pkl"):
            if member.file_size > files.MOST_TEXT:
                raise UserError(f"{path} has a description of {member.file_size >> 20} MiB: it is no checkpoint.")
            check_pickle(archive.read(member), room=room)


def load_torch(path: Path, *, allowed: Sequence[Any] = (), device: Any = "cpu", mapped: bool = False) -> Any:
    """`torch.load` of tensors and plain values, and of the classes that are `allowed`, after `check_file`.

    What is wrong with a damaged file is raised as torch, zipfile or pickle say it.
    """
    import torch

    check_file(path)
    with torch.serialization.safe_globals(list(allowed)):
        return torch.load(path, map_location=device, weights_only=True, mmap=mapped)


def read_state(path: Path, *keys: str, remedy: str, **options: Any) -> dict[str, Any]:
    """The dictionary in one of our own torch files, with the entries `keys`; `options` are those of `load_torch`.

    Raises:
        UserError: absent, damaged, or something else; the sentence ends with `remedy`.
    """
    try:
        state = load_torch(path, **options)
    except (OSError, MemoryError, UserError):  # described where errors are
        raise
    except Exception as error:  # torch's own texts advise to read the file without its safe unpickler
        raise UserError(f"{path} cannot be read safely as a checkpoint ({type(error).__name__}): {remedy}.") from None
    if not isinstance(state, dict) or not all(key in state for key in keys):
        raise UserError(f"{path} holds no checkpoint with {', '.join(keys) or 'names'}: {remedy}.")
    return state
