"""What the documents promise can be followed: files, links, commands and sources exist."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SOURCE_FOLDERS = ("align", "configs", "reward", "sandbox", "scripts")
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("*.md"))


def tree(document: str) -> dict[str, str]:
    """Read the fenced block `tree`: path -> what stands beside it."""
    (block,) = re.findall(r"```tree\n(.*?)```", document, re.DOTALL)
    entries, folder = {}, ""
    for line in block.splitlines():
        name, _, text = line.strip().partition(" ")
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
        path = name if name == folder else folder + name
        assert path not in entries, f"{path} stands twice in the tree"
        entries[path] = text.strip()
    return entries


def anchors(document: str) -> set[str]:
    """The anchors that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.*)$", document, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links() -> Iterator[tuple[Path, str]]:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)]+)\)", document.read_text()):
            if not target.startswith(("https://", "http://")):
                yield document, target


def test_the_tree_of_the_readme_lists_exactly_the_sources():
    listed = {path for path in tree((ROOT / "README.md").read_text()) if path.startswith(SOURCE_FOLDERS)}
    files = {
        path.relative_to(ROOT).as_posix()
        for folder in SOURCE_FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and (folder == "configs" or path.suffix == ".py") and path.stem != "__init__"
    }
    assert {path for path in listed if not path.endswith("/")} == files


def test_every_line_of_the_tree_exists_and_is_explained():
    for path, text in tree((ROOT / "README.md").read_text()).items():
        assert (ROOT / path).exists(), path
        assert text, f"{path} has no explanation"


def test_the_tree_reader_by_example():
    document = "```tree\na/  a folder\n  b.py  a file\n  c/d.py  deeper\ne.md  at the top\n```"
    assert tree(document) == {
        "a/": "a folder",
        "a/b.py": "a file",
        "a/c/d.py": "deeper",
        "e.md": "at the top",
    }


@pytest.mark.parametrize(("document", "target"), [pytest.param(d, t, id=f"{d.name}:{t}") for d, t in links()])
def test_every_link_resolves(document: Path, target: str):
    path, _, anchor = target.partition("#")
    file = document.parent / path if path else document
    assert file.exists()
    assert not anchor or anchor in anchors(file.read_text())


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_make_target_that_is_named_exists(document: Path):
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = set(re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)", document.read_text(), re.MULTILINE))
    assert {first or second for first, second in named} <= set(phony.split())


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "Makefile"], ids=lambda path: path.name)
def test_every_program_that_is_named_exists(document: Path):
    text = document.read_text()
    modules = re.findall(r"python -m ((?:align|reward|sandbox)[\w.]*)", text)
    scripts = re.findall(r"python (scripts/\w+\.py)", text)
    for path in [*(module.replace(".", "/") for module in modules), *scripts]:
        file = ROOT / path
        assert file.is_file() or file.with_suffix(".py").is_file() or (file / "__main__.py").is_file(), path


def test_papers_lists_every_paper_that_the_sources_cite():
    papers = (ROOT / "docs" / "papers.md").read_text()
    for path in (path for folder in SOURCE_FOLDERS for path in (ROOT / folder).rglob("*.py")):
        for number in re.findall(r"(?i)arxiv[: ]*(\d{4}\.\d{5})", path.read_text()):
            assert number in papers, f"{path.name} cites arXiv {number}"


def test_papers_names_files_that_exist():
    for path in re.findall(
        r"`((?:align|reward|sandbox|scripts)/[\w/]+\.py)`", (ROOT / "docs" / "papers.md").read_text()
    ):
        assert (ROOT / path).exists(), path


def test_decisions_are_numbered_without_a_gap():
    assert [path.name[:4] for path in DECISIONS] == [f"{i:04}" for i in range(1, len(DECISIONS) + 1)]


@pytest.mark.parametrize("path", DECISIONS, ids=lambda path: path.stem)
def test_a_decision_says_why_what_instead_of_what_and_what_follows(path: Path):
    text = path.read_text()
    assert text.startswith(f"# {path.name[:4]} ")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings == ["Context", "Decision", "Rejected", "Consequences"]
    assert len(text.splitlines()) <= 40
