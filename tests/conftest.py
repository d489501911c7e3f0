"""What holds for every test."""

import signal

# Tests that are started in the background of a shell inherit that Ctrl-C is ignored, and so would the runs they start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
