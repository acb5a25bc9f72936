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
# # Fused gradients
#
# `flora_jax.value_and_grad` gives sketches whose data are those of `project(jax.grad(…))`, but compresses inside the
# backward pass: the full gradient is never computed. Here that is seen: in the jaxpr, in the HLO that XLA compiled, in its FLOPs and in its memory.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("flora_jax") is None:  # as in a hosted notebook
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "flora-jax[notebooks]"], check=True)

# %%
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import flora_jax
from flora_jax.chain.products import sample
from flora_jax.chain.sketch import is_sketch
from flora_jax.models import decoder

# %% [markdown]
# ## In the jaxpr
#
# Two weights, 256 × 640 and 640 × 192, and 96 tokens. For `y = x W` with gradient `δ` of `y`, the gradient of `W` is
# `xᵀ δ`; its sketch is `(x Aᵀ)ᵀ δ`. All sizes differ, so a product can be told by its shape. These are all products of
# both functions.

# %%
params = {
    "first": jax.random.normal(jax.random.key(0), (256, 640)) / 16,
    "second": jax.random.normal(jax.random.key(1), (640, 192)) / 25,
}
x = jax.random.normal(jax.random.key(2), (96, 256))
projection = flora_jax.Projection(rank=16, side="input")


def loss(params, x):
    return jnp.mean((jnp.tanh(x @ params["first"]) @ params["second"]) ** 2)


def products(jaxpr):
    """Shape of every product's result, with the shapes of its factors; also in inner jaxprs."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn.outvars[0].aval.shape, *(var.aval.shape for var in eqn.invars)
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products(inner)


def weight_shaped(shapes, params):
    """Those of the shapes that are a weight's, either way round."""
    known = {tuple(sorted(leaf.shape)) for leaf in jax.tree.leaves(params) if leaf.ndim == 2}
    return sorted(shape for shape in shapes if tuple(sorted(shape)) in known)


fused = partial(flora_jax.value_and_grad(loss, projection), cycle=0)
results = {}
for name, function in (("jax.value_and_grad", jax.value_and_grad(loss)), ("flora_jax", fused)):
    found = list(products(jax.make_jaxpr(function)(params, x).jaxpr))
    results[name] = [shape for shape, _, _ in found]
    print(name)
    for shape, left, right in found:
        of = "a full gradient" if weight_shaped([shape], params) else ""
        of = "a sketch" if shape[0] == 16 else "x Aᵀ" if shape[-1] == 16 else of
        print(f"  {left!s:>10} · {right!s:<10} → {shape!s:<10} {of}")

# %% [markdown]
# The last product of the second list, 96 × 256, is the gradient of the input, which is not used: XLA drops it.
#
# The sketches are what `project` makes of the gradient, and both are what numpy makes of it in float64.

# %%
tx = flora_jax.project(projection)
_, sketches = fused(params, x)
full = jax.grad(loss)(params, x)
projected, _ = tx.update(full, tx.init(params), params)
for path in params:
    A = np.asarray(sample(sketches[path].spec, 0), np.float64)
    expected = A @ np.asarray(full[path], np.float64)
    for name, data in (("fused", sketches[path].data), ("projected", projected[path].data)):
        error = np.linalg.norm(data - expected) / np.linalg.norm(expected)
        print(f"{path:7} {name:10} relative error {error:.1e}")

# %% [markdown]
# ## In the compiled HLO
#
# A LLaMA of two layers (width 256, feed-forward 640, four heads, 2048 words), not rematerialised, 4 × 192 tokens,
# compiled for this machine. A `dot` of the compiled program is one product of matrices, and the shape of its result says
# whether it is the gradient of a weight. The ordinary program has one such product for each weight that tokens are
# multiplied by. The fused program has none: in the place of each there are two smaller ones, `x Aᵀ` and the sketch, so
# that it has more products and fewer FLOPs.

# %%
shape = decoder.Shape(2048, 256, 640, 2, 4, 2, jnp.float32, remat=False, scan=False)
model = decoder.Decoder(shape)
windows = jax.random.randint(jax.random.key(3), (4, 193), 0, 2048)
weights = jax.jit(lambda: model.init(jax.random.key(4), windows[:, :8])["params"])()
llama_loss = partial(decoder.loss, model)

