"""More than one process, with torch.distributed: which parts of an aggregation to sum or average over ranks.

Under data parallelism each rank sees a part of the batch, and the optimizer steps along the average over ranks. So the
averaged gradients have to be aggregated; aggregating on each rank and then averaging gives another, noisier direction.

* A shared representation: its rows on W ranks are parts of the same row of G, and only their Gram matrices have to be
  summed (`reduce_gram`, T × T numbers).
* Shared parameters: the task gradients themselves have to be averaged (`AveragedRows`). The Gram of an average is not
  the average of Grams. If the gramian engine has factors of these gradients and they are smaller, they are exchanged
  instead (`averaged_update`).
* Parameters sharded by `fully_shard` (FSDP2): their gradients arrive averaged, and each rank holds its shard of the
  columns (`sharded_update`).

Every rank has to take the same steps in the same order, as with all collectives.
"""

from fastmtl.distributed.averaged import AveragedRows
from fastmtl.distributed.collectives import agree, gram_group, reduce_gram
from fastmtl.distributed.factors import averaged_update
from fastmtl.distributed.sharded import check_gathered, is_sharded, sharded_update

__all__ = [
    "AveragedRows",
    "agree",
    "averaged_update",
    "check_gathered",
    "gram_group",
    "is_sharded",
    "reduce_gram",
    "sharded_update",
]
