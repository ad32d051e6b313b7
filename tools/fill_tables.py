"""Fill the tables of README.md and docs/ from committed results: `make tables`.

A page says where a table stands, what it shows and from which file:

    <!-- vocab benchmarks/results/amd-epyc-2-threads-24-gib.csv -->
    (the table)
    <!-- end -->

tests/test_tables.py holds the pages against the files.
"""

import csv
import re
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
MARKED = re.compile(r"(<!-- ([\w-]+) (\S+\.csv) -->\n).*?(<!-- end -->)", re.DOTALL)

Row = dict[str, str]


def filled(text: str, root: Path = ROOT) -> str:
    """The page with each of its tables as the file beside its name has it."""

    def fill(match: re.Match[str]) -> str:
        with (root / match[3]).open(newline="") as file:
            rows = list(csv.DictReader(file))
        return f"{match[1]}{TABLES[match[2]](rows)}\n{match[4]}"

    return MARKED.sub(fill, text)


def vocab(rows: list[Row]) -> str:
    """Logits to values and back: every vocabulary size, all rows scored, and the worst ratios."""
    return _vocabulary(rows, "1", "All rows scored")


def vocab_half(rows: list[Row]) -> str:
    return _vocabulary(rows, "0.5", "Half of the rows scored")


def vocab_sizes(rows: list[Row]) -> str:
    """From the smallest batch to the largest, all rows scored."""

    def case(row: Row) -> Case:
        shape = f"{row['batch']} x {row['seq_len']} x {row['vocab_size']}"
        setting = row["threads"] + ", one core busy" * (row["neighbours"] != "0")
        cells = (shape, row["dtype"], setting)
        return cells, f"{row['dtype']}, {shape}, threads: {setting}"

    sized = [row for row in rows if row["part"] == "sizes"]
    headings = ("sequences x tokens x V", "logits", "threads")
    return _vocab(sized, headings, case, "All rows scored")


def _vocabulary(rows: list[Row], share: str, scored: str) -> str:
    def case(row: Row) -> Case:
        cells = (row["vocab_size"], row["dtype"])
        return cells, f"{row['dtype']}, V = {row['vocab_size']}"

    here = [row for row in rows if row.get("part", "vocabulary") == "vocabulary"]
    here = [row for row in here if row["scored_share"] == share]
    here.sort(key=lambda row: (int(row["vocab_size"]), row["dtype"]))
    return _vocab(here, ("V", "logits"), case, scored)


Case = tuple[tuple[str, ...], str]  # the cells that name it, and a text that does


def _vocab(
    rows: list[Row], headings: tuple[str, ...], case: Callable[[Row], Case], scored: str
) -> str:
    of = {(*case(row), row["impl"], row["passes"]): row for row in rows}
    worst: dict[str, tuple[float, str]] = {}
    speeds = [f"over {peer}" for peer in VOCAB_PEERS]
    memory = [f"peak MiB, {impl}" for impl in VOCAB_MEMORY]
    lines = _heading(
        *(*headings, "forward, ms", *speeds, "forward + backward, ms", *speeds, *memory),
        "largest error, nats",
    )
    for names, where in dict.fromkeys(map(case, rows)):
        cells, errors = list(names), []
        for passes in ("forward", "forward+backward"):
            ours = of[names, where, "dpo_triton", passes]
            errors.append(float(ours["value_error"]))
            cells.append(_ms(ours["ms"]))
            for peer in VOCAB_PEERS:
                ratio = float(of[names, where, peer, passes]["ms"]) / float(ours["ms"])
                text = f"{ratio:.2f}x ({where}, {passes.replace('+', ' + ')})"
                worst[peer] = min(worst.get(peer, (ratio, text)), (ratio, text))
                cells.append(f"{ratio:.2f}x")
        both = [of[names, where, impl, "forward+backward"] for impl in VOCAB_MEMORY]
        cells += [f"{float(row['peak_mib']):.0f}" for row in both]
        lines.append(_line(*cells, f"{max(errors):.1e}"))
    slowest = ", and ".join(f"{worst[peer][1]} over {peer}" for peer in VOCAB_PEERS)
    worst_case = f"The worst ratios are {slowest}. Below 1x this package is slower."
    return "\n".join([*lines, "", f"{scored}; {_setting(rows[0])}. {worst_case}"])


VOCAB_PEERS = ("log_softmax", "torch.compile")
VOCAB_MEMORY = ("dpo_triton", "log_softmax")


