"""Replacing a framework's functions and putting them back, with a framework of its own."""

import importlib
import sys
import warnings
from typing import Any

import pytest

from dpo_triton.integrations import _patching
from dpo_triton.integrations._patching import Integration, Replacement

FILES = {
    "standin/__init__.py": "",
    "standin/core.py": """
def score(logits, labels, scale=1.0):
    return "theirs"

def count(labels):
    return "theirs"

class Trainer:
    def logps(self, logits):
        return "theirs", self

    @staticmethod
    def batch(logits):
        return "theirs"
""",
    "standin/head.py": """
import torch
from .core import score

class Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, scale=1.0):
        return hidden * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2, None

def head(hidden):
    return Head.apply(hidden)
""",
    "standin/trainer.py": """
from .core import score as their_score
from .head import Head as TheirHead

def train():
    return their_score(1, 2)
""",
    "standin/late.py": "from .core import score",
    "standin-1.2.3.post1+cpu.dist-info/METADATA": "Name: standin\nVersion: 1.2.3.post1+cpu\n",
}


def score(logits: Any, labels: Any, scale: float = 1.0) -> str:
    return "ours"


def count(labels: Any) -> str:
    return "ours"


def logps(self: Any, logits: Any) -> Any:
    return "ours", self


def batch(logits: Any) -> str:
    return "ours"


def head(hidden: Any, scale: float = 1.0) -> str:
    return "ours"


def integration(*replacements: Replacement, **options: Any) -> Integration:
    options = dict(framework="Stand-in", distribution="standin", tested=("1.1", "1.2.3")) | options
    replacements = replacements or (Replacement("standin.core", "score", score),)
    return Integration(replacements=replacements, **options)


@pytest.fixture
def standin(tmp_path, monkeypatch):
    """The framework, imported: its core and the trainer that imports from it."""
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("standin.trainer")
    yield sys.modules["standin"]
    for name in [name for name in sys.modules if name.partition(".")[0] == "standin"]:
        del sys.modules[name]


def test_replaced_where_it_is_held_and_restored_exactly(standin):
    before = [dict(vars(standin.core)), dict(vars(standin.trainer))]
    undo = integration().enable()
    assert standin.core.score(1, 2) == standin.trainer.train() == "ours"
    assert standin.core.score.__wrapped__ is score
    undo()
    assert [dict(vars(standin.core)), dict(vars(standin.trainer))] == before
    undo()  # again: nothing
    assert standin.trainer.train() == "theirs"


def test_a_module_that_imports_it_later_gets_it_back_too(standin):
    with integration().fused():
        late = importlib.import_module("standin.late")
        assert late.score(1, 2) == "ours"
    assert late.score is standin.core.score
    assert late.score(1, 2) == "theirs"


def test_methods_and_static_methods(standin):
    trainer = standin.core.Trainer
    before = dict(vars(trainer))
    owner = "standin.core:Trainer"
    both = integration(Replacement(owner, "logps", logps), Replacement(owner, "batch", batch))
    with both.fused():
        instance = trainer()
        assert instance.logps(1) == ("ours", instance)
        assert instance.batch(1) == trainer.batch(1) == "ours"
    assert dict(vars(trainer)) == before


def test_an_autograd_function_is_replaced_by_what_its_apply_does(standin):
    before = [dict(vars(standin.head)), dict(vars(standin.trainer))]
    with integration(Replacement("standin.head", "Head", head)).fused():
        assert standin.head.head(1) == standin.trainer.TheirHead.apply(1, scale=2.0) == "ours"
    assert [dict(vars(standin.head)), dict(vars(standin.trainer))] == before


def test_a_module_that_only_imports_it_is_changed_alone(standin):
    theirs = standin.core.score
    undo = integration(Replacement("standin.head", "score", score)).enable()
    assert standin.head.score(1, 2) == "ours"
    assert standin.core.score(1, 2) == standin.trainer.train() == "theirs"
    undo()
    assert standin.head.score is theirs


def test_a_replacement_of_some_versions(standin):
    replacements = [
        Replacement("standin.core", "count", count, versions=("1.2",)),
        Replacement("standin.core", "gone", count, versions=("1.1", "1.20")),
    ]
    with integration(*replacements).fused():
        assert standin.core.count(1) == "ours"
    assert standin.core.count(1) == "theirs"


def test_an_exception_undoes(standin):
    with pytest.raises(KeyError, match="ours"), integration().fused():
        raise KeyError(standin.trainer.train())
    assert standin.trainer.train() == "theirs"


@pytest.mark.parametrize("first_undone", [0, 1])
def test_nested_in_any_order(first_undone, standin):
    def inner(logits: Any, labels: Any, scale: float = 1.0) -> str:
        return "inner"

    theirs = standin.core.score
    undos = [
        integration().enable(),
        integration(Replacement("standin.core", "score", inner)).enable(),
    ]
    assert standin.trainer.train() == "inner"
    undos.pop(first_undone)()
    assert standin.trainer.train() == standin.core.score(1, 2) == ["inner", "ours"][first_undone]
    undos.pop()()
    assert standin.core.score is standin.trainer.their_score is theirs


def test_the_same_twice_is_undone_twice(standin):
    with integration().fused():
        with integration().fused():
            assert standin.trainer.train() == "ours"
        assert standin.trainer.train() == "ours"
    assert standin.trainer.train() == "theirs"


