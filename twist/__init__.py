"""One import name for every room: `twist.pretrain`, `twist.converters`, ….

In a clone the rooms are folders beside this one; the wheel has them inside it.
"""

from pathlib import Path

# A second work tree that borrows the environment of the first then runs its own rooms, not those that are installed.
_CLONE = Path(__file__).resolve().parent.parent
if (_CLONE / "contracts").is_dir() and (_CLONE / "pyproject.toml").is_file():
    __path__.append(str(_CLONE))
