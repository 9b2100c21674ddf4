"""Tiny sharp models, a tokenizer, a sentence encoder and tasks, all random or written out here."""

import copy
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from icrouting.decoder.families import dims_of
from icrouting.routing.pids import PIDs
from icrouting.routing.router import Routing
from icrouting.tasks.task import Example, Task, TaskSpec

VOCAB = 311
# Every axis has a size of its own, so that swapped axes cannot pass.
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 42,
    "intermediate_size": 52,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "max_position_embeddings": 512,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES | {"head_dim": 8, "hidden_size": 48, "num_key_value_heads": 2}),
    "gemma3": Gemma3TextConfig(
        **SIZES,
        sliding_window=7,
        query_pre_attn_scalar=13,
        tie_word_embeddings=False,
        layer_types=["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
    ),
}

# Families whose heads share the hidden size out among them.
_SHARED = {name: size for name, size in SIZES.items() if name != "head_dim"} | {
    "num_key_value_heads": 6
}
# The experts' kernel wants rows of a multiple of 16 bytes.
_EXPERTS = SIZES | {
    "hidden_size": 48,
    "intermediate_size": 56,
    "moe_intermediate_size": 40,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
}

# Every row of the family table.
ALL_CONFIGS: dict[str, PretrainedConfig] = CONFIGS | {
    "mistral": MistralConfig(**SIZES, sliding_window=7),
    "mixtral": MixtralConfig(**_EXPERTS, sliding_window=7),
    "qwen3": Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=7, max_window_layers=2),
    "qwen3_moe": Qwen3MoeConfig(**_EXPERTS, norm_topk_prob=True),
    "gemma2": Gemma2Config(
        **SIZES,
        sliding_window=7,
        query_pre_attn_scalar=13,
        attn_logit_softcapping=5.0,
        tie_word_embeddings=False,
    ),
    "phi": PhiConfig(
        **_SHARED | {"hidden_size": 60, "num_key_value_heads": 3, "partial_rotary_factor": 0.4}
    ),
    "phi3": Phi3Config(**SIZES, partial_rotary_factor=0.6),
    "olmo2": Olmo2Config(**SIZES),
    "granite": GraniteConfig(**SIZES, attention_multiplier=0.23, residual_multiplier=0.7),
    "gpt_neox": GPTNeoXConfig(**_SHARED | {"hidden_size": 60}, rotary_pct=0.4),
    "gpt2": GPT2Config(**_SHARED, scale_attn_by_inverse_layer_idx=True),
    "opt": OPTConfig(**_SHARED, ffn_dim=52, word_embed_proj_dim=38, tie_word_embeddings=False),
}


def model(family: str, kernel: str = "sdpa", seed: int = 0) -> PreTrainedModel:
    """A tiny model of a family."""
    return sharp(ALL_CONFIGS[family], kernel, seed, embed_std=0.4 if family == "gemma3" else 1.0)


def model_of(family: str, seed: int = 0) -> PreTrainedModel:
    """A tiny model on a kernel that computes all of it: sdpa has no soft cap."""
    return model(family, "eager" if family == "gemma2" else "sdpa", seed)


