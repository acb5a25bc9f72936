"""Flora for JAX: sketches of gradients in place of gradients (arXiv 2402.03293)."""

from flora_jax.alias import flora as flora
from flora_jax.boundary import apply_gradients as apply_gradients
from flora_jax.carry_over import carry_over as carry_over
from flora_jax.fused import ValueAndGrad as ValueAndGrad
from flora_jax.fused import value_and_grad as value_and_grad
from flora_jax.interpreter import Use as Use
from flora_jax.plan import LeafPlan as LeafPlan
from flora_jax.plan import Plan as Plan
from flora_jax.plan import plan as plan
from flora_jax.projection import DimensionNumbers as DimensionNumbers
from flora_jax.projection import Projection as Projection
from flora_jax.sharding import state_shardings as state_shardings
from flora_jax.sketch import Sketch as Sketch
from flora_jax.sketch import Spec as Spec
from flora_jax.train_step import make_train_step as make_train_step
from flora_jax.transforms import accumulate as accumulate
from flora_jax.transforms import cycle as cycle
from flora_jax.transforms import decompress as decompress
from flora_jax.transforms import has_updated as has_updated
from flora_jax.transforms import momentum as momentum
from flora_jax.transforms import project as project
from flora_jax.transforms import shrink as shrink
from flora_jax.transforms import skip_nonfinite as skip_nonfinite

__version__ = "0.1.0"
