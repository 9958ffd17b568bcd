from finetune.cli import run
from finetune.tools.evaluate.command import main

run(main)
