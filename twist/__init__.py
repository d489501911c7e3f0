"""One import name for every room: `twist.pretrain`, `twist.converters`, ….

In a clone the rooms are folders beside this one; the wheel has them inside it.
"""

from importlib import import_module
from pathlib import Path

# A second work tree that borrows the environment of the first then runs its own rooms, not those that are installed.
_CLONE = Path(__file__).resolve().parent.parent
if (_CLONE / "contracts").is_dir() and (_CLONE / "pyproject.toml").is_file():
    __path__.append(str(_CLONE))

# What a program calls, and where it lives: `twist.inspect(path)`, `twist.load_artefact(path) → (tensors, header)`. They
# are looked up when they are used, so that `import twist` stays without torch.
_PUBLIC = {
    "inspect": "converters.inspect:inspect",
    "load_artefact": "converters.read:load_artefact",
    "features": "transfer.features:features",
    "run_transfer": "transfer.run:transfer",
    "compare_records": "compare.comparison:compare_records",
}


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'twist' has no attribute {name!r}")
    module, _, function = _PUBLIC[name].partition(":")
    return getattr(import_module(f"twist.{module}"), function)
