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
# # Quickstart: less memory for the same training
#
# A small transformer learns to predict the next byte of Python's standard library, twice: with gradients that are
# accumulated uncompressed, and with Flora, which accumulates sketches of them. Both train all parameters on the same
# batches. What is compared is the peak memory of the compiled step, and the loss.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("flora_jax") is None:  # as in a hosted notebook
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "flora-jax[notebooks]"], check=True)

# %%
import sysconfig
from functools import partial
from pathlib import Path
from time import perf_counter

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from IPython.display import SVG, Markdown

import flora_jax
from flora_jax.memory import estimate, outline, report
from flora_jax.models import decoder

files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
held_out_files = files[::10]
train_files = [file for file in files if file not in held_out_files]


def read(files):
    return np.frombuffer(b"".join(file.read_bytes() for file in files), np.uint8)


train, held_out = read(train_files), read(held_out_files)


def windows(data, seed, count, length=64):
    """So many windows of the text, each with the byte that follows it."""
    starts = np.random.default_rng(seed).integers(0, len(data) - length, count)
    return data[starts[:, None] + np.arange(length + 1)].astype(np.int32)


model = decoder.Decoder(decoder.Shape(256, 256, 768, 4, 4, 4, jnp.float32))
loss = partial(decoder.loss, model)  # nats per byte, of (params, windows)
init = jax.jit(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"])
size = sum(leaf.nbytes for leaf in jax.tree.leaves(init())) / 2**20
print(f"The parameters take {size:.1f} MiB. There are {len(train) / 1e6:.1f} MB of text.")

# %% [markdown]
# ## The two training steps
#
# An optimizer step has four micro-steps. This is the loop that optax documents, with Adafactor:

# %%
MICRO_STEPS = 4


def uncompressed(rate):
    tx = optax.MultiSteps(optax.adafactor(rate), MICRO_STEPS)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    return tx, step


# %% [markdown]
# And this is Flora, with the setting that the documentation advises: sketches of rank d/8, kept in int8 between the
# micro-steps and orthogonalized. `make_train_step` compresses each gradient inside the backward pass, so that no
# full gradient of a matrix exists. The embedding, the head and the norms stay uncompressed; Adafactor updates them.


# %%
def flora(rate):
    projection = flora_jax.Projection(
        1 / 8,
        distribution="srtt",
        side="input",
        embedding="whole",
        head="whole",
        resample_every=64 * MICRO_STEPS,
    )
    tx = flora_jax.flora(
        rate,
        adafactor_learning_rate=0.05,
        projection=projection,
        accumulation_steps=MICRO_STEPS,
        preset="advised",
        state_dtype="int8",
    )
    return tx, flora_jax.make_train_step(loss, tx, projection)


# %% [markdown]
# ## Peak memory and loss
#
# The compiler says how many bytes a compiled step holds at its peak: its arguments (parameters, optimizer state and
# batch), its results where they do not overwrite arguments, and its temporaries (gradients, updates and activations).
# Each method has the learning rate with the lowest held-out loss after these 40 optimizer steps, on the batches below:
# 0.01 of 0.005, 0.01, 0.02, 0.04 and 0.08 for Adafactor, and 0.035 of 0.01, 0.02, 0.035, 0.06 and 0.1 for Flora.


# %%
def fit(method, rate, optimizer_steps=40):
    """The compiled step's memory in MiB, the losses of the micro-steps, the held-out loss and the seconds."""
    tx, step = method(rate)
    params = init()
    opt_state = tx.init(params)
    batches = [windows(train, i, 2) for i in range(optimizer_steps * MICRO_STEPS)]
    compiled = step.lower(params, opt_state, batches[0]).compile()
    m = compiled.memory_analysis()
    new = m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
    memory = {"arguments": m.argument_size_in_bytes / 2**20, "temporaries and results": new / 2**20}

    step(init(), tx.init(params), batches[0])  # so that the seconds are not those of compiling
    losses, start = [], perf_counter()
    for batch in batches:
        params, opt_state, value = step(params, opt_state, batch)
        losses.append(float(value))
    seconds = perf_counter() - start
    return memory, np.array(losses), float(jax.jit(loss)(params, windows(held_out, 0, 64))), seconds


results = {
    "uncompressed": fit(uncompressed, 0.01),
    "Flora, rank d/8": fit(flora, 0.035),
}
print("                 peak MiB   training loss   held-out loss   seconds")
for name, (memory, losses, after, seconds) in results.items():
    last = losses[-10 * MICRO_STEPS :].mean()
    print(f"{name:16}{sum(memory.values()):9.1f}{last:16.3f}{after:16.3f}{seconds:10.1f}")
print("Losses are in nats per byte; that of training is the mean of the last ten optimizer steps.")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
start = np.zeros(len(results))
for part, colour in (("arguments", "#4c566a"), ("temporaries and results", "#a3be8c")):
    sizes = np.array([memory[part] for memory, *_ in results.values()])
    left.barh(list(results), sizes, left=start, color=colour, label=part)
    start += sizes
left.axvline(size, color="k", ls=":", lw=1, label="parameters alone")
left.invert_yaxis()
left.set(xlabel="peak memory of the compiled step, MiB")
left.legend(fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.4, 1))
for name, (_, losses, after, _) in results.items():
    curve = losses.reshape(-1, MICRO_STEPS).mean(1)
    (line,) = right.plot(np.arange(1, len(curve) + 1), curve, label=f"{name}, training")
    right.plot(len(curve), after, "o", color=line.get_color(), label=f"{name}, held-out")
right.set(xlabel="optimizer step", ylabel="loss, nats per byte")
right.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## What it costs and what it gains

# %%
(before, _, loss_before, seconds_before), (after, _, loss_after, seconds_after) = results.values()
total_before, total_after = sum(before.values()), sum(after.values())
Markdown(
    f"The step with sketches takes {total_after:.1f} MiB where the uncompressed one takes {total_before:.1f} MiB, "
    f"{total_after / total_before:.2f} of it; it ends at a held-out loss of {loss_after:.3f} where the other ends at "
    f"{loss_before:.3f} nats per byte; and it costs a second learning rate to tune, and a gradient that is known "
    f"only through a random projection."
)

# %% [markdown]
# ## The same for a large model
#
# `flora-jax plan --model LLaMA-7B` prints this estimate for one training step in bfloat16, with 2,048 tokens, on a TPU
# v5e chip.

# %%
setting = estimate.Setting(model=outline.named("LLaMA-7B"))
SVG(report.to_svg(setting, estimate.estimates(setting)))

# %% [markdown]
# ## Conclusion
#
# Beside the parameters the uncompressed loop holds the accumulated gradient, the micro-step's gradient and the updates,
# which together are three times their size; with Flora small sketches take the place of gradients, and all temporaries
# together are about the size of the parameters. The loss is lower here because the advised setting orthogonalizes its
# updates and Adafactor does not: compression alone costs loss, as the table of the README shows, and in a run of thousands
# of optimizer steps the compressed training was a little behind. If gradients and optimizer state fit your device, you do
# not need sketches. One run with one seed on a small model shows the direction of both differences, and not their size
# for yours.
