"""What a user installs: one top-level package with the kernels inside it, from any copy of ours."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
from run_versions import COMBINATIONS

import dpo_triton

ROOT = Path(__file__).resolve().parents[1]

pytest.importorskip("setuptools", minversion="77")


class Built(NamedTuple):
    """Of a checkout, and of one without symbolic links: a zip, or git on Windows."""

    sdist: Path
    wheel: Path  # from that sdist
    unlinked: Path  # the checkout
    unlinked_wheel: Path
    unlinked_editable: Path


def build(kind: str, source: Path) -> Path:
    """What setuptools makes of a folder: "sdist", "wheel" or "editable"."""
    out = source.with_name(f"{source.name}-{kind}")
    out.mkdir()
    code = f"import sys; from setuptools.build_meta import build_{kind} as f; f(sys.argv[1])"
    # -I: nor does setuptools look for plug-ins of Hugging Face's `kernels` in our folder.
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(out)], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("built")
    linked, unlinked = folder / "linked", folder / "unlinked"
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "out")
    shutil.copytree(ROOT, linked, symlinks=True, ignore=ignored)
    shutil.copytree(linked, unlinked, symlinks=True)
    for path in [path for path in unlinked.rglob("*") if path.is_symlink()]:
        text = os.readlink(path)
        path.unlink()
        path.write_text(text)

    sdist = build("sdist", linked)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    wheels = build("wheel", unpacked), unlinked, build("wheel", unlinked)
    return Built(sdist, *wheels, build("editable", unlinked))


@pytest.mark.parametrize("name", ["wheel", "unlinked_wheel"])
def test_wheel_has_one_top_level_package(built, name):
    names = zipfile.ZipFile(getattr(built, name)).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"dpo_triton"}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "dpo_triton").glob("**/*.py")}
    sources |= {f"dpo_triton/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert sources == {name for name in names if name.endswith(".py")}
    assert "dpo_triton/py.typed" in names
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_sdist_has_the_kernels_once_as_files(built):
    with tarfile.open(built.sdist) as archive:
        members = {m.name.split("/", 1)[1]: m for m in archive if "/" in m.name}
    assert members["kernels/partials.py"].isfile()
    assert not any(name.startswith("dpo_triton/kernels/") for name in members)
    assert "README.md" in members
    assert "tests/test_values.py" in members


def test_an_index_can_show_it(built):
    pytest.importorskip("twine")
    command = [sys.executable, "-m", "twine", "check", "--strict", built.sdist, built.wheel]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2


def test_version_has_a_dated_entry_in_the_changelog():
    entries = re.findall(r"^## \[(.+?)\](.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    released = [(version, date) for version, date in entries if version != "Unreleased"]
    version, date = released[0]
    assert version == dpo_triton.__version__
    assert re.fullmatch(r" - \d{4}-\d\d-\d\d", date)
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {version}\ndate-released: {date.removeprefix(' - ')}\n" in citation


def test_versions_are_said_alike():
    """Of tools, in constraints and in the hooks before a commit; of floors, in what is tried."""
    constraints = (ROOT / "constraints.txt").read_text()
    if (ROOT / ".pre-commit-config.yaml").exists():  # not in an sdist
        hooks = (ROOT / ".pre-commit-config.yaml").read_text()
        assert re.search(r"^ruff==(.*)$", constraints, re.MULTILINE)[1] in hooks
    project = (ROOT / "pyproject.toml").read_text()
    oldest = COMBINATIONS["oldest"]
    assert f'requires-python = ">={oldest.python}"' in project
    for package in ("torch", "triton", "numpy"):
        floor = re.search(rf'^    "{package}>=([\d.]+)', project, re.MULTILINE)[1]
        assert getattr(oldest, package).startswith(f"{floor}."), package


CODE = """
import importlib.util, sys
sys.path.insert(0, sys.argv[2])
import torch, dpo_triton
spec = importlib.util.find_spec("kernels")
assert spec is None or not spec.origin.startswith(tuple(sys.argv[1:])), "a package `kernels`"
assert dpo_triton.__file__.startswith(sys.argv[2])
x, y = torch.randn(2, 3, 50), torch.zeros(2, 3, dtype=torch.long)
a = dpo_triton.fused_seq_logprob(x, y)
if importlib.util.find_spec("triton"):
    torch.testing.assert_close(dpo_triton.fused_seq_logprob(x, y, backend="triton"), a)
"""
CODE_EDITABLE = """
import site, sys
site.addsitedir(sys.argv[2])
def find(name):
    found = [finder.find_spec(name, None) for finder in sys.meta_path]
    return [spec.origin for spec in found if spec and spec.origin.startswith(sys.argv[1])]
assert find("dpo_triton") == [sys.argv[1] + "/dpo_triton/__init__.py"]
assert find("dpo_triton.kernels") == [sys.argv[1] + "/kernels/__init__.py"]
assert not find("kernels")
"""


@pytest.mark.parametrize(
    ("name", "options", "code"),
    [("unlinked_wheel", ["-I"], CODE), ("unlinked_editable", ["-I", "-S"], CODE_EDITABLE)],
    ids=["wheel", "editable"],
)
def test_installed_it_is_found_and_works(built, name, options, code, tmp_path):
    """Both from a checkout without links. -S: another editable install is not looked at."""
    zipfile.ZipFile(getattr(built, name)).extractall(tmp_path / "site")
    # -I and another folder: neither the checkout nor its kernels/ can be imported by accident.
    done = subprocess.run(
        [sys.executable, *options, "-c", code, str(built.unlinked), str(tmp_path / "site")],
        cwd=tmp_path,
        env={"TRITON_INTERPRET": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


CODE_UNLINKED = """
import sys

# An editable install of another checkout knows where its kernels are.
sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
import torch
from dpo_triton import fused_seq_logprob

batch = torch.randn(1, 2, 5), torch.zeros(1, 2, dtype=torch.long)
fused_seq_logprob(*batch)
try:
    fused_seq_logprob(*batch, backend="triton")
except ModuleNotFoundError as error:
    print(error)
"""


def test_a_checkout_without_links_says_what_to_do(built):
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", CODE_UNLINKED],
        cwd=built.unlinked,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"{built.unlinked / 'dpo_triton' / 'kernels'} is a link to the kernels" in done.stdout
    assert "run `pip install .` in it" in done.stdout


def test_no_message_installs_a_name_that_is_not_ours():
    """Nothing is on a package index yet: an extra comes from the checkout."""
    by_name = re.compile(r"""install ['"]?dpo[-_]triton\b(?!-\d)""")
    for folder in ("dpo_triton", "kernels", "benchmarks", "examples", "docs", "tools"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".md"):
                assert not by_name.search(path.read_text()), path


def test_kernels_is_a_link_in_the_checkout():
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    assert (ROOT / "dpo_triton" / "kernels").resolve() == ROOT / "kernels"
