"""DoRA on query and value, rank 8, and a new head.

python -m vitft_jax.train --config configs/dora.py --config.data.path=IMAGES --config.model.pretrained=WEIGHTS
"""

from vitft_jax.config import Config, default


def get_config() -> Config:
    """The defaults with DoRA; it reads the settings of LoRA, such as ``--config.lora.rank=16``."""
    config = default()
    config.methods = ("dora",)
    return config
