"""The version, alone: what writes it into a file needs nothing else of the package."""

__version__ = "0.1.0"
