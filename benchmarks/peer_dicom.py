"""A peer's time on a list of files. Run by dicom.py in the environment that holds it.

Usage: peer_dicom.py deid|dicom-anonymizer|dicognito|dicomsdl LIST OUT

LIST holds one path a line. Prints seconds of wall clock and of CPU as JSON; imports and one file before are not timed.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path

from peer_deidentify import deid, dicognito, dicom_anonymizer

KEYWORDS = Path(__file__).with_name("dicom_keywords.txt").read_text().split()


def dicomsdl(files: list[Path], out: Path) -> None:
    """Forty attributes of each file, up to the pixels."""
    import dicomsdl as sdl

    for file in files:
        header = sdl.open(str(file), load_until=0x7FE00000)
        for keyword in KEYWORDS:
            getattr(header, keyword)


def main() -> None:
    """Time one peer."""
    warnings.simplefilter("ignore")
    name, files, out = sys.argv[1], [Path(p) for p in Path(sys.argv[2]).read_text().split("\n") if p], Path(sys.argv[3])
    tools = {"deid": deid, "dicom-anonymizer": dicom_anonymizer, "dicognito": dicognito}

    def run(some: list[Path]) -> None:
        if name == "dicomsdl":
            dicomsdl(some, out)
            return
        failed = tools[name](some, lambda file: out / file.name)
        if failed:
            raise SystemExit(f"{name} failed: {failed.most_common(1)[0][0]}")

    run(files[:1])
    before, began = os.times(), time.perf_counter()
    run(files)
    after, took = os.times(), time.perf_counter() - began
    print(json.dumps([took, after.user + after.system - before.user - before.system]))


if __name__ == "__main__":
    main()