def head(rows: list[Row]) -> str:
    """Hidden states to values and back, float32: seconds, memory and errors beside the peers'."""
    of = {
        (row["model"], row["impl"], row["scored_share"], row["head"]): row
        for row in rows
        if row["dtype"] == "float32" and row["passes"] == "forward+backward"
    }
    columns = (("0.45", "trained"), ("0.45", "frozen"), ("1", "trained"))
    lines = _heading(
        *("model", "way", "45 % scored, s", "frozen head, s", "100 % scored, s"),
        *("peak MiB, 45 %", "largest error, nats"),
    )
    for model, impl in dict.fromkeys((row["model"], row["impl"]) for row in rows):
        found = [of.get((model, impl, *column)) for column in columns]
        if found[0] is None:
            continue
        seconds = [f"{float(row['ms']) / 1e3:.2f}" if row else "" for row in found]
        error = max(float(row["value_error"]) for row in found if row)
        memory = f"{float(found[0]['peak_mib']):.0f}"
        lines.append(_line(model, impl, *seconds, memory, f"{error:.1e}"))
    return "\n".join([*lines, "", f"float32; {_setting(rows[0])}."])


def dpo_step(rows: list[Row]) -> str:
    lines = _heading("way", "s", "head and log-probabilities, s", "share", "peak MiB")
    for row in rows:
        seconds, share = float(row["ms"]) / 1e3, float(row["head_share"])
        cells = f"{seconds:.1f}", f"{seconds * share:.1f}", f"{share:.0%}".replace("%", " %")
        lines.append(_line(row["impl"], *cells, f"{float(row['peak_mib']):.0f}"))
    first = rows[0]
    what = f"{first['pairs']} pairs of {first['seq_len']} tokens, {first['scored']} of "
    what += f"{first['tokens']} tokens scored"
    return "\n".join([*lines, "", f"{what}; {_setting(first)}."])


def kernels(rows: list[Row]) -> str:
    """What the compiled kernels execute and move, and what a model makes of it: a line a quantity,
    a column an implementation."""
    impls = list(dict.fromkeys(row["impl"] for row in rows))
    of = {
        (row["impl"], row["quantity"], row["passes"], row["where"], row["case"]): float(
            row["value"]
        )
        for row in rows
        if row["quantity"] in KERNEL_QUANTITIES
    }

    def both_targets(name: str, quantity: str, passes: str) -> str:
        cells = []
        for impl in impls:
            found = [of[impl, quantity, passes, target, "all"] for target in ("sm_90", "sm_100")]
            cells.append(" / ".join(f"{number:.2f}" for number in found))
        return _line(f"{name}, {passes}, sm_90 / sm_100", *cells)

    def one(name: str, form: str, *key: str) -> str:
        return _line(name, *(form.format(of[(impl, *key)]) for impl in impls))

    def modelled(device: str, case: str, name: str) -> str:
        cells = [
            sum(of[impl, MODELLED, passes, device, case] for passes in ("forward", "backward"))
            for impl in impls
        ]
        what = f"modelled ms of 8192 rows, forward + backward, {device}, {name}"
        return _line(what, *(f"{ms:.2f}" for ms in cells))

    names = {"all": "all rows scored", "50%, shift": "half of the rows scored, shifted"}
    lines = _heading("", *impls)
    for passes in ("forward", "backward"):
        lines.append(both_targets("PTX instructions per logit", PTX, passes))
        lines.append(both_targets("machine instructions (SASS) per logit", SASS, passes))
    lines.append(one("exponentials per logit, forward", "{:.2f}", EXP2, "forward", "sm_90", "all"))
    lines.append(
        one("barriers in the loop, forward", "{:.0f}", BARRIERS, "forward", "sm_90", "all")
    )
    for case, name in names.items():
        key = (BYTES, "forward+backward", "sm_90", case)
        lines.append(one(f"bytes per logit, forward + backward, {name}", "{:.1f}", *key))
    for device in ("H100 SXM", "B200"):
        lines += [modelled(device, case, name) for case, name in names.items()]
    return "\n".join([*lines, "", f"{_setting(rows[0])}."])


PTX, SASS = "PTX instructions per logit", "machine instructions per logit"
EXP2, BARRIERS = "exp2 per logit", "barriers in the loop"
BYTES, MODELLED = "total bytes per logit", "modelled time"
KERNEL_QUANTITIES = (PTX, SASS, EXP2, BARRIERS, BYTES, MODELLED)


def versions(rows: list[Row]) -> str:
    """Which combinations ran, when, and what came of it."""
    lines = _heading(*rows[0])
    return "\n".join([*lines, *(_line(*row.values()) for row in rows)])


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "vocab": vocab,
    "vocab-half": vocab_half,
    "vocab-sizes": vocab_sizes,
    "head": head,
    "dpo-step": dpo_step,
    "kernels": kernels,
    "versions": versions,
}


def _heading(*cells: str) -> list[str]:
    return [_line(*cells), _line(*["---"] * len(cells))]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _ms(milliseconds: str) -> str:
    number = float(milliseconds)
    return f"{number:.1f}" if number >= 1 else f"{number:.3f}"


def _setting(row: Row) -> str:
    return f"`{row['command']}` on {row['machine']}, torch {row['torch']}"


if __name__ == "__main__":
    for page in PAGES:
        before = page.read_text()
        after = filled(before)
        if after != before:
            page.write_text(after)
            print(page.relative_to(ROOT))
