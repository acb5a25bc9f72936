# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The chain taken apart
#
# `flora_jax.flora` is a chain of four optax transformations. Here each stands alone, is looked into, and is
# swapped.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("flora_jax") is None:  # as in a hosted notebook
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "flora-jax[notebooks]"], check=True)

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import flora_jax
from flora_jax.chain import distributions

params = {"kernel": jnp.zeros((256, 192)), "bias": jnp.zeros(192)}
grads = {"kernel": jax.random.normal(jax.random.key(0), (256, 192)), "bias": jnp.ones(192)}

# %% [markdown]
# `project` makes a `Sketch` of each gradient that is compressed, and lets the others through.

# %%
projection = flora_jax.Projection(rank=32, resample_every=4)
tx = flora_jax.project(projection)
sketches, _ = tx.update(grads, tx.init(params), params)
print(jax.tree.map(jnp.shape, sketches))

# %% [markdown]
# `decompress` expands it. One estimate is noisy; the mean over projections tends to the gradient, with an error that
# falls with the root of their number. With `resample_every=1` each call of `update` samples a new projection.


# %%
def estimates(distribution, rank, count):
    """So many estimates of `grads["kernel"]`, each by a projection of its own."""
    projection = flora_jax.Projection(rank, distribution=distribution, resample_every=1)
    chain = optax.chain(flora_jax.project(projection), flora_jax.decompress())

    @jax.jit
    def run(state):
        def step(state, _):
            updates, state = chain.update(grads, state, params)
            return state, updates["kernel"]

        return jax.lax.scan(step, state, length=count)[1]

    return np.asarray(run(chain.init(params)))


G = np.asarray(grads["kernel"])
norm = np.linalg.norm(G)
counts = np.arange(1, 129)
means = np.cumsum(estimates("gaussian", 32, 128), axis=0) / counts[:, None, None]
errors = np.linalg.norm(means - G, axis=(1, 2)) / norm
print(f"relative error of one estimate {errors[0]:.2f}, of the mean of 128 {errors[-1]:.2f}")

# %% [markdown]
# Each distribution has a variance that is known. Measured here over 24 projections for several ranks, against the
# formula.

# %%
RANKS = (8, 32, 128)
measured = {
    kind: [np.mean(np.sum((estimates(kind, r, 24) - G) ** 2, axis=(1, 2))) / norm**2 for r in RANKS]
    for kind in distributions.DISTRIBUTIONS
}
for kind, values in measured.items():
    formula = [distributions.variance(kind, r, 256) for r in RANKS]
    ratio = np.array(values) / formula
    print(f"{kind:12} measured / formula at ranks {RANKS}: {np.round(ratio, 3)}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
left.loglog(counts, errors, label="measured")
left.loglog(
    counts, np.sqrt(distributions.variance("gaussian", 32, 256) / counts), "k--", label="√(v/k)"
)
left.set(
    xlabel="projections averaged, k",
    ylabel="relative error of the mean",
    title="one estimate is noisy, not biased",
)
left.legend()
for kind, values in measured.items():
    (line,) = right.loglog(RANKS, [distributions.variance(kind, r, 256) for r in RANKS], lw=1)
    right.loglog(RANKS, values, "o", color=line.get_color(), label=kind)
right.set(
    xlabel="rank", ylabel="v, over ‖G‖²", title="variance: points measured, lines the formulas"
)
right.set_xticks(RANKS, [str(r) for r in RANKS])
right.minorticks_off()
right.legend()
plt.show()

# %% [markdown]
# `accumulate` adds sketches and calls the transformation inside it in an optimizer step. With an orthonormal projection of full rank
# nothing is lost: the chain is `optax.MultiSteps` over the same optimizer, to rounding.

# %%
exact = flora_jax.Projection(192, distribution="orthonormal", side="output", resample_every=4)
inner = optax.adafactor(1e-2)
tx = optax.chain(
    flora_jax.project(exact),
    flora_jax.accumulate(optax.chain(flora_jax.decompress(), inner), every=4, projection=exact),
)
reference = optax.MultiSteps(inner, every_k_schedule=4)
state, other = tx.init(params), reference.init(params)
for i in range(4):
    given = jax.tree.map(lambda g, i=i: g * (i + 1), grads)
    updates, state = tx.update(given, state, params)
    expected, other = reference.update(given, other, params)
    print(
        f"micro-step {i}: optimizer step {bool(flora_jax.has_updated(state))}, cycle {int(flora_jax.cycle(state))}"
    )
error = jnp.max(jnp.abs(updates["kernel"] - expected["kernel"])) / jnp.max(
    jnp.abs(expected["kernel"])
)
print(f"largest difference to MultiSteps, relative: {error:.1e}")

# %% [markdown]
# `momentum` is the paper's Algorithm 2: an average of sketches, moved to the next projection at the end of a cycle. Any
# optax optimizer follows.

# %%
projection = flora_jax.Projection(64, distribution="srht", resample_every=10)
tx = optax.chain(
    flora_jax.project(projection),
    flora_jax.momentum(0.9, projection=projection),
    flora_jax.decompress(),
    optax.sgd(1.0),
)
state, update = tx.init(params), jax.jit(tx.update)
cosines = []  # of the update and the gradient, which is the same in all steps
for _ in range(30):
    updates, state = update(grads, state, params)
    step = -np.asarray(updates["kernel"])
    cosines.append(np.sum(step * G) / np.linalg.norm(step) / norm)
print(f"cosine of update and gradient: first {cosines[0]:.2f}, mean {np.mean(cosines):.2f}")
plt.figure(figsize=(6, 3), layout="constrained")
plt.plot(np.arange(1, 31), cosines)
for cycle in (10, 20):
    plt.axvline(cycle + 0.5, color="grey", lw=0.8, ls=":")
plt.xlabel("step (dotted: a new projection)")
plt.ylabel("cosine of update and gradient")
plt.ylim(0, 1)
plt.show()

# %% [markdown]
# ## Conclusion
#
# Each transformation does one thing that can be checked alone. One estimate of a gradient by a projection of rank 32 is
# almost three times as far from the gradient as the gradient is from zero, but it is not biased: the error of the mean falls with
# the root of the number of projections, as the formula says. The distributions with orthogonal rows (orthonormal, srht and
# srtt) have the lowest variance at high rank, and all distributions are about the same at low rank. With a projection
# that loses nothing, `accumulate` is `optax.MultiSteps` to rounding, so whatever Flora loses it loses in the projection.
