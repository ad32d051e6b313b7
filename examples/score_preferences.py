"""Which of two answers does a causal LM find likelier, by the sum and by the mean of log p?

    python examples/score_preferences.py                       # SmolLM2-135M, preferences.jsonl
    python examples/score_preferences.py --data pairs.jsonl.gz --limit 12 --check

The forms of a row of the data are in the documentation of dpo_triton.data.parse_pair. The sum
favours short answers, the mean does not.
"""

import argparse
import io
import json
import math
import sys
import tempfile
import time
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import command_line
import torch
from causal_lm import CURE, find_smollm2, load_model, load_tokenizer, max_positions
from torch import Tensor

from dpo_triton import fused_seq_logprob, reference
from dpo_triton.data import Pair, TokenRows, parse_pair, read_texts, tokenise_files
from dpo_triton.precompute import collate_pairs

MAX_SUM_ERROR = 1e-3  # nats, of a sequence
MAX_MEAN_ERROR = 1e-5  # nats a token
WIDTH = 28  # columns of the prompt in the table


class Scores(NamedTuple):
    """Of N pairs, chosen and rejected, on the CPU, in the order of the input."""

    sums: Tensor  # (N, 2) nats; 0 where nothing is scored
    means: Tensor  # (N, 2) nats a token; likewise
    lengths: Tensor  # (N, 2) scored tokens
    errors: Tensor  # (N, 2, 4) float64, from compare; 0 without a check
    model_seconds: float
    logprob_seconds: float  # on a GPU with the compilation of the kernels


@torch.no_grad()
def score(
    model: Any,
    rows: TokenRows,
    *,
    batch_size: int,
    device: torch.device,
    backend: str = "auto",
    check: bool = False,
) -> Scores:
    """Score the answers in batches of `batch_size` pairs of about one length."""
    from tqdm import tqdm

    sums, lengths = torch.zeros(2, len(rows), 2)
    errors = torch.zeros(len(rows), 2, 4, dtype=torch.float64)
    model_seconds = logprob_seconds = 0.0
    longest_first = torch.from_numpy(rows.lengths.max(axis=1)).argsort(descending=True, stable=True)
    with tqdm(total=int(rows.lengths.sum()), unit="token", unit_scale=True) as bar:
        for picked in longest_first.split(batch_size):
            input_ids, attention_mask, mask = collate_pairs(list(rows.select(picked)), device)
            began = _clock(device)
            logits = model(input_ids, attention_mask=attention_mask, use_cache=False).logits
            batch, options = (logits, input_ids, mask), dict(shift=True, backend=backend)
            model_done = _clock(device)
            values, stats = fused_seq_logprob(
                *batch, reduction="sum", stats=("lengths",), **options
            )
            model_seconds += model_done - began
            logprob_seconds += _clock(device) - model_done
            sums[picked] = values.cpu().view(2, -1).T
            lengths[picked] = stats["lengths"].cpu().view(2, -1).T
            if check:
                means = fused_seq_logprob(*batch, reduction="mean", **options)
                found = compare(*batch, torch.stack((values, means), dim=1).cpu())
                errors[picked] = found.view(2, -1, 4).transpose(0, 1)
            bar.update(int(attention_mask.sum()))
            del logits, batch  # or the next ones are made beside them
    means = sums / lengths.clamp(min=1)
    return Scores(sums, means, lengths, errors, model_seconds, logprob_seconds)


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def compare(logits: Tensor, input_ids: Tensor, mask: Tensor, values: Tensor) -> Tensor:
    """Return the errors of `values` (B, 2), sums and means: (B, 4) float64, absolute then relative.

    Truth is the reference on float64 logits, one sequence at a time to keep memory small.
    """
    exact = torch.zeros(values.shape, dtype=torch.float64)
    for b in range(len(values)):
        row = slice(b, b + 1)
        inputs = (logits[row].double(), input_ids[row], mask[row])
        for k, reduction in enumerate(("sum", "mean")):
            exact[b, k] = reference.seq_logprob(*inputs, reduction=reduction, shift=True).item()
    errors = (values - exact).abs()
    return torch.cat((errors, errors / exact.abs().clamp(min=1e-300)), dim=1)


