from finetune.cli import run
from finetune.tools.toy.command import main

run(main)
