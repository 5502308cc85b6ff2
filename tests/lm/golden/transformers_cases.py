"""Checkpoints and outputs of transformers, and whether transformers reads what kdjax writes.

    python transformers_cases.py make FOLDER     # writes the cases; needs torch and transformers
    python transformers_cases.py write FOLDER    # writes checkpoints of kdjax; needs kdjax
    python transformers_cases.py check FOLDER    # loads those; needs torch and transformers

No environment needs all three libraries, and the project's tests need neither torch nor
transformers: they read the files of ``make``, which lie beside this script. These were made with
torch 2.15.0 (CPU, one thread) and transformers 5.23.0.

``NAME.npz`` belongs to the checkpoint in the folder ``NAME`` and holds, of each case,
``CASE/in/ARGUMENT``, ``CASE/out/OUTPUT`` and, where the model consists of some of the checkpoint's
layers, ``CASE/layers``. ``scores`` are the scaled products of queries and keys, before mask and
softmax. Outputs at positions with mask 0 mean nothing.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
VOCABULARY = 40
TEXT = "Hello, World! A student of three layers."
OUTPUTS = {  # of transformers, and what they are called here
    "logits": "logits",
    "prediction_logits": "logits",
    "seq_relationship_logits": "next_sentence",
}
AUTO = {
    "Model": "AutoModel",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForPreTraining": "AutoModelForPreTraining",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "LMHeadModel": "AutoModelForCausalLM",
}
BERT = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 20, "max_position_embeddings": 12,
}  # fmt: skip
DISTILBERT = {
    "vocab_size": VOCABULARY, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 20,
    "max_position_embeddings": 12,
}  # fmt: skip
GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 12,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def labels(count):
    names = {i: f"class {i}" for i in range(count)}
    return {"id2label": names, "label2id": {name: i for i, name in names.items()}}


# Name: class, changes to the config, cases.
CHECKPOINTS = {
    "bert_span": ("BertForQuestionAnswering", {"hidden_act": "quick_gelu"}, ("types",)),
    "bert_token": (
        "BertForTokenClassification",
        {"hidden_act": "relu", "num_hidden_layers": 3, "layer_norm_eps": 1e-5, **labels(5)},
        ("types", "nomask", "taken"),
    ),
    "bert_pretraining": ("BertForPreTraining", {}, ("types", "left")),
    "bert_mlm_untied": (
        "BertForMaskedLM",
        {"tie_word_embeddings": False},
        ("right",),
    ),
    "bert_mlm_gelu_new": ("BertForMaskedLM", {"hidden_act": "gelu_new"}, ("right",)),
    "bert_sharded": ("BertForSequenceClassification", labels(3), ("types",)),
    "distilbert_base": ("DistilBertModel", {}, ("right", "nomask")),
    "distilbert_mlm": ("DistilBertForMaskedLM", {"n_layers": 3}, ("right", "taken")),
    "distilbert_seqcls": ("DistilBertForSequenceClassification", labels(3), ("right", "nomask")),
    "distilbert_token": ("DistilBertForTokenClassification", labels(3), ("right",)),
    "distilbert_span": ("DistilBertForQuestionAnswering", {}, ("right",)),
    "gpt2_scaled_by_layer": (
        "GPT2LMHeadModel",
        {"scale_attn_by_inverse_layer_idx": True, "n_inner": 24, "n_layer": 3},
        ("right", "left_positions", "taken"),
    ),
    "gpt2_unscaled": (
        "GPT2LMHeadModel",
        {"scale_attn_weights": False, "activation_function": "silu", "n_head": 4},
        ("right",),
    ),
    "gpt2_base": ("GPT2Model", {"layer_norm_epsilon": 1e-3}, ("right", "left")),
    "gpt2_untied": (
        "GPT2LMHeadModel",
        {"tie_word_embeddings": False, "reorder_and_upcast_attn": True},
        ("right",),
    ),
    "gpt2_seqcls_padded": (
        "GPT2ForSequenceClassification",
        {"pad_token_id": 3, **labels(3)},
        ("right", "left"),
    ),
    "gpt2_seqcls_unpadded": ("GPT2ForSequenceClassification", labels(3), ("single",)),
    "gpt2_bfloat16": ("GPT2LMHeadModel", {}, ("right",)),
}
UNUSED = {"bert_mlm_untied": ("cls.predictions.bias",)}  # the forward pass uses decoder.bias


# make


def make(folder):
    """Writes checkpoints and outputs."""
    import torch
    import transformers

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.disable_progress_bar()
    for seed, (name, (kind, changes, cases)) in enumerate(CHECKPOINTS.items(), 100):
        where = folder / name
        model = drawn(kind, changes, seed)
        if name == "gpt2_bfloat16":
            model = model.to(torch.bfloat16)
        size = "12KB" if name == "bert_sharded" else "1GB"
        model.save_pretrained(where, max_shard_size=size)
        for file in where.iterdir():
            file.chmod(0o644)  # safetensors writes files that only their owner can read
        model = getattr(transformers, kind).from_pretrained(where, dtype=torch.float32).eval()
        stored = {}
        for case in cases:
            inputs = case_inputs(case, model.config)
            layers = np.array([2, 0]) if case == "taken" else None
            outputs = run(model if layers is None else with_layers(model, layers), inputs)
            stored |= {f"{case}/in/{key}": value for key, value in inputs.items()}
            stored |= {f"{case}/out/{key}": value for key, value in outputs.items()}
            if layers is not None:
                stored[f"{case}/layers"] = layers
        np.savez_compressed(folder / f"{name}.npz", **stored)
        every_tensor_matters(name, model, case_inputs(cases[0], model.config))
        print(f"{name}: {', '.join(cases)}")
    points = torch.linspace(-6, 6, 97)
    names = ["gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"]
    names += ["gelu_python_tanh", "gelu_accurate", "quick_gelu", "relu", "silu", "swish", "tanh"]
    found = {name: transformers.activations.ACT2FN[name](points).numpy() for name in names}
    np.savez_compressed(folder / "activations.npz", x=points.numpy(), **found)


def drawn(kind, changes, seed):
    """A model with parameters large enough that each one matters."""
    import torch
    import transformers

    base, config = next(
        (base, config)
        for start, base, config in (
            ("Bert", BERT, transformers.BertConfig),
            ("DistilBert", DISTILBERT, transformers.DistilBertConfig),
            ("GPT2", GPT2, transformers.GPT2Config),
        )
        if kind.startswith(start)
    )
    model = getattr(transformers, kind)(config(**base | changes))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=random)
            if name.endswith("bias"):
                noise = 0.1 * noise
            elif "norm" in name.lower() or ".ln_" in f".{name}":
                noise = 1 + 0.1 * noise
            else:
                noise = 0.3 * noise
            value.copy_(noise)
    return model.eval()


def case_inputs(case, config):
    """Arguments of a case, from the case's name and the config alone."""
    random = np.random.default_rng(7)
    rows, columns = (1, 8) if case == "single" else (3, 9)
    ids = random.integers(4, VOCABULARY, (rows, columns))
    inputs = {"input_ids": ids}
    if case not in ("nomask", "single"):
        lengths = np.array([9, 6, 2])[:, None]
        mask = np.arange(columns) < lengths
        if case.startswith("left"):
            mask = mask[:, ::-1]
        ids[~mask] = config.pad_token_id or 0
        inputs["attention_mask"] = mask.astype(np.int64)
        if case == "left_positions":
            inputs["position_ids"] = np.maximum(mask.cumsum(1) - 1, 0)
    if case == "types":
        inputs["token_type_ids"] = (np.arange(columns) >= 3).astype(np.int64) * np.ones_like(ids)
    return {name: value.astype(np.int32) for name, value in inputs.items()}


