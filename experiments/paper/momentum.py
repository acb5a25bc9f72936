"""Table 2 shows metric and memory of momentum by rank.

python -m experiments.paper.momentum
python -m experiments.paper.momentum --size full --data paper
"""

from experiments.paper.methods import Method
from experiments.paper.table import Table, main

TABLE = Table(
    name="momentum",
    title="2. Momentum: rank against metric and memory",
    task="summarisation",
    rows={
        "cpu": (
            Method("uncompressed", momentum=0.9),
            Method("lora", 8, momentum=0.9),
            Method("flora", 8, momentum=0.9),
            Method("flora", 32, momentum=0.9),
            Method("flora", 32, "advised", momentum=0.9),
            Method("flora", 32, momentum=0.9, uncompressed_embeddings=True),
            Method("flora", 32, "advised", momentum=0.9, uncompressed_embeddings=True),
        ),
        "full": (
            Method("uncompressed", momentum=0.9),
            *(Method("lora", rank, momentum=0.9) for rank in (8, 32, 128, 256)),
            *(Method("flora", rank, momentum=0.9) for rank in (8, 32, 128, 256)),
            Method("flora", 256, "advised", momentum=0.9),
            Method("flora", 256, momentum=0.9, uncompressed_embeddings=True),
        ),
    },
    model={"full": "T5-small"},
)

if __name__ == "__main__":
    main(TABLE)
