#!/usr/bin/env bash
# Real CT DICOM to a stop at the gate, with a report. Usage: run.sh DATA NEW_FOLDER. Ends with 3.
set -euo pipefail
data=$(cd "$1/ct_contrast_tcga" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
project=$2

radloop init "$project"
cp "$here/radloop.toml" "$project/radloop.toml"
cd "$project"
# Public data needs no secret: with this key the 30 patients fall into the same parts everywhere.
printf 'radloop example' | sha256sum | cut -d' ' -f1 >radloop.key
radloop setup
mkdir images
find "$data" -name '*.dcm' -exec cp {} images/ \;
# Only rows whose slice is there: two patients and one study carry both labels, so labels are keyed by file.
python3 - "$data/overview.csv" <<'PYTHON'
import csv, os, sys
rows = [(r["dicom_name"], r["Contrast"]) for r in csv.DictReader(open(sys.argv[1])) if os.path.exists("images/" + r["dicom_name"])]
csv.writer(open("labels.csv", "w")).writerows([("file", "contrast"), *rows])
PYTHON
radloop labels import labels.csv --key file --key-column file --value-column contrast
radloop run prepare
radloop run develop
