from finetune.cli import run
from finetune.tools.plan.command import main

run(main)