def run(model, inputs):
    """What the model computes with its own eager attention, and the scores in it."""
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    scores = []

    def attention(module, query, key, value, mask, scaling=None, **_):
        scores.append(query @ key.transpose(-1, -2) * scaling)
        masked = scores[-1] if mask is None else scores[-1] + mask
        weights = masked.softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    AttentionInterface.register("recorded", attention)
    AttentionMaskInterface.register("recorded", eager_mask)
    tensors = {name: torch.from_numpy(value).long() for name, value in inputs.items()}
    with torch.no_grad():
        model.set_attn_implementation("recorded")
        model(**tensors)
        model.set_attn_implementation("eager")
        out = model(**tensors, output_hidden_states=True, output_attentions=True)
    found = {"hidden": torch.stack(out.hidden_states), "scores": torch.stack(scores)}
    found |= {ours: out[name] for name, ours in OUTPUTS.items() if out.get(name) is not None}
    if getattr(model.base_model, "pooler", None) is not None:
        found["pooled"] = model.base_model.pooler(out.hidden_states[-1]).detach()
    if "start_logits" in out:
        found["logits"] = torch.stack([out.start_logits, out.end_logits], -1)
    # The recorded scores are those that its own attention came from.
    real = tensors.get("attention_mask", torch.ones_like(tensors["input_ids"])).bool()
    allowed = real[:, None, None, :]
    if model.config.model_type == "gpt2":
        allowed = allowed & torch.ones(real.shape[1], real.shape[1]).tril().bool()
    weights = found["scores"].masked_fill(~allowed, -torch.inf).softmax(-1)
    apart = (weights - torch.stack(out.attentions)).movedim(2, 3)[:, real].abs().max()
    assert apart < 1e-6, apart
    return {name: value.float().numpy() for name, value in found.items()}


