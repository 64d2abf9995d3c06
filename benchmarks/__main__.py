"""All benchmarks, one after the other: python -m benchmarks [--quick]."""

import argparse
import subprocess
import sys
from pathlib import Path

from .report import write_readme

parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
parser.add_argument("--quick", action="store_true", help="small and short; the figures are not kept")
quick = ["--quick"] * parser.parse_args().quick
for file in sorted(Path(__file__).parent.glob("*.py")):
    if not file.stem.startswith("_") and file.stem != "report":
        subprocess.run([sys.executable, "-m", f"benchmarks.{file.stem}", *quick], check=True)
write_readme()
