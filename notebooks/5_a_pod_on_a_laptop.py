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
# # A TPU pod, planned on a laptop
#
# Three questions before a run on many chips, answered on a machine with none: does it fit, where does each array lie,
# and what do the chips send one another. The first is answered by the planner, from shapes; the others by the program
# that XLA compiles for the pod.
#
# Where the package `libtpu` is installed (it exists for Linux), the program is compiled for eight chips of a TPU v5e;
# without it, for eight devices that this machine's CPU stands for. Nothing runs in either case.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("flora_jax") is None:  # as in a hosted notebook
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "flora-jax[notebooks]", "libtpu; sys_platform == 'linux'"], check=True)

# %%
import math
import os
import re
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import flora_jax
from flora_jax.chain.plan import tree_bytes
from flora_jax.memory import estimate, outline, report
from flora_jax.models import decoder
from flora_jax.paths import path_name

# %% [markdown]
# ## Does it fit?
#
# LLaMA-7B in bfloat16 on 1 to 64 chips of a TPU v5e (15.75 GiB that a program may use), one sequence of 2048 tokens for
# each chip, rank 128, weights and state sharded over all chips. `flora-jax plan --chips 4 --batch 4` prints the same at the
# prompt. The largest rank that surely fits, a multiple of 8, stands in brackets, with – where rank 8 does not fit.

# %%
CHIPS = (1, 2, 4, 8, 16, 32, 64)
MARKS = {"fits": "", "close": "?", "no": "!"}
model = outline.named("LLaMA-7B")
settings = {chips: estimate.Setting(model=model, chips=chips, batch=chips) for chips in CHIPS}
table = {chips: {e.method: e for e in estimate.estimates(s)} for chips, s in settings.items()}

print(f"GiB a chip{'':16}" + "".join(f"{chips:>14}" for chips in CHIPS))
for method in estimate.METHODS:
    cells = []
    for chips in CHIPS:
        e = table[chips][method]
        rank = f" ({e.largest_rank or '–'})" if e.rank else ""
        cells.append(f"{e.total / estimate.GIB:.2f}{MARKS[e.answer]}{rank}")
    print(f"{method:26}" + "".join(f"{cell:>14}" for cell in cells))
print(
    "! does not fit, ? is too close to call: the estimate is within 10 % of the compiler's figure"
)

needed = {m: next(c for c in CHIPS if table[c][m].fits) for m in estimate.METHODS}
print("\nfewest of these chips that surely hold it:", needed)

# %%
figure, (left, right) = plt.subplots(
    1, 2, figsize=(13, 4), layout="constrained", width_ratios=(2, 3)
)
for i, method in enumerate(estimate.METHODS):
    totals = [table[chips][method].total / estimate.GIB for chips in CHIPS]
    left.loglog(CHIPS, totals, "--" if i % 2 else "-", lw=4 - i / 2, label=method)
hbm = settings[1].capacity / estimate.GIB
left.axhline(hbm, color="k", ls="--", lw=1)
left.set(xlabel="chips", ylabel="GiB per chip (dashed: what it has)")
left.set_xticks(CHIPS, [str(c) for c in CHIPS])
left.set_yticks((2, 4, 8, 16, 32), ("2", "4", "8", "16", "32"))
left.minorticks_off()
left.legend(fontsize=8)
start = np.zeros(len(estimate.METHODS))
for part in estimate.PARTS:
    sizes = np.array([table[4][m].parts[part] / estimate.GIB for m in estimate.METHODS])
    if sizes.any():
        right.barh(estimate.METHODS, sizes, left=start, color=report.COLOURS[part], label=part)
    start += sizes
right.axvline(hbm, color="k", ls="--", lw=1)
right.invert_yaxis()
right.set(xlabel="GiB per chip, on 4 chips (dashed: what it has)")
right.legend(fontsize=8, ncols=6, loc="lower center", bbox_to_anchor=(0.4, 1))
plt.show()

# %% [markdown]
# ## Where does each array lie?
#
# From here on a small LLaMA, that compiles in seconds: width 256, 4 layers under `scan`, on 2 × 4 chips: two replicas
# (`data`), the weights of each sharded over four (`fsdp`). A weight is sharded along the side that Flora keeps.

# %%
jax.config.update("jax_platforms", "cpu")  # compiling for a TPU is no reason to look for one
if importlib.util.find_spec("libtpu"):
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ |= {"TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost"}
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
else:
    if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", 8)
    devices = jax.devices()[:8]
