"""What can be wrong with a data set, and what to do about it."""

from typing import NamedTuple

from finetune.prompts.text import SYSTEM_TAG

ERROR, WARNING, NOTE = "error", "warning", "note"
_DIARISE = "a diarisation tool (pyannote.audio, NVIDIA NeMo)"
_NO_PROMPTS = "(train.py reads no prompts: check with --no-personaplex)"


class Kind(NamedTuple):
    level: str
    title: str
    remedy: str


class Problem(NamedTuple):
    kind: str  # of KINDS
    place: str  # manifest:line
    detail: str  # one sentence that names the file


KINDS = {
    "line": Kind(ERROR, "broken manifest line", 'write {"path": ..., "duration": seconds} on each line, as '
                 "make_manifest does"),
    "mixed": Kind(ERROR, "lines with and without codes", "run precompute_codes.py on all files, or use none"),
    "missing": Kind(ERROR, "missing audio", "put the file there, or leave the line out of the manifest"),
    "unreadable": Kind(ERROR, "unreadable audio", "export it again as wav or flac"),
    "channels": Kind(ERROR, "not stereo", "left is the agent, right the user: make_manifest joins two mono files; a "
                     f"recording with both voices in one channel needs {_DIARISE} first"),
    "same channels": Kind(ERROR, "the same sound in both channels", "this is a mono recording: get both sides as "
                          f"separate channels, or separate the speakers with {_DIARISE}"),
    "swapped": Kind(ERROR, "channels swapped: the agent's words are loud on the right", "training takes the left "
                    "channel as the agent: swap them (sox in.wav out.wav remix 2 1); if left is the agent already, "
                    "these are the user's words: annotate the left channel (annotate.py --channel 0)"),
    "duration": Kind(ERROR, "duration that costs windows", "write the duration that make_manifest finds"),
    "no words file": Kind(ERROR, "missing word times", "run annotate.py on the manifest"),
    "bad words file": Kind(ERROR, "word times that cannot be read", "repair the .json, or move it away and run "
                           "annotate.py again"),
    "past the end": Kind(ERROR, "words after the end of the audio", "the .json belongs to another version of the file: "
                         "correct the times, or move it away and run annotate.py again"),
    "crowded": Kind(ERROR, "tokens dropped: words come faster than 12.5 tokens per second", "look at these word times "
                    "(often Whisper squeezed words together): correct them, or annotate again"),
    "no agent": Kind(ERROR, "no words of the agent in any file", "set data.speakers to the label of the agent's words"),
    "prompt": Kind(ERROR, "prompt that cannot be used", "write a string that fits: shorten it, or raise "
                   f"prompt.max_sec {_NO_PROMPTS}"),
    "voice": Kind(ERROR, "voice that cannot be used", "put the file there, set prompt.voices_dir or, for same_speaker, "
                  f"run precompute_codes.py --same-speaker {_NO_PROMPTS}"),
    "codes": Kind(ERROR, "codes that cannot be used", "run precompute_codes.py again"),
    "failed": Kind(ERROR, "file that could not be checked", "look at it; training may stop there"),
    "off": Kind(WARNING, "inexact duration", "write the duration that make_manifest finds"),
    "clipping": Kind(WARNING, "clipped audio", "record or export at a lower level; Mimi encodes the distortion"),
    "silent agent": Kind(WARNING, "agent (left) silent", "teaches the agent to say nothing; is the channel right?"),
    "silent user": Kind(WARNING, "user (right) silent", "teaches the agent to talk alone; is the channel right?"),
    "bleeding": Kind(WARNING, "each channel contains the other speaker", "training needs them apart: was it a stereo "
                     "microphone, or were there loudspeakers next to an open one?"),
    "no words": Kind(WARNING, "no words of the agent", "the text stream would be padding; if the agent speaks there, "
                     "annotate again or check data.speakers"),
    "unsorted": Kind(WARNING, "word times out of order", "nothing: they are sorted when read"),
    "odd times": Kind(WARNING, "odd word times", "they start before the file, end before they start, or end after the "
                      "audio; annotate again if there are many"),
    "late": Kind(WARNING, "late text: words come faster than 12.5 tokens per second", "the text trails the voice "
                 "there; look at these word times"),
    "truncated": Kind(WARNING, "truncated words, because data.keep_and_shift is off", "set data.keep_and_shift to "
                      "true"),
    "script": Kind(WARNING, "letters outside of the tokenizer's vocabulary", "each costs several tokens: transliterate "
                   "the text, or expect it to be late"),
    "no text prompt": Kind(WARNING, "no text prompt", "give one (annotate.py --personaplex --text-prompt ...) or set "
                           "prompt.text for all"),
    "no voice prompt": Kind(WARNING, "no voice prompt", "give one (annotate.py --personaplex --voice-prompt ...) or "
                            "set prompt.voice for all, e.g. to same_speaker"),
    "half wrapped": Kind(WARNING, f"text prompt with stray {SYSTEM_TAG} tags", f"write {SYSTEM_TAG} at both ends (the "
                         "closing tag has no slash), or leave the tags out"),
    "own voice": Kind(WARNING, "the recording itself is its voice prompt", "the model can copy it: same_speaker takes "
                      "a segment outside of the window"),
    "no segment": Kind(WARNING, "same_speaker finds no speech", "it needs a second of the agent outside of the window; "
                       "give a voice file"),
    "duplicate": Kind(WARNING, "the same audio twice", "keep one of the lines, unless the audio should count twice"),
    "shared json": Kind(WARNING, "two files share one .json", "rename one of the audio files"),
    "leak": Kind(WARNING, "held-out audio is in the training data", "keep it in one of them only: otherwise the "
                 "evaluation measures memory"),
    "codes only": Kind(NOTE, "codes whose audio cannot be read", "nothing: training needs the codes only; the levels "
                       "were not checked"),
    "unwrapped": Kind(NOTE, f"text prompt without {SYSTEM_TAG} tags", "nothing: it is wrapped automatically"),
}  # fmt: skip

# Kinds of problems with which training cannot read any window of a file: it skips them, or does not start.
UNREADABLE = {
    "missing", "unreadable", "channels", "no words file", "bad words file", "codes", "prompt", "voice", "failed",
}  # fmt: skip
