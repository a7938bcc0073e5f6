"""LoRA on query and value, rank 8, and a new head.

python -m vitft_jax.train --config configs/lora.py --config.data.path=IMAGES --config.model.pretrained=WEIGHTS
"""

from vitft_jax.config import Config, default


def get_config() -> Config:
    """The defaults with LoRA."""
    config = default()
    config.methods = ("lora",)
    return config
