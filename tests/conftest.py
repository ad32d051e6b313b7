"""Backends and devices of the suite. Without a GPU the kernels run in Triton's interpreter."""

import gc
import os

import pytest
import torch
from backends import BACKENDS, HAS_TRITON

if not torch.cuda.is_available():  # read when @triton.jit runs: before dpo_triton.kernels
    os.environ.setdefault("TRITON_INTERPRET", "1")
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if HAS_TRITON and IS_INTERPRETED:
    import triton_interpreter

    triton_interpreter.round_like_a_gpu()
    triton_interpreter.compute_once()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tests' tensors are: every test that can takes it."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def narrow_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's tiles are so wide that a vocabulary of several would take the interpreter minutes."""
    from processes import with_narrow_tiles

    if HAS_TRITON:
        with_narrow_tiles(monkeypatch.setattr)


@pytest.fixture(scope="session")
def seed(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--seed"))


@pytest.fixture(autouse=True)
def fresh_seed(seed: int) -> None:
    """Inputs are drawn anew in every run; --seed repeats one."""
    torch.manual_seed(seed)


@pytest.fixture
def poisoned():
    """Memory that torch.empty returns holds NaN: what a stage does not write cannot look right."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


def pytest_addoption(parser: pytest.Parser) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    parser.addoption("--seed", type=int, default=seed, help="seed of the inputs")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """A GPU is not shared: with one, the tests run in this process."""
    return 0 if torch.cuda.is_available() else None


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    """One seed for all workers: each would draw its own."""
    node.workerinput["seed"] = node.config.getoption("--seed")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # one of several processes that share the cores
        config.option.seed = config.workerinput["seed"]
        threads = max(1, torch.get_num_threads() // config.workerinput["workercount"])
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes that a test starts


def pytest_report_header(config: pytest.Config) -> str:
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "interpreter"
    return f"inputs: --seed={config.getoption('--seed')}; kernels: {where}"


def pytest_collection_finish() -> None:
    """What is imported stays: or each collection of garbage looks at millions of objects."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # a folder may have that name, and be a keyword
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
