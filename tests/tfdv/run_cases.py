"""Run under the TFDV environment's Python: validates the cases in a JSON file, in order, in one process.

python run_cases.py CASES.json RESULTS.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from radloop.errors import RadloopError
from radloop_tfdv.validate import validate


def main() -> None:
    """Each result is what `validate` returned, or the error that it raised."""
    cases, results = Path(sys.argv[1]), {}
    for name, arguments in json.loads(cases.read_text()).items():
        paths = {
            key: Path(arguments.pop(key)) for key in ("table", "out", "baseline", "reviewed_schema") if key in arguments
        }
        try:
            results[name] = validate(paths.pop("table"), paths.pop("out"), **paths, **arguments)
        except RadloopError as error:
            results[name] = {"error": type(error).__name__, "text": str(error)}
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
