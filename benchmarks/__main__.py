"""Run all benchmarks, one after the other: python -m benchmarks [--quick]."""

import argparse
import subprocess
import sys
from pathlib import Path

from .report import write_readme

parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
parser.add_argument(
    "--quick", action="store_true", help="run small and short; the figures are not saved"
)
options = parser.parse_args()
for file in sorted(Path(__file__).parent.glob("*.py")):
    if file.stem.startswith("_") or file.stem == "report":
        continue
    command = [sys.executable, "-m", f"benchmarks.{file.stem}"]
    if options.quick:
        command.append("--quick")
    subprocess.run(command, check=True)
write_readme()
