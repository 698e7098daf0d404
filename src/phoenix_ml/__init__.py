"""Phoenix ML: real-time machine-learning inference, on record and watched."""

__version__ = "0.1.0"
