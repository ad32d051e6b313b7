"""Sphinx: `make docs` builds this folder into dist/docs. Every warning fails it.

So do a link to a file that is not there, and a public name that the reference leaves out or that
has no docstring.
"""

import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

import dpo_triton

sys.path.insert(0, str(Path(__file__).parent))
import docstrings

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = "https://github.com/dpo-triton/dpo-triton"
# What a user may import; each says in __all__ what of it is public.
MODULES = (
    "dpo_triton",
    "dpo_triton.data",
    "dpo_triton.losses",
    "dpo_triton.nn",
    "dpo_triton.precompute",
    "dpo_triton.reference",
    "dpo_triton.integrations.minimind",
)

project = "dpo_triton"
author = "dpo_triton contributors"
project_copyright = author
version = release = dpo_triton.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["README.md"]  # for whoever browses the folder: see prepare_page
html_theme = "furo"
html_title = f"dpo_triton {version}"
myst_heading_anchors = 3
autodoc_typehints = "none"  # shapes and dtypes are in the docstrings
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"

logger = logging.getLogger(__name__)


def prepare_page(app: Sphinx, docname: str, source: list[str]) -> None:
    """The first page is the folder's README.md, with the list of pages that index.md has.

    Files outside of this folder are not on the site: a link goes to the repository's copy.

    One to a file that does not exist is left alone, and MyST warns of it.
    """

    def replace(match: re.Match[str]) -> str:
        path = ROOT / match[1]
        kind = "tree" if path.is_dir() else "blob"
        return f"]({REPOSITORY}/{kind}/main/{match[1]})" if path.exists() else match[0]

    if docname == "index":
        source[0] = (ROOT / "docs" / "README.md").read_text() + source[0]
    source[0] = re.sub(r"\]\(\.\./([^)#]+)\)", replace, source[0])


def check_public_names(app: Sphinx, env: BuildEnvironment) -> None:
    documented = env.domaindata["py"]["objects"]
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        defined = [name for name, value in vars(module).items() if inspect.isfunction(value)]
        for name in getattr(module, "__all__", defined):
            value = getattr(module, name)
            if inspect.ismodule(value) or name.startswith("_"):
                continue
            if f"{module_name}.{name}" not in documented:
                logger.warning("%s.%s is public and not in api.md", module_name, name)
            elif (inspect.isroutine(value) or inspect.isclass(value)) and not has_docstring(value):
                logger.warning("%s.%s has no docstring", module_name, name)


def has_docstring(value: Any) -> bool:
    text = inspect.getdoc(value) or ""
    return bool(text) and not text.startswith(f"{value.__name__}(")  # a NamedTuple's own


def convert_docstring(
    app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]
) -> None:
    """Records also show their fields as the source has them: shapes are in comments beside them."""
    lines[:] = docstrings.to_restructured_text(lines)
    if what == "class" and issubclass(value, (tuple, dict)):
        after_docstring = inspect.getsource(value).split('"""', 2)[-1]
        body = re.split(r"\n    (?:@|def )", after_docstring)[0]
        fields = [line for line in body.splitlines() if line.startswith("    ")]
        lines += [".. code-block:: python", "", *fields, ""]


def skip_fields(
    app: Sphinx, what: str, name: str, value: Any, skip: bool, options: Any
) -> bool | None:
    return True if "Alias for field" in (inspect.getdoc(value) or "") else None


def setup(app: Sphinx) -> None:
    app.connect("source-read", prepare_page)
    app.connect("autodoc-process-docstring", convert_docstring)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("env-check-consistency", check_public_names)
