from finetune.cli import run
from finetune.tools.report.page import main

run(main)
