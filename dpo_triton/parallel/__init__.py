"""Several ranks and one result: vocabularies and sequences that are sharded over a process group.

A rank of a sharded vocabulary runs the first stage on its own columns, as if they were some of the
splits. One gather later every rank has the partials of all, in the order of the columns, and runs
the same second stage on the same numbers; the third stage needs nothing from the others, but for
the sum of what the ranks say about the hidden states.

    partials -> [gather] -> combine                  grad -> [sum of the gradient of hidden]
                combine  -> [sums of sequences]

Every call of a group starts with a note of each rank to all others, NOTE_BYTES long whatever it
says: what the rank was given, or why it fails. So ranks that disagree, or one that fails, are an
error on every rank, and nobody is left waiting in a collective.

Only calls with a group, a shard or a DTensor come here.
"""

from .._records import VocabShard
from ._scores import sharded_scores

__all__ = ["VocabShard", "sharded_scores"]
