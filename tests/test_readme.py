"""The program in the README runs as it stands, in both languages; only its length is cut."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def program(readme):
    """The first Python block."""
    return re.search(r"```python\n(.*?)```", (ROOT / readme).read_text(), re.S)[1]


def test_both_languages_have_the_same_program():
    bare = [re.sub(r" *#.*", "", program(readme)) for readme in ("README.md", "README.zh-CN.md")]
    assert bare[0] == bare[1]


def test_the_readmes_program_runs():
    text = program("README.md")
    for long, short in (("20_000", "64"), ("minutes=10", "steps=2"), ("steps=25", "steps=2")):
        assert long in text
        text = text.replace(long, short)
    text += "\nimport torch\nassert last.x.shape == (1, 3, 64, 64) and torch.isfinite(last.x).all()"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_each_link_exists(readme):
    links = re.findall(r"(?:\]\(|src=\")([^)\"#]+)", (ROOT / readme).read_text())
    assert len(links) > 10
    for link in links:
        assert "://" in link or (ROOT / link).exists(), link
