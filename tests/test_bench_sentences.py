"""The sentences that the benchmark ends with follow from its rows."""

from benchmarks.common.report import BOTH, FORWARD
from benchmarks.vocab.rows import SIZES, VOCABULARY, Row
from benchmarks.vocab.sentences import sentences

MAIN = dict(vocab_size=1000, batch=8, seq_len=128, part=VOCABULARY)
SMALL = dict(vocab_size=64, batch=8, seq_len=16, part=SIZES)


def row(impl, passes, ms, size=MAIN, **more):
    cells = dict(
        impl=impl, dtype="bfloat16", scored_share=1.0, passes=passes, ms=ms, ms_p20=ms, ms_p80=ms,
        samples=1, glogits_per_s=1.0, copy_share=0.1, peak_mib=3.0, value_error=1e-6,
        value_rounding=5e-7, grad_error=None, grad_rounding=2e-3, speedup=None, threads=2,
        neighbours=0,
    )  # fmt: skip
    return Row(**(cells | size | more))


def test_where_ours_wins():
    rows = [
        row("dpo_triton", FORWARD, 2.0, value_error=4e-7),
        row("dpo_triton in place", FORWARD, 0.1, peak_mib=0.1, value_error=1e-9),
        row("log_softmax", FORWARD, 7.0),
        row("torch.compile", FORWARD, 3.0, value_error=2e-6),
        row("dpo_triton", BOTH, 4.0, peak_mib=2.5),
        row("log_softmax", BOTH, 16.0, peak_mib=9.0),
        row("torch.compile", BOTH, 8.0, peak_mib=6.0),
        row("log_softmax", BOTH, 1.0, neighbours=1),  # beside nobody of ours
        row("dpo_triton", FORWARD, 1.03, SMALL),
        row("log_softmax", FORWARD, 1.0, SMALL, scored_share=1.0),  # no difference
    ]
    assert sentences(rows, 1000) == [
        "Of 8 x 128 x 1000 bfloat16 logits, 2 threads, dpo_triton is fastest forward (2 ms, 1.50 "
        "times as fast as torch.compile) and dpo_triton is fastest forward and backward (4 ms, "
        "2.00 times as fast as torch.compile).",
        "Nobody beats dpo_triton by more than 5% in any of 3 cases.",
        "At its peak dpo_triton holds 2.5 MiB above those logits, the least of all; log_softmax "
        "holds 9.",
        "Against float64 the values of dpo_triton err by 1.0e-06 nats at most, the least of all; "
        "those of torch.compile by 2.0e-06.",
        "Nothing here speaks for anything but dpo_triton.",
    ]


def test_where_ours_loses():
    rows = [
        row("dpo_triton", FORWARD, 4.0, value_error=3e-6),
        row("log_softmax", FORWARD, 3.0),
        row("torch.compile", FORWARD, 2.0),
        row("dpo_triton", BOTH, 4.0, peak_mib=9.5),
        row("log_softmax", BOTH, 16.0, peak_mib=9.0),
        row("torch.compile", BOTH, 8.0, peak_mib=16.0),
        row("dpo_triton", FORWARD, 0.9, SMALL, threads=1),
        row("log_softmax", FORWARD, 0.1, SMALL, threads=1),
        row("torch.compile", FORWARD, 0.2, SMALL, threads=1),
        row("dpo_triton", FORWARD, 0.8, SMALL, scored_share=0.5),
        row("log_softmax", FORWARD, 0.2, SMALL, scored_share=0.5),
    ]
    assert sentences(rows, 1000) == [
        "Of 8 x 128 x 1000 bfloat16 logits, 2 threads, torch.compile is fastest forward (2 ms, "
        "1.50 times as fast as log_softmax) and dpo_triton is fastest forward and backward (4 ms, "
        "2.00 times as fast as torch.compile).",
        "dpo_triton loses in 3 of 4 cases, by most to log_softmax: 9.00 times its time, forward, "
        "of 8 x 16 x 64 bfloat16 logits, 1 thread.",
        "At its peak dpo_triton holds 9.5 MiB above those logits, and log_softmax less, 9; "
        "torch.compile 16.",
        "Against float64 the values of dpo_triton err by 3.0e-06 nats at most, and those of "
        "log_softmax by less, 1.0e-06.",
        "Where time alone counts, take log_softmax forward in 2 cases of 8,192 logits, "
        "torch.compile forward in 1 case of 1,024,000 logits; dpo_triton in all others.",
    ]


def test_without_a_headline_the_largest_batch_speaks():
    rows = [row("dpo_triton", passes, 2.0, SMALL, peak_mib=None) for passes in (FORWARD, BOTH)]
    first, second, third, *_ = sentences(rows, 1000)
    assert first.startswith("Of 8 x 16 x 64 bfloat16 logits, 2 threads, dpo_triton is ")
    assert second == "Nobody beats dpo_triton by more than 5% in any of 2 cases."
    assert third == "What a call holds of memory is not known on this machine."
