"""The head in tiles: products of hidden states and weight around the three stages.

A tile is the logits of some scored rows and `Backend.tile_width` columns. Columns are walked
outside and rows inside, so that the weight is read once, its gradient is written once, and what is
summed over tiles is no larger than the hidden states. Rows that are not scored are dropped first.

    forward     tile = hidden @ weight[columns].T -> partials -> combine
    backward    tile again, unless it was kept    -> grad -> three products:
                d hidden += d @ weight[columns]     d weight[columns] = d.T @ hidden

Of a head that does not train the gradient of hidden is made in the forward pass, up to the factor
of each token that only the backward pass knows. A row's total is not known yet when its tile is
there, so that sums are relative to the total so far, as in FlashAttention (Dao et al. 2022,
arXiv:2205.14135), and the target's column is left out of them: its part keeps its digits.

    d logp[n] / d hidden[n] = slope * ((1 - p[n, y]) * weight[y]
                                       - sum over j != y of p[n, j] * weight[j])
"""

from ._autograd import Head

__all__ = ["Head"]
