"""The losses as their papers write them, in mpmath: lists of numbers in, a list of losses out."""

import mpmath as mp

mp.mp.dps = 60

ONE = mp.mpf(1)


def sig(x):
    return 1 / (1 + mp.exp(-x))


def ls(x):
    return -mp.log1p(mp.exp(-x))


def log_odds(logp):
    """log(p / (1 - p))."""
    return logp - mp.log(-mp.expm1(logp))


def score(f, a, c):
    """f'(u), u = exp(c), up to a constant."""
    if f == "forward_kl":
        return 1 - mp.exp(-c)
    if f == "js_divergence":
        return mp.log(2 * mp.exp(c) / (1 + mp.exp(c)))
    if f == "alpha_divergence":
        return (mp.exp((a - 1) * c) - 1) / (a - 1)
    return c


def of_ratios(formula):
    """A loss of one pair, from c and r."""

    def losses(win, lose, ref_win, ref_lose, **options):
        pairs = zip(win, lose, ref_win, ref_lose, strict=True)
        return [
            formula(win_i - ref_win_i, lose_i - ref_lose_i, **options)
            for win_i, lose_i, ref_win_i, ref_lose_i in pairs
        ]

    return losses


def of_policy(formula):
    return lambda win, lose, **options: [
        formula(*pair, **options) for pair in zip(win, lose, strict=True)
    ]


def margin(c, r, f="reverse_kl", a=0.5):
    return score(f, a, c) - score(f, a, r)


def smoothed(x, e):
    return -(1 - e) * ls(x) - e * ls(-x)


def sigmoid(c, r, beta, e=0, **f):
    return smoothed(beta * margin(c, r, **f), e)


def hinge(c, r, beta, **f):
    return max(mp.mpf(0), 1 - beta * margin(c, r, **f))


def ipo(c, r, beta):
    return (c - r - 1 / (2 * mp.mpf(beta))) ** 2


def exo_pair(c, r, beta, e, **f):
    x = beta * margin(c, r, **f)
    q = (sig(x), sig(-x))
    p = (1 - mp.mpf(e), mp.mpf(e))
    log_q = (ls(x), ls(-x))
    return sum(q[i] * (log_q[i] - mp.log(p[i])) for i in (0, 1))


def nca_pair(c, r, beta):
    return -ls(beta * c) - ls(-beta * c) / 2 - ls(-beta * r) / 2


def robust(c, r, beta, e, **f):
    x = beta * margin(c, r, **f)
    return ((1 - e) * -ls(x) - e * -ls(-x)) / (1 - 2 * mp.mpf(e))


def bco_pair(c, r, beta, delta=0):
    return -ls(beta * c - delta) - ls(-(beta * r - delta))


def sppo_hard(c, r, beta):
    eta = 1 / mp.mpf(beta)
    return (c - eta / 2) ** 2 + (r + eta / 2) ** 2


def apo_zero(c, r, beta):
    return 1 - sig(beta * c) + sig(beta * r)


def apo_down(c, r, beta):
    return sig(beta * c) + 1 - sig(beta * (c - r))


def discopop(c, r, beta, tau, **f):
    x = beta * margin(c, r, **f)
    m = sig(x / tau)
    return -ls(x) * (1 - m) + mp.exp(-x) * m


def aot(win, lose, ref_win, ref_lose, beta, e=0):
    ours = sorted(a - b for a, b in zip(win, lose, strict=True))
    theirs = sorted(a - b for a, b in zip(ref_win, ref_lose, strict=True))
    return [smoothed(beta * (a - b), e) for a, b in zip(ours, theirs, strict=True)]


def aot_unpaired(win, lose, ref_win, ref_lose, beta, e=0):
    ours = sorted(a - b for a, b in zip(win, ref_win, strict=True))
    theirs = sorted(a - b for a, b in zip(lose, ref_lose, strict=True))
    return [smoothed(beta * (a - b), e) for a, b in zip(ours, theirs, strict=True)]


def kto(win, lose, ref_win, ref_lose, beta, kl, desirable, undesirable):
    kl = max(kl, 0)
    chosen = [desirable * (1 - sig(beta * (a - b - kl))) for a, b in zip(win, ref_win, strict=True)]
    rejected = [
        undesirable * (1 - sig(beta * (kl - a + b))) for a, b in zip(lose, ref_lose, strict=True)
    ]
    return chosen + rejected


def reward(logp, alpha):
    """AlphaPO's, from p."""
    return logp if alpha == 0 else (1 - mp.exp(logp) ** -alpha) / alpha


def simpo(win, lose, beta, gamma, e=0, alpha=0):
    return smoothed(beta * (reward(win, alpha) - reward(lose, alpha)) - gamma, e)


