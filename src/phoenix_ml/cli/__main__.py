"""``python -m phoenix_ml.cli``."""

from phoenix_ml.cli import main

main()
