from finetune.cli import run
from finetune.tools.check_data.command import main

run(main)
