"""What a user installs: one top-level package, with the kernels inside it."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytest.importorskip("build")
pytest.importorskip("setuptools", minversion="77")


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist of the checkout, and the wheel that is built from that sdist."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,) = out.glob("*.tar.gz")
    (wheel,) = out.glob("*.whl")
    return sdist, wheel


def test_wheel_has_one_top_level_package(distributions):
    names = zipfile.ZipFile(distributions[1]).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"dpo_triton"}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "dpo_triton").glob("**/*.py")}
    sources |= {f"dpo_triton/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert sources <= set(names)
    assert "dpo_triton/py.typed" in names
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_sdist_has_the_kernels_once_as_files(distributions):
    with tarfile.open(distributions[0]) as archive:
        members = {m.name.split("/", 1)[1]: m for m in archive if "/" in m.name}
    assert members["kernels/partials.py"].isfile()
    assert "README.md" in members
    assert "tests/test_values.py" in members


CODE = """
import importlib.util, sys
import torch, dpo_triton
spec = importlib.util.find_spec("kernels")
assert spec is None or not spec.origin.startswith(sys.path[0]), "a top-level package `kernels`"
print(dpo_triton.__file__)
x, y = torch.randn(2, 3, 50), torch.zeros(2, 3, dtype=torch.long)
a = dpo_triton.fused_seq_logprob(x, y)
if importlib.util.find_spec("triton"):
    torch.testing.assert_close(dpo_triton.fused_seq_logprob(x, y, backend="triton"), a)
"""


def test_installed_wheel_works_on_its_own(distributions, tmp_path):
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, "--target", str(target), str(distributions[1])], check=True)
    # -P and another folder: neither the checkout nor its kernels/ can be imported by accident.
    runner = f"import sys; sys.path.insert(0, {str(target)!r})\n" + CODE
    done = subprocess.run(
        [sys.executable, "-I", "-c", runner],
        cwd=tmp_path,
        env={"TRITON_INTERPRET": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(target))


def test_kernels_is_a_link_in_the_checkout():
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    assert (ROOT / "dpo_triton" / "kernels").resolve() == ROOT / "kernels"
