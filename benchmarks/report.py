"""One form for all benchmarks: a small table in the terminal, a JSON file in benchmarks/results, and benchmarks/README.md."""

import datetime
import json
import platform
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def hardware() -> str:
    """The machine in words: the GPU, or the CPU's number of threads and its fastest instructions."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    kind = getattr(torch.backends.cpu, "get_cpu_capability", lambda: platform.machine())()
    return f"{torch.get_num_threads()} CPU threads ({platform.machine()}, {kind})"


def text(value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(rows: list[dict]) -> str:
    """Rows with the same keys as a Markdown table."""
    lines = [" | ".join(rows[0]), " | ".join("---" for _ in rows[0])] + [" | ".join(text(v) for v in row.values()) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def finish(name: str, claims: dict, rows: list[dict], quick: bool, **more: list[dict]) -> None:
    """Print the figures; unless they come from a quick run, keep them and write the README anew. more: further tables by their name."""
    print(f"\n{name}\n{table(rows)}\n" + "\n".join(f"{key}: {text(value)}" for key, value in claims.items()))
    for title, others in more.items():
        print(f"\n{title}\n{table(others)}")
    if quick:
        print("a quick run: these figures are not kept")
        return
    RESULTS.mkdir(exist_ok=True)
    result = {"date": datetime.date.today().isoformat(), "hardware": hardware(), "torch": torch.__version__.split("+")[0],
              "claims": claims, "rows": rows} | more
    path = RESULTS / f"{name}{'.gpu' if torch.cuda.is_available() else ''}.json"
    path.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    write_readme()


def write_readme() -> None:
    """benchmarks/README.md from the files in benchmarks/results."""
    lines = ["# Benchmarks", "", "Written by `make bench` from `benchmarks/results/`; never by hand. "
            "`python -m benchmarks.NAME` measures one anew.", ""]
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        lines += [f"## {path.stem}", "", f"{result['date']}, {result['hardware']}, torch {result['torch']}", "", table(result["rows"]), ""]
        lines += [f"- `{key}`: {text(value)}" for key, value in result["claims"].items()] + [""]
        for title, rows in result.items():
            if title != "rows" and isinstance(rows, list):
                lines += [f"### {title}", "", table(rows), ""]
    (RESULTS.parent / "README.md").write_text("\n".join(lines))