def test_one_function_in_two_places(standin):
    standin.core.rate = lambda labels: "also theirs"
    both = [Replacement("standin.core", name, count) for name in ("count", "rate")]
    with integration(*both).fused():
        assert standin.core.count(1) == standin.core.rate(1) == "ours"
    assert standin.core.count(1) == "theirs"
    assert standin.core.rate(1) == "also theirs"


@pytest.mark.parametrize("tested", [("1.2",), ("1.2.3",), ("1.2.3.post1",), ("0.9", "1")])
def test_series_of_versions(tested, standin):
    integration(tested=tested).enable()()


@pytest.mark.parametrize("tested", [("1.2.30",), ("1.2.4", "1.3"), ("2", "11.2.3")])
def test_an_unknown_version_is_refused(tested, standin):
    with pytest.raises(RuntimeError) as error:
        integration(tested=tested).enable()
    assert "Stand-in 1.2.3.post1+cpu was not tested" in str(error.value)
    assert ", ".join(tested) in str(error.value)
    assert standin.trainer.train() == "theirs"


def test_a_refusal_names_the_option(standin):
    with pytest.raises(RuntimeError, match=r'or pass untested="warn" to have it taken for 1\.1'):
        integration(tested=("1.1", "1.3")).enable()
    with pytest.raises(ValueError, match=r'untested must be "refuse" or "warn", got \'ignore\''):
        integration(tested=("1.1", "1.3")).enable(untested="ignore")


def test_an_untested_version_with_a_warning(standin, monkeypatch):
    """It is taken for the newest tested one before it, warned of once, and checked as ever."""
    monkeypatch.setattr(_patching, "_warned", set())
    replacements = (
        Replacement("standin.core", "score", score, versions=("1.2.0",)),
        Replacement("standin.core", "gone", score, versions=("1.1.9", "1.3", "1.10")),
    )
    untested = integration(*replacements, tested=("1.10", "1.2.0", "1.1.9", "1.3"))
    with pytest.warns(UserWarning, match=r"1\.2\.3\.post1\+cpu was .* taken for 1\.2\.0") as caught:
        undo = untested.enable(untested="warn")
    assert [warning.filename for warning in caught] == [__file__]
    assert standin.trainer.train() == "ours"
    undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with untested.fused(untested="warn"):
            assert standin.trainer.train() == "ours"
    assert standin.trainer.train() == "theirs"
    wrong = integration(Replacement("standin.core", "score", more), tested=("1.3",))
    with pytest.raises(RuntimeError, match=r"takes \(logits, labels, scale=1\.0\), and"):
        wrong.enable(untested="warn")
    assert standin.trainer.train() == "theirs"


def test_a_with_block_warns_where_it_stands(standin, monkeypatch):
    monkeypatch.setattr(_patching, "_warned", set())
    with (
        pytest.warns(UserWarning, match="taken for 2") as caught,
        integration(tested=("2.0", "3.1")).fused(untested="warn"),
    ):
        pass
    assert [warning.filename for warning in caught] == [__file__]


def test_a_tested_version_gives_no_warning(standin):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        integration().enable(untested="warn")()


def test_a_framework_that_is_not_there_is_refused():
    with pytest.raises(ModuleNotFoundError, match=r"Stand-in is not installed.*'standin'.*1\.2\.3"):
        integration().enable()


def more(logits: Any, labels: Any, more: int, scale: float = 1.0) -> str:
    return "ours"


def fewer(logits: Any, labels: Any) -> str:
    return "ours"


def other_default(logits: Any, labels: Any, scale: float = 2.0) -> str:
    return "ours"


def moved(labels: Any, *, chunk_size: int = 0, scale: float = 1.0, logits: Any) -> Any:
    return logits, labels, scale, chunk_size


def test_parameters_go_by_name(standin):
    """A framework's next version may lose a parameter, or order them anew."""
    with integration(Replacement("standin.core", "score", moved)).fused():
        assert standin.trainer.train() == (1, 2, 1.0, 0)
        assert standin.core.score(1, scale=3.0, labels=2) == (1, 2, 3.0, 0)
        with pytest.raises(TypeError):
            standin.core.score(1, 2, 3.0, 4)
        with pytest.raises(TypeError):
            standin.core.score(1, logits=1, labels=2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Replacement("standin.core", "gone", score), r"no standin\.core\.gone.*tested.*1\.2\.3"),
        (Replacement("standin.core:Gone", "logps", logps), r"no standin\.core:Gone\.logps"),
        (Replacement("standin.core", "score", more), r"takes \(logits, labels, scale=1\.0\), and"),
        (Replacement("standin.core", "score", fewer), r"takes \(logits, labels\); the tested"),
        (Replacement("standin.core", "score", other_default), r"scale=2\.0\); the tested"),
        (Replacement("standin.head", "Head", logps), r"takes \(hidden, scale=1\.0\), and"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_replaced(wrong, message, standin):
    with pytest.raises(RuntimeError, match=message):
        integration(Replacement("standin.core", "count", count), wrong).enable()
    assert standin.core.count(1) == standin.core.score(1, 2) == "theirs"


def test_somebody_else_s_replacement_is_not_undone(standin):
    undo = integration().enable()
    ours = standin.core.score
    standin.core.score = more
    with pytest.raises(RuntimeError, match=r"standin\.core\.score was replaced by something else"):
        undo()
    assert standin.core.score is more
    standin.core.score = ours
    undo()
    assert standin.trainer.train() == "theirs"
