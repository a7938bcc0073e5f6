"""Fine-tune pretrained Vision Transformers on small, specialised image sets, and make the result small and fast."""

import time

IMPORTED = time.perf_counter()  # before JAX and all else is imported, to tell how long a command takes to get going
