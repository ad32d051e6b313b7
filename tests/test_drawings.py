"""The scripts behind the drawings and the plot of docs/."""

from pathlib import Path

import draw_stages
import plot_numerics
import pytest
import torch

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.mark.parametrize("name", ["stages", "tiles"])
def test_drawings_are_what_the_script_draws(name, tmp_path):
    getattr(draw_stages, name)().write(tmp_path / "drawn.svg")
    assert (tmp_path / "drawn.svg").read_text() == (DOCS / f"{name}.svg").read_text()


def test_what_the_plot_shows():
    """The other formulas have lost value and gradient 20 nats ahead, ours has them at any lead."""
    for dtype in plot_numerics.DTYPES:
        for name, formula in plot_numerics.FORMULAS.items():
            before, after = plot_numerics.margin_errors(formula, dtype, [-20, 20], 3001)
            rounding = torch.finfo(dtype).eps
            if name == "dpo_triton":
                assert max(before.value, after.value) < 1e-5
                assert max(before.target_grad, after.target_grad) < max(1e-5, rounding)
            else:
                assert before.value < 10 * rounding
                assert after.value > 0.9
                assert after.target_grad > 0.9


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    plot_numerics.plot(tmp_path / "numerics.svg", margins=[-20, 0, 20], vocab_sizes=[64, 128])
    assert "</svg>" in (tmp_path / "numerics.svg").read_text()
