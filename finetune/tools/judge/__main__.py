from finetune.cli import run
from finetune.tools.judge.command import main

run(main)