print(f"compiled for {len(devices)} x {devices[0].device_kind}")
mesh = Mesh(np.array(devices).reshape(2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

shape = decoder.Shape(4096, 256, 768, 4, 4, 4, jnp.bfloat16, sharded=(("data", "fsdp"),))
net = decoder.Decoder(shape)


def placed(tree, shardings):
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def where(path, x):
    """Gives a sharding along the side that is kept; the larger is projected (the input of a square, an embedding's columns)."""
    if x.ndim < 2 or min(x.shape[-2:]) < 128:
        return NamedSharding(mesh, P())
    rows, columns = x.shape[-2:]
    keeps_rows = "embed" in path_name(path) or columns > rows
    return NamedSharding(
        mesh, P(*[None] * (x.ndim - 2), *(("fsdp", None) if keeps_rows else (None, "fsdp")))
    )


with jax.set_mesh(mesh):
    params = jax.eval_shape(
        lambda: net.init(jax.random.key(0), jnp.zeros((8, 8), jnp.int32))["params"]
    )
params = placed(params, jax.tree_util.tree_map_with_path(where, params))
batch = jax.ShapeDtypeStruct((8, 257), jnp.int32, sharding=NamedSharding(mesh, P(("data", "fsdp"))))

STEPS = 16
projection = flora_jax.Projection(32, resample_every=STEPS)
flora = flora_jax.flora(1e-3, projection=projection, accumulation_steps=STEPS)
multisteps = optax.MultiSteps(optax.adafactor(1e-3), STEPS).gradient_transformation()

states = {}
for name, tx in (("Flora", flora), ("MultiSteps", multisteps)):
    shardings = flora_jax.state_shardings(tx, params)
    states[name] = placed(jax.eval_shape(tx.init, params), shardings)

# %% [markdown]
# `state_shardings` makes the shardings of any optax state from those of the params. Flora's accumulator has the axes of
# the weight, with the rank in place of the side that is projected.

# %%
known = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
rows = jax.tree_util.tree_leaves_with_path(states["Flora"])
print(f"{'weight':42} {'sharding':22} its sketch")
for path, leaf in rows:
    owner = next((name for name in known if path_name(path).endswith(f"accumulated/{name}")), None)
    if owner and len(leaf.shape) > 1 and "norm" not in owner:
        weight = known[owner]
        print(
            f"{owner + ' ' + str(weight.shape):42} {tuple(weight.sharding.spec)!s:22} "
            f"{leaf.shape} {tuple(leaf.sharding.spec)}"
        )


def on_a_chip(tree):
    def local(x):
        return jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype)

    return tree_bytes(jax.tree.map(local, tree))


print()
for name, tree in {"params": params, **states}.items():
    print(f"{name:12} {on_a_chip(tree) / 2**20:7.2f} MiB a chip")

# %% [markdown]
# ## What do the chips send?
#
# One program for each: micro-step and, every 16th time, the optimizer step. Flora's is `make_train_step`; the other takes
# `jax.value_and_grad` and holds gradients and updates to the shardings of the weights. Both are compiled for the mesh,
# and the collectives are read from the HLO: how often each runs, among how many chips, and whether in the branch of the
# optimizer step. Bytes are those that a chip sends by the ring algorithms. These are the lines that read them:

# %%
WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}  # bytes
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
CALLED = re.compile(r"(calls|to_apply|body|\w*branch\w*|\w+_computation)=(\{[^}]*\}|%[\w.\-]+)")
GROUP = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]+)\}|mesh\[(.*?)\] \{(.*?)\})")


def chips_of(line):
    """How many chips take part in a collective; XLA writes it in three ways."""
    if not (match := GROUP.search(line)):
        return len(devices)
    count, first, sizes, axes = match.groups()
    if sizes:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", sizes))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", axes))
    return int(count or first.count(",") + 1)


