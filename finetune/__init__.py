"""Fine-tuning of full-duplex speech models: Moshi and PersonaPlex."""

import os
import sys

# moshi compiles its norms and gatings on first use: 40 s on a CPU, and stride assertions on some GPUs under FSDP. It
# reads this when it is imported.
os.environ.setdefault("NO_TORCH_COMPILE", "1")


def _interrupt(kind, error, trace):
    if issubclass(kind, KeyboardInterrupt):  # while modules are imported, which takes seconds; later finetune.cli.run
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _interrupt
