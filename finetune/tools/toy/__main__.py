from finetune.cli import run
from finetune.tools.toy.world import main

run(main)