ARRAY = re.compile(r"%([\w.\-]+) = \w+\[([\d,]*)\]")
DOT = re.compile(
    r"%[\w.\-]+ = \w+\[([\d,]*)\]\S* dot\((?:\S+ )?%([\w.\-]+),.*?lhs_contracting_dims=\{([\d,]*)\}"
)


def numbers(text):
    return tuple(int(n) for n in text.split(",") if n)


def dots(compiled):
    """Shape and FLOPs of every dot."""
    text = compiled.as_text()
    known = {name: numbers(sizes) for name, sizes in ARRAY.findall(text)}
    for result, left, axes in DOT.findall(text):
        inner = math.prod(known[left][axis] for axis in numbers(axes))
        yield numbers(result), 2 * math.prod(numbers(result)) * inner


def compiled(function):
    return jax.jit(function).lower(weights, windows).compile()


def fused_llama(rank):
    rule = flora_jax.Projection(rank, side="input")
    return partial(flora_jax.value_and_grad(llama_loss, rule), cycle=0)


RANKS = (4, 16, 64, 127)
ordinary = compiled(jax.value_and_grad(llama_loss))
programs = {rank: compiled(fused_llama(rank)) for rank in RANKS}

kernels = [x for path, x in jax.tree_util.tree_leaves_with_path(weights) if "kernel" in str(path)]
print(f"the model has {len(kernels)} weights that tokens are multiplied by")
for name, program in (("jax.value_and_grad", ordinary), ("flora_jax, rank 16", programs[16])):
    found = list(dots(program))
    of_weights = weight_shaped([s for s, _ in found], weights)
    of_sketches = [s for s, _ in found if s[0] == 16]
    print(
        f"{name:19} {sum(f for _, f in found) / 1e9:.2f} GFLOP in all products; "
        f"{len(of_weights)} of them are full gradients, {len(of_sketches)} are sketches"
    )
counts = [len(weight_shaped([s for s, _ in dots(programs[rank])], weights)) for rank in RANKS]
print(f"full gradients in the fused programs of ranks {RANKS}: {counts}")

# %% [markdown]
# ## FLOPs and memory, by rank
#
# The table has ratios to `jax.value_and_grad`. The FLOPs are those of the products alone, and those of the whole program,
# in which sampling `A` counts too, as XLA's `cost_analysis` gives them. The bytes are those of temporaries, and of all
# that the program holds (arguments, results and temporaries), as its `memory_analysis` gives them.


# %%
def figures(program):
    memory = program.memory_analysis()
    held = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    cost = program.cost_analysis()
    flops = (cost[0] if isinstance(cost, list) else cost)["flops"]
    return np.array([sum(f for _, f in dots(program)), flops, memory.temp_size_in_bytes, held])


NAMES = ("FLOPs, products", "FLOPs, all", "temporaries", "bytes, all")
ratios = np.array([figures(programs[rank]) / figures(ordinary) for rank in RANKS])
print("rank  " + "".join(f"{name:>15}" for name in NAMES))
for rank, row in zip(RANKS, ratios, strict=True):
    print(f"{rank:4}  " + "".join(f"{value:15.3f}" for value in row))

# %% [markdown]
# One of the three products that a weight of `m` inputs and `n` outputs costs, of 2 m n FLOPs for each token, gives way to
# two, of 2 m r and 2 r n. The embedding adds products too: the gradients of its rows are multiplied by its `A`, at 2 r m
# FLOPs for each token. XLA computes that product in several places of the program, instead of keeping its result, and the
# HLO says in how many. The rest, attention for the most part, stays. The formula below has all of these terms.

# %%
m, n = np.array([kernel.shape for kernel in kernels]).T
tokens = windows[:, 1:].size
lookups = sum(s == (tokens, 16) for s, _ in dots(programs[16])) - len(kernels)

