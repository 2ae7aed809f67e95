"""`python -m sparsebench`: the same as the command, e.g. under torchrun."""

from sparsebench.cli import main

if __name__ == "__main__":
    main()
