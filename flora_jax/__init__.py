"""Flora for JAX: optimizers that keep low-rank sketches of gradients in place of the gradients.

The method is from Hao, Cao, Mou, "Flora: Low-Rank Adapters Are Secretly Gradient Compressors",
arXiv 2402.03293. The paper's algorithms are in `flora_jax.chain`, whose docstring says which file has
which of their lines.
"""

from flora_jax.chain.accumulate import accumulate as accumulate
from flora_jax.chain.accumulate import has_updated as has_updated
from flora_jax.chain.carry_over import carry_over as carry_over
from flora_jax.chain.decompress import decompress as decompress
from flora_jax.chain.exact_momentum import exact_momentum as exact_momentum
from flora_jax.chain.flora import flora as flora
from flora_jax.chain.leaf_plan import LeafPlan as LeafPlan
from flora_jax.chain.momentum import momentum as momentum
from flora_jax.chain.orthogonalize import orthogonalize as orthogonalize
from flora_jax.chain.plan import Plan as Plan
from flora_jax.chain.plan import Use as Use
from flora_jax.chain.plan import plan as plan
from flora_jax.chain.polar import polar as polar
from flora_jax.chain.project import cycle as cycle
from flora_jax.chain.project import project as project
from flora_jax.chain.projection import DimensionNumbers as DimensionNumbers
from flora_jax.chain.projection import Projection as Projection
from flora_jax.chain.scale_by_shape import scale_by_shape as scale_by_shape
from flora_jax.chain.shrink import shrink as shrink
from flora_jax.chain.sketch import Sketch as Sketch
from flora_jax.chain.sketch import Spec as Spec
from flora_jax.chain.sketched_muon import sketched_muon as sketched_muon
from flora_jax.chain.skip_nonfinite import skip_nonfinite as skip_nonfinite
from flora_jax.fused.int8 import from_int8 as from_int8
from flora_jax.fused.int8 import to_int8 as to_int8
from flora_jax.fused.value_and_grad import ValueAndGrad as ValueAndGrad
from flora_jax.fused.value_and_grad import value_and_grad as value_and_grad
from flora_jax.sharding.state import state_shardings as state_shardings
from flora_jax.update.apply_gradients import apply_gradients as apply_gradients
from flora_jax.update.train_step import make_train_step as make_train_step

__version__ = "0.2.0"
