"""LoRA, and patch tokens that the class token does not attend to leave after blocks 6 and 8: 35 % of them each time.

python -m vitft_jax.train --config configs/skip.py --config.data.path=IMAGES --config.model.pretrained=WEIGHTS

Of 196 patch tokens 128 and then 84 go on. To skip without training, evaluate a run that was trained dense:

python -m vitft_jax.evaluate --workdir runs/lora --config.methods=lora,skip
"""

from vitft_jax.config import Config, default


def get_config() -> Config:
    """The defaults with LoRA and token skipping."""
    config = default()
    config.methods = ("lora", "skip")
    return config
