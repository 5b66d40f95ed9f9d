"""What the documentation says about files and commands is so."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| `(\w+)` \| (.+?) \| `(\S+)` \| `(\S+)` \| `bench\.(\w+)` \|$", re.MULTILINE)
ROWS = ROW.findall((ROOT / "docs" / "kernels.md").read_text())
FILES = [*(ROOT / "csrc").rglob("*.cu"), *(ROOT / "cifar_resnet_fast" / "kernels").glob("*.py")]


def kernels(text):
    """Names of the kernels that a source file defines."""
    cuda = re.findall(r"__global__[^;{]*?\b(\w+_kernel)\(", text)
    return cuda + re.findall(r"@triton\.jit\S*\ndef (\w+_kernel)\(", text)


def test_every_kernel_has_a_row():
    defined = {
        (name, str(path.relative_to(ROOT))) for path in FILES for name in kernels(path.read_text())
    }
    assert len(defined) >= 25
    assert {(name, file) for name, _, file, _, _ in ROWS} == defined


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_files_of_a_row_exist(row):
    _, _, file, test, bench = row
    for path in (file, test, f"bench/{bench}.py"):
        assert (ROOT / path).is_file(), path


def test_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f" {page.name}\n" in nav, page.name
