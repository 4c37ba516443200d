"""`python -m hfsd`, for launchers that start modules: `accelerate launch -m hfsd scan ...`."""

from hfsd.cli import main

main()
