"""Table 1 shows metric and memory of accumulation by rank.

python -m experiments.paper.accumulation                       # T5, summarisation
python -m experiments.paper.accumulation --task translation    # GPT-2, German to English
python -m experiments.paper.accumulation --size full --data paper --checkpoint t5-3b
"""

from experiments.paper.methods import Method
from experiments.paper.table import Table, main

TABLE = Table(
    name="accumulation",
    title="1. Accumulation: rank against metric and memory",
    task="summarisation",
    rows={
        "cpu": (
            Method("uncompressed"),
            Method("lora", 2),
            Method("lora", 8),
            Method("lora", 32),
            Method("flora", 32),
            Method("flora", 8, "advised"),
            Method("flora", 32, "advised"),
            Method("flora", 32, uncompressed_embeddings=True),
            Method("flora", 8, "advised", uncompressed_embeddings=True),
            Method("flora", 32, "advised", uncompressed_embeddings=True),
            *(
                Method("flora", rank, "advised", uncompressed_embeddings=True, state_dtype="int4")
                for rank in (32, 64, 128)
            ),
            Method("flora", 512, uncompressed_embeddings=True, state_dtype="int4"),
        ),
        "full": (
            Method("uncompressed"),
            *(Method("lora", rank) for rank in (8, 32, 128, 256)),
            *(Method("flora", rank) for rank in (8, 32, 128, 256)),
            Method("flora", 256, "advised"),
            Method("flora", 256, uncompressed_embeddings=True),
        ),
    },
)

if __name__ == "__main__":
    main(TABLE)
