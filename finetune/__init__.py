"""Fine-tuning of full-duplex speech models: Moshi and PersonaPlex."""

import os

# moshi compiles its norms and gatings on first use: 40 s on a CPU, and stride assertions on some GPUs
# under FSDP. Read by moshi when it is imported, so it has to be set before. `compile: true` undoes it.
os.environ.setdefault("NO_TORCH_COMPILE", "1")
