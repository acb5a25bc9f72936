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

assert len(weight_shaped(results["jax.value_and_grad"], params)) == 2
assert not weight_shaped(results["flora_jax"], params)

# %% [markdown]
# The last product of the second list, 96 × 256, is the gradient of the input, which nobody asked for: XLA drops it.
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
        assert error < 1e-5

# %% [markdown]
# ## In the compiled HLO
#
# A LLaMA of two layers (width 256, feed-forward 640, four heads, 2048 words), not rematerialised, 4 × 192 tokens,
# compiled for this machine. Every `dot` of the program, by its result.

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
        f"{name:19} {sum(f for _, f in found) / 1e9:.2f} GFLOP in {len(found)} dots; "
        f"{len(of_weights)} are full gradients, {len(of_sketches)} sketches"
    )

assert len(weight_shaped([s for s, _ in dots(ordinary)], weights)) == len(kernels)
for program in programs.values():
    assert not weight_shaped([s for s, _ in dots(program)], weights)

# %% [markdown]
# ## FLOPs and memory, by rank
#
# As ratios to `jax.value_and_grad`: FLOPs of the dots; FLOPs of the whole program, sampling `A` among them, as XLA's
# `cost_analysis` has them; bytes of temporaries and of all that the program holds (arguments, results, temporaries), as
# its `memory_analysis` has them.


# %%
def figures(program):
    memory = program.memory_analysis()
    held = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    cost = program.cost_analysis()
    flops = (cost[0] if isinstance(cost, list) else cost)["flops"]
    return np.array([sum(f for _, f in dots(program)), flops, memory.temp_size_in_bytes, held])


NAMES = ("FLOPs of dots", "FLOPs, all", "temporaries", "bytes, all")
ratios = np.array([figures(programs[rank]) / figures(ordinary) for rank in RANKS])
print("rank  " + "".join(f"{name:>15}" for name in NAMES))
for rank, row in zip(RANKS, ratios, strict=True):
    print(f"{rank:4}  " + "".join(f"{value:15.3f}" for value in row))
assert np.all(np.diff(ratios[:, 0]) > 0) and np.all(ratios[:-1, 0] < 1)

# %% [markdown]
# One of the three products that a weight of `m` inputs and `n` outputs costs, of 2 m n FLOPs for each token, gives way to
# two, of 2 m r and 2 r n. Besides, the gradients of the embedding's rows are multiplied by its `A`, 2 r m a product; the
# HLO says how many products XLA makes of that. The rest, attention for the most part, stays.

# %%
m, n = np.array([kernel.shape for kernel in kernels]).T
tokens = windows[:, 1:].size
lookups = sum(s == (tokens, 16) for s, _ in dots(programs[16])) - len(kernels)
print(f"products with the embedding's A: {lookups}")

total = figures(ordinary)[0]
ranks = np.arange(1, 129)
change = [(2 * r * (m + n) - 2 * m * n).sum() + lookups * 2 * r * shape.width for r in ranks]
formula = 1 + tokens * np.array(change) / total
assert np.allclose(np.interp(RANKS, ranks, formula), ratios[:, 0], rtol=1e-3)

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
        ylabel="over jax.value_and_grad",
        xticks=RANKS,
        ylim=(0.6, 1.05),
    )
    axes.legend(loc="lower right")
plt.show()

# %% [markdown]
# ## What falls back to the full gradient
#
# A weight that is used in a way for which there is no rule, here divided by the norms of its columns before the product,
# gets its full gradient at that use, which is projected at once: right, but not small. The plan names weight, operation
# and line.


# %%
def normalised(params, x):
    kernel = params["first"] / jnp.sqrt(jnp.sum(params["first"] ** 2, axis=0))
    return jnp.mean((jnp.tanh(x @ kernel) @ params["second"]) ** 2)


grad_fn = flora_jax.value_and_grad(normalised, projection)
plan = grad_fn.plan(params, x)
for use in plan.whole_uses:
    line = use.place.rpartition(":")[2]
    print(
        f"full gradient of {use.path!r}, for want of a rule for {use.primitive}, line {line} of the cell"
    )

found = [s for s, _, _ in products(jax.make_jaxpr(partial(grad_fn, cycle=0))(params, x).jaxpr)]
print("products of a weight's shape:", weight_shaped(found, params))
assert {use.path for use in plan.whole_uses} == {"first"}
assert {tuple(sorted(s)) for s in weight_shaped(found, params)} == {(256, 640)}

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
    assert error < 1e-5

# %% [markdown]
# And the LLaMA has no such use: every weight's gradient is fused.

# %%
assert not flora_jax.value_and_grad(llama_loss, projection).plan(weights, windows).whole_uses
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
assert len(errors) == len(kernels) + 1  # the embedding's too
assert max(errors) < 1e-4
