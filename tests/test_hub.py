"""The layout for the Hugging Face Hub: what is in it, and that `kernels` loads it beside us."""

import ast
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from build_hub import BACKENDS, build

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub")
    build(out)
    return out


def metadata(hub: Path, backend: str = "cpu") -> dict:
    return json.loads((hub / "build" / f"torch-{backend}" / "metadata.json").read_text())


def test_a_variant_is_the_package(hub):
    assert {path.name for path in (hub / "build").iterdir()} == {f"torch-{b}" for b in BACKENDS}
    sources = {
        path.relative_to(ROOT / "dpo_triton"): path.read_bytes()
        for folder in ("", "_cpu_stages", "_torch_stages", "kernels")
        for path in (ROOT / "dpo_triton" / folder).glob("*.py")
    }
    for backend in BACKENDS:
        variant = hub / "build" / f"torch-{backend}"
        assert not any(path.is_symlink() for path in variant.rglob("*"))
        for name, content in sources.items():
            assert (variant / name).read_bytes() == content, name
    assert (hub / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_imports_are_relative_or_of_what_the_hub_allows(hub):
    """Its rules have no NumPy or numba, which the stages on a CPU use, as the card says."""
    allowed = sys.stdlib_module_names | {"torch", "triton", "numpy", "numba", "llvmlite"}
    allowed |= {"typing_extensions"}  # torch brings it
    card = (hub / "README.md").read_text()
    assert "numpy" in card
    assert "numba" in card
    for path in (hub / "build" / "torch-cpu").rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):  # what only a type checker imports is allowed
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                node.body = [ast.Pass()]
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in names:
                assert name.partition(".")[0] in allowed, f"{path}: {name}"


def test_ids_are_unique_to_backend_and_sources(hub, tmp_path):
    """`kernels` imports a variant under its id, and operators of two builds must not meet."""
    ids = {metadata(hub, backend)["id"] for backend in BACKENDS}
    assert len(ids) == len(BACKENDS)
    assert all(id.isidentifier() for id in ids)

    shutil.copytree(ROOT / "dpo_triton", tmp_path / "dpo_triton", symlinks=True)
    (tmp_path / "dpo_triton" / "kernels").unlink()  # a copy without links has the same variants
    (tmp_path / "dpo_triton" / "kernels").write_text("../kernels")
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    shutil.copy(ROOT / "LICENSE", tmp_path)
    build(tmp_path / "same", tmp_path)
    assert metadata(tmp_path / "same") == metadata(hub)
    with (tmp_path / "kernels" / "grad.py").open("a") as file:
        file.write("# a change\n")
    build(tmp_path / "changed", tmp_path)
    assert metadata(tmp_path / "changed")["id"] not in ids


def test_building_again_drops_what_was_there(hub):
    stale = hub / "build" / "torch-cpu" / "stale.py"
    stale.touch()
    build(hub)
    assert not stale.exists()


