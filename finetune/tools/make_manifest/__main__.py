from finetune.cli import run
from finetune.tools.make_manifest.command import main

run(main)