def save(folder: Path, family: str = "llama", seed: int = 0) -> None:
    """Writes a tiny model and its tokenizer to a folder."""
    model(family, seed=seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def sharp(
    config: PretrainedConfig, kernel: str = "sdpa", seed: int = 0, embed_std: float = 1.0
) -> PreTrainedModel:
    """A random model in float32 whose attention is sharp enough for errors to show."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tiny = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=kernel)
        for name, weight in tiny.named_parameters():
            if weight.ndim == 1:  # biases and norms, so that a missed one shows
                weight.data += 0.2 * torch.randn_like(weight)
            elif "embed" not in name:
                fan_in = weight.shape[0 if ".c_" in name else -1]  # GPT-2's are transposed
                torch.nn.init.normal_(weight, std=1.4 / fan_in**0.5)
            else:
                torch.nn.init.normal_(weight, std=embed_std)
    tiny.generation_config.pad_token_id = 1
    return tiny.eval().requires_grad_(False)


def vision_model(kernel: str = "sdpa") -> PreTrainedModel:
    """A tiny model of images and text, whose text is read by the family "gemma3"."""
    vision = {
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    config = Gemma3Config(
        text_config=CONFIGS["gemma3"].to_dict(),
        vision_config=vision,
        mm_tokens_per_image=1,
        image_token_index=300,
        boi_token_index=301,
        eoi_token_index=302,
        tie_word_embeddings=False,
        pad_token_id=1,
    )
    return sharp(config, kernel, embed_std=0.4)


def pids(
    of: PreTrainedModel, layers: tuple[int, ...] = (3, 4), rank: int = 3, seed: int = 1
) -> PIDs:
    """Random orthonormal directions for a model."""
    dims, generator = dims_of(of), torch.Generator().manual_seed(seed)

    def columns(width: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(len(layers), width, rank, generator=generator)).Q

    query, key = columns(dims.n_heads * dims.head_dim), columns(dims.n_kv_heads * dims.head_dim)
    ones = [torch.ones(len(layers), rank) for _ in range(4)]
    return PIDs(layers, query, key, *ones, "pca")


def routing(
    of: PreTrainedModel, batch: int, n_layers: int = 2, rank: int = 3, seed: int = 2
) -> Routing:
    """A random routing that is far from neutral."""
    generator = torch.Generator().manual_seed(seed)
    alpha = torch.rand(batch, n_layers, rank, generator=generator) * 2 - 1
    return Routing(alpha, torch.rand(batch, n_layers, dims_of(of).n_heads, generator=generator))


def prompts(
    lengths: tuple[int, ...] = (11, 5, 17), side: str = "left", seed: int = 3
) -> dict[str, torch.Tensor]:
    """Random prompts of mixed lengths, padded on one side, with mask and explicit position ids."""
    generator, longest = torch.Generator().manual_seed(seed), max(lengths)
    input_ids = torch.ones(len(lengths), longest, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, length in enumerate(lengths):
        where = slice(longest - length, longest) if side == "left" else slice(0, length)
        input_ids[row, where] = torch.randint(2, VOCAB, (length,), generator=generator)
        mask[row, where] = 1
    return {
        "input_ids": input_ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp_min(0),
    }


_WORDS = (
    "good bad film plot joy dull sharp weak actors scene of the a and moving boring "
    "ball goal match team vote"
)


def task(name: str = "toy", n_train: int = 40, n_test: int = 12) -> Task:
    """A task of two classes in the catalogue's style."""
    spec = TaskSpec(name, "in-domain", "Review: {text}\nSentiment:", ("negative", "positive"))
    words, generator = _WORDS.split(), torch.Generator().manual_seed(len(name))

    def example(number: int) -> Example:
        picked = torch.randint(len(words), (5,), generator=generator).tolist()
        label = number % 2
        text = f"{('dull', 'joy')[label]} {' '.join(words[i] for i in picked)} {number}"
        return Example({"text": text}, (), label)

    rows = [example(number) for number in range(n_train + n_test + 6)]
    return Task(spec, tuple(rows[:n_train]), tuple(rows[n_train:-6]), tuple(rows[-6:]))


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the toy task, whose ids fit the tiny models."""
    toy = task()
    texts = [f"{toy.prompt(e)} {toy.answer(e)}\n" for e in toy.train]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, vocab_size=VOCAB, show_progress=False, special_tokens=["<eos>", "<pad>"]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )


def encoder_folder(folder: Path) -> Path:
    """A random sentence encoder in the layout of sentence-transformers, 12 features wide."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizer

    bert = folder / "bert"
    bert.mkdir(parents=True)
    letters = list("abcdefghijklmnopqrstuvwxyz0123456789.:,")
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *letters,
        *(f"##{letter}" for letter in letters),
    ]
    BertTokenizer(vocab={word: number for number, word in enumerate(vocabulary)}).save_pretrained(
        bert
    )
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=14,
        max_position_embeddings=512,
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        BertModel(config).save_pretrained(bert)
    words = Transformer(str(bert))
    SentenceTransformer(modules=[words, Pooling(12)], device="cpu").save(str(folder / "encoder"))
    return folder / "encoder"
