"""Text encoders: captions → context [B, L, D] and mask bool [B, L], True = a real token.

`CharacterEncoder` is small and is trained together with the diffusion network. It needs no
tokenizer, because a Chinese character already carries meaning: each character is a token. An
embedding table and a small transformer (Vaswani et al. 2017) encode them, so that 豆 in 土豆
(potato) and 豆 in 豆腐 (tofu) get different embeddings. The empty caption consists of the start
token alone.

The attribute `uncond` of an encoder is the caption that stands for no caption, here "". Training
puts it in place of dropped captions, and classifier-free guidance uses its context as the
unconditional one. An encoder of class labels would have a label of its own for it.

`CnClipEncoder` is the text tower of Chinese CLIP (Yang et al. 2022), which was trained on hundreds
of millions of images with captions. It is large and usually stays frozen.

The file needs torch, safetensors and, beside it, weights_io.py. `CnClipEncoder` also needs the
package cn_clip.

>>> encoder = CharacterEncoder("番茄炒鸡蛋土豆汤", dim=64)
>>> context, mask = encoder(["番茄炒鸡蛋", "土豆汤", ""])
>>> tuple(context.shape), mask.sum(dim=1).tolist()
((3, 6, 64), [6, 4, 1])
"""

import contextlib
import hashlib
import io
import re
import warnings
from pathlib import Path

import torch
from torch import nn

from .weights_io import read_tensors


