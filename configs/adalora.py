"""AdaLoRA on query, key and value, from rank 12 to a mean of 8, and a new head.

python -m vitft_jax.train --config configs/adalora.py --config.data.path=IMAGES --config.model.pretrained=WEIGHTS

The schedule follows the length of the run. Ranks by layer: `summary.json` and `figures/active_rank.png` of the run.
"""

from vitft_jax.config import Config, default


def get_config() -> Config:
    """The defaults with AdaLoRA."""
    config = default()
    config.methods = ("adalora",)
    return config
