"""What a check finds: the kinds of problems and what to do about them, and the facts about each file."""

import os
from dataclasses import dataclass, field
from typing import NamedTuple

from finetune.audio.agreement import Agreement
from finetune.data.batch import TextStats
from finetune.data.manifest import Line
from finetune.data.voice_supply import VoiceSource
from finetune.prompts.text import SYSTEM_TAG

_DIARISE = "a diarisation tool (pyannote.audio, NVIDIA NeMo)"
_ANNOTATE = "annotate.py --personaplex"
_NO_PROMPTS = "(train.py reads no prompts: check with --no-personaplex)"

KINDS = {  # {level: {kind: (title, remedy)}}
    "error": {
        "line": ("broken manifest line", 'write {"path": ..., "duration": seconds} on each line, as make_manifest '
                 "does"),
        "mixed": ("lines with and without codes", "run precompute_codes.py on all files, or use none"),
        "missing": ("missing audio", "put the file there, or leave the line out of the manifest"),
        "unreadable": ("unreadable audio", "export it again as wav or flac"),
        "channels": ("not stereo", "left is the agent, right the user: make_manifest joins two mono files; a recording "
                     f"with both voices in one channel needs {_DIARISE} first"),
        "same channels": ("the same sound in both channels", "this is a mono recording: get both sides as separate "
                          f"channels, or separate the speakers with {_DIARISE}"),
        "swapped": ("channels swapped: the agent's words are on the right", "training takes the left channel as "
                    "the agent: swap them (sox in.wav out.wav remix 2 1); if left is the agent already, these are the "
                    "user's words: annotate the left channel (annotate.py --channel 0)"),
        "duration": ("duration that costs windows", "write the duration that make_manifest finds"),
        "no words file": ("missing word times", "run annotate.py on the manifest"),
        "bad words file": ("word times that cannot be read", "repair the .json, or move it away and run annotate.py "
                           "again"),
        "past the end": ("words after the end of the audio", "the .json belongs to another version of the file: "
                         "correct the times, or move it away and run annotate.py again"),
        "crowded": ("tokens dropped: words come faster than 12.5 tokens per second", "look at these word times (often "
                    "Whisper squeezed words together): correct them, or annotate again"),
        "no agent": ("no words of the agent in any file", "set data.speakers to the label of the agent's words"),
        "prompt": ("prompt that cannot be used", "write a string that fits: shorten it, or raise prompt.max_sec "
                   f"{_NO_PROMPTS}"),
        "voice": ("voice that cannot be used", "put the file there, set prompt.voices_dir or, for same_speaker, run "
                  f"precompute_codes.py --same-speaker {_NO_PROMPTS}"),
        "no voice": ("windows without a voice: training does not start", "choose one of these settings"),
        "codes": ("codes that cannot be used", "run precompute_codes.py again"),
        "failed": ("file that could not be checked", "look at it; training may stop there"),
    },
    "warning": {
        "off": ("inexact duration", "write the duration that make_manifest finds"),
        "clipping": ("clipped audio", "record or export at a lower level; Mimi encodes the distortion"),
        "silent agent": ("agent (left) silent", "teaches the agent to say nothing; is the channel right?"),
        "silent user": ("user (right) silent", "teaches the agent to talk alone; is the channel right?"),
        "bleeding": ("each channel contains the other speaker", "training needs them apart: was it a stereo "
                     "microphone, or were there loudspeakers next to an open one?"),
        "shifted": ("words shifted in time", "the text would be early or late by as much: correct the times of the "
                    ".json, or move it away and run annotate.py again"),
        "part swapped": ("channels swapped for a part of the call, or words of the user among the agent's", "listen to "
                         "that part: swap the channels there, or correct the speakers in the .json"),
        "one label": ("words of both speakers under the agent's label", "the agent would be trained to say the user's "
                      "words: label them by speaker, or annotate the left channel alone (annotate.py --channel 0)"),
        "misplaced": ("words where nobody speaks", "the times are not those of this recording: correct them, or move "
                      "the .json away and run annotate.py again"),
        "few words": ("speech of the agent without words", "the agent would be trained to speak without text there: "
                      "transcribe the rest, or leave the file out"),
        "sentences": ("several words in one entry", "the tokens of an entry follow its start at 12.5 per second, "
                      "whenever they are said: give the time of each word (annotate.py does)"),
        "unsure": ("words dropped by annotate.py because Whisper was unsure", "a model that does not know the language "
                   "does this: annotate again with --lang, or with a --whisper-model without .en"),
        "tags": ("tags of transcribers, trained as if they were said", "set data.drop_tags to true"),
        "epochs": ("many passes over the same data", "lower max_steps or add data: the model learns them by heart, and "
                   "the held-out loss rises"),
        "no words": ("no words of the agent", "the text stream would be padding; if the agent speaks there, annotate "
                     "again or check data.speakers"),
        "unsorted": ("word times out of order", "nothing: they are sorted when read"),
        "odd times": ("odd word times", "they start before the file, end before they start, or end after the audio; "
                      "annotate again if there are many"),
        "late": ("late text: words come faster than 12.5 tokens per second", "the text trails the voice there; look at "
                 "these word times"),
        "truncated": ("truncated words, because data.keep_and_shift is off", "set data.keep_and_shift to true"),
        "script": ("letters outside of the tokenizer's vocabulary", "each costs several tokens: transliterate the "
                   "text, or expect it to be late"),
        "no text prompt": ("no text prompt, which no server starts without", f"give one ({_ANNOTATE} --text-prompt "
                           "...) or set prompt.text for all"),
        "no voice prompt": ("no voice prompt", f"give one ({_ANNOTATE} --voice-prompt ...) or set prompt.voice for "
                            "all, e.g. to same_speaker"),
        "half wrapped": (f"text prompt with stray {SYSTEM_TAG} tags", f"write {SYSTEM_TAG} at both ends (the closing "
                         "tag has no slash), or leave the tags out"),
        "own voice": ("the recording itself is its voice prompt", "the model can copy it: same_speaker takes a segment "
                      "outside of the window"),
        "no segment": ("same_speaker finds no voice", "it needs a second of the agent outside of the window, or in "
                       "another call of the same speaker; give a voice file, or an empty voice_prompt to do without"),
        "duplicate": ("the same audio twice", "keep one of the lines, unless the audio should count twice"),
        "shared json": ("two files share one .json", "rename one of the audio files"),
        "leak": ("held-out audio is in the training data", "keep it in one of them only: otherwise the evaluation "
                 "measures memory"),
    },
    "note": {
        "codes only": ("codes whose audio cannot be read", "nothing: training needs the codes only; the levels were "
                       "not checked"),
        "dropped tags": ("tags of transcribers", "nothing: they are left out; data.drop_tags: false trains them as "
                         "words"),
        "other language": ("another language than in most files", "listen to it: if the language is wrong, annotate it "
                           "again with --lang"),
        "unserved voice": ("voice that NVIDIA's runtime cannot load", "give the server a mono wav of it; training "
                           "takes the first channel"),
        "unwrapped": (f"text prompt without {SYSTEM_TAG} tags", "nothing: it is wrapped automatically"),
    },
}  # fmt: skip

