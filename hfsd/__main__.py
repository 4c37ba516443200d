"""`python -m hfsd`, for launchers that start modules: `torchrun -m hfsd scan ...`."""

from hfsd.cli import main

main()
