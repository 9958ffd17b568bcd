"""Fine-tuning of full-duplex speech models: Moshi and PersonaPlex."""

import os

# moshi compiles its norms and gatings on first use: 40 s on a CPU, and stride assertions on some GPUs under FSDP. It
# reads this when it is imported.
os.environ.setdefault("NO_TORCH_COMPILE", "1")
