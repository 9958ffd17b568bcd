from finetune.cli import run
from finetune.tools.import_words.command import main

run(main)
