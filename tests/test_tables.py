"""The figures on the pages are those of the committed results."""

import csv
import re

import fill_tables
import pytest


@pytest.mark.parametrize("page", fill_tables.PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_files(page):
    text = page.read_text()
    assert fill_tables.filled(text) == text, "run `make tables`"
    assert text.count("<!-- end -->") == len(fill_tables.MARKED.findall(text))


def test_the_first_page_shows_every_size_and_the_worst_case():
    text = (fill_tables.ROOT / "README.md").read_text()
    (name,) = [name for _, kind, name, _ in fill_tables.MARKED.findall(text) if kind == "vocab"]
    with (fill_tables.ROOT / name).open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["scored_share"] == "1"]
    for size in {row["vocab_size"] for row in rows}:
        assert f"\n| {size} |" in text
    for peer in ("log_softmax", "torch.compile"):
        ms = {
            (row["impl"], row["dtype"], row["vocab_size"], row["passes"]): float(row["ms"])
            for row in rows
        }
        worst = min(ms[(peer, *key[1:])] / ms[key] for key in ms if key[0] == "dpo_triton")
        assert re.search(rf"{worst:.2f}x \([^)]*\) over {re.escape(peer)}", text)


def test_a_changed_result_changes_the_page(tmp_path):
    (tmp_path / "runs.csv").write_text(
        "layers,head,seconds,peak_mib,speedup,num_tokens,num_scored,"
        "machine,torch,trl,command\n4,TRL,2,1,1,8,4,M,2,1,cmd\n"
    )
    page = "<!-- trl-step runs.csv -->\nold\n<!-- end -->\n"
    once = fill_tables.filled(page, tmp_path)
    assert "| 4 | TRL | 2.00 | 1 | 1.00x |" in once
    assert fill_tables.filled(once, tmp_path) == once
