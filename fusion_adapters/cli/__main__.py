"""`python -m fusion_adapters.cli`."""

from . import main

main()
