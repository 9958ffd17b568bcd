"""Take word times from transcripts of other programs: writes the .json that training reads next to each recording.

    python -m finetune.tools.import_words data/train.jsonl --speaker Ann=SPEAKER_MAIN --speaker Bob=SPEAKER_USER
    python -m finetune.tools.import_words data/train.jsonl --transcripts corpus.ctm --speaker A=SPEAKER_MAIN

Reads, for the recording calls/0001.wav, the first of these that exists:
  0001.json      WhisperX, whisper, faster-whisper, whisper-timestamped, OpenAI's API, transformers, whisper.cpp
  0001.ctm       recording channel start duration word; the channel is the speaker
  0001.TextGrid  Praat and the Montreal Forced Aligner; each tier (or "NAME - words") is a speaker
  0001.vtt .srt  a cue may begin with <v NAME>, [NAME]: or NAME:
  0001.txt       Fisher and CallHome (LDC): start end NAME: text
  0001.txt       text without times, NAME: text in each line, with the turns of a diarisation in 0001.rttm
They lie next to the recording or, with --transcripts FOLDER, in FOLDER or in its subfolders of the same names. FILE.ctm
may hold all recordings. A transcript that lies where the .json of the words belongs, as WhisperX writes it, is refused,
or renamed to 0001.transcript.json with --set-aside. A recording that make_manifest has joined from two sides takes the
transcripts of the sides (0001_agent.json and 0001_user.json), whose words are the agent's and the user's.

Writes 0001.json: {"alignments": [["hello", [0.40, 0.72], "SPEAKER_MAIN"], ...]} in the order of time, and with it a
record of where the words come from. Training reads the words of SPEAKER_MAIN, the agent's. The names in a transcript
are mapped with --speaker; words of other names are left out, and counted. Diarisations number the speakers of each
file from 0: if the agent is not the same SPEAKER_00 in all files, --by-channel finds it. If a transcript names no
speakers, and 0001.rttm lies next to it, each word is of whoever has a turn at its time.

With --output-dir nothing is written next to the recordings: the words go to DIR/calls/0001.json, and DIR/train.jsonl is
a manifest whose lines name them as "words_path". Train on that one.

A word without times (WhisperX has none for digits) gets some from its neighbours, and is counted. A transcript with the
times of sentences only is refused: its words would come seconds too early or too late. With --aligner stable-ts
(pip install '.[stable-ts]') a Whisper finds the words of each sentence in the sound of its speaker's channel. With
--spread they share the time of their sentence by their lengths, which is less exact.

Words that are by hand or of a program other than these are never replaced. A second run replaces what the first one has
imported, and nothing else. Recordings that got no words are listed. Exit code 1 if none got any (with --strict: if one
got none), 2 for a mistake in the command itself.
"""

import argparse
import os
from collections import Counter
from pathlib import Path

from finetune.audio.words import MAIN_SPEAKER
from finetune.claim import claimed
from finetune.cli import UserError, no_room
from finetune.data.manifest import read_manifest
from finetune.data.words_folder import redirect_words
from finetune.distributed import pick_device
from finetune.files import expand, why_missing
from finetune.jobs.failures import show_list
from finetune.parser import Parser
from finetune.tools.import_words.formats import READERS
from finetune.tools.import_words.recording import ANYONE, ImportRules, import_recording
from finetune.tools.import_words.sources import ASIDE, Transcripts


def main(argv: list[str] | None = None) -> int:
    args = _parse_args(argv)
    if not args.manifest.exists():
        raise UserError(f"{args.manifest}: {why_missing(args.manifest)}")
    problems: list[str] = []
    if args.output_dir:
        args.manifest = redirect_words(args.manifest, args.output_dir, problems)
    with claimed(args.manifest):
        return import_words(args, problems)


