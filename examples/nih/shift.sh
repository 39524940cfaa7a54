#!/usr/bin/env bash
# Another population as a second site of the Kermany project: what watch says of it. Usage: shift.sh DATA KERMANY_FOLDER
set -euo pipefail
data=$(cd "$1/cxr_nih1000_64" && pwd)
cd "$2"

# The champion: the last trained model, approved by whoever runs this example.
until radloop run develop; do
    waiting=$(radloop status --json | python3 -c 'import json,sys; print(next((w["digest"] for w in json.load(sys.stdin)["waiting"] if w["pipeline"] == "develop" and not w["approved"]), ""))')
    [[ -n $waiting ]] || break
    radloop approve "$waiting" --why "example on public data; the audit's finding is known: JPEG file size"
done
radloop serve --ready-file serve.json &
trap 'kill %1' EXIT
while [[ ! -f serve.json ]]; do sleep 0.2; done
radloop run release || [[ $? -eq 4 ]]
waiting=$(radloop status --json | python3 -c 'import json,sys; print(next(w["digest"] for w in json.load(sys.stdin)["waiting"] if w["pipeline"] == "release"))')
radloop approve "$waiting" --why "example on public data"
radloop run release

# The second site: imported, predicted, labelled by another definition.
before=$(mktemp)
touch "$before"
radloop import-images "$data" --manifest "$data/manifest.csv" --file file --patient patient --age "Patient Age" --sex "Patient Gender" \
    --view "View Position" --modality DX --site nih
find landing -name '*.dcm' -newer "$before" -print0 | xargs -0 radloop predict --site nih --json >predictions-nih.json
python3 - "$data/manifest.csv" <<'PYTHON'
import csv, sys
rows = [(r["file"], "NORMAL" if r["label"] == "0_normal" else "PNEUMONIA") for r in csv.DictReader(open(sys.argv[1]))]
csv.writer(open("nih-labels.csv", "w")).writerows([("file", "label"), *rows])
PYTHON
radloop labels import nih-labels.csv --key file --key-column file --value-column label
radloop run watch
radloop report
