"""The predictor: one model behind Open Inference Protocol v2 (REST and gRPC), one process.

`python -m radloop.serving.predictor --package DIR --key-file FILE --predictions DIR` prints one JSON line with the
bound ports once it takes requests. It listens on 127.0.0.1 unless told otherwise; Envoy stands in front of it.
"""

from __future__ import annotations

from radloop.serving.predictor.start import main as main
