"""Looks at the pickles of a torch file, or at a bare one, before anything is built from them.

Unpicklers believe what a file says: a memo index makes a table of that length, nested tuples overflow the C stack,
`bytearray(2**31)` is allocated. `check_pickle` reads the opcodes alone, in memory and time of the file's length.
"""

import io
import mmap
import os
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from twist.contracts import files
from twist.contracts.errors import UserError

# Far above those of real checkpoints: a ResNet-50 with its optimiser has 20,000 opcodes, 12 levels, no long number.
MOST_OPCODES, MOST_DEPTH, MOST_NUMBER_BITS = 5_000_000, 500, 1024
# Bytes that calls are given, for each byte of the file: an array's pass through two or three of them.
MOST_COPIES: Final = 8
ENDS_EARLY: Final = "it ends too early, or has a byte that is no opcode"
SMALL: Final = 64 * 2**20
_ZIP = b"PK\x03\x04"
# torch's format before 1.6 begins with a magic number: five pickles (that, protocol, system, value, names of storages),
# then raw bytes.
STREAM_MAGIC: Final = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
_PICKLES_OF_STREAM = 5
# What allocates as much as a number says.
_ALLOCATORS = re.compile(r"(__builtin__|builtins) bytearray|torch \w*(Tensor|Storage)")
# Opcodes that add to the object below what they take, which they leave; and those that call.
_ADDING = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}
_CALLING = {"REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ"}
# Of an object: its depth, the largest number in it, the bytes in it.
_Seen = tuple[int, int, int]
_ALLOCATOR: _Seen = (-1, 0, 0)


def _takes(opcode: pickletools.OpcodeInfo) -> int:
    """Objects that an opcode takes from the stack, besides all above the last mark."""
    beside = (pickletools.markobject, pickletools.stackslice)
    # The class of OBJ lies above the mark, with the rest.
    return 0 if opcode.name == "OBJ" else sum(one not in beside for one in opcode.stack_before)


_TAKES = {opcode.name: _takes(opcode) for opcode in pickletools.opcodes}


def check_pickle(data: bytes | mmap.mmap, start: int = 0, *, room: int | None = None) -> int:
    """Where the pickle that begins at `start` of `data` ends. `room` is how many bytes storages can have in the file.

    Raises:
        pickle.UnpicklingError: it is damaged, or asks for more than a file of its length can mean.
    """
    file: Any = io.BytesIO(data) if isinstance(data, bytes) else data
    room = len(data) if room is None else room
    file.seek(start)
    stack: list[_Seen] = []
    marks: list[int] = []
    memo: dict[int, _Seen] = {}
    given = at = 0

    def require(fine: bool, reason: str) -> None:
        if not fine:
            raise pickle.UnpicklingError(f"{reason}, at byte {at}")

    opcodes: Iterator[Any] = pickletools.genops(file)
    for count in range(MOST_OPCODES + 1):
        try:
            opcode, argument, at = next(opcodes)
        except (StopIteration, ValueError):
            break
        name = opcode.name
        require(count < MOST_OPCODES, f"it has more than {MOST_OPCODES:,} opcodes")
        if name == "STOP":
            require(len(stack) == 1 and not marks, "it does not leave one object")
            return at + 1
        if name == "MARK":
            marks.append(len(stack))
            require(len(marks) <= MOST_DEPTH, f"it nests more than {MOST_DEPTH} objects")
        elif name.endswith("GET"):
            require(argument in memo, "it takes from its memo what is not there")
            stack.append(memo[argument])
        elif name.endswith("PUT") or name == "MEMOIZE":
            index = len(memo) if argument is None else argument
            require(0 <= index <= 2 * len(memo) + 1000 and bool(stack), "its memo has places without objects")
            memo[index] = stack[-1]
        elif name == "FRAME":
            require(argument <= len(data) - at, ENDS_EARLY)
        elif name == "GLOBAL":
            stack.append(_ALLOCATOR if _ALLOCATORS.fullmatch(argument) else (0, 0, 0))
        elif type(argument) is int and name != "PROTO" and not name.startswith("EXT"):
            require(argument.bit_length() <= MOST_NUMBER_BITS, "it has an endless number")
            # A negative one is as large as its bytes, and so refused where size matters.
            stack.append((0, argument if argument >= 0 else 2**62, 0))
        elif name == "POP" and marks and marks[-1] == len(stack):
            marks.pop()
        else:
            marked = pickletools.markobject in opcode.stack_before
            require(not marked or bool(marks), "it lacks a mark")
            floor = (marks.pop() if marked else len(stack)) - _TAKES[name]
            require(floor >= (marks[-1] if marks else 0), "it takes more than there is")
            taken = stack[floor:]
            del stack[floor:]
            if not opcode.stack_after:
                continue
            first, others = (taken[:1], taken[1:]) if name in _ADDING else ([], taken)
            depth = max([one[0] for one in first] + [one[0] + 1 for one in others], default=0)
            largest = max([one[1] for one in taken], default=0)
            # Capped: an object that holds itself twice, sixty times over, would have endless ones.
            own = len(argument) if isinstance(argument, (str, bytes, bytearray)) else 0
            held = min(sum(one[2] for one in taken) + own, 2**62)
            require(depth <= MOST_DEPTH, f"it nests more than {MOST_DEPTH} objects")
            fits = name != "BINPERSID" or largest <= room
            require(fits, f"it names a storage of {largest:,} numbers, which the file does not have")
            if name in _CALLING:
                given += held
                require(given <= MOST_COPIES * len(data) + SMALL, "it has the same bytes copied again and again")
                require(not largest or taken[:1] != [_ALLOCATOR], "it asks for memory by a number")
            stack.extend([(depth, largest, held)] * len(opcode.stack_after))
    raise pickle.UnpicklingError(f"{ENDS_EARLY}, after byte {at}")


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


def read_state(
    path: Path, *keys: str, remedy: str, allowed: Sequence[Any] = (), device: Any = "cpu", mapped: bool = False
) -> dict[str, Any]:
    """The dictionary of tensors, plain values and `allowed` classes in one of our own torch files, with these entries.

    Raises:
        UserError: absent, damaged, or something else; the sentence ends with `remedy`.
    """
    import torch

    try:
        check_file(path)
        with torch.serialization.safe_globals(list(allowed)):
            state = torch.load(path, map_location=device, weights_only=True, mmap=mapped)
    except (OSError, MemoryError, UserError):  # described where errors are
        raise
    except Exception as error:  # torch's own texts advise to read the file without its safe unpickler
        raise UserError(f"{path} cannot be read safely as a checkpoint ({type(error).__name__}): {remedy}.") from None
    if not isinstance(state, dict) or not all(key in state for key in keys):
        raise UserError(f"{path} holds no checkpoint with {', '.join(keys) or 'names'}: {remedy}.")
    return state
