"""radloop: MLOps for medical imaging. Importing it imports nothing else; see `radloop --help`."""

from __future__ import annotations

__version__ = "0.1.0"
