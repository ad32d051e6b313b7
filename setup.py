"""Which folders are packages; all else is in pyproject.toml.

dpo_triton/kernels is a link, which a zip or a checkout on Windows may not have. Builds take the
folder itself, under the name of the link and no other.
"""

from setuptools import find_packages, setup

KERNELS = "dpo_triton.kernels"
found = find_packages(include=["dpo_triton", "dpo_triton.*"], exclude=[KERNELS])
setup(packages=[*found, KERNELS], package_dir={KERNELS: "kernels"})
