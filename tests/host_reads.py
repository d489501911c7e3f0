"""Hears what would make the host wait for a GPU. On a CPU the same functions are called, and wait for nothing."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# A number read on the host, which is what .item(), float(), `if tensor` and formatting become, …
_NUMBERS = ("_local_scalar_dense", "is_nonzero", "aten.equal.", "allclose")
# … and shapes that depend on data.
_SHAPES = ("nonzero", "masked_select", "_unique", "repeat_interleave.Tensor")
# Copies to the host, which are no operation when the tensor is there already.
_METHODS = ("tolist", "cpu", "numpy", "__array__")


class HostReads:
    """`with reads.heard(): …` appends to `found` the name of every read, unless inside `with reads.ignored():`."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.listening = False

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        with self._as(listening=True), _Operations(self), _Methods(self):
            yield

    def ignored(self) -> contextlib.AbstractContextManager[None]:
        return self._as(listening=False)

    @contextlib.contextmanager
    def _as(self, *, listening: bool) -> Iterator[None]:
        before, self.listening = self.listening, listening
        try:
            yield
        finally:
            self.listening = before

    def hear(self, name: str) -> None:
        if self.listening:
            self.found.append(name)


class _Operations(TorchDispatchMode):
    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = str(function).startswith("aten.index.") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if by_mask or any(name in str(function) for name in _NUMBERS + _SHAPES):
            self._reads.hear(str(function))
        return function(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in _METHODS:
            self._reads.hear(function.__name__)
        return function(*args, **(kwargs or {}))