total = figures(ordinary)[0]
ranks = np.arange(1, 129)
change = [(2 * r * (m + n) - 2 * m * n).sum() + lookups * 2 * r * shape.width for r in ranks]
formula = 1 + tokens * np.array(change) / total
apart = np.abs(np.interp(RANKS, ranks, formula) / ratios[:, 0] - 1).max()
print(f"largest relative difference of the formula to the FLOPs of the dots: {apart:.1e}")

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
left.plot(ranks, formula, "k--", lw=1, label="formula")
left.plot(RANKS, ratios[:, 0], "C0o", label=NAMES[0])
left.plot(RANKS, ratios[:, 1], "C1s", mfc="none", ms=11, label=NAMES[1])
for i in (2, 3):
    right.plot(RANKS, ratios[:, i], "o-", color=f"C{i}", label=NAMES[i])
for axes in (left, right):
    axes.axhline(1, color="grey", lw=0.8)
    axes.set(
        xlabel="rank (the width is 256)",
        ylabel="ratio to jax.value_and_grad",
        xticks=RANKS,
        ylim=(0.6, 1.05),
    )
    axes.legend(loc="lower right")
plt.show()

# %% [markdown]
# ## What falls back to the full gradient
#
# A weight that is used in a way for which there is no rule, here divided by the norms of its columns before the product,
# gets its full gradient at that use, which is projected at once. The result is right, but the full gradient exists for
# a moment. The plan names the weight, the operation and the line.


# %%
def normalised(params, x):
    kernel = params["first"] / jnp.sqrt(jnp.sum(params["first"] ** 2, axis=0))
    return jnp.mean((jnp.tanh(x @ kernel) @ params["second"]) ** 2)


grad_fn = flora_jax.value_and_grad(normalised, projection)
plan = grad_fn.plan(params, x)
for use in plan.whole_uses:
    line = use.place.rpartition(":")[2]
    print(
        f"{use.path!r} gets its full gradient: no rule for {use.primitive}, in line {line} of the cell"
    )

found = [s for s, _, _ in products(jax.make_jaxpr(partial(grad_fn, cycle=0))(params, x).jaxpr)]
print("products of a weight's shape:", weight_shaped(found, params))

# %% [markdown]
# What it gives is still the sketch of the gradient.

# %%
_, sketches = grad_fn(params, x, cycle=0)
full = jax.grad(normalised)(params, x)
for path in params:
    A = np.asarray(sample(sketches[path].spec, 0), np.float64)
    expected = A @ np.asarray(full[path], np.float64)
    error = np.linalg.norm(sketches[path].data - expected) / np.linalg.norm(expected)
    print(f"{path:7} relative error {error:.1e}")

# %% [markdown]
# And the LLaMA has no such use: every weight's gradient is fused.

# %%
plan = flora_jax.value_and_grad(llama_loss, projection).plan(weights, windows)
print(f"uses of the LLaMA's weights that fall back to the full gradient: {len(plan.whole_uses)}")
_, sketches = jax.jit(fused_llama(16))(weights, windows)
_, full = jax.jit(jax.value_and_grad(llama_loss))(weights, windows)
projected, _ = jax.jit(tx.update)(full, tx.init(weights), weights)
pairs = zip(
    *(jax.tree.leaves(tree, is_leaf=is_sketch) for tree in (sketches, projected)), strict=True
)
errors = [
    float(jnp.linalg.norm(a.data - b.data) / jnp.linalg.norm(b.data))
    for a, b in pairs
    if is_sketch(a)
]
print(f"{len(errors)} sketches, fused and projected: largest relative difference {max(errors):.1e}")

# %% [markdown]
# ## Conclusion
#
# The full gradient is absent from the fused program, not only short-lived: no product in the jaxpr or in the compiled HLO has
# the shape of a weight, and the sketches are the same to rounding. On this model rank 16 takes about a quarter of the
# FLOPs away, and the gain shrinks with the rank until at half the width almost nothing is left. Temporaries shrink less, by about
# an eighth, because attention and activations make up most of them in a model this small. A weight that is used in a
# way without a rule still trains correctly, but its full gradient exists for a moment; look at the plan before a long run.
