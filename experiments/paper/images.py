"""Table 5 is image classification by ViT.

python -m experiments.paper.images
python -m experiments.paper.images --size full --data paper
"""

from experiments.paper.methods import Method
from experiments.paper.table import Table, main

TABLE = Table(
    name="images",
    title="5. ViT",
    task="images",
    optimizer_steps=300,
    rows={
        "cpu": (
            Method("uncompressed"),
            Method("lora", 2),
            Method("lora", 6),
            Method("flora", 8),
            Method("flora", 32),
            Method("flora", 32, "advised"),
        ),
        "full": (
            Method("uncompressed"),
            *(Method("lora", rank) for rank in (16, 64, 192)),
            *(Method("flora", rank) for rank in (16, 64, 192)),
            Method("flora", 192, "advised"),
        ),
    },
)

if __name__ == "__main__":
    main(TABLE)
