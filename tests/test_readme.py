"""The program in the README runs as it stands, in both languages; only its length is reduced."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README.zh-CN.md")


def read_program(readme):
    """The first Python block of a README."""
    return re.search(r"```python\n(.*?)```", (ROOT / readme).read_text("utf-8"), re.S)[1]


def read_links(readme):
    """The targets of the links and images of a README, in their order."""
    return re.findall(r"(?:\]\(|src=\")([^)\"]+)", (ROOT / readme).read_text("utf-8"))


def test_both_languages_have_the_same_program():
    english, chinese = (re.sub(r" *#.*", "", read_program(readme)) for readme in READMES)
    assert english == chinese


def test_the_readmes_program_runs():
    program = read_program("README.md")
    replacements = [("20_000", "64"), ("minutes=10", "steps=2"), ("steps=25", "steps=2")]
    for original, reduced in replacements:
        assert original in program
        program = program.replace(original, reduced)
    program += "\nimport torch"
    program += "\nassert last.x.shape == (1, 3, 64, 64)"
    program += "\nassert torch.isfinite(last.x).all()"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=ROOT, capture_output=True, text=True, timeout=200,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", [*READMES, "docs/files.md", "docs/training_in_practice.md"])
def test_each_link_exists(page):
    links = re.findall(r"(?:\]\(|src=\")([^)\"#]+)", (ROOT / page).read_text("utf-8"))
    assert len(links) > 2
    for link in links:
        assert "://" in link or ((ROOT / page).parent / link).exists(), link


def test_both_languages_have_the_same_links_and_commands():
    def contents(readme):
        text = (ROOT / readme).read_text("utf-8")
        prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
        commands = re.findall(r"`((?:make|python|\.venv)[^`]*)`", prose)
        blocks = re.findall(r"^```\n(python.*?)```", text, re.S | re.M)
        # A page that exists in both languages counts as the same: NAME.md and NAME.zh-CN.md.
        links = [link.replace(".zh-CN.md", ".md") for link in read_links(readme)]
        return sorted(commands), blocks, links

    assert contents("README.md") == contents("README.zh-CN.md")


def test_each_language_links_its_own_pages():
    """Only the link to the README in the other language changes the language."""
    for link in read_links("README.md"):
        assert link == "README.zh-CN.md" or not link.endswith(".zh-CN.md"), link
    for link in read_links("README.zh-CN.md"):
        if link.endswith(".md") and link != "README.md":
            assert not (ROOT / link).with_suffix(".zh-CN.md").exists(), link


def test_every_file_is_listed():
    page = (ROOT / "docs" / "files.md").read_text("utf-8")
    listed = set(re.findall(r"\]\(\.\./([^)]+\.py)\)", page))
    files = {
        path.relative_to(ROOT).as_posix()
        for folder in ("easy_diffusion", "datasets")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert listed == files