def with_layers(model, layers):
    """Another model of the same class whose layers are some of this one's."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(layers)  # transformers maps the name of GPT-2 and DistilBERT
    small = type(model)(config)
    taken = {}
    for name, value in model.state_dict().items():
        stem, found, rest = next(
            (name.partition(part) for part in (".layer.", ".h.") if part in name), (name, "", "")
        )
        if not found:
            taken[name] = value
            continue
        index, _, rest = rest.partition(".")
        taken |= {
            f"{stem}{found}{i}.{rest}": value
            for i, layer in enumerate(layers)
            if int(index) == layer
        }
    small.load_state_dict(taken)
    return small.eval()


def every_tensor_matters(name, model, inputs):
    """A reader that drops or swaps a tensor can't agree with the stored outputs."""
    import torch

    def flat():
        mask = inputs.get("attention_mask", np.ones_like(inputs["input_ids"])).astype(bool)
        found = run(model, inputs)
        found["scores"] = np.moveaxis(found["scores"], 2, 3)
        parts = [found.pop(key)[:, mask] for key in ("hidden", "scores")]
        parts += [value[mask] if value.ndim == 3 else value for value in found.values()]
        return np.concatenate([part.ravel() for part in parts])

    before = flat()
    random = torch.Generator().manual_seed(0)
    for tensor, value in model.named_parameters():
        kept = value.detach().clone()
        with torch.no_grad():
            value.add_(0.05 * torch.randn(value.shape, generator=random))
        change = np.abs(flat() - before).max()
        assert (change > 3e-3) == (tensor not in UNUSED.get(name, ())), (name, tensor, change)
        with torch.no_grad():
            value.copy_(kept)


# write


def write(folder):
    """Checkpoints of kdjax, its outputs beside them: what is in the cases, students, new models."""
    import jax

    from kdjax import lm

    jax.config.update("jax_default_matmul_precision", "highest")
    stored = sorted(file.parent.name for file in HERE.glob("*/config.json"))
    models = {}
    for name in stored:
        config, params = lm.load_checkpoint(HERE / name)
        models[name] = config, params
        layers = (config.num_layers - 1, 0)
        models[f"{name}_student"] = lm.take_layers(config, params, layers)
    for name, config in new_configs(lm).items():
        params, _ = lm.model(config).init(jax.random.key(0))
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        pairs = zip(keys, leaves, strict=True)
        leaves = [x + 0.2 * jax.random.normal(key, x.shape) for key, x in pairs]
        models[name] = config, jax.tree.unflatten(tree, leaves)
    heads = {
        ("bert_mlm", "sequence", 3), ("bert_mlm", "token", 4), ("bert_mlm", "span", None),
        ("bert_mlm", "pretraining", None), ("bert_mlm", None, None), ("bert_base", "masked_lm", 2),
        ("bert_seqcls", "sequence", 7), ("distilbert_mlm", "sequence", 1),
        ("distilbert_base", "masked_lm", None), ("distilbert_mlm", None, None),
        ("gpt2_lm", "sequence", 3), ("gpt2_lm", None, None), ("gpt2_base", "lm", None),
    }  # fmt: skip
    for name, head, count in heads:
        models[f"{name}_as_{head}"] = lm.load_checkpoint(
            HERE / name, head=head, num_labels=count, key=jax.random.key(2)
        )
    for dtype in ("bfloat16", "float16"):
        config, params = models["distilbert_seqcls"]
        half = jax.tree.map(lambda x: x.astype(dtype), params)  # noqa: B023
        models[f"distilbert_seqcls_{dtype}"] = config, half
    for name, (config, params) in models.items():
        write_one(lm, folder / name, config, params)
    print(f"{len(models)} checkpoints")


