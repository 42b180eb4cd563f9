"""What must be in a wheel, and what must not: ``python .ci/wheel_content.py FILE.whl``."""

import sys
import zipfile
from pathlib import PurePosixPath

names = zipfile.ZipFile(sys.argv[1]).namelist()
tops = {PurePosixPath(name).parts[0] for name in names}
packages = {top for top in tops if not top.endswith(".dist-info")}
missing = [
    wanted
    for wanted in (
        "lightning_lora/py.typed",
        "lightning_lora/run_report/page.html",
        "lightning_lora/recipes/quickstart.yaml",
        "lightning_lora/recipes/data/README.md",
        "lightning_lora/recipes/data/entries.jsonl",
    )
    if wanted not in names
]
stray = [name for name in names if "/data/" in name and name.endswith(".py") and "recipes" in name]
license_files = [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]
if packages != {"lightning_lora"} or missing or stray or not license_files:
    sys.exit(f"Found packages {sorted(packages)}, missing {missing}, stray {stray}, license files {license_files}.")
print(f"{len(names)} files, one package, recipes and their data, types, license")