class CharacterEncoder(nn.Module):
    """Captions → context [B, L, dim] and mask bool [B, L].

    L is the length of the longest caption in the call, plus one for the start token.

    characters: all characters that the encoder knows, in any order. Others are encoded as the
        unknown token, and a warning names each of them once.
    dim: D, a multiple of the number of heads.
    max_length: longest L. A caption of more than max_length - 1 characters raises ValueError.

    The attribute `settings` is the dict of these arguments: `CharacterEncoder(**settings)` builds
    the encoder again.
    """

    PADDING = 0
    START = 1
    UNKNOWN = 2

    uncond = ""  # the unconditional caption

    def __init__(
        self,
        characters: str,
        dim: int = 128,
        layers: int = 2,
        heads: int = 4,
        max_length: int = 32,
    ):
        super().__init__()
        self.characters = "".join(sorted(set(characters)))
        self.settings = dict(
            characters=self.characters, dim=dim, layers=layers, heads=heads, max_length=max_length
        )
        self.dim = dim
        self.max_length = max_length
        self.index = {character: i + 3 for i, character in enumerate(self.characters)}
        self.warned = set()  # unknown characters that a warning has named
        self.embedding = nn.Embedding(len(self.index) + 3, dim)
        self.position = nn.Parameter(torch.randn(max_length, dim) * 0.02)
        layer = nn.TransformerEncoderLayer(
            dim, heads, 4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(dim)

    def with_characters(self, characters: str) -> "CharacterEncoder":
        """Return a copy that also knows these characters; all that it knew is encoded as before."""
        settings = self.settings | {"characters": self.characters + characters}
        larger = CharacterEncoder(**settings)
        state = self.state_dict()
        embedding = larger.embedding.weight.detach().to(self.position)  # [characters + 3, dim]
        embedding[:3] = state["embedding.weight"][:3]  # padding, start token, unknown token
        for character, row in self.index.items():
            embedding[larger.index[character]] = state["embedding.weight"][row]
        larger.load_state_dict(state | {"embedding.weight": embedding})
        return larger.to(self.position)

    def tokenize(self, captions: list[str]) -> torch.Tensor:
        """Token ids, int64 [B, L] on the CPU: start token, one token a character, padding."""
        check_captions(captions)
        longest = max(captions, key=len)
        if len(longest) >= self.max_length:
            raise ValueError(
                f"a caption has at most {self.max_length - 1} characters; "
                f"{longest!r} has {len(longest)}"
            )
        self.warn_of_unknown(captions)
        rows = []
        for caption in captions:
            ids = [self.index.get(character, self.UNKNOWN) for character in caption]
            padding = [self.PADDING] * (len(longest) - len(caption))
            rows.append([self.START, *ids, *padding])
        return torch.tensor(rows)

    def warn_of_unknown(self, captions: list[str]) -> None:
        """Warn of the characters of these captions that are unknown and were not named before."""
        unknown = set("".join(captions)) - self.index.keys() - self.warned
        if unknown:
            self.warned |= unknown
            names = "、".join(sorted(unknown))
            warnings.warn(
                f"this encoder does not know the characters {names}: all are encoded alike",
                stacklevel=4,
            )

    def forward(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.tokenize(captions)  # [B, L]
        return self.encode(tokens.to(self.position.device, non_blocking=True))

    def encode(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Context [B, L, dim] and mask bool [B, L] of token ids int64 [B, L], on their device."""
        mask = tokens != self.PADDING  # [B, L]
        context = self.embedding(tokens) + self.position[: tokens.shape[1]]  # [B, L, dim]
        context = self.transformer(context, src_key_padding_mask=~mask)  # [B, L, dim]
        return self.norm(context), mask


class CnClipEncoder(nn.Module):
    """Captions → context [B, 52, dim] of Chinese CLIP's text tower and its mask bool [B, 52].

    source: one of
        a checkpoint file as cn_clip publishes or saves it, also after fine-tuning;
        a folder that holds one such file, or to which transformers' ChineseCLIPModel was saved;
        a name that cn_clip knows and downloads, such as "ViT-B-16".
    frozen: if True, the encoder has no gradients and stays in eval mode, so that the same caption
        always has the same context.

    The attribute `dim` is D, 768 for ViT-B-16. Captions are cut after 50 tokens. Raises
    FileNotFoundError, or ValueError for a damaged file or one that is not of Chinese CLIP.
    (Yang et al., "Chinese CLIP: Contrastive Vision-Language Pretraining in Chinese", 2022.)
    """

    LENGTH = 52

    uncond = ""  # the unconditional caption

    def __init__(self, source, frozen: bool = True):
        super().__init__()
        from cn_clip.clip import available_models

        if str(source) in available_models() and not Path(source).exists():
            state = _download_cn_clip(str(source))
        else:
            state = _read_cn_clip(Path(source))
        self.bert, self.text_projection = _build_text_tower(state, source)
        self.dim = self.bert.config.hidden_size
        self.frozen = frozen
        self.requires_grad_(not frozen).eval()

    def train(self, mode: bool = True):
        return super().train(mode and not self.frozen)

    def tokenize(self, captions: list[str]) -> torch.Tensor:
        """Token ids, int64 [B, 52]: [CLS], the tokens of the caption, [SEP], then zeros."""
        from cn_clip.clip import tokenize

        check_captions(captions)
        return tokenize(captions, self.LENGTH).to(self.text_projection.device)

    def forward(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.tokenize(captions)  # [B, 52]
        mask = tokens != 0  # [B, 52]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            attention_mask = mask.to(self.text_projection.dtype)
            context = self.bert(tokens, attention_mask=attention_mask)[0]  # [B, 52, dim]
        return context, mask

    def pooled(self, context: torch.Tensor) -> torch.Tensor:
        """One vector a caption, in the space that Chinese CLIP shares with images.

        Context [B, 52, dim] → [B, 512] for ViT-B-16. It is not normalised.
        """
        return context[:, 0] @ self.text_projection

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change when any weight changes."""
        digest = hashlib.blake2b(digest_size=8)
        for name, tensor in self.state_dict().items():
            content = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
            digest.update(name.encode() + content)
        return digest.hexdigest()


def check_captions(captions) -> None:
    """Raise TypeError for a single str, which would be taken for a list of characters, and for
    captions that are not str, such as labels."""
    if isinstance(captions, str):
        raise TypeError(f"captions is a list of str: [{captions!r}], not {captions!r}")
    for caption in captions:
        if not isinstance(caption, str):
            raise TypeError(
                f"a caption must be a str, not {caption!r}; labels need an encoder of their own, "
                "such as an nn.Embedding"
            )


def _download_cn_clip(name):
    """All tensors of a published model, downloaded and loaded by cn_clip."""
    from cn_clip.clip import load_from_name

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # cn_clip prints its configuration
            model, _ = load_from_name(name, device="cpu")
    except Exception as error:
        raise RuntimeError(
            f"cn_clip could not download or load {name}; "
            f"give the path to a checkpoint of it instead: {error}"
        ) from error
    return model.state_dict()


def _read_cn_clip(path):
    """All tensors of a checkpoint, by cn_clip's names.

    They are `bert.…` and `text_projection` [dim, joint_dim] of the text tower, and, if the
    checkpoint has one, those of the vision tower.
    """
    if path.is_dir():
        path = _find_cn_clip(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no Chinese CLIP at {path}: it is neither a file nor a folder nor a name of cn_clip"
        )
    tensors = read_tensors(path)
    state = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    if "text_projection.weight" in state:
        # The names of transformers, whose projection is transposed
        state = {re.sub(r"^text_model\.", "bert.", name): tensor for name, tensor in state.items()}
        state["text_projection"] = state.pop("text_projection.weight").T
        return state
    # cn_clip rounds its weights to half precision when it loads them
    return {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }


def _find_cn_clip(folder):
    """The checkpoint in a folder; FileNotFoundError if there is none or the choice is unclear."""
    files = [
        *folder.glob("model.safetensors"),
        *folder.glob("pytorch_model.bin"),
        *folder.glob("*.pt"),
    ]
    if not files or (files[0].suffix == ".pt" and len(files) > 1):
        raise FileNotFoundError(
            f"{folder} must hold a model.safetensors, a pytorch_model.bin or exactly one .pt file; "
            f"it holds {', '.join(file.name for file in files) or 'none'}"
        )
    return files[0]


def _build_text_tower(state, source):
    """cn_clip's BertModel with the weights of `state` in float32, and the text projection."""
    from cn_clip.clip.configuration_bert import BertConfig
    from cn_clip.clip.modeling_bert import BertModel

    word_embeddings = state.get("bert.embeddings.word_embeddings.weight")
    if word_embeddings is None or "text_projection" not in state:
        raise ValueError(
            f"{source} is no Chinese CLIP: bert.embeddings.word_embeddings.weight or "
            f"text_projection is missing; it has {len(state)} other tensors, "
            f"such as {', '.join(list(state)[:3]) or 'none'}"
        )

    state = split_attention(state)

    # The sizes of the tower follow from the tensors
    vocabulary, dim = word_embeddings.shape
    layers = {name.split(".")[3] for name in state if name.startswith("bert.encoder.layer.")}
    bert = BertModel(
        BertConfig(
            vocab_size_or_config_json_file=vocabulary,
            hidden_size=dim,
            num_hidden_layers=len(layers),
            num_attention_heads=dim // 64,
            intermediate_size=4 * dim,
            layer_norm_eps=1e-12,
            hidden_act="gelu",
        )
    )

    # The pooler is not used; position_ids are a constant
    weights = {
        name.removeprefix("bert."): tensor.float()
        for name, tensor in state.items()
        if name.startswith("bert.")
        and "pooler" not in name
        and not name.endswith("position_ids")
    }
    mismatches = _list_mismatches(bert.state_dict(), weights)
    if mismatches:
        raise ValueError(
            f"{source} is not a text tower of Chinese CLIP:\n  " + "\n  ".join(sorted(mismatches))
        )
    bert.load_state_dict(weights, strict=False)
    return bert, nn.Parameter(state["text_projection"].float())


def split_attention(state: dict) -> dict:
    """Split each tensor `Wqkv`, of a training with flash attention, into query, key and value."""
    result = {}
    for name, tensor in state.items():
        if name.startswith("bert.") and ".Wqkv." in name:
            for part, values in zip(("query", "key", "value"), tensor.chunk(3)):
                result[name.replace("Wqkv", part)] = values
        else:
            result[name] = tensor
    return result


def _list_mismatches(expected, weights):
    """One line for each tensor that is missing, unknown or of the wrong shape."""
    missing = expected.keys() - weights.keys()
    unknown = weights.keys() - expected.keys()
    lines = [f"missing: bert.{name}" for name in missing if not name.endswith("position_ids")]
    lines += [f"unknown: bert.{name}" for name in unknown]
    for name in expected.keys() & weights.keys():
        shape = tuple(weights[name].shape)
        expected_shape = tuple(expected[name].shape)
        if shape != expected_shape:
            lines.append(f"shape of bert.{name}: {shape}, not {expected_shape}")
    return lines
