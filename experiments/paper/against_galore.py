"""Table 6 compares Flora with GaLore: LLaMA, language modelling, from random weights.

    python -m experiments.paper.against_galore
    python -m experiments.paper.against_galore --size full --data paper                     # 60M
    python -m experiments.paper.against_galore --size full --data paper --model LLaMA-350M

The layers are unrolled, since `optax.contrib.galore` takes single matrices.
"""

from experiments.paper.methods import Method
from experiments.paper.table import Table, main

TABLE = Table(
    name="against_galore",
    title="6. Against GaLore",
    task="language",
    rows={
        "cpu": (
            Method("uncompressed"),
            Method("uncompressed", base="adam"),
            Method("galore", 32),
            Method("lora", 8),
            Method("flora", 32),
            Method("flora", 32, "advised"),
            Method("flora", 32, uncompressed_embeddings=True),
            Method("flora", 8, "advised"),
            Method("flora", 8, "advised", uncompressed_embeddings=True),
            Method("flora", 32, "advised", uncompressed_embeddings=True),
        ),
        "full": (
            Method("uncompressed"),
            Method("uncompressed", base="adam"),
            *(Method("galore", rank) for rank in (128, 256)),
            Method("lora", 128),
            *(Method("flora", rank) for rank in (128, 256)),
            Method("flora", 256, "advised"),
            Method("flora", 256, "advised", uncompressed_embeddings=True),
        ),
    },
    changes={"scan": False},
)

if __name__ == "__main__":
    main(TABLE)
