"""The sizes of the runs: some minutes for a table on two CPU cores, and the paper's."""

from typing import Literal

from experiments.paper.problem import Sizes, Task

Size = Literal["cpu", "full"]
SIZES: dict[Size, dict[Task, Sizes]] = {
    "cpu": {
        "summarisation": Sizes("T5-test", (48, 16), 8, 4, 300, held_out=512, warm=2000),
        "translation": Sizes("GPT-2-test", (24, 24), 8, 4, 300, held_out=512, warm=2000),
        "language": Sizes("LLaMA-test", (0, 64), 8, 4, 300, held_out=512),
        "images": Sizes("ViT-test", (0, 0), 8, 4, 300, held_out=540),
    },
    "full": {
        "summarisation": Sizes(
            "T5-3B", (512, 128), 1, 16, 12_750, 2000, 6, remat=True, checkpoint_every=250
        ),
        "translation": Sizes(
            "GPT-2-XL", (512, 512), 1, 16, 12_900, 2000, 6, remat=True, checkpoint_every=250
        ),
        "language": Sizes(
            "LLaMA-60M", (0, 256), 32, 16, 10_000, 2000, remat=True, checkpoint_every=250
        ),
        "images": Sizes("ViT-B", (0, 0), 32, 4, 7_000, 10_000, remat=True, checkpoint_every=250),
    },
}
"""At full size a run is one pass of XSum or IWSLT17, with 16 examples in an optimizer step, 1.3 G tokens of C4, or 20
passes of CIFAR-100."""
