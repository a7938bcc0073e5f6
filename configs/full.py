"""Every parameter trains.

python -m vitft_jax.train --config configs/full.py --config.data.path=IMAGES --config.model.pretrained=WEIGHTS

BUSI, ViT-S/14, 8 epochs, float32, 1 seed (docs/results.md): test accuracy 0.814 (95 % CI 0.745 to 0.874), AUROC 0.937
(0.901 to 0.965). In bfloat16, same seed, another machine: 0.885 (0.806 to 0.932) and 0.956 (0.918 to 0.978).
"""

from vitft_jax.config import Config, default


def get_config() -> Config:
    """The defaults with everything trainable at a rate that keeps what was pretrained."""
    config = default()
    config.train.trainable = "."
    config.train.lr = 3e-5
    return config
