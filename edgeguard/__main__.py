"""`python -m edgeguard`, and so `torchrun -m edgeguard`: the same program as `edgeguard`."""

from edgeguard.cli import main

main()
