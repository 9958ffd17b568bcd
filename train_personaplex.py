"""Fine-tune PersonaPlex: Moshi with 16 depformer steps, a voice prompt and a role prompt before each window.

    torchrun train_personaplex.py config.yaml [key=value ...]

Starts from PersonaPlex weights, loaded as they are, or from Moshiko's, expanded from 8 to 16 codebooks. The same
command continues a run that was stopped. Settings: README.md, example/personaplex_config.yaml.
"""

import train
from finetune.cli import run
from finetune.model.expansion import expand_moshiko_to_personaplex
from finetune.model.pretrained import PERSONAPLEX

__all__ = ["expand_moshiko_to_personaplex"]

if __name__ == "__main__":
    run(lambda: train.main(PERSONAPLEX, __doc__))
