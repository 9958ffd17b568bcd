"""List the commands: python -m finetune"""

from finetune.cli import run

COMMANDS = {  # in the order of their use
    "Data": {
        "finetune.tools.make_manifest": "list recordings, join mono files, set some calls aside for evaluation",
        "annotate": "word times, by Whisper, and prompts",
        "finetune.tools.import_words": "word times from transcripts of other programs",
        "finetune.tools.check_data": "find what training would fail on, lose, or learn wrongly",
        "precompute_codes": "encode recordings once: a folder with all that training needs",
        "finetune.tools.make_replay": "conversations of the base model, to keep what it can do",
    },
    "Training": {
        "finetune.tools.plan": "memory and compute of a run, and the largest batch that fits",
        "train": "fine-tune Moshi",
        "train_personaplex": "fine-tune PersonaPlex, with voice and role prompts",
    },
    "Afterwards": {
        "finetune.tools.report": "a page about a run: curves, settings, replies to play",
        "finetune.tools.generate": "replies to recorded users, as a server would give them",
        "finetune.tools.evaluate": "held-out losses and replies; whether prompts matter; two runs compared",
        "finetune.tools.judge": "turn-taking by the rules of Full-Duplex-Bench, and how replies sound",
        "finetune.tools.make_voice": "a voice prompt (.pt) from a recording",
        "finetune.tools.export": "a folder for servers and the hub",
    },
    "To try it out": {"finetune.tools.toy": "a tiny model and synthetic dialogues"},
}


def main() -> None:
    for heading, commands in COMMANDS.items():
        print(f"{heading}:")
        for module, line in commands.items():
            print(f"  python -m {module:<29} {line}")
    print("\n--help after one of them says what it reads and writes, with its options and examples.")


if __name__ == "__main__":
    run(main)
