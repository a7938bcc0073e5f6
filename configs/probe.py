"""A new head on frozen features: what a linear probe reaches without touching the model.

python -m vitft_jax.train --config configs/probe.py --config.data.path=IMAGES --config.model.pretrained=WEIGHTS
"""

from vitft_jax.config import Config, default


def get_config() -> Config:
    """The defaults train the head alone; it takes a higher rate than adapters do."""
    config = default()
    config.train.lr = 3e-3
    return config
