"""Sets up a virtual environment and trains a language model with Flora; arguments go to train."""

import sys

from experiments.environment import python, run

if __name__ == "__main__":
    sys.exit(run(python("experiments"), "-m", "experiments.train", *sys.argv[1:]))
