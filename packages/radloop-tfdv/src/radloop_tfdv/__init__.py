"""TensorFlow Data Validation for radloop.

TFDV needs TensorFlow 2.16, numpy 1 and pandas 1, so it lives in an environment of its own, and only there: nothing in
the package `radloop` imports it, except the body of the stage `validate`. Importing this package is cheap; importing
`radloop_tfdv.validate` takes seconds.
"""

from __future__ import annotations
