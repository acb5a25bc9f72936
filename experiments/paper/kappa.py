"""Table 3 varies κ, the number of optimizer steps between two projections under momentum.

python -m experiments.paper.kappa
python -m experiments.paper.kappa --size full --data paper
"""

from experiments.paper.methods import Method
from experiments.paper.table import Table, main

TABLE = Table(
    name="kappa",
    title="3. κ: optimizer steps between two projections under momentum",
    task="summarisation",
    rows={
        "cpu": (
            Method("uncompressed", momentum=0.9),
            *(Method("flora", 32, momentum=0.9, kappa=kappa) for kappa in (1, 10, 100, 1000)),
        ),
        "full": (
            Method("uncompressed", momentum=0.9),
            *(
                Method("flora", 256, momentum=0.9, kappa=kappa)
                for kappa in (1, 10, 100, 1000, 10_000)
            ),
        ),
    },
    model={"full": "T5-small"},
)

if __name__ == "__main__":
    main(TABLE)
