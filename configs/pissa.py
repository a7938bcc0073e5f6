"""PiSSA on query and value, rank 8, and a new head.

python -m vitft_jax.train --config configs/pissa.py --config.data.path=IMAGES --config.model.pretrained=WEIGHTS
"""

from vitft_jax.config import Config, default


def get_config() -> Config:
    """The defaults with PiSSA; it reads the settings of LoRA, such as ``--config.lora.rank=16``."""
    config = default()
    config.methods = ("pissa",)
    config.lora.alpha = 8.0  # alpha / rank = 1, as in the paper: the product A B starts as the principal part itself
    return config
