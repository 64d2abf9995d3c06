"""The output of every benchmark: a table in the terminal, a JSON file, and benchmarks/README.md.

Each benchmark calls `finish` with its claims and its rows. A file in benchmarks/results is

    {"date", "hardware", "torch", "claims": {name: value}, "rows": [{column: value}], ...}

NAME.json contains figures of a CPU, NAME.gpu.json those of a GPU.
"""

import argparse
import datetime
import json
import platform
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def make_parser(
    name: str, description: str, out: Path | None = None, minutes: float | None = None
) -> argparse.ArgumentParser:
    """The options of `python -m benchmarks.NAME`: --quick and, with a default, --out and --minutes.

    description: the module's docstring, for --help.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument(
        "--quick", action="store_true",
        help="run every part small and short; the figures are not saved",
    )
    if out is not None:
        parser.add_argument(
            "--out", type=Path, default=out,
            help="folder for all that is drawn and trained; what it already has is used",
        )
    if minutes is not None:
        parser.add_argument(
            "--minutes", type=float, default=minutes, help="time of each training in minutes"
        )
    return parser


def describe_hardware() -> str:
    """Return the GPU's name, or the number of CPU threads, architecture and instruction set."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    capability = getattr(torch.backends.cpu, "get_cpu_capability", lambda: platform.machine())()
    return f"{torch.get_num_threads()} CPU threads ({platform.machine()}, {capability})"


def format_value(value) -> str:
    """Format a table cell; floats have three significant digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def format_table(rows: list[dict]) -> str:
    """Format rows with the same keys as a Markdown table."""
    cells = [list(rows[0]), ["---"] * len(rows[0])]
    cells += [[format_value(value) for value in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def finish(
    name: str, claims: dict, rows: list[dict], quick: bool, **more_tables: list[dict]
) -> None:
    """Print the figures; unless they are from a quick run, save them and renew the README.

    name: of the benchmark. claims: {name: value}. rows: of the main table.
    more_tables: rows of further tables by their title.
    """
    print(f"\n{name}\n{format_table(rows)}\n")
    for key, value in claims.items():
        print(f"{key}: {format_value(value)}")
    for title, table_rows in more_tables.items():
        print(f"\n{title}\n{format_table(table_rows)}")
    if quick:
        print("a quick run: these figures are not saved")
        return

    result = {
        "date": datetime.date.today().isoformat(),
        "hardware": describe_hardware(),
        "torch": torch.__version__.split("+")[0],
        "claims": claims,
        "rows": rows,
    }
    result |= more_tables
    RESULTS.mkdir(exist_ok=True)
    suffix = ".gpu" if torch.cuda.is_available() else ""
    path = RESULTS / f"{name}{suffix}.json"
    path.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", "utf-8")
    write_readme()


def write_readme() -> None:
    """Write benchmarks/README.md from the files in benchmarks/results."""
    lines = [
        "# Benchmarks",
        "",
        "This file is written by `make bench` from `benchmarks/results/`; do not edit it. "
        "`python -m benchmarks.NAME` repeats one measurement.",
        "",
    ]
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text("utf-8"))
        lines += [f"## {path.stem}", ""]
        lines += [f"{result['date']}, {result['hardware']}, torch {result['torch']}", ""]
        lines += [format_table(result["rows"]), ""]
        for key, value in result["claims"].items():
            lines.append(f"- `{key}`: {format_value(value)}")
        lines.append("")
        for title, rows in result.items():
            if title != "rows" and isinstance(rows, list):
                lines += [f"### {title}", "", format_table(rows), ""]
    (RESULTS.parent / "README.md").write_text("\n".join(lines), "utf-8")
