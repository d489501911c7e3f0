"""`python -m twist`: what torchrun and the suite start."""

from twist.cli import main

if __name__ == "__main__":
    main()