# Problems with which training cannot read any window of a file: it skips them, or does not start.
UNREADABLE = {
    "missing", "unreadable", "channels", "no words file", "bad words file", "codes", "prompt", "voice", "failed",
}  # fmt: skip


class Problem(NamedTuple):
    kind: str
    place: str  # manifest:line
    detail: str  # one sentence that names the file


@dataclass
class FileFacts:
    """What is known about one line of a manifest; times in seconds. "Words" and "tokens" are the agent's."""

    held_out: bool
    source: int  # index of the manifest within train_data or eval_data
    line: Line
    windows: list[int]  # frames of dialogue of each; 0: training would skip it
    prompt_frames: list[int] = field(init=False)  # of each window
    voiceless: list[bool] = field(init=False)  # of each window: it has no voice prompt
    problems: list[Problem] = field(default_factory=list)
    real_sec: float | None = None  # can be decoded; None: nothing can
    words: int = 0
    tokens: int = 0
    labels: set[str] = field(default_factory=set)  # of all speakers
    language: str | None = None  # that annotate.py heard
    text: TextStats = field(default_factory=TextStats)  # over the windows
    densest: float = 0.0  # tokens per second in the window with most of them
    decoded_sec: float = 0.0  # of the audio that was checked
    talk_sec: tuple[float, float, float] = (0.0, 0.0, 0.0)  # agent, user, both at once
    agreement: Agreement | None = None  # of words and sound, if there are both
    gaps: list[float] = field(default_factory=list)  # see response_gaps
    digest: str | None = None  # of the checked audio: equal for equal sound in any container
    mimi: str | None = None  # fingerprint of the codec that made the codes
    prompt: str | None = None
    voice: str | None = None
    voices: VoiceSource | None = None  # what same_speaker can use

    def __post_init__(self):
        self.prompt_frames, self.voiceless = [0] * len(self.windows), [False] * len(self.windows)

    @property
    def place(self) -> str:
        return f"{self.line.manifest}:{self.line.number}"

    def add(self, kind: str, detail: str) -> None:
        """Add a problem, with the name of the file in front unless the sentence has it."""
        if os.path.splitext(self.line.path)[0] not in detail:
            detail = f"{self.line.path}: {detail}"
        self.problems.append(Problem(kind, self.place, " ".join(detail.split())))

    def has(self, *kinds: str) -> bool:
        return any(problem.kind in kinds for problem in self.problems)
