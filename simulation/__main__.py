"""``python -m simulation`` is ``agssd-sim``."""

from simulation.cli import main

main()
