"""Which seeds there are: those that numpy, torch and the frameworks all take."""

from typing import Final

MOST_SEED: Final = 2**32 - 1
