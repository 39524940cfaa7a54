"""radloop: MLOps for medical imaging. Importing it imports nothing else; see `radloop --help`."""

__version__ = "0.1.0"