# Run where neither the checkout's own kernels/ nor anything but dpo_triton of it can be imported.
LOAD = """
import importlib.util, pathlib, sys
import torch
import dpo_triton
import vendored.dpo_triton
from dpo_triton import reference
from kernels import get_local_kernel, get_loaded_kernels

hub = pathlib.Path(sys.argv[1])
torch.manual_seed(int(sys.argv[2]))
loaded = get_local_kernel(hub, backend="cpu")
builds = [loaded]
for backend in ("cuda", "rocm", "xpu"):  # named by their folder, they load without such a device
    builds.append(get_local_kernel(hub / "build" / f"torch-{backend}", backend="cpu"))
(record, *_) = get_loaded_kernels()
assert record.module is loaded is not dpo_triton
assert loaded.__file__ == str(hub / "build" / "torch-cpu" / "__init__.py")
assert loaded.__all__ == dpo_triton.__all__

builds.append(vendored.dpo_triton)  # a copy inside another package is one more
namespaces = [sys.modules[f"{m.__name__}._ops"].NAMESPACE for m in (dpo_triton, *builds)]
ids = [f"_dpo_triton_{backend}_" for backend in ("cpu", "cuda", "rocm", "xpu")]
assert [name[: len(id)] for name, id in zip(namespaces[1:], ids)] == ids, namespaces
assert (namespaces[0], namespaces[-1]) == ("dpo_triton", "vendored_dpo_triton")
for namespace in namespaces:
    assert getattr(torch.ops, namespace).linear_logprob_grad.default is not None

# The head has a whole tile of 4096 columns and a tail; about a third is not scored.
B, T, V, H = 1, 4, 4096 + 37, 24
labels = torch.randint(0, V, (B, T))
mask = (torch.rand(B, T) > 0.3) * torch.rand(B, T)
mask[0, 2:] = 1.0
logits = torch.randn(B, T, V) * 3
hidden, weight = torch.randn(B, T, H), torch.randn(V, H) * 0.3
upstream = torch.randn(B)


def of_logits(module, backend):
    x = logits.clone().requires_grad_()
    value = module.fused_seq_logprob(x, labels, mask, shift=True, backend=backend)
    return value, *torch.autograd.grad(value, x, upstream)


def of_hidden(module, backend):
    inputs = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    value = module.fused_linear_seq_logprob(*inputs, labels, mask, shift=True, backend=backend)
    return value, *torch.autograd.grad(value, inputs, upstream)


def exact(*inputs):
    inputs = [x.double().requires_grad_() for x in inputs]
    x = inputs[0] if len(inputs) == 1 else inputs[0] @ inputs[1].T
    value = reference.seq_logprob(x, labels, mask.double(), shift=True)
    return value, *torch.autograd.grad(value, inputs, upstream.double())


backends = ["torch"] + ["triton"] * (importlib.util.find_spec("triton") is not None)
for function, truth in ((of_logits, exact(logits)), (of_hidden, exact(hidden, weight))):
    for backend in backends:
        ours = function(dpo_triton, backend)
        for module in builds[: 1 if backend == "triton" else None]:
            for got, installed, true in zip(function(module, backend), ours, truth, strict=True):
                assert torch.equal(got, installed), "the same sources have the same bits"
                assert true.abs().max() > 0
                bound = 1e-5 * true.abs().max().item()
                torch.testing.assert_close(got.double(), true, rtol=0, atol=bound)

compiled = torch.compile(loaded.fused_seq_logprob, backend="eager", fullgraph=True)
assert torch.equal(compiled(logits, labels), loaded.fused_seq_logprob(logits, labels))
print("loaded", record.metadata.name)
"""


def has_kernels() -> bool:
    """By its metadata: under pytest `import kernels` finds the checkout's folder of that name."""
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(int(part) for part in version.split(".")[:2]) >= (0, 17)


needs_kernels = pytest.mark.skipif(not has_kernels(), reason="kernels >= 0.17 is not installed")


def run(code: str, folder: Path, *arguments: str) -> str:
    """The output of Python code that finds dpo_triton in a folder, and nothing else of ours."""
    for place in (folder, folder / "vendored"):
        place.mkdir(exist_ok=True)
        (place / "dpo_triton").symlink_to(ROOT / "dpo_triton")
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env=os.environ
        | offline
        | {"TRITON_INTERPRET": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_kernels
def test_kernels_loads_it_beside_an_installed_dpo_triton(hub, tmp_path, request):
    seed = request.config.getoption("--seed")
    assert run(LOAD, tmp_path, str(hub), str(seed)) == "loaded dpo-triton\n"


VERIFY = """
import pathlib, sys
from kernels._rust import Digest, DigestAlgorithm, Metadata

for variant in pathlib.Path(sys.argv[1]).glob("build/*"):
    metadata = Metadata.read_from_file(variant / "metadata.json")
    got = Digest.hash_variant(DigestAlgorithm.SHA256, variant)
    metadata.digest.validate(got)
    assert str(metadata.backend.backend_type).lower() == variant.name.removeprefix("torch-")
    (variant / "seq_logprob.py").open("a").write("# a change")
    try:
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
    except Exception as error:
        print(type(error).__name__)
"""


@needs_kernels
def test_digests_are_those_that_kernels_computes(tmp_path):
    build(tmp_path / "hub")
    found = run(VERIFY, tmp_path, str(tmp_path / "hub")).split()
    assert found == ["DigestValidationError"] * len(BACKENDS)
