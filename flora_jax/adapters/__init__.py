"""LoRA and variants of LoRA: low-rank arrays that are trained beside frozen weights, on any JAX function.

Each method returns an `Adapter` (`low_rank.py`), with `init(key, params) -> adapter_params`,
`apply(fun)`, which runs a function with the adapters, and
`merge(params, adapter_params) -> params`. Start with `lora.py`; the other files have one method each,
`quantized.py` has frozen weights in 8 or 4 bits, and `peft.py` has the file format of Hugging Face PEFT.
"""

from flora_jax.adapters import peft as peft
from flora_jax.adapters.deep_lora import deep_lora as deep_lora
from flora_jax.adapters.deep_lora import discrepant as discrepant
from flora_jax.adapters.deep_lora import singular_vectors as singular_vectors
from flora_jax.adapters.flat_lora import flat_lora as flat_lora
from flora_jax.adapters.flat_lora import growing as growing
from flora_jax.adapters.lora import lora as lora
from flora_jax.adapters.lora_pro import lora_pro as lora_pro
from flora_jax.adapters.lora_pro import lora_pro_inside as lora_pro_inside
from flora_jax.adapters.lorta import lorta as lorta
from flora_jax.adapters.low_rank import Adapter as Adapter
from flora_jax.adapters.low_rank import Factors as Factors
from flora_jax.adapters.run_lora import run_lora as run_lora
from flora_jax.adapters.sora import proximal as proximal
from flora_jax.adapters.sora import prune as prune
from flora_jax.adapters.sora import sora as sora
from flora_jax.adapters.xgb_lora import Boosting as Boosting
from flora_jax.adapters.xgb_lora import BoostingState as BoostingState
from flora_jax.adapters.xgb_lora import boosting as boosting
from flora_jax.adapters.xgb_lora import xgb_lora as xgb_lora
