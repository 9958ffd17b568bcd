"""Print what became of the recordings."""

from pathlib import Path

from finetune.jobs.failures import show_list
from finetune.tools.make_manifest.diarisation import Separated, Separation
from finetune.tools.make_manifest.pairs import JoinedPair, Pair
from finetune.tools.make_manifest.recordings import RecordingInfo, Refusals


def print_summary(
    infos: dict[Path, RecordingInfo], joined: dict[Pair, JoinedPair], separated: dict[Separation, Separated],
    new: list[Path], known: list[Path], refused: Refusals,
) -> None:  # fmt: skip
    stereo = [path for path in new if path in infos]
    print(f"  {len(stereo):>6} new stereo files")
    print(f"  {sum(pair.target in new for pair in joined):>6} new pairs, joined into left (agent) and right (user)")
    if separated:
        spoken = sum(result.agent_sec + result.user_sec - result.both_sec for result in separated.values())
        both = sum(result.both_sec for result in separated.values())
        print(f"  {len(separated):>6} separated by their diarisations; both speak, and are heard on both sides, in "
              f"{both / max(spoken, 1e-9):.1%} of the speech")  # fmt: skip
    print(f"  {len(known):>6} files already in the manifests, kept")
    print(f"  {sum(map(len, refused.values())):>6} refused")
    notes = {
        "one side is longer than the other, which is padded with silence; do they start together?": [
            f"{pair.left}: by {result.difference_sec:.1f} s" for pair, result in joined.items()
            if result.difference_sec > 1
        ],
        "joined again because a side has changed, or separated again; move the old .json away and annotate again": [
            str(task.target) for task in (*joined, *separated) if task.target in known
        ],
        "both speak at once, in the separated recordings, so that each side has the other's voice too": [
            f"{task.recording}: for {result.both_sec:.1f} s of {result.agent_sec:.1f} s of the agent" for task, result
            in sorted(separated.items(), key=lambda item: -item[1].both_sec) if result.both_sec
        ],
        "a side is silent in the excerpts that were inspected": [
            f"{path}: {'left (agent)' if infos[path].silent[0] else 'right (user)'}" for path in stereo
            if any(infos[path].silent)
        ],
        "one speaker is heard in both channels; training needs them apart": [
            f"{path}: {infos[path].shared}" for path in stereo if infos[path].shared
        ] + [f"{pair.left}: {result.shared}" for pair, result in joined.items() if result.shared],
        "the header of a wav states another length than its sound has; the sound is used to its end": [
            f"{path}: {info.stated_sec:.1f} s in the header, {info.duration_sec:.1f} s of sound"
            for path, info in infos.items() if info.stated_sec is not None
        ],
        "in the manifest, but the file is missing": [str(path) for path in known if not path.exists()],
        **{f"refused: {reason}": rows for reason, rows in refused.items()},
    }  # fmt: skip
    for title, rows in notes.items():
        show_list(f"{len(rows)} x {title}", rows, limit=5)
