"""The README's code runs, and its signature is the function's."""

import inspect
import re
from pathlib import Path

import dpo_triton

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_code_runs():
    ran = [block for block in BLOCKS if block.startswith("import")]
    assert ran
    for block in ran:
        exec(compile(block, "README.md", "exec"), {})


def test_api_block_is_the_signature():
    (block,) = [block for block in BLOCKS if block.startswith("fused_seq_logprob(")]
    written = re.sub(r"#.*", "", block.split("\n)", 1)[0])
    names = re.findall(r"(\w+)(?:=([^,\n]+))?,", written.split("(", 1)[1] + ",")
    signature = inspect.signature(dpo_triton.fused_seq_logprob)
    assert [name for name, _ in names] == list(signature.parameters)
    for name, default in names:
        expected = signature.parameters[name].default
        if default:
            assert eval(default) == expected, name
        else:
            assert expected is inspect.Parameter.empty


def test_every_command_exists():
    makefile = (Path(__file__).resolve().parents[1] / "Makefile").read_text()
    for target in re.findall(r"make ([\w-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for script in re.findall(r"python ((?:benchmarks|examples)/\w+\.py)", README):
        assert (Path(__file__).resolve().parents[1] / script).exists()
