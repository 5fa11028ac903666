#!/usr/bin/env bash
# Draws reconstruction.png from the bundle that `make repro` made: three validation digits, three quarters of their patches hidden.
# The first of them is digit.png, which README's examples send.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

.venv/bin/python - "$folder" <<'PY'
import sys
from pathlib import Path
from cae.data.shards import ImageShards

shards = ImageShards(Path("data/prepared"), "val")
for number, position in enumerate((210, 510, 810)):
    shards.image(position).save(f"{sys.argv[1]}/{number}.png")
PY
cp "$folder/0.png" docs/images/digit.png
for number in 0 1 2; do
    .venv/bin/cae-pipe reconstruct "$folder/$number.png" --seed "$number" --view side_by_side --out "$folder/row$number.png"
done
.venv/bin/python - "$folder" <<'PY'
import sys
from PIL import Image

rows = [Image.open(f"{sys.argv[1]}/row{number}.png") for number in range(3)]
sheet = Image.new("L", (sum(row.width for row in rows) + 16, rows[0].height), 255)
for number, row in enumerate(rows):
    sheet.paste(row, (number * (row.width + 8), 0))
sheet.resize((sheet.width * 3, sheet.height * 3), Image.Resampling.NEAREST).save("docs/images/reconstruction.png")
PY
