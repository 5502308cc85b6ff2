"""Transformers to distil: BERT, DistilBERT and GPT-2, from and to Hugging Face folders."""

from kdjax.lm._config import BertConfig, Config, GPT2Config
from kdjax.lm._folder import load_checkpoint, read_config, save_checkpoint
from kdjax.lm._fused import FusedKDParts, fused_linear_kd
from kdjax.lm._fused_term import fused_distillation
from kdjax.lm._generate import generate
from kdjax.lm._masking import mask_tokens
from kdjax.lm._model import model
from kdjax.lm._sampler import sampler
from kdjax.lm._take_layers import take_layers
from kdjax.lm._tokenizer import load_tokenizer
from kdjax.lm._word_replacement import input_vectors, replace_words

__all__ = [
    "BertConfig",
    "Config",
    "FusedKDParts",
    "GPT2Config",
    "fused_distillation",
    "fused_linear_kd",
    "generate",
    "input_vectors",
    "load_checkpoint",
    "load_tokenizer",
    "mask_tokens",
    "model",
    "read_config",
    "replace_words",
    "sampler",
    "save_checkpoint",
    "take_layers",
]