def collectives(text):
    """For each collective of a program: kind, arrays, chips, times, optimizer step or not, bytes sent."""
    bodies, found = {}, {}
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            lines = bodies.setdefault("ENTRY" if head[1] else head[2], [])
        elif bodies:
            lines.append(line)

    def trips(line):
        if known := re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', line):
            return int(known[1])
        test = bodies[re.search(r"condition=%([\w.\-]+)", line)[1]]
        limits = re.findall(r"s32\[\][^=]*constant\((\d+)\)", "\n".join(test))
        return max(map(int, limits), default=1)

    def walk(name, times, optimizer_step):
        for line in bodies.get(name, ()):
            if match := COLLECTIVE.search(line):
                result, kind, start = match.groups()
                arrays = re.findall(r"(\w+)\[([\d,]*)\]", result)
                if start and kind != "all-reduce":  # operands, results, and words of context
                    arrays = [array for array in arrays if array != ("u32", "")]
                    arrays = arrays[len(arrays) // 2 :]
                shapes = [(dtype, [int(n) for n in axes.split(",") if n]) for dtype, axes in arrays]
                size = sum(WIDTHS[dtype] * math.prod(axes) for dtype, axes in shapes) * times
                chips = chips_of(line)
                share = (chips - 1) / chips
                factor = {"all-reduce": 2 * share, "reduce-scatter": chips * share}
                factor["collective-permute"] = 1
                names = [f"{dtype}[{axes}]" for dtype, axes in arrays]
                channel = re.search(r"channel_id=(\d+)", line)  # the parts of one have the same
                sent = factor.get(kind, share) * size
                found[channel[1] if channel else line] = (
                    kind, names, chips, times, optimizer_step, sent
                )  # fmt: skip
            for role, called in CALLED.findall(line):
                runs = times * (trips(line) if role == "body" else 1)
                inside = optimizer_step or "branch" in role or role.endswith("_computation")
                for other in re.findall(r"%([\w.\-]+)", called):
                    walk(other, runs, inside)

    walk("ENTRY", 1, False)
    return list(found.values())


# %%
loss = partial(decoder.loss, net)


def ordinary(params, state, batch):
    def keep(tree, like):
        return jax.tree.map(
            lambda x, y: jax.lax.with_sharding_constraint(x, y.sharding), tree, like
        )

    value, grads = jax.value_and_grad(loss)(params, batch)
    updates, state = multisteps.update(keep(grads, where_params), state, params)
    params = keep(optax.apply_updates(params, updates), where_params)
    return params, keep(state, states["MultiSteps"]), value


where_params = params
steps = {
    "Flora": flora_jax.make_train_step(loss, flora, projection),
    "MultiSteps": jax.jit(ordinary, donate_argnums=(0, 1)),
}
programs = {}
for name, step in steps.items():
    with jax.set_mesh(mesh):
        programs[name] = step.lower(params, states[name], batch).compile()

sent = {}
print(f"MB sent by a chip{'':13}" + "".join(f"{kind:>20}" for kind in KINDS))
for name, program in programs.items():
    found = collectives(program.as_text())
    for update in (False, True):
        sums = dict.fromkeys(KINDS, 0.0)
        for kind, _, _, _, optimizer_step, size in found:
            sums[kind] += size * (optimizer_step == update)
        sent[name, update] = np.array(list(sums.values())) / 1e6
        label = f"{name}, {'optimizer step adds' if update else 'micro-step'}"
        print(f"{label:30}" + "".join(f"{x:20.3f}" for x in sent[name, update]))

mean = {name: (sent[name, False] + sent[name, True] / STEPS).sum() for name in programs}
print(f"\nmean of {STEPS} micro-steps: " + ", ".join(f"{n} {x:.2f} MB" for n, x in mean.items()))

# %% [markdown]
# The weights are gathered for use with either method. What differs is what is summed: gradients with MultiSteps, sketches
# with Flora. These are the largest sums of each micro-step:

# %%
SUMS = ("all-reduce", "reduce-scatter")
for name, program in programs.items():
    found = collectives(program.as_text())
    found = [c for c in found if c[0] in SUMS and not c[4]]
    print(name, f"({sum(c[-1] for c in found) / 1e6:.2f} MB in all)")
    for kind, arrays, group, times, _, _ in sorted(found, key=lambda c: -c[-1])[:4]:
        shown = ", ".join(arrays[:3]) + (" …" if len(arrays) > 3 else "")
        print(f"  {kind} among {group} chips, {times} times: {shown}")

# %%
memory = {}
for name, program in programs.items():
    m = program.memory_analysis()
    kept = m.argument_size_in_bytes / 2**20
    new = (m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes) / 2**20
    memory[name] = kept, new
    print(f"{name:11} arguments {kept:6.2f} MiB, temporaries and results {new:7.2f} MiB a chip")

figure, (left, right) = plt.subplots(1, 2, figsize=(12, 2.6), layout="constrained")
start = np.zeros(2)
for i, kind in enumerate(KINDS):
    sizes = np.array([sent[n, False][i] + sent[n, True][i] / STEPS for n in programs])
    if sizes.any():
        left.barh(list(programs), sizes, left=start, label=kind)
    start += sizes
left.invert_yaxis()
left.set(xlabel=f"MB that a chip sends, mean of {STEPS} micro-steps")
left.legend(fontsize=8, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1))
start = np.zeros(2)
for part, label in enumerate(("arguments: parameters, state, batch", "temporaries and results")):
    sizes = np.array([memory[name][part] for name in programs])
    right.barh(list(programs), sizes, left=start, label=label, color=("#4c566a", "#a3be8c")[part])
    start += sizes
right.invert_yaxis()
right.set(xlabel="MiB per chip, as the compiler says")
right.legend(fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
plt.show()

# %% [markdown]
# ## Conclusion
#
# The planner answers the first question in a second: of the methods that accumulate, fused sketches are the ones that hold
# LLaMA-7B on the fewest chips, and exact gradients in the backward pass, which do not accumulate, need fewer still. The
# shardings of the state follow from those of the weights, so that nothing has to be written by hand. The weights are gathered
# equally often with either method, which is most of what Flora's chips send; the saving is in the sums, where sketches take the
# place of gradients. All of this is what the compiler and the planner say, and no step was timed on a pod.
