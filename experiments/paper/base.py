"""Table 4 puts base optimizers of linear memory below Flora, and Adam, whose memory is not linear.

python -m experiments.paper.base
python -m experiments.paper.base --size full --data paper
"""

from typing import get_args

from experiments.paper.methods import Base, Method
from experiments.paper.table import Table, main


def rows(rank: int) -> tuple[Method, ...]:
    """Gives each base optimizer without compression, and below Flora."""
    return tuple(
        method
        for base in get_args(Base)
        for method in (Method("uncompressed", base=base), Method("flora", rank, base=base))
    )


TABLE = Table(
    name="base",
    title="4. Base optimizers",
    task="summarisation",
    rows={"cpu": rows(32), "full": rows(256)},
    model={"full": "T5-small"},
)

if __name__ == "__main__":
    main(TABLE)
