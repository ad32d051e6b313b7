"""Lay the package out as the Hugging Face Hub's `kernels` (0.17 or newer) loads it: `make hub`.

    dist/hub/README.md, LICENSE
    dist/hub/build/torch-cuda/     the package, once a backend: __init__.py, ..., metadata.json
    dist/hub/build/torch-rocm/     ...

The files are the same in each; what differs is the name under which `kernels` imports them, the
"id" in metadata.json. It ends in a hash of the sources, and the operators' namespace is it.
Needs Python alone. Layout and metadata: https://huggingface.co/docs/kernels/kernel-requirements
"""

import argparse
import base64
import hashlib
import json
import runpy
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "dpo_triton"
BACKENDS = ("cpu", "cuda", "rocm", "xpu")
OLDEST_KERNELS = "0.17.0"
# Adapters stand between an installed package and an installed trainer, pairs come from files, and a
# file of reference values needs safetensors; the Hub's rules allow no import but of the standard
# library, torch and the build itself.
LEFT_OUT = ("data", "integrations", "precompute", "__pycache__")

CARD = """---
license: apache-2.0
library_name: kernels
---
# dpo_triton

Log-probabilities of label sequences for preference optimisation, in one pass over the logits: fused
Triton kernels and a PyTorch path for CPUs.

```python
from pathlib import Path

from kernels import get_local_kernel

dpo_triton = get_local_kernel(Path("the folder of this file"))
logps = dpo_triton.fused_seq_logprob(logits, labels, mask, shift=True)  # (B,) means, in nats
```

dpo_triton {version}; pure Python, with Triton kernels for GPUs. It needs torch, and numpy; on a
CPU it is faster where numba is installed.
"""


def build(out: Path, root: Path = ROOT) -> list[Path]:
    """Write the layout of the checkout `root` into `out`; return the folders of its variants."""
    version = runpy.run_path(str(root / PACKAGE / "_version.py"))["__version__"]
    variants = [_build_variant(backend, version, root, out) for backend in BACKENDS]
    (out / "README.md").write_text(CARD.format(version=version))
    shutil.copy(root / "LICENSE", out)
    return variants


def _build_variant(backend: str, version: str, root: Path, out: Path) -> Path:
    variant = out / "build" / f"torch-{backend}"
    if variant.exists():
        shutil.rmtree(variant)
    ignore = shutil.ignore_patterns(*LEFT_OUT, "kernels")
    shutil.copytree(root / PACKAGE, variant, ignore=ignore)
    # dpo_triton/kernels is a link, which a zip or a checkout on Windows may not have.
    shutil.copytree(root / "kernels", variant / "kernels", ignore=shutil.ignore_patterns(*LEFT_OUT))
    digests = {
        path.relative_to(variant).as_posix(): hashlib.sha256(path.read_bytes()).digest()
        for path in sorted(variant.rglob("*"))
        if path.is_file()
    }
    of_all = hashlib.sha256(b"".join(name.encode() + d for name, d in digests.items()))
    metadata = {
        "name": PACKAGE.replace("_", "-"),
        "id": f"_{PACKAGE}_{backend}_{of_all.hexdigest()[:10]}",
        "version": int(version.partition(".")[0]),  # the Hub counts incompatible interfaces
        "license": "Apache-2.0",
        "kernels-minver": OLDEST_KERNELS,
        "python-depends": [],  # out of the Hub's own list, which has neither numpy nor triton
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {name: base64.b64encode(d).decode() for name, d in digests.items()},
        },
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return variant


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist" / "hub", help="folder to write")
    for folder in build(parser.parse_args().out):
        print(folder)
