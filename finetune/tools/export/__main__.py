from finetune.cli import run
from finetune.tools.export.command import main

run(main)
