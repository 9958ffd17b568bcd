"""A folder with a tiny Moshi in the layout of the published checkpoints."""

import io
import json
from pathlib import Path

import sentencepiece
import torch
from moshi.models.lm import LMModel
from safetensors.torch import save_file

from finetune.model.layout import fuse
from finetune.streams import TEXT_PAD
from finetune.tools.toy.language import NEUTRAL_WORDS, QUESTIONS, ROLES, expected_reply, greeting, text_prompt
from finetune.tools.toy.mimi import MIMI_CONFIG, make_mimi

_PIECES = 400  # of the tokenizer, 256 of them bytes: most words of the world are one to three pieces
# Moshi's settings (moshi/models/loaders.py, _lm_kwargs) with smaller numbers.
_LM_CONFIG = {
    "dim": 160, "n_q": 16, "dep_q": 8, "card": 2048, "existing_text_padding_id": TEXT_PAD, "num_heads": 5,
    "num_layers": 4, "hidden_scale": 4.125, "causal": True, "layer_scale": None, "context": 3000, "max_period": 10000,
    "gating": "silu", "norm": "rms_norm_f32", "positional_embedding": "rope", "depformer_dim": 64,
    "depformer_dim_feedforward": 264, "depformer_num_heads": 2, "depformer_num_layers": 2,
    "depformer_layer_scale": None, "depformer_multi_linear": True, "depformer_context": 8,
    "depformer_max_period": 10000, "depformer_gating": "silu", "depformer_pos_emb": "none",
    "depformer_weights_per_step": True, "delays": [0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1],
    "text_card": _PIECES,
}  # fmt: skip
_NAMES = {
    "moshi_name": "model.safetensors",
    "mimi_name": "mimi.safetensors",
    "mimi_config_name": "mimi_config.json",
    "tokenizer_name": "tokenizer.model",
}


def _make_tokenizer() -> bytes:
    sentences = [text_prompt(role) for role in ROLES] + [" ".join(greeting(role)) for role in ROLES]
    sentences += [" ".join(expected_reply(role, question)) for role in ROLES for question in QUESTIONS]
    sentences += [" ".join(words) for words in (*QUESTIONS.values(), NEUTRAL_WORDS)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, model_type="bpe", vocab_size=_PIECES,
        byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=TEXT_PAD, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def make_model(folder: Path, seed: int = 0, **overrides) -> Path:
    """Writes a tiny Moshi in stock layout to `folder` (made if needed) and returns it.

    The weights are bfloat16 in the fused layout of the published checkpoints; those of the LM are random by `seed`.
    `overrides` replace LM settings of _LM_CONFIG, e.g. `num_layers=1`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _NAMES["tokenizer_name"]).write_bytes(_make_tokenizer())
    save_file(make_mimi(seed).state_dict(), folder / _NAMES["mimi_name"])
    (folder / _NAMES["mimi_config_name"]).write_text(json.dumps(MIMI_CONFIG, indent=2) + "\n")

    config = _LM_CONFIG | overrides
    torch.manual_seed(seed)
    lm = LMModel(dtype=torch.bfloat16, **config)
    save_file(fuse(lm.state_dict(), config["dep_q"]), folder / _NAMES["moshi_name"])
    config |= {"model_type": "moshi", **_NAMES}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder
