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
# # Quickstart: your loop, one line changed
#
# A small network is trained on scikit-learn's handwritten digits (1,797 images of 8 × 8 pixels, UCI, CC BY 4.0),
# accumulating over 8 micro-steps: once with `optax.MultiSteps`, once with Flora.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from IPython.display import SVG
from sklearn.datasets import load_digits

import flora_jax
from flora_jax.chain.plan import tree_bytes
from flora_jax.memory import estimate, outline, report

images, digits = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(images))
images, digits = images[order] / 16.0, digits[order]
train, held_out = slice(0, 1500), slice(1500, None)

WIDTHS = (64, 512, 512, 10)
MICRO_STEPS = 8


def init(key):
    keys = jax.random.split(key, len(WIDTHS) - 1)
    return {
        f"layer_{i}": {"kernel": jax.random.normal(k, (n, m)) * n**-0.5, "bias": jnp.zeros(m)}
        for i, (k, n, m) in enumerate(zip(keys, WIDTHS, WIDTHS[1:], strict=False))
    }


def logits(params, x):
    for i in range(len(WIDTHS) - 1):
        x = x @ params[f"layer_{i}"]["kernel"] + params[f"layer_{i}"]["bias"]
        x = jnp.tanh(x) if i < len(WIDTHS) - 2 else x
    return x


def loss(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()


# %% [markdown]
# The loop is the same for both; only `tx` differs.


# %%
def fit(tx, optimizer_steps=60):
    params = init(jax.random.key(0))
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state, x, y):
        value, grads = jax.value_and_grad(loss)(params, x, y)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    rng, losses = np.random.default_rng(1), []
    for _ in range(optimizer_steps * MICRO_STEPS):
        rows = rng.integers(0, 1500, 16)
        params, opt_state, value = step(params, opt_state, images[rows], digits[rows])
        losses.append(float(value))
    right = jnp.argmax(logits(params, images[held_out]), axis=1) == digits[held_out]
    return np.array(losses), float(right.mean()), tree_bytes(opt_state)


before = optax.MultiSteps(optax.adafactor(0.02), every_k_schedule=MICRO_STEPS)
after = flora_jax.flora(0.02, rank=64, accumulation_steps=MICRO_STEPS)

results = {"MultiSteps": fit(before), "Flora, rank 64": fit(after)}
for name, (_, accuracy, size) in results.items():
    print(f"{name:15} held-out accuracy {accuracy:.3f}   optimizer state {size / 1024:7.1f} KiB")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
for name, (losses, _, _) in results.items():
    left.plot(losses.reshape(-1, MICRO_STEPS).mean(1), label=name)
left.set(xlabel="optimizer step", ylabel="training loss, nats", yscale="log")
left.legend()
right.bar(list(results), [size / 1024 for _, _, size in results.values()], color=["C0", "C1"])
right.set(ylabel="optimizer state, KiB")
plt.show()

# %% [markdown]
# The plan says what is compressed, what is not, and why. The first layer (64 inputs) and the last (10 outputs) are
# below `min_dim`, so they accumulate at full size.

# %%
projection = flora_jax.Projection(64, resample_every=MICRO_STEPS)
plan = flora_jax.plan(init(jax.random.key(0)), projection, accumulation_steps=MICRO_STEPS)
print(plan)

# %% [markdown]
# The same figures for LLaMA-7B are those of `flora-jax plan --model LLaMA-7B`; the picture shows one training step in
# bfloat16, with 2048 tokens, on a TPU v5e chip.

# %%
setting = estimate.Setting(outline.named("LLaMA-7B"))
SVG(report.to_svg(setting, estimate.estimates(setting)))
