"""The notebook: its cells run on a tiny model, and the outputs that it keeps are a real run's."""

import json
from pathlib import Path

import causal_lm
import matplotlib
import pytest
from tiny_llama import save_tiny_llama

for package in ("transformers", "peft", "matplotlib"):
    pytest.importorskip(package)

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NOTEBOOK = EXAMPLES / "dpo_in_fifteen_minutes.ipynb"
LN_2 = 0.6931472


def code_cells():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_the_cells_run_one_after_another(tmp_path, monkeypatch, capsys):
    tiny = save_tiny_llama(tmp_path / "tiny")
    monkeypatch.setattr(causal_lm, "find_smollm2", lambda: tiny)
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    monkeypatch.setattr(plt, "show", lambda: None)
    names = {}
    for number, cell in enumerate(code_cells(), start=1):
        exec(
            compile("".join(cell["source"]), f"{NOTEBOOK.name}, code cell {number}", "exec"), names
        )
    plt.close("all")
    assert names["losses"][0] == pytest.approx(LN_2, abs=1e-5)
    assert names["losses"][-1] < names["losses"][0]
    assert (tmp_path / "out" / "notebook" / "adapter_config.json").exists()
    opened = causal_lm.load_model(tmp_path / "out" / "notebook", "cpu", None)
    assert opened.num_parameters() == causal_lm.load_model(tiny, "cpu", None).num_parameters()


def test_the_outputs_that_are_kept_are_those_of_a_whole_run_in_order():
    cells = code_cells()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}
    text = "".join("".join(o["text"]) for o in outputs if o["output_type"] == "stream")
    assert "135 million weights" in text
    assert "step 1: loss 0.6931" in text
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    assert NOTEBOOK.stat().st_size < 150_000


def test_the_notebook_is_valid():
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.read(NOTEBOOK, as_version=4))
