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
    rows = [row for row in rows if row.get("part", "vocabulary") == "vocabulary"]
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
    cells = "TRL,2000,0.5,1024,2,512,680,2048,cmd,M,2"
    columns = "impl,ms,head_share,peak_mib,pairs,seq_len,scored,tokens,command,machine,torch"
    (tmp_path / "runs.csv").write_text(f"{columns}\n{cells}\n")
    page = "<!-- dpo-step runs.csv -->\nold\n<!-- end -->\n"
    once = fill_tables.filled(page, tmp_path)
    assert "| TRL | 2.0 | 1.0 | 50 % | 1024 |" in once
    assert fill_tables.filled(once, tmp_path) == once


def test_sizes_and_settings_have_lines_of_their_own():
    shared = dict(
        batch="8", seq_len="16", vocab_size="64", dtype="float32", scored_share="1", threads="2",
        part="sizes", peak_mib="3", value_error="1e-7", command="cmd", machine="M", torch="2",
    )  # fmt: skip
    rows = [
        shared | dict(impl=impl, passes=passes, ms=ms, neighbours=neighbours)
        for neighbours in ("0", "1")
        for impl, ms in (("dpo_triton", "0.5"), ("log_softmax", "0.25"), ("torch.compile", "2"))
        for passes in ("forward", "forward+backward")
    ]
    one = [row | dict(part="vocabulary", ms="4") for row in rows[:6]]
    assert "| 64 | float32 | 4.0 | 1.00x | 1.00x |" in fill_tables.vocab([*one, *rows])
    text = fill_tables.vocab_sizes([*rows, *one])
    line = "| 8 x 16 x 64 | float32 | {} | 0.500 | 0.50x | 4.00x | 0.500 | 0.50x | 4.00x | 3 | 3 |"
    assert line.format("2") in text
    assert line.format("2, one core busy") in text
    assert "0.50x (float32, 8 x 16 x 64, threads: 2, forward" in text
