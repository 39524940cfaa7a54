"""`python -m radloop.serving.predictor`."""

from __future__ import annotations

import sys

from radloop.serving.predictor.start import main

sys.exit(main())
