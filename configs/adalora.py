"""AdaLoRA on query, key and value, from rank 12 to a mean of 8, and a new head.

python -m vitft_jax.train --config configs/adalora.py --config.data.path=IMAGES --config.model.pretrained=WEIGHTS

The schedule follows the length of the run. Ranks by layer: `summary.json` and `figures/active_rank.png` of the run.

It wants a higher learning rate than LoRA, and on a small image set LoRA did better. BUSI, ViT-S/14, 8 epochs, bfloat16, 3 seeds
(docs/results.md): test accuracy 0.784 [0.782 to 0.788], AUROC 0.915 [0.908 to 0.918]; LoRA at the same budget of ranks
and tuned likewise: 0.857 and 0.950.
"""

from vitft_jax.config import Config, default


def get_config() -> Config:
    """The defaults with AdaLoRA."""
    config = default()
    config.methods = ("adalora",)
    config.train.lr = 1e-3
    return config
