"""A new head on frozen features: what a linear probe reaches without touching the model.

python -m vitft_jax.train --config configs/probe.py --config.data.path=IMAGES --config.model.pretrained=WEIGHTS

BUSI, ViT-S/14, 10 epochs, bfloat16, 1 seed (docs/results.md): test accuracy 0.769 (95 % CI 0.700 to 0.833), AUROC 0.899
(0.850 to 0.940); 2,307 parameters train.
"""

from vitft_jax.config import Config, default


def get_config() -> Config:
    """The defaults train the head alone; it takes a higher rate than adapters do."""
    config = default()
    config.train.lr = 3e-3
    return config