def _parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Return the arguments, checked, with `rules`."""
    parser = Parser(__doc__)
    parser.add_argument("manifest", type=expand, metavar="MANIFEST", help=".jsonl or .jsonl.gz file")
    parser.add_argument("--transcripts", type=expand, metavar="PATH", help="folder of the transcripts, or one file for "
                        "all; default: the folder of each recording")  # fmt: skip
    parser.add_argument("--output-dir", type=expand, metavar="DIR", help="folder for the words and a manifest that "
                        "names them, if they cannot lie next to the recordings")  # fmt: skip
    parser.add_argument("--speaker", action="append", metavar="NAME=SPEAKER", help="NAME in the "
                        "transcripts is SPEAKER_MAIN (the agent) or SPEAKER_USER; '*': all other words, also those "
                        "without a name")  # fmt: skip
    parser.add_argument("--by-channel", action="store_true", help="instead of --speaker: who is louder in the left "
                        "channel is the agent, and in the right one the user")  # fmt: skip
    parser.add_argument("--spread", action="store_true", help="spread the words of a sentence over its time")
    parser.add_argument("--aligner", choices=["stable-ts"], help="find the words of a sentence in its sound, and "
                        "spread those that are not found")  # fmt: skip
    parser.add_argument("--whisper-model", default="medium", metavar="NAME", help="name or .pt file of a Whisper, for "
                        "--aligner (default: medium)")  # fmt: skip
    parser.add_argument("--lang", metavar="CODE", help="language of the transcripts, e.g. en, for --aligner")
    parser.add_argument("--replace", action="store_true", help="replace the words of annotate.py too")
    parser.add_argument("--set-aside", action="store_true", help="rename a transcript that lies where the .json "
                        f"belongs to *{ASIDE}.json")  # fmt: skip
    parser.add_argument("--strict", action="store_true", help="exit with 1 if any recording got no words")
    args = parser.parse_args(argv)
    speakers = {}
    for pair in args.speaker or []:
        name, equals, speaker = (part.strip() for part in pair.rpartition("="))
        if not (name and equals and speaker):
            raise UserError(f"--speaker {pair}: is not NAME=SPEAKER, e.g. SPEAKER_00={MAIN_SPEAKER}")
        speakers[name] = speaker
    if speakers and args.by_channel:
        raise UserError("--speaker and --by-channel exclude each other")
    spread = args.spread or args.aligner is not None
    args.rules = ImportRules(speakers, args.by_channel, spread, args.replace, args.set_aside)
    args.manifest = args.manifest.absolute()
    args.output_dir = args.output_dir and Path(os.path.abspath(args.output_dir))
    if args.transcripts is not None:
        args.transcripts = args.transcripts.absolute()
        if not args.transcripts.exists():
            raise UserError(f"--transcripts {args.transcripts}: {why_missing(args.transcripts)}")
        if not args.transcripts.is_dir() and args.transcripts.suffix.lower() not in READERS:
            raise UserError(f"--transcripts {args.transcripts}: its name must end in {', '.join(READERS)}")
    return args


def import_words(args: argparse.Namespace, problems: list[str]) -> int:
    """Import the words of all recordings and print a summary. Returns the exit code.

    `problems`: sentences about bad lines, to which those of this manifest are added.
    """
    lines = {line.path: line for line in read_manifest(args.manifest, problems)}
    if not lines:
        raise UserError("; ".join([f"{args.manifest}: names no audio file", *problems[:1]]))
    transcripts = Transcripts(args.transcripts)
    sources = {path: transcripts.find(path) for path in lines}
    if not any(sources.values()):
        where = args.transcripts or "the folders of the recordings"
        example = next(iter(lines)).stem
        raise UserError(f"{where}: no transcript has the name of a recording, e.g. {example}.json or {example}.ctm")

    # 1. Which names there are. Files are read again for their words, because those of all may not fit into memory.
    failed: dict[Path, str] = {}
    names: Counter[str | None] = Counter()
    key = lambda source: source[:2] if transcripts.in_one_file else source.path
    uses = Counter(key(source) for own in sources.values() for source in own)
    for path, own in sources.items():
        for source in own:
            try:
                if uses[key(source)] > 1:
                    raise UserError(f"{source.path}: by its name of several recordings, one of them {path}")
                for passage in transcripts.read(source):
                    names[passage.speaker] += len(passage.words) if source.speaker is None else 0
            except UserError as error:
                failed[path] = str(error)
    if +names:
        _check_names(+names, args.rules)

    # 2. The words.
    if args.aligner:
        from finetune.audio.aligners import stable_ts_text_aligner  # takes seconds to import

        device = str(pick_device("auto"))
        args.rules = args.rules._replace(align=stable_ts_text_aligner(args.whisper_model, device, args.lang))
    words: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    done: list[Path] = []
    agentless: list[str] = []
    for path, own in sources.items():
        try:
            if own and path not in failed:
                result = import_recording(lines[path], {source: transcripts.read(source) for source in own}, args.rules)
                words.update(result.words)
                counts.update(result.counts)
                done.append(path)
                agentless += [str(path)] * (not result.words.get(MAIN_SPEAKER))
        except (UserError, OSError) as error:
            if no_room(error):
                raise
            failed[path] = str(error) if isinstance(error, UserError) else f"{path}: {error.strerror}"

    # 3. Summary.
    shown = ", ".join(f"{number} words of {speaker}" for speaker, number in sorted(words.items())) or "no words"
    print(f"{args.manifest}: {len(lines)} recordings, {len(done)} with imported words: {shown}")
    show_list("of all words:", [f"{number} {what}" for what, number in counts.most_common()])
    missing = [str(path) for path, own in sources.items() if not own]
    show_list(f"{len(agentless)} x no words of {MAIN_SPEAKER}, the agent:", agentless, limit=5)
    show_list(f"{len(missing)} x no transcript:", missing, limit=5)
    show_list(f"{len(failed)} x refused:", list(failed.values()), limit=10)
    show_list("bad lines:", problems)
    if done:
        print("next: python -m finetune.tools.check_data config.yaml, which compares the words with the sound")
    return int(not done or (args.strict and bool(failed or missing or problems)))


def _check_names(names: Counter[str | None], rules: ImportRules) -> None:
    """Raise UserError if --speaker does not say whose the words are, or names somebody who is not there."""
    shown = ", ".join(f"{name or 'no name'} ({number})" for name, number in names.most_common(10))
    if not rules.speakers and not rules.by_channel:
        first = names.most_common(1)[0][0] or f"'{ANYONE}'"
        raise UserError(
            f"the transcripts have words of {shown}; say which are the agent's, e.g. --speaker {first}={MAIN_SPEAKER}, "
            "or --by-channel if the recordings tell"
        )
    unknown = [name for name in rules.speakers if name != ANYONE and name not in names]
    if unknown:
        raise UserError(f"--speaker {unknown[0]}: no transcript names {unknown[0]}; they have words of {shown}")