def cpo(win, lose, beta, weight, e=0):
    return smoothed(beta * (win - lose), e) + weight * -win


def orpo(win, lose, beta):
    return -win + beta * -ls(log_odds(win) - log_odds(lose))


def sft(sums, lengths):
    return [-sum(sums) / sum(lengths)] * len(sums)


# name -> (formula, its options, the function's options)
F_OPTIONS = [
    dict(f="forward_kl"),
    dict(f="js_divergence"),
    dict(f="alpha_divergence", a=0.3),
    dict(f="alpha_divergence", a=1.0 + 2**-40),  # the limit, log u, without cancellation
]


def trl_f(options):
    names = dict(f="f_divergence_type", a="f_alpha_divergence_coef")
    return {names[key]: value for key, value in options.items()}


CASES = {
    "sigmoid": (of_ratios(sigmoid), dict(beta=0.3), dict(beta=0.3)),
    "sigmoid smoothed": (
        of_ratios(sigmoid),
        dict(beta=0.3, e=0.125),
        dict(beta=0.3, label_smoothing=0.125),
    ),
    "sigmoid_norm": (of_ratios(sigmoid), dict(beta=2.0), dict(beta=2.0)),
    "hinge": (of_ratios(hinge), dict(beta=0.2), dict(beta=0.2)),
    "ipo": (of_ratios(ipo), dict(beta=0.3), dict(beta=0.3)),
    "exo_pair": (
        of_ratios(exo_pair),
        dict(beta=0.3, e=0.0625),
        dict(beta=0.3, label_smoothing=0.0625),
    ),
    "nca_pair": (of_ratios(nca_pair), dict(beta=0.3), dict(beta=0.3)),
    "robust": (of_ratios(robust), dict(beta=0.3, e=0.125), dict(beta=0.3, label_smoothing=0.125)),
    "bco_pair": (of_ratios(bco_pair), dict(beta=0.3), dict(beta=0.3)),
    "bco_pair shifted": (
        of_ratios(bco_pair),
        dict(beta=0.3, delta=0.75),
        dict(beta=0.3, delta=0.75),
    ),
    "sppo_hard": (of_ratios(sppo_hard), dict(beta=0.3), dict(beta=0.3)),
    "aot": (aot, dict(beta=0.3, e=0.125), dict(beta=0.3, label_smoothing=0.125)),
    "aot_unpaired": (aot_unpaired, dict(beta=0.3), dict(beta=0.3)),
    "apo_zero": (of_ratios(apo_zero), dict(beta=0.3), dict(beta=0.3)),
    "apo_down": (of_ratios(apo_down), dict(beta=0.3), dict(beta=0.3)),
    "discopop": (of_ratios(discopop), dict(beta=0.3, tau=0.25), dict(beta=0.3, discopop_tau=0.25)),
    "kto": (
        kto,
        dict(beta=0.3, kl=0.5, desirable=1.5, undesirable=0.75),
        dict(beta=0.3, kl=0.5, desirable_weight=1.5, undesirable_weight=0.75),
    ),
    "kto below 0": (
        kto,
        dict(beta=0.3, kl=0, desirable=1, undesirable=1),
        dict(beta=0.3, kl=-2.0),
    ),
    "simpo": (of_policy(simpo), dict(beta=2.0, gamma=0.75), dict(beta=2.0, simpo_gamma=0.75)),
    "simpo smoothed": (
        of_policy(simpo),
        dict(beta=2.0, gamma=0.75, e=0.125),
        dict(beta=2.0, simpo_gamma=0.75, label_smoothing=0.125),
    ),
    "simpo alpha": (
        of_policy(simpo),
        dict(beta=2.0, gamma=0.5, alpha=0.25),
        dict(beta=2.0, simpo_gamma=0.5, alpha=0.25),
    ),
    "cpo": (
        of_policy(cpo),
        dict(beta=0.3, weight=0.5, e=0.125),
        dict(beta=0.3, cpo_alpha=0.5, label_smoothing=0.125),
    ),
    "orpo": (of_policy(orpo), dict(beta=0.3), dict(beta=0.3)),
}
for _name, _options in {
    "sigmoid": dict(beta=0.3),
    "hinge": dict(beta=0.3),
    "exo_pair": dict(beta=0.3, e=0.0625),
    "robust": dict(beta=0.3, e=0.125),
    "discopop": dict(beta=0.3, tau=0.25),
}.items():
    _trl = {"beta": "beta", "e": "label_smoothing", "tau": "discopop_tau"}
    for _f in F_OPTIONS:
        CASES[f"{_name} {_f}"] = (
            of_ratios(globals()[_name]),
            _options | _f,
            {_trl[key]: value for key, value in _options.items()} | trl_f(_f),
        )