def display_width(text: str) -> int:
    """Return the columns of `text` in a terminal: 2 a wide East Asian character, 0 a mark."""
    is_mark = [unicodedata.category(c) in ("Mn", "Me") for c in text]
    is_wide = [unicodedata.east_asian_width(c) in ("W", "F") for c in text]
    return sum(0 if mark else 1 + wide for mark, wide in zip(is_mark, is_wide, strict=True))


def fit(text: str, width: int) -> str:
    """Return `text` on one line of exactly `width` columns: padded, or cut with an ellipsis."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if display_width(text) > width:
        end = 0
        while display_width(text[: end + 1]) < width:
            end += 1
        text = text[:end] + "…"
    return text + " " * (width - display_width(text))


def winner(chosen: float, rejected: float) -> str | None:
    """Return which value is larger; NaN is no value."""
    if math.isnan(chosen) or math.isnan(rejected):
        return None
    return "tie" if chosen == rejected else "chosen" if chosen > rejected else "rejected"


def tabulate(rows: TokenRows, prompts: Sequence[str], scores: Scores) -> list[dict[str, Any]]:
    """Return one record a pair; its winners are None where it has an empty answer or a NaN."""
    records = []
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        sums, means = scores.sums[i].tolist(), scores.means[i].tolist()
        is_counted = bool((scores.lengths[i] > 0).all())
        records.append(
            dict(
                pair=i + 1,
                source=row["source"],
                prompt=prompt,
                tokens=[int(n) for n in scores.lengths[i]],
                is_cut=[row["chosen_is_cut"], row["rejected_is_cut"]],
                sum=[_number(value) for value in sums],
                mean=[_number(value) for value in means],
                winner_by_sum=winner(*sums) if is_counted else None,
                winner_by_mean=winner(*means) if is_counted else None,
            )
        )
    return records


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def print_table(records: Sequence[dict[str, Any]]) -> None:
    """Print one line a pair, all of the same display width."""
    line = "{:>4}  {}  {:>7} {:>8}  {:>8} {:>8}  {:>7} {:>8}  {:<8} {:<8}".format
    titles = ("answer", "tokens ", "sum of", "log p", "mean of", "log p", "likelier", "likelier")
    print(line("", fit("", WIDTH), *titles))
    print(line("pair", fit("prompt", WIDTH), *("chosen", "rejected") * 3, "by sum", "by mean"))
    for r in records:
        cuts = ["*" if is_cut else " " for is_cut in r["is_cut"]]
        tokens = [f"{n}{cut}" for n, cut in zip(r["tokens"], cuts, strict=True)]
        values = ["nan" if v is None else f"{v:.2f}" for v in r["sum"]]
        values += ["nan" if v is None else f"{v:.3f}" for v in r["mean"]]
        winners = [r[f"winner_by_{name}"] or "-" for name in ("sum", "mean")]
        print(line(r["pair"], fit(r["prompt"], WIDTH), *tokens, *values, *winners))


def summarise(
    records: Sequence[dict[str, Any]], rows: TokenRows, scores: Scores
) -> dict[str, float | None]:
    """Return what was counted, cut, left out and timed, by name. A tie counts as half."""
    counted = [r for r in records if r["winner_by_sum"]]
    counts = {"chosen": 1.0, "tie": 0.5, "rejected": 0.0}
    wins = {k: sum(counts[r[f"winner_by_{k}"]] for r in counted) for k in ("mean", "sum")}
    tokens, scored = int(rows.lengths.sum()), int(scores.lengths.double().sum())
    is_nan = ~scores.sums.isfinite().all(dim=1)
    return {
        "pairs": len(records),
        "rows left out, --skip-bad-rows": rows.report.bad,
        "pairs left out of the shares": len(records) - len(counted),
        "  since a log p is not a number": int(is_nan.sum()),
        "share where chosen wins by mean": wins["mean"] / len(counted) if counted else None,
        "share where chosen wins by sum": wins["sum"] / len(counted) if counted else None,
        "sequences": 2 * len(records),
        "sequences cut at --max-length (*)": sum(sum(r["is_cut"]) for r in records),
        "answers cut to nothing": int((scores.lengths == 0).sum()),
        "tokens": tokens,
        "tokens scored": scored,
        "seconds in the model": scores.model_seconds,
        "seconds in fused_seq_logprob": scores.logprob_seconds,
        "tokens a second, model": round(tokens / max(scores.model_seconds, 1e-9)),
        "tokens a second, fused_seq_logprob": round(scored / max(scores.logprob_seconds, 1e-9)),
        "peak memory of the process, GiB": _peak_gib(),
    }


def _peak_gib() -> float | None:
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def read_prompts(rows: TokenRows, paths: Sequence[Path]) -> list[str]:
    """Return each row's prompt, or its last message."""
    prompts = {row["source"]: "" for row in rows}
    for path in paths:
        with open(path, "rb") as file:
            for source, text in read_texts(file, str(path)):
                if source in prompts:
                    prompts[source] = shown(parse_pair(source, text))
    return list(prompts.values())


