"""The paper's algorithms, as a chain of optax transformations on sketches.

Source: Hao, Cao, Mou, "Flora: Low-Rank Adapters Are Secretly Gradient Compressors", arXiv 2402.03293.

**Notation.** The gradient `G` of a weight is `n × m`, where `m` is the side that is projected. The
projection `A` is `r × m`, sampled from a key with entries of variance `1/r`. The sketch `C = G Aᵀ` is
`n × r`, and `C A` is an unbiased estimate of `G`, since `E[AᵀA] = I`. JAX's weights are stored as
`(input, output)`, and no axis of theirs is moved: a sketch has the weight's axes, with `r` in the place
of the projected ones. A weight of shape `(m, n)` whose input side is projected has a sketch of shape
`(r, n)`, which is the paper's `C` transposed.

**Algorithm 1, accumulation**, for each weight and each micro-step:

| in the paper | here |
|---|---|
| a seed for each weight, and `A ~ N(0, 1/r)` sampled from it anew each time | `keys.py`, `distributions.py` |
| `G Aᵀ` | `project.py`, by `products.project` |
| `C ← C + G Aᵀ`, for `τ` micro-steps | `accumulate.py` |
| `G̃ = (1/τ) C A` | the mean in `accumulate.py`; `decompress.py`, by `products.decompress` |
| the base optimizer's step with `G̃` | any optax optimizer after `decompress`; Adafactor in `flora.py` |
| `C ← 0` | `accumulate.py` |
| a new seed | `project.py`, which counts the cycles |

**Algorithm 2, momentum**, for each weight and each step:

| in the paper | here |
|---|---|
| every `κ` steps a new seed, and `A′` sampled from it | `project.py`, at the end of a cycle; `κ` is `Projection.resample_every` |
| `M ← M A A′ᵀ` | `momentum.py`, by `products.transfer` |
| `M ← β M + (1 − β) G Aᵀ` | `momentum.py` |
| the base optimizer's step with `M A` | `decompress.py`, and any optax optimizer after it |

**Orthogonalized sketches**, the advised preset, are not in the paper. `orthogonalize.py`, between
`accumulate.py`, whose `decay` makes the accumulator the momentum, and `decompress.py`, does what Muon does to
a matrix; `scale_by_shape.py` comes after.

**Reading order.** `flora.py` puts the chain together. `project.py`, `accumulate.py`, `momentum.py` and
`decompress.py` are its transformations, and `sketch.py` is what passes between them. `projection.py` has
the settings, `keys.py` and `distributions.py` sample `A`, and `products.py` multiplies by it.

The rest is needed in practice. `leaf_plan.py` and `plan.py` say which weights are compressed and what
the state takes; `leaf_operations.py` lets an update be evaluated leaf by leaf; `states.py` and `storage.py` are what the states have in common; `blocks.py` keeps no
more than a part of `A` in memory; `transformation.py` is for meshes with explicit axes. `shrink.py`,
`skip_nonfinite.py` and `carry_over.py` are options, and `official.py` is the authors' own optimizer, for
comparison.
"""
