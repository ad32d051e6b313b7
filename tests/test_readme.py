"""The README and docs/: code runs, signatures are the functions', commands and links exist.

A Python block runs by itself. Words after "python" on its fence say how:

    needs NAME      where the module NAME, and what it needs, is installed; else its test is skipped
    compiled        in a process of its own that compiles kernels
    interpreted     in one that interprets them, as this one may do
    ranks N         by torchrun, in N processes

A block that begins with the name of a public function and a parenthesis is its signature, and is
compared with the code. There is no block that nothing is done with.
"""

import inspect
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import dpo_triton

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = "https://github.com/dpo-triton/dpo-triton"
OF_FILES = re.compile(  # absolute, as a package index needs them
    rf"(?:{REPOSITORY}/(?:blob|tree)|https://raw.githubusercontent.com/dpo-triton/dpo-triton)/main/"
)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "gpu_lab" / "README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
OTHER_FENCES = {"", "sh", "{eval-rst}", "{toctree}"}  # formulas, commands; what Sphinx reads


class Block(NamedTuple):
    page: Path
    line: int  # of its first line of code
    fence: str  # what follows the opening backquotes
    code: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def read_blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = re.finditer(r"^```(.*)\n((?:.*\n)*?)^```$", text, re.MULTILINE)
    blocks = [Block(page, text.count("\n", 0, m.start(2)) + 1, m[1], m[2]) for m in found]
    assert text.count("```") == 2 * len(blocks), f"{page}: a fence that is not closed, or indented"
    return blocks


BLOCKS = [block for page in PAGES for block in read_blocks(page)]
PYTHON = [block for block in BLOCKS if block.fence not in OTHER_FENCES]
SIGNATURES = [block for block in PYTHON if re.match(r"\w+\(", block.code)]
RUNNING = [block for block in PYTHON if block not in SIGNATURES]


def by_name(blocks: list[Block]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("block", blocks, ids=[block.name for block in blocks])


@by_name(RUNNING)
def test_code_runs(block, tmp_path, monkeypatch):
    language, *words = block.fence.split()
    assert language == "python"
    needed = words[1:] if words[:1] == ["needs"] else []
    if needed:
        for name in needed:
            pytest.importorskip(name)
    elif words in (["compiled"], ["interpreted"]):
        pytest.importorskip("triton")
        is_interpreted = words == ["interpreted"]
        if is_interpreted and not interpreter_takes_numpy():
            pytest.skip("this Triton's interpreter does not run with this NumPy")
        (tmp_path / "block.py").write_text(block.code)  # Triton reads a kernel's source
        if is_interpreted and os.environ.get("TRITON_INTERPRET") == "1":
            runpy.run_path(str(tmp_path / "block.py"))
        else:
            run_in_own_process(["block.py"], is_interpreted=is_interpreted, folder=tmp_path)
        return
    elif words[:1] == ["ranks"]:
        (tmp_path / "block.py").write_text(block.code)
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", words[1]]
        run_in_own_process([*launch, "block.py"], is_interpreted=False, folder=tmp_path)
        return
    else:
        assert not words, f"{block.name}: what does {block.fence!r} mean?"
    monkeypatch.chdir(tmp_path)
    code = compile("\n" * (block.line - 1) + block.code, block.page, "exec")
    try:
        exec(code, {})
    except ModuleNotFoundError as error:
        if not needed or (error.name or "").startswith("dpo_triton"):
            raise
        pytest.skip(f"{' and '.join(needed)} cannot be imported here without {error.name}")


def interpreter_takes_numpy() -> bool:
    """Triton before 3.7 makes numbers of arrays with one element, which NumPy 2.4 refuses."""
    import numpy
    import triton

    def release(version: str) -> tuple[int, ...]:
        return tuple(int(part) for part in version.split(".")[:2])

    return release(triton.__version__) >= (3, 7) or release(numpy.__version__) < (2, 4)


def run_in_own_process(arguments: list[str], *, is_interpreted: bool, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "TRITON_INTERPRET": str(int(is_interpreted)), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@by_name(SIGNATURES)
def test_signature_is_the_function_s(block):
    code = re.sub(r"#.*", "", block.code)
    written = re.findall(r"^(\w+)\(\n(.*?)^\)", code, re.DOTALL | re.MULTILINE)
    assert written
    for function_name, arguments in written:
        function = getattr(dpo_triton, function_name)
        parameters = inspect.signature(function).parameters
        names = re.findall(r"(\w+)(?:=([^,\n]+))?,", arguments)
        assert [name for name, _ in names] == list(parameters), function_name
        for name, default in names:
            expected = parameters[name].default
            if default:
                assert eval(default) == expected, name
            else:
                assert expected is inspect.Parameter.empty, name
    for name in re.findall(r"^([a-z]\w*)[(.]", code, re.MULTILINE):
        assert name == "dpo_triton" or hasattr(dpo_triton, name), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_links_exist(page):
    text = page.read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for file in re.findall(r"\b(?:benchmarks|docs|examples|tests|tools)/[\w/]+\.(?:py|md)", text):
        assert (ROOT / file).exists(), file
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)  # kernel[grid](x)
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", prose):
        path, is_ours = OF_FILES.subn("", target)
        if is_ours:
            assert (ROOT / path).exists(), target
        elif not target.startswith("https://"):
            assert page.name != "README.md" or page.parent != ROOT, f"{target} is not absolute"
            assert (page.parent / target).exists(), target


def test_one_address_for_the_repository():
    """In what a user reads, and what an index shows."""
    project = (ROOT / "pyproject.toml").read_text()
    urls = re.findall(r"^\w+ = \"(https://github.com/.*)\"$", project, re.MULTILINE)
    assert urls
    text = "\n".join(page.read_text() for page in PAGES)
    urls += re.findall(r"https://github.com/dpo[\w-]*/[\w-]+", text)
    assert all(url.startswith(REPOSITORY) for url in urls)


def test_every_page_is_linked():
    index = (ROOT / "docs" / "README.md").read_text()
    site = (ROOT / "docs" / "index.md").read_text()
    pages = {page.stem for page in (ROOT / "docs").glob("[a-z]*.md")} - {"index"}
    for name in pages:
        assert f"({name}.md)" in index, name
        assert f"\n{name}\n" in site, name
    assert f"]({REPOSITORY}/tree/main/docs)" in (ROOT / "README.md").read_text()
    assert "](docs" in (ROOT / "CONTRIBUTING.md").read_text()


def test_the_first_page_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 200
    first = "\n".join(lines[:20])
    assert "GPU" in first
    assert first.count("\nmake ") == 2


PUBLIC = {
    name: getattr(dpo_triton, name)
    for name in dpo_triton.__all__
    if inspect.isfunction(getattr(dpo_triton, name))
}


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_parameter_is_described(name):
    """In the function's own docstring, or in that of one that it refers to."""
    pages, described = [name], set()
    for page in pages:
        docstring = inspect.getdoc(PUBLIC[page])
        for names in re.findall(r"^    (\w+(?:,\s+\w+)*): ", docstring, re.MULTILINE):
            described |= set(re.split(r",\s+", names))
        pages += [
            other
            for other in re.findall(r"`(\w+)`", docstring)
            if other in PUBLIC and other not in pages
        ]
    assert set(inspect.signature(PUBLIC[name]).parameters) <= described