def shown(pair: Pair) -> str:
    return pair.prompt if isinstance(pair.prompt, str) else str(pair.prompt[-1]["content"])


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, defaults filled in."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = command_line.add_common(parser)
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on a GPU")
    add("--check", action="store_true", help="compare with the reference in float64")
    add("--json", type=Path, metavar="FILE", help="write the values and the summary")
    args = parser.parse_args(argv)
    command_line.fill_in(args)
    args.dtype = args.dtype or ("bfloat16" if args.device.type == "cuda" else "float32")
    return args


def run(args: argparse.Namespace, folder: Path) -> int:
    """Score, print and write; `folder` takes the tokens. Return 1 if --check finds a difference."""
    model_folder = args.model or find_smollm2()
    tokenizer, config = load_tokenizer(model_folder)
    rows = tokenise_files(
        args.data,
        folder / "tokens",
        tokenizer,
        max_length=command_line.checked_max_length(args.max_length, max_positions(config)),
        vocab_size=config.get_text_config().vocab_size,
        limit=args.limit,
        skip_bad_rows=args.skip_bad_rows,
    )
    model = load_model(model_folder, args.device, getattr(torch, args.dtype))
    options = dict(device=args.device, backend=args.backend, check=args.check)
    scores = score(model, rows, batch_size=args.batch_size, **options)
    records = tabulate(rows, read_prompts(rows, args.data), scores)
    summary = summarise(records, rows, scores)
    errors = scores.errors.flatten(0, 1).amax(0).tolist()  # keeps NaN
    if args.check:
        names = ("sum, nats", "mean, nats", "sum, relative", "mean, relative")
        pairs = zip(names, errors, strict=True)
        summary |= {f"largest error, {name}": _number(error) for name, error in pairs}
    print_table(records)
    print()
    for name, value in summary.items():
        spec = ".4g" if isinstance(value, float) else ","
        print(f"{name:<36}{'-' if value is None else format(value, spec)}")
    print(*rows.report.lines()[1:], sep="\n")
    if args.json:
        result = {"summary": summary, "pairs": records}
        text = json.dumps(result, ensure_ascii=False, indent=1, allow_nan=False)
        args.json.write_text(text + "\n", encoding="utf-8")
    if not (errors[0] <= MAX_SUM_ERROR and errors[1] <= MAX_MEAN_ERROR):
        limits = f"{MAX_SUM_ERROR} nats (sum) or {MAX_MEAN_ERROR} (mean)"
        print(f"error: a value is further than {limits} from the reference", file=sys.stderr)
        return 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0; 1 where --check finds a difference, 2 for input that cannot be used."""
    args = parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a prompt may not fit the terminal's encoding
    try:
        command_line.check(args, ("transformers", "tqdm"), [args.json] if args.json else [])
        with tempfile.TemporaryDirectory() as folder:
            return run(args, Path(folder))
    except (ImportError, OSError, ValueError) as error:
        cure = CURE if isinstance(error, ImportError) else ""
        print(f"error: {error}{cure}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