def new_configs(lm):
    """Models that no stored checkpoint is like."""
    small = {"vocab_size": 320, "hidden_size": 12, "num_layers": 2, "num_heads": 3}
    bert = {**small, "intermediate_size": 10, "max_positions": 12}
    body = {**bert, "pooler": False}
    distil = {**body, "token_types": 0, "distil": True}
    gpt2 = {**small, "max_positions": 12}
    found = {
        "new_bert_untied_pretraining": lm.BertConfig(**bert, head="pretraining", tied=False),
        "new_bert_untied_mlm": lm.BertConfig(**body, head="masked_lm", tied=False),
        "new_bert_one_type": lm.BertConfig(**{**bert, "token_types": 1}, head="sequence"),
        "new_bert_no_pad": lm.BertConfig(**bert, head="sequence", num_labels=1, pad_token=None),
        "new_distilbert_untied": lm.BertConfig(**distil, head="masked_lm", tied=False),
        "new_distilbert_regression": lm.BertConfig(**distil, head="sequence", num_labels=1),
        "new_gpt2_sequence": lm.GPT2Config(**gpt2, head="sequence", num_labels=3, pad_token=0),
        "new_gpt2_untied": lm.GPT2Config(**gpt2, tied=False, scale_attention=False),
        "new_gpt2_inner": lm.GPT2Config(**gpt2, intermediate_size=20, scale_by_layer=True),
        "new_gpt2_one_head": lm.GPT2Config(**{**gpt2, "num_heads": 1}, head=None),
    }
    for head in (None, "masked_lm", "pretraining", "sequence", "token", "span"):
        pooler = head in (None, "pretraining", "sequence")
        config = lm.BertConfig(**{**body, "pooler": pooler}, head=head, num_labels=3)
        found[f"new_bert_{head}"] = config
        if head != "pretraining":
            found[f"new_distilbert_{head}"] = lm.BertConfig(**distil, head=head, num_labels=3)
    return found


def write_one(lm, folder, config, params):
    import jax

    tokenizer = HERE / ("gpt2_lm" if isinstance(config, lm.GPT2Config) else "bert_seqcls")
    lm.save_checkpoint(folder, config, params, tokenizer=tokenizer)
    random = np.random.default_rng(3)
    single = isinstance(config, lm.GPT2Config) and config.head == "sequence"
    single = single and config.pad_token is None
    ids = random.integers(4, min(config.vocab_size, 300), (1 if single else 3, 9))
    inputs = {"input_ids": ids}
    if not single:
        mask = np.arange(9) < np.array([9, 5, 1])[:, None]
        ids[~mask] = config.pad_token or 0
        inputs["attention_mask"] = mask.astype(np.int64)
    if getattr(config, "token_types", 0) > 1:
        inputs["token_type_ids"] = random.integers(0, 2, ids.shape)
    full = jax.tree.map(lambda x: x.astype("float32"), params)
    found, _ = lm.model(config).apply(full, {}, inputs)
    found = {name: np.stack(value) for name, value in found.items()}
    tokens = lm.load_tokenizer(folder).encode(TEXT).ids
    np.savez(
        folder / "outputs.npz",
        tokens=tokens,
        **{f"in/{name}": value for name, value in inputs.items()},
        **{f"out/{name}": value for name, value in found.items()},
    )


