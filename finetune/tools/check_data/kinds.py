"""What can be wrong with a data set, and what to do about it."""

from typing import NamedTuple

from finetune.prompts.text import SYSTEM_TAG

ERROR, WARNING, NOTE = "error", "warning", "note"


class Kind(NamedTuple):
    level: str
    title: str
    remedy: str


KINDS = {
    "line": Kind(ERROR, "broken manifest line", 'write {"path": ..., "duration": seconds} on each line, as '
                 "make_manifest does"),
    "mixed": Kind(ERROR, "lines with and without codes", "run precompute_codes.py on all files, or use none"),
    "missing": Kind(ERROR, "missing audio", "put the file there, or take the line out of the manifest"),
    "unreadable": Kind(ERROR, "unreadable audio", "export it again as wav or flac, or take the line out"),
    "channels": Kind(ERROR, "not stereo", "left is the agent, right the user: make_manifest joins two mono "
                     "files; one mixed recording needs a diarisation tool first (pyannote.audio, NVIDIA NeMo)"),
    "same channels": Kind(ERROR, "the same sound in both channels", "it is a mono recording: get both sides apart, or "
                          "separate the speakers with a diarisation tool (pyannote.audio, NVIDIA NeMo)"),
    "swapped": Kind(ERROR, "channels swapped: the agent's words are loud on the right", "training takes the left one "
                    "as the agent: swap them (sox in.wav out.wav remix 2 1); if left is the agent already, these words "
                    "are the user's: annotate the left channel (annotate.py --channel 0)"),
    "duration": Kind(ERROR, "duration that costs windows", "write the duration that make_manifest finds"),
    "no words file": Kind(ERROR, "missing word times", "run annotate.py on the manifest"),
    "bad words file": Kind(ERROR, "word times that cannot be read", "remove the .json and run annotate.py again"),
    "past the end": Kind(ERROR, "words after the end of the audio", "the .json belongs to another version of the "
                         "file: remove it and run annotate.py again"),
    "crowded": Kind(ERROR, "tokens dropped: words come faster than 12.5 tokens a second", "look at these word times "
                    "(often Whisper squeezed words together); annotate again, or take the words out"),
    "no agent": Kind(ERROR, "no words of the agent in any file", "set data.speakers to the label of the agent's words"),
    "prompt": Kind(ERROR, "prompt that cannot be used", "write a string that fits: shorten it, or raise "
                   "prompt.max_sec (for train.py, which reads no prompts, check with --no-personaplex)"),
    "voice": Kind(ERROR, "voice that cannot be used", "put the file there, set prompt.voices_dir, or, for "
                  "same_speaker, run precompute_codes.py --same-speaker (for train.py, which reads no prompts, check "
                  "with --no-personaplex)"),
    "codes": Kind(ERROR, "codes that cannot be used", "run precompute_codes.py again"),
    "failed": Kind(ERROR, "file that could not be checked", "look at it; training may stop there"),
    "off": Kind(WARNING, "duration that is not quite true", "write the duration that make_manifest finds"),
    "clipping": Kind(WARNING, "clipped audio", "record or export with a lower level; Mimi hears the distortion"),
    "silent agent": Kind(WARNING, "agent (left) silent", "teaches the agent to say nothing; is the channel right?"),
    "silent user": Kind(WARNING, "user (right) silent", "teaches the agent to talk alone; is the channel right?"),
    "bleeding": Kind(WARNING, "one speaker is heard in both channels", "training wants them apart: is it one stereo "
                     "microphone, or loudspeakers beside an open one?"),
    "no words": Kind(WARNING, "no words of the agent", "the text stream would be padding; if the agent speaks there, "
                     "annotate again or check data.speakers"),
    "unsorted": Kind(WARNING, "word times out of order", "nothing: they are sorted when read"),
    "odd times": Kind(WARNING, "odd word times", "before the start, ending before they begin, or ending after the "
                      "audio; annotate again if there are many"),
    "late": Kind(WARNING, "text late: words come faster than 12.5 tokens a second", "the text trails the voice there; "
                 "look at these word times"),
    "cut": Kind(WARNING, "words cut short, because data.keep_and_shift is off", "set data.keep_and_shift to true"),
    "script": Kind(WARNING, "text that the tokenizer breaks up", "its letters are outside of the tokenizer's "
                   "vocabulary and cost several tokens each; transliterate, or expect late text"),
    "no text prompt": Kind(WARNING, "no text prompt", "give one (annotate.py --personaplex --text-prompt ...) or set "
                           "prompt.text for all"),
    "no voice prompt": Kind(WARNING, "no voice prompt", "give one (annotate.py --personaplex --voice-prompt ...) or "
                            "set prompt.voice for all, e.g. to same_speaker"),
    "half wrapped": Kind(WARNING, f"text prompt with stray {SYSTEM_TAG} tags",
                         f"take the tags out, or write {SYSTEM_TAG} "
                         "at both ends; the closing tag has no slash"),
    "own voice": Kind(WARNING, "the recording itself is its voice prompt", "the model can copy: same_speaker takes a "
                      "stretch outside of the window"),
    "no stretch": Kind(WARNING, "same_speaker finds no speech", "it needs a second of the agent outside of the window; "
                       "give a voice file"),
    "duplicate": Kind(WARNING, "the same audio twice", "take one line out, unless it shall count twice"),
    "shared json": Kind(WARNING, "two files share one .json", "rename one of them"),
    "leak": Kind(WARNING, "held-out audio is in the training data", "take it out of one of them: the evaluation would "
                 "measure memory"),
    "unheard": Kind(NOTE, "codes whose audio cannot be heard", "nothing: training needs the codes only; levels were "
                    "not checked"),
    "unwrapped": Kind(NOTE, f"text prompt without {SYSTEM_TAG} tags", "nothing: it is wrapped automatically"),
}  # fmt: skip


class Problem(NamedTuple):
    kind: str  # of KINDS
    place: str  # manifest:line
    detail: str  # one sentence that names the file


# Kinds for which a file's windows cannot be read in training, so that they are skipped, or never counted.
SKIPPED = {
    "missing", "unreadable", "channels", "no words file", "bad words file", "codes", "prompt", "voice", "failed",
}  # fmt: skip
