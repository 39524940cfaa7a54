#!/usr/bin/env bash
# A split that leaks must be refused, with how many patients cross. Usage: leak.sh DATA NEW_FOLDER. Ends with 3.
set -euo pipefail
data=$(cd "$1/cxr_nih1000_64" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
project=$2

radloop init "$project"
cp "$here/radloop.toml" "$project/radloop.toml"
cd "$project"
radloop setup
radloop import-images "$data" --manifest "$data/manifest.csv" --file file --patient patient --modality DX --site nih
radloop labels import "$data/manifest.csv" --key file --key-column file --value-column label
radloop labels import "$data/manifest.csv" --key file --key-column file --value-column split --task split
radloop run prepare
radloop run develop
