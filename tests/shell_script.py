"""`python -m shell_script SCRIPT`: a run of a suite that is a shell script, and keeps what it was given open."""

import os
import sys

if __name__ == "__main__":
    for number in map(int, os.listdir("/proc/self/fd")):
        if number > 2 and os.path.exists(f"/proc/self/fd/{number}"):
            os.set_inheritable(number, True)
    os.execv("/bin/sh", ["/bin/sh", "-c", sys.argv[1]])
