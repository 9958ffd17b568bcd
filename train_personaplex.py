"""Fine-tune PersonaPlex: Moshi with 16 depformer steps, and a voice and a role prompt before each window.

The assembly of a run is `run_training` in train.py.
"""

from finetune.cli import run_fire
from finetune.model.expansion import expand_moshiko_to_personaplex
from finetune.model.pretrained import PERSONAPLEX
from train import launch

__all__ = ["expand_moshiko_to_personaplex", "train_personaplex"]


def train_personaplex(config: str, *overrides: str) -> int:
    """Fine-tune PersonaPlex on recorded dialogues, each window after a voice prompt and a role prompt.

    torchrun train_personaplex.py config.yaml optim.lr=2e-6
    torchrun --nproc-per-node 8 train_personaplex.py config.yaml run_dir=runs/8gpus sharding=none

    A config needs at least data, a folder, and what is trained; prompts that the data do not name come from it too:

        data: {train_data: data/train.jsonl, eval_data: data/eval.jsonl}
        prompt: {text: "You enjoy having a good conversation.", voice: same_speaker}
        run_dir: runs/first
        lora: {enable: true}

    Starts from PersonaPlex weights, or from Moshi weights, which it expands from 8 to 16 codebooks.
    Reads the manifests data.train_data and data.eval_data, and a model from the hub or a folder (moshi_paths).
    Writes checkpoints, metrics and samples to run_dir. The same command continues a run that was stopped.

    Exit codes:
      0   the run is complete, or Ctrl-C stopped it after a step
      2   settings, data or model cannot be used; the last line says why
      3   the guard has ended it: guard.action is stop, or there were too many rollbacks
      75  a signal (SLURM's, say) stopped it after a saved step: run the same command again

    Args:
        config: YAML file of settings. All settings are listed below.
        overrides: Settings that replace those of the file, as key.subkey=value.
    """
    return launch(PERSONAPLEX, config, overrides)


if __name__ == "__main__":
    run_fire(train_personaplex)