# check

WARNINGS: list[str] = []  # of transformers


def check(folder):
    """Loads what ``write`` wrote: no warnings, every bit, the same outputs and tokens."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: WARNINGS.append(record.getMessage())
    transformers.utils.logging.get_logger("transformers").addHandler(handler)
    worst, bad = {}, []
    files = sorted(folder.glob("*/outputs.npz"))
    for file in files:
        problems, errors = check_one(file)
        problems += WARNINGS
        WARNINGS.clear()
        for name, value in errors.items():
            worst[name] = max(value, worst.get(name, (0, "")))
        print(f"{file.parent.name}: " + ", ".join(f"{k} {v[0]:.1e}" for k, v in errors.items()))
        bad += [f"{file.parent.name}: {problem}" for problem in problems]
    for name, (value, where) in worst.items():
        print(f"largest difference of {name}: {value:.2e} ({where})")
    print(f"{len(files)} checkpoints, {len(bad)} problems", *bad, sep="\n")
    return 1 if bad or not files else 0


def check_one(file):
    import torch
    import transformers
    from safetensors.torch import load_file

    folder = file.parent
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    ending = next(end for end in sorted(AUTO, key=len)[::-1] if architecture.endswith(end))
    auto = getattr(transformers, AUTO[ending])
    model, info = auto.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    written = load_file(folder / "model.safetensors")
    if architecture == "BertModel" and "pooler.dense.weight" not in written:
        # transformers makes a new one and says so.
        info["missing_keys"] -= {"pooler.dense.weight", "pooler.dense.bias"}
        model.pooler = None
        WARNINGS.clear()
    problems = [f"{kind}: {names}" for kind, names in info.items() if names]
    if type(model).__name__ != architecture:
        problems.append(f"{type(model).__name__} instead of {architecture}")
    seen = list(WARNINGS)
    kept = auto.from_pretrained(folder)
    WARNINGS[:] = seen  # the same ones again
    state = kept.state_dict()
    problems += [
        f"{name} has other bits"
        for name, value in written.items()
        if name not in state or not torch.equal(state[name], value)
    ]
    kept.save_pretrained(folder / "again")
    again = load_file(folder / "again" / "model.safetensors")
    new = {
        name for name in again if name.startswith("pooler.") and getattr(model, "pooler", 0) is None
    }
    if sorted(set(again) - new) != sorted(written):
        problems.append(f"it writes other tensors: {sorted(set(again) ^ set(written))}")
    with np.load(file) as stored:
        inputs = {key[3:]: stored[key] for key in stored.files if key.startswith("in/")}
        wanted = {key[4:]: stored[key] for key in stored.files if key.startswith("out/")}
        tokens = stored["tokens"].tolist()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if tokenizer(TEXT)["input_ids"] != tokens:
        problems.append(f"tokens {tokenizer(TEXT)['input_ids']}, not {tokens}")
    found = run(model.eval(), inputs)
    if sorted(found) != sorted(wanted):
        problems.append(f"outputs {sorted(found)}, not {sorted(wanted)}")
    real = inputs.get("attention_mask", np.ones_like(inputs["input_ids"])).astype(bool)
    errors = {}
    for name in sorted(set(found) & set(wanted)):
        ours, theirs = wanted[name], found[name]
        if name == "scores":
            ours, theirs = np.moveaxis(ours, 2, 3), np.moveaxis(theirs, 2, 3)
        if name in ("hidden", "scores"):
            ours, theirs = ours[:, real], theirs[:, real]
        elif ours.ndim == 3:
            ours, theirs = ours[real], theirs[real]
        errors[name] = float(np.abs(ours - theirs).max()), folder.name
        if not np.allclose(ours, theirs, atol=1e-5, rtol=1e-5):
            problems.append(f"{name} differ by {errors[name][0]:.1e}")
    return problems, errors


if __name__ == "__main__":
    verbs = {"make": make, "write": write, "check": check}
    if len(sys.argv) != 3 or sys.argv[1] not in verbs:
        sys.exit(__doc__)
    sys.exit(verbs[sys.argv[1]](Path(sys.argv[2])))
