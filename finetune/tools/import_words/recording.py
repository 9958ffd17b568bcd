"""Write the words of one recording, from its transcripts."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from finetune.audio.annotation import USER_SPEAKER, add_words, load_output, origins, other_speakers
from finetune.audio.words import MAIN_SPEAKER, Word
from finetune.cli import UserError
from finetune.data.manifest import Line
from finetune.tools.import_words.alignment import align_sentences
from finetune.tools.import_words.formats import Passage
from finetune.tools.import_words.sides import heard_in
from finetune.tools.import_words.sources import ASIDE, Source
from finetune.tools.import_words.timing import is_sentence, time_words

if TYPE_CHECKING:
    from finetune.audio.aligners import AlignText  # takes seconds to import

ORIGIN = "transcripts"  # key in the record of words that this command has imported
ANYONE = "*"


class ImportRules(NamedTuple):
    speakers: dict[str, str]  # {name in transcripts: speaker}; ANYONE: all others, and words without a name
    by_channel: bool = False  # instead of `speakers`: who is heard on the left is the agent
    spread: bool = False  # spread the words of a sentence over its time
    replace: bool = False  # replace the words of annotate.py too
    set_aside: bool = False  # rename a transcript that lies where the .json belongs
    align: "AlignText | None" = None  # finds the words of a sentence in its sound


class Imported(NamedTuple):
    words: dict[str, int]  # {speaker: number}
    counts: Counter[str]  # of words by what was done to them


def import_recording(line: Line, transcripts: dict[Source, list[Passage]], rules: ImportRules) -> Imported:
    """Write the .json of a recording. Raises UserError, and then writes nothing."""
    output, sources = line.words_path, list(transcripts)
    passages: dict[tuple[str | None, str | None], list[Passage]] = {}  # by (speaker of the source, name)
    for source, found in transcripts.items():
        for passage in found:
            passages.setdefault((source.speaker, passage.speaker), []).append(passage)

    # 1. Times, and whose words they are.
    speaker_of = {key: key[0] or rules.speakers.get(key[1] or "", rules.speakers.get(ANYONE)) for key in passages}
    wanted = [key for key in passages if rules.by_channel or speaker_of[key]]
    timed = {key: _time_words(sources, passages[key], rules.spread) for key in wanted}
    speakers = {source.speaker for source in sources} - {None} or set(rules.speakers.values())
    if rules.by_channel and sources[0].speaker is None:
        speakers = {MAIN_SPEAKER, USER_SPEAKER}
        channels = heard_in(line.path, {key: words for key, (words, _) in timed.items()})
        speaker_of = {key: (MAIN_SPEAKER, USER_SPEAKER)[channels[key]] if key in channels else None for key in passages}
    if rules.align:
        for key in wanted:
            if speaker_of[key]:
                found, aligned = align_sentences(rules.align, line.path, speaker_of[key], passages[key])
                own, repairs = _time_words(sources, found, rules.spread)
                timed[key] = own, repairs + aligned
    if not any(timed[key][0] for key in wanted if speaker_of[key]):
        names = ", ".join(sorted({key[1] or "no name" for key in passages})[:5])
        found = f"has only words of {names}, who are not among the speakers to import" if names else "has no words"
        raise UserError(f"{sources[0].path}: {found}")

    # 2. Nothing else is replaced.
    content = {} if output in [source.path for source in sources] else load_output(output)
    kept = ", ".join(sorted(other_speakers(content) & speakers))
    if kept:
        raise UserError(
            f"{output}: has words of {kept} by hand or by another program, which are kept; rename the file to import "
            "these"
        )
    annotated = ", ".join(sorted(s for s, origin in origins(content).items() if s in speakers and ORIGIN not in origin))
    if annotated and not rules.replace:
        raise UserError(f"{output}: has words of {annotated} by annotate.py; --replace replaces them")
    if output in [source.path for source in sources]:
        _set_aside(output, rules.set_aside)

    # 3. The words.
    results = {}
    for speaker in sorted(speakers):
        own = [timed[key] for key in wanted if speaker_of[key] == speaker]
        words = [[text, [round(start, 3), round(end, 3)], speaker] for found, _ in own for text, start, end in found]
        results[speaker] = {
            "channel": int(speaker != MAIN_SPEAKER),
            "duration": line.duration or max((row[1][1] for row in words), default=0.0),
            "sound_sec": 0.0,
            "repairs": dict(sum((repairs for _, repairs in own), Counter())),
            ORIGIN: [source.path.name for source in sources],
            "words": words,
        }
    add_words(output, results, {})
    counts = sum((timed[key][1] for key in wanted if speaker_of[key]), Counter())
    for key in passages:
        if speaker_of[key] is None:
            counts[f"left out: of {key[1] or 'no name'}"] += sum(len(passage.words) for passage in passages[key])
    return Imported({speaker: len(result["words"]) for speaker, result in results.items()}, counts)


def _time_words(sources: Sequence[Source], passages: list[Passage], spread: bool) -> tuple[list[Word], Counter[str]]:
    """Return what `time_words` does. Raises UserError if that needs --spread, or is not possible."""
    path = ", ".join(dict.fromkeys(str(source.path) for source in sources))
    if any(is_sentence(passage) and passage.start is None for passage in passages):
        raise UserError(
            f"{path}: has text without times; put the turns of a diarisation next to it, in "
            f"{sources[0].recording}.rttm, or let annotate.py find words and times"
        )
    sentences = sum(len(passage.words) for passage in passages if is_sentence(passage))
    if sentences and not spread:
        words = sum(len(passage.words) for passage in passages)
        raise UserError(
            f"{path}: {sentences} of {words} words have no time but that of their sentence, so they would be trained "
            "seconds too early or late; --aligner finds them in the sound, --spread spreads them over that time, and "
            "annotate.py transcribes the sound again"
        )
    try:
        return time_words(passages)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _set_aside(output: Path, allowed: bool) -> None:
    """Rename a transcript that lies where the .json belongs. Raises UserError if that is not wanted or not possible."""
    target = output.with_name(f"{output.stem}{ASIDE}.json")
    if not allowed:
        raise UserError(
            f"{output}: this transcript lies where the word times belong; move it to another folder and name that with "
            f"--transcripts, let --set-aside rename it to {target.name}, or write the words elsewhere with --output-dir"
        )
    if target.exists():
        raise UserError(f"{output}: cannot be renamed to {target.name}, which exists; move one of them elsewhere")
    output.rename(target)
