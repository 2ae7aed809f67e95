"""`python -m sparsebench.bench` is the command `sparsebench-bench`."""

from sparsebench.bench import main

main()
