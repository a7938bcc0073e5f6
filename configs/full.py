"""Every parameter trains.

python -m vitft_jax.train --config configs/full.py --config.data.path=IMAGES --config.model.pretrained=WEIGHTS
"""

from vitft_jax.config import Config, default


def get_config() -> Config:
    """The defaults with everything trainable at a rate that keeps what was pretrained."""
    config = default()
    config.train.trainable = "."
    config.train.lr = 3e-5
    return config
